"""`agentscope-rocketmq dev`: a local RocketMQ until Ctrl-C."""

from __future__ import annotations

import enum
import json
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path  # noqa: TC003  (Typer reads annotations at run time)
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Engine", "dev"]

_CHECK_INTERVAL = 0.5
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Engine(enum.StrEnum):
    """What to run."""

    APACHE = "apache"


class _Stop(Exception):  # noqa: N818  (it is no error)
    """A signal asked for the end."""


def dev(
    engine: Annotated[
        Engine, typer.Option(help="apache: a real Apache RocketMQ; needs Java and Maven.")
    ] = Engine.APACHE,
    port: Annotated[
        int, typer.Option(help="Port of the gRPC endpoint; 0 chooses a free one.", min=0, max=65535)
    ] = 8081,
    data: Annotated[
        Path | None, typer.Option(help="Folder to keep messages in; without it they are gone at the end.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON when it is ready.")] = False,
) -> None:
    """Run a local RocketMQ until Ctrl-C."""
    from agentscope_rocketmq.dev.apache import ApacheRocketMQ  # noqa: PLC0415  (loads gRPC)

    with _signals_stop():
        broker = ApacheRocketMQ(port=port, data=data, on_progress=lambda line: print(line, file=sys.stderr, flush=True))
        with broker:
            _announce(engine, broker.endpoint, broker.namesrv, as_json=as_json)
            while True:
                time.sleep(_CHECK_INTERVAL)
                broker.check()


def _announce(engine: Engine, endpoint: str, namesrv: str, *, as_json: bool) -> None:
    environment = {"ROCKETMQ_ENDPOINT": endpoint, "ROCKETMQ_NAMESRV": namesrv}
    if as_json:
        lines = [json.dumps({"engine": engine, "endpoint": endpoint, "namesrv": namesrv, "environment": environment})]
    else:
        lines = [
            f"RocketMQ is ready: endpoint {endpoint}, name server {namesrv}. Ctrl-C stops it. For development only: it "
            "listens on every address of this machine and asks for no credentials.",
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
