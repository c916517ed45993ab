"""A backlog thrown at one worker: how many it has at once, what its memory does, and how urgent requests fare.

    scripts/bench backlog [--engine embedded|apache|HOST:PORT] [--calls 1000] [--urgent 50] [--concurrency 4]

The requests are sent while no worker runs, for `--away` seconds; the urgent ones last. Exits non-zero when one was not
answered, more ran at once than there are places, the urgent ones were not done before 80 % of the others, or the
worker's memory grew by more than 20 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
import uuid
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskUpdater
from a2a.types import Part, Task, TaskState, TaskStatus
from rich.console import Console
from rich.table import Table

from agentscope_rocketmq import A2AServer, RocketMQConfig
from agentscope_rocketmq.config import Limits
from agentscope_rocketmq.envelope import BATCH_HEADER, RequestEnvelope, ResponseEnvelope
from agentscope_rocketmq.priority import PRIORITY_EXTENSION
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from benchmarks.agent import card as plain_card
from benchmarks.chaos.processes import Book
from benchmarks.engine import APACHE, EMBEDDED, provisioned

if TYPE_CHECKING:
    from a2a.server.agent_execution import RequestContext
    from a2a.server.events import EventQueue

MOST_GROWTH = 20 * 1024 * 1024
SESSION = "backlog"
WARM = 50  # requests after which the worker's memory is compared


class Worker(AgentExecutor):
    """Works for a moment; notes when."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._at_once = 0

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        self._at_once += 1
        submitted = TaskStatus(state=TaskState.TASK_STATE_SUBMITTED)
        await event_queue.enqueue_event(Task(id=context.task_id, context_id=context.context_id, status=submitted))
        await asyncio.sleep(0.01)
        updater = TaskUpdater(event_queue, str(context.task_id), str(context.context_id))
        await updater.add_artifact([Part(text="done")], artifact_id="a")
        self._book.note(done=context.get_user_input(), at_once=self._at_once, memory=memory())
        self._at_once -= 1
        await updater.complete()

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        raise NotImplementedError("A run is over before it could be cancelled.")


def memory() -> int:
    """Resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def tiered_card(endpoint: str, topic: str) -> dict[str, Any]:
    """A card whose agent has an urgent tier."""
    extension = {"uri": PRIORITY_EXTENSION, "params": {"high": f"{topic}-high"}}
    return plain_card(endpoint, topic) | {"capabilities": {"streaming": True, "extensions": [extension]}}


async def work(config: str, card: str, book: str) -> None:
    settings = RocketMQConfig.model_validate_json(config)
    server = A2AServer.from_executor(Worker(Book(Path(book))), card=json.loads(card), config=settings)
    await server.serve(port=0)


def envelope(config: RocketMQConfig, topic: str, text: str) -> bytes:
    """A request that is answered in one message."""
    message = {"messageId": uuid.uuid4().hex, "role": "ROLE_USER", "parts": [{"text": text}]}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "SendMessage", "params": {"message": message}})
    return RequestEnvelope(
        request_id=uuid.uuid4().hex,
        body=body,
        headers={BATCH_HEADER: "1", "A2A-Version": "1.0"},
        dest_topic=topic,
        reply_topic=config.reply_topic,
        lite_topic=SESSION,
    ).encode()


async def _answers(consumer: LiteConsumer, wanted: int) -> int:
    answered = 0
    async for batch in consumer.batches():
        if isinstance(batch, LiteBatch):
            answered += sum(ResponseEnvelope.decode(message.body()).end for message in batch.messages)
            await consumer.ack(batch.messages)
        if answered >= wanted:
            break
    return answered


async def measure(options: argparse.Namespace) -> int:
    async with contextlib.AsyncExitStack() as stack:
        config, card = await stack.enter_async_context(provisioned(options.engine, tiered_card))
        folder = Path(stack.enter_context(TemporaryDirectory()))
        topic = card["supportedInterfaces"][0]["url"].rpartition("/")[2]
        connection = await stack.enter_async_context(Connection(config.endpoint))
        producer = await stack.enter_async_context(Producer(connection))
        consumer = await stack.enter_async_context(LiteConsumer(connection, config.reply_topic, config.reply_group))
        await consumer.subscribe([SESSION])
        begun = time.monotonic()
        for number in range(options.calls):
            await producer.send(Message(topic=topic, body=envelope(config, topic, f"normal {number}")))
        for number in range(options.urgent):
            await producer.send(Message(topic=f"{topic}-high", body=envelope(config, topic, f"high {number}")))
        await asyncio.sleep(max(0.0, options.away - (time.monotonic() - begun)))
        limited = config.model_copy(update={"limits": Limits(concurrency=options.concurrency)})
        command = [sys.executable, "-m", "benchmarks.backlog", "--work", limited.model_dump_json(exclude_defaults=True)]
        worker = subprocess.Popen([*command, json.dumps(card), str(folder / "book")])  # noqa: ASYNC220, S603
        stack.callback(worker.wait)
        stack.callback(worker.kill)
        started = time.monotonic()
        async with asyncio.timeout(1800):
            answered = await _answers(consumer, options.calls + options.urgent)
        seconds = time.monotonic() - started
        lines = [json.loads(line) for line in (folder / "book").read_text(encoding="utf-8").splitlines()]
    return report(lines, answered=answered, seconds=seconds, options=options)


def report(lines: list[dict[str, Any]], *, answered: int, seconds: float, options: argparse.Namespace) -> int:
    """Print the table; whether anything is not as it must be."""
    done = [line["done"] for line in lines]
    last_urgent = max((place for place, text in enumerate(done) if text.startswith("high")), default=0)
    before = sum(text.startswith("normal") for text in done[:last_urgent])
    warm = [line["memory"] for line in lines[min(WARM, len(lines) - 1) :]]
    growth = max(warm) - warm[0]
    at_once = max(line["at_once"] for line in lines)
    table = Table("what", "number")
    for name, figure in (
        ("requests, and urgent ones sent last", f"{options.calls} + {options.urgent}"),
        ("seconds that they lay on the broker at least", options.away),
        ("answered", answered),
        ("executed", len(done)),
        ("most at once", f"{at_once} (places: {options.concurrency})"),
        ("normal ones done before the last urgent one", f"{before} ({before / options.calls:.0%})"),
        ("growth of the worker's memory, MB", f"{growth / 1e6:.1f}"),
        ("seconds from the worker's start", f"{seconds:.0f}"),
    ):
        table.add_row(name, str(figure))
    Console().print(table)
    wanted = options.calls + options.urgent
    right = (
        answered == wanted == len(set(done)) == len(done),
        at_once <= options.concurrency,
        before < 0.8 * options.calls,
        growth <= MOST_GROWTH,
    )
    return int(not all(right))


def main() -> int:
    if sys.argv[1:2] == ["--work"]:
        asyncio.run(work(*sys.argv[2:]))
        return 0
    parser = argparse.ArgumentParser(prog="scripts/bench backlog", description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--engine", default=APACHE, metavar=f"{EMBEDDED}|{APACHE}|HOST:PORT")
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--urgent", type=int, default=50)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--away", type=float, default=60.0, help="seconds without a worker")
    return asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
