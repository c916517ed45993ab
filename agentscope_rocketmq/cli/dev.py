"""`agentscope-rocketmq dev`: a local RocketMQ until Ctrl-C."""

from __future__ import annotations

import enum
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path  # noqa: TC003  (Typer reads annotations at run time)
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentscope_rocketmq.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Engine", "dev"]

_CHECK_INTERVAL = 0.5
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_EMBEDDED_ONLY = "Only with the embedded engine"


class Engine(enum.StrEnum):
    """What to run."""

    EMBEDDED = "embedded"
    APACHE = "apache"


class _Stop(Exception):  # noqa: N818  (it is no error)
    """A signal asked for the end."""


def dev(
    engine: Annotated[
        Engine,
        typer.Option(
            help="embedded: RocketMQ's protocol in this process, without Java. apache: a real Apache RocketMQ; needs "
            "Java and Maven."
        ),
    ] = Engine.EMBEDDED,
    port: Annotated[
        int, typer.Option(help="Port of the gRPC endpoint; 0 chooses a free one.", min=0, max=65535)
    ] = 8081,
    namesrv_port: Annotated[
        int, typer.Option(help="Port of the name server; 0 chooses a free one.", min=0, max=65535)
    ] = 0,
    data: Annotated[
        Path | None, typer.Option(help="Folder to keep messages in; without it they are gone at the end.")
    ] = None,
    fsync: Annotated[
        bool | None,
        typer.Option(
            "--fsync/--no-fsync",
            help="With --data: what is acknowledged is on the disk (the default). --no-fsync is faster; it survives "
            "kill -9 of this process, not the death of the machine.",
            rich_help_panel=_EMBEDDED_ONLY,
            show_default=False,
        ),
    ] = None,
    strict: Annotated[
        bool | None,
        typer.Option(
            "--strict",
            help="Topics and groups must be provisioned, as on a production cluster; otherwise first use makes them.",
            rich_help_panel=_EMBEDDED_ONLY,
        ),
    ] = None,
    max_body_bytes: Annotated[
        int | None,
        typer.Option(
            help="Largest body of a message.", min=1, rich_help_panel=_EMBEDDED_ONLY, show_default="4 MiB, as RocketMQ"
        ),
    ] = None,
    max_lite_topic_length: Annotated[
        int | None,
        typer.Option(
            help="Longest name of a LiteTopic.", min=1, rich_help_panel=_EMBEDDED_ONLY, show_default="64, as RocketMQ"
        ),
    ] = None,
    lite_quota: Annotated[
        int | None,
        typer.Option(
            help="LiteTopics that one client may subscribe, for groups that first use makes.",
            min=1,
            rich_help_panel=_EMBEDDED_ONLY,
            show_default="20000",
        ),
    ] = None,
    retention: Annotated[
        float | None,
        typer.Option(
            help="Hours after which messages are deleted.",
            min=0.001,
            rich_help_panel=_EMBEDDED_ONLY,
            show_default="72, as RocketMQ",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON when it is ready.")] = False,
) -> None:
    """Run a local RocketMQ until Ctrl-C."""
    limits = {
        "fsync": fsync,
        "strict": strict,
        "max_body_bytes": max_body_bytes,
        "max_lite_topic_length": max_lite_topic_length,
        "lite_quota": lite_quota,
        "retention": None if retention is None else retention * 3600,
    }
    chosen = {name: value for name, value in limits.items() if value is not None}
    with _signals_stop():
        if engine is Engine.EMBEDDED:
            _run_embedded(port, namesrv_port, data, chosen, as_json=as_json)
        elif chosen:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in chosen)
            raise ConfigurationError(f"{names}: only the embedded engine has that. Leave it out, or --engine.")
        else:
            _run_apache(port, namesrv_port, data, as_json=as_json)


def _run_embedded(port: int, namesrv_port: int, data: Path | None, chosen: dict[str, Any], *, as_json: bool) -> None:
    # gRPC's C core writes lines of its own to stderr, about a port that is taken for one: what they say is said here.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from agentscope_rocketmq.dev.embedded.run import run_embedded  # noqa: PLC0415  (loads gRPC)
    from agentscope_rocketmq.dev.embedded.settings import Settings  # noqa: PLC0415

    made = "must be provisioned" if chosen.get("strict") else "are made by their first use"
    kept = f"in {data}" if data is not None else "in memory"
    run_embedded(
        port,
        data,
        namesrv_port=namesrv_port,
        settings=Settings(**chosen),
        on_ready=lambda broker: _announce(
            Engine.EMBEDDED,
            broker.endpoint,
            broker.namesrv,
            f"Messages are kept {kept}; topics and groups {made}. For development only: it listens on this machine "
            "alone, and asks for no credentials.",
            as_json=as_json,
        ),
    )


def _run_apache(port: int, namesrv_port: int, data: Path | None, *, as_json: bool) -> None:
    from agentscope_rocketmq.dev.apache import ApacheRocketMQ  # noqa: PLC0415  (loads gRPC)

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with ApacheRocketMQ(port=port, namesrv_port=namesrv_port, data=data, on_progress=progress) as broker:
        _announce(
            Engine.APACHE,
            broker.endpoint,
            broker.namesrv,
            "For development only: it listens on every address of this machine and asks for no credentials.",
            as_json=as_json,
        )
        while True:
            time.sleep(_CHECK_INTERVAL)
            broker.check()


def _announce(engine: Engine, endpoint: str, namesrv: str, habits: str, *, as_json: bool) -> None:
    environment = {"ROCKETMQ_ENDPOINT": endpoint, "ROCKETMQ_NAMESRV": namesrv}
    if as_json:
        lines = [json.dumps({"engine": engine, "endpoint": endpoint, "namesrv": namesrv, "environment": environment})]
    else:
        lines = [
            f"RocketMQ is ready: endpoint {endpoint}, name server {namesrv}. Ctrl-C stops it. {habits}",
            "In the shell of your agents:",
            *(f"  export {name}={value}" for name, value in environment.items()),
        ]
    print("\n".join(lines), flush=True)


@contextmanager
def _signals_stop() -> Iterator[None]:
    """Leave the block without an error at the first SIGINT, SIGTERM or SIGHUP; further ones change nothing."""
    stopping = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            raise _Stop

    previous = {number: signal.signal(number, stop) for number in _STOP_SIGNALS}
    try:
        yield
    except _Stop:
        pass
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
