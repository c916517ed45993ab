"""`agentscope-rocketmq gateway` and `token`: A2A over HTTP in front of agents on RocketMQ, and who may use it."""

from __future__ import annotations

import asyncio
import enum
import logging
import re
from pathlib import Path  # noqa: TC003  (Typer reads annotations at run time)
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from agentscope_rocketmq.config import RocketMQConfig

__all__ = ["Auth", "gateway", "token"]

_NAMED = re.compile(r"([a-z0-9-]+)=(.+)", re.DOTALL)


class Auth(enum.StrEnum):
    """Who may use a gateway."""

    NONE = "none"
    TOKEN = "token"  # noqa: S105  (the name of a way)


def gateway(
    agent: Annotated[
        list[str], typer.Option(help="URL or card file of an agent, or NAME=that; may be repeated.", show_default=False)
    ],
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 chooses a free one.", min=0, max=65535)] = 8000,
    auth: Annotated[
        Auth, typer.Option(help="token: bearer tokens of the command `token`. none: everybody, as one owner.")
    ] = Auth.NONE,
    public_url: Annotated[
        str | None, typer.Option(help="URL at which clients reach this gateway; without it each request's own.")
    ] = None,
    card_cache: Annotated[
        Path | None, typer.Option(help="Folder for fetched cards; without it the user's cache folder.")
    ] = None,
) -> None:
    """Serve A2A over HTTP and server-sent events in front of agents on RocketMQ, until Ctrl-C."""
    from agentscope_rocketmq.config import RocketMQConfig  # noqa: PLC0415
    from agentscope_rocketmq.fetch import default_cache  # noqa: PLC0415
    from agentscope_rocketmq.gateway import create_gateway  # noqa: PLC0415  (loads gRPC and the a2a-sdk)
    from agentscope_rocketmq.owners import TokenVerifier  # noqa: PLC0415

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    config = RocketMQConfig.from_env()
    served = create_gateway(
        config,
        _sources(agent),
        verify=TokenVerifier(_secret(config)) if auth is Auth.TOKEN else None,
        public_url=public_url,
        card_cache=card_cache or default_cache(),
    )
    asyncio.run(served.serve(host=host, port=port))


def token(
    owner: Annotated[str, typer.Argument(help="Name of the owner.", show_default=False)],
    hours: Annotated[float, typer.Option(help="How long it is good.")] = 24.0,
) -> None:
    """Print a bearer token for an owner, good for gateways with the same ROCKETMQ_A2A_SECRET."""
    from agentscope_rocketmq.config import RocketMQConfig  # noqa: PLC0415
    from agentscope_rocketmq.owners import make_token  # noqa: PLC0415

    print(make_token(owner, secret=_secret(RocketMQConfig.from_env()), lifetime=hours * 3600))


def _secret(config: RocketMQConfig) -> str:
    from agentscope_rocketmq.errors import ConfigurationError  # noqa: PLC0415

    if config.a2a_secret is None:
        raise ConfigurationError("Tokens need a secret: set ROCKETMQ_A2A_SECRET to a long random text.")
    return config.a2a_secret.get_secret_value()


def _sources(agents: list[str]) -> Any:
    """A list of sources, or, where any is named, all by name."""
    from agentscope_rocketmq.errors import ConfigurationError  # noqa: PLC0415

    named = [match for match in map(_NAMED.fullmatch, agents) if match is not None]
    if not named:
        return agents
    if len(named) != len(agents) or len({match[1] for match in named}) != len(named):
        raise ConfigurationError("Name all agents or none, each another name: --agent NAME=SOURCE.")
    return {match[1]: match[2] for match in named}
