"""`agentscope-rocketmq dead-letters`: requests that no worker could serve."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agentscope_rocketmq.deadletters import DeadLetter, DeadLetters

__all__ = ["dead_letters"]

dead_letters = typer.Typer(help="Look at requests that no worker could serve; try them again.", no_args_is_help=True)

_Topic = Annotated[str, typer.Argument(help="The agent's topic.", show_default=False)]
_Id = Annotated[int, typer.Argument(help="Id of the letter, as `list` shows it.", show_default=False)]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dead_letters.command("list")
def list_letters(topic: _Topic, as_json: _Json = False) -> None:
    """Show the dead letters of a topic, the oldest first."""
    letters = _with(topic, lambda box: box.list())
    if as_json:
        print(json.dumps([_as_dict(letter) for letter in letters]))
        return
    from rich.console import Console  # noqa: PLC0415  (imports stay inside: see the package)
    from rich.table import Table  # noqa: PLC0415

    table = Table("id", "given up", "attempts", "request", "reason", "retried")
    for letter in letters:
        request = letter.request
        name = "(none)" if request is None else request.request_id
        when = letter.time.isoformat(timespec="seconds")
        retried = "yes" if letter.retried else ""
        table.add_row(str(letter.id), when, str(letter.attempts), name, letter.reason, retried)
    Console().print(table)


@dead_letters.command()
def show(topic: _Topic, letter: _Id, as_json: _Json = False) -> None:
    """Show one dead letter with its message."""
    found = _with(topic, lambda box: box.find(letter))
    about = _as_dict(found) | {"message": found.body.decode("utf-8", "backslashreplace")}
    print(json.dumps(about) if as_json else "\n".join(f"{name}: {value}" for name, value in about.items()))


@dead_letters.command()
def retry(topic: _Topic, letter: _Id, as_json: _Json = False) -> None:
    """Put a dead letter back on its topic, once, as a new request."""
    request_id = _with(topic, lambda box: box.retry(letter))
    print(json.dumps({"requestId": request_id}) if as_json else f"Put back as request {request_id}.")


def _with(topic: str, use: Callable[[DeadLetters], Awaitable[Any]]) -> Any:
    import asyncio  # noqa: PLC0415

    from agentscope_rocketmq.config import RocketMQConfig  # noqa: PLC0415
    from agentscope_rocketmq.deadletters import DeadLetters  # noqa: PLC0415
    from agentscope_rocketmq.rocketmq.connection import Connection  # noqa: PLC0415
    from agentscope_rocketmq.rocketmq.lite import LiteConsumer  # noqa: PLC0415
    from agentscope_rocketmq.rocketmq.producer import Producer  # noqa: PLC0415

    config = RocketMQConfig.from_env()

    async def run() -> Any:
        connect = config.timeouts.connect
        async with (
            Connection.from_config(config) as connection,
            Producer(connection, connect_timeout=connect) as producer,
            LiteConsumer(connection, config.state_topic, config.state_group, connect_timeout=connect) as consumer,
        ):
            return await use(DeadLetters(producer, consumer, topic))

    return asyncio.run(run())


def _as_dict(letter: DeadLetter) -> dict[str, Any]:
    request = letter.request
    return {
        "id": letter.id,
        "time": letter.time.isoformat(),
        "attempts": letter.attempts,
        "topic": letter.topic,
        "messageId": letter.message_id,
        "requestId": None if request is None else request.request_id,
        "reason": letter.reason,
        "retried": letter.retried,
        "bytes": len(letter.body),
    }
