"""`agentscope-rocketmq provision`: the topics and groups that agents need."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from a2a.types import AgentCard

    from agentscope_rocketmq.provision import Applied

__all__ = ["provision"]

_USUAL_NAMESRV = "127.0.0.1:9876"


def provision(
    cards: Annotated[
        list[str] | None,
        typer.Argument(metavar="CARD", help="Agent cards: files, or base URLs of running agents."),
    ] = None,
    print_only: Annotated[
        bool, typer.Option("--print", help="Only print the mqadmin commands that would do the same.")
    ] = False,
    namesrv: Annotated[
        str | None, typer.Option(help="host:port of the name server.", envvar="ROCKETMQ_NAMESRV", show_default=False)
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Name of the cluster; needed when the name server knows several.")
    ] = None,
    retention: Annotated[
        int | None,
        typer.Option(
            help="Minutes a conversation is kept after its last message; -1: as long as the broker keeps messages.",
            show_default="4320, which is 3 days",
        ),
    ] = None,
    java_group: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GROUP", help="Also make this group of the reply topic, ordered, for callers in Java. Repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make the topics and consumer groups that agents and their callers need. Safe to repeat."""
    import asyncio  # noqa: PLC0415  (imports stay inside: see the package)

    from agentscope_rocketmq.config import RocketMQConfig  # noqa: PLC0415
    from agentscope_rocketmq.provision import (  # noqa: PLC0415
        DEFAULT_RETENTION_MINUTES,
        apply,
        mqadmin_lines,
        plan,
    )

    config = RocketMQConfig.from_env()
    minutes = DEFAULT_RETENTION_MINUTES if retention is None else retention
    agents = [_load(card) for card in cards or ()]
    wanted = plan(agents, config, retention_minutes=minutes, java_groups=java_group or ())
    if print_only:
        lines = mqadmin_lines(wanted, namesrv=namesrv or _USUAL_NAMESRV, cluster=cluster or "DefaultCluster")
        print(json.dumps(lines) if as_json else "\n".join(lines))
        return
    applied = asyncio.run(apply(wanted, config, namesrv=namesrv, cluster=cluster))
    print(json.dumps([_as_dict(line) for line in applied]) if as_json else "\n".join(map(_as_text, applied)))


def _load(card: str) -> AgentCard:
    import asyncio  # noqa: PLC0415

    from agentscope_rocketmq.card import read_card  # noqa: PLC0415
    from agentscope_rocketmq.fetch import CardFetcher  # noqa: PLC0415

    if card.startswith(("http://", "https://")):
        return asyncio.run(CardFetcher(None).fetch(card))
    return read_card(card)


def _as_dict(applied: Applied) -> dict[str, object]:
    return {
        "kind": applied.kind,
        "name": applied.name,
        "outcome": applied.outcome,
        "attributes": dict(applied.attributes),
    }


def _as_text(applied: Applied) -> str:
    attributes = " ".join(f"{key}={value}" for key, value in applied.attributes.items())
    return f"{applied.outcome:9} {applied.kind} {applied.name}  {attributes}".rstrip()
