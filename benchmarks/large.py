"""100 MB requests and answers: rate beside raw messages of 3.9 MB, memory beside the same bodies over plain HTTP.

    scripts/bench large [--engine apache|HOST:PORT] [--mb 100] [--rounds 3] [--blobs]

Caller and server are a process each. Memory is the peak of a process's resident memory above what it had before the
call; "own" is RocketMQ's less HTTP's, and so is "carried", in seconds: most of a call's time is what the a2a-sdk does
with such a body on either way. Bodies are base64 of random bytes. Exits non-zero when a body arrived changed, when
"own" is over 1.5 times the body, or when a request or an answer was carried at less than half of the raw rate; a single
event of that size is shown beside them. With `--blobs` bodies go by way of a directory that both sides share.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskUpdater
from a2a.types import Part, Task, TaskState, TaskStatus
from rich.console import Console
from rich.table import Table

from agentscope_rocketmq import A2AServer, DirectoryBlobStore, RocketMQ, RocketMQConfig
from agentscope_rocketmq.card import JSONRPC, card_to_dict, parse_card
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from benchmarks.agent import card, question
from benchmarks.engine import APACHE, provisioned

MB = 1_000_000
RAW = 3_900_000
SLOWEST = 0.5
MOST_OWN = 1.5
CARRIED = ("request", "answer")


class Memory:
    """Peak of this process's resident memory since `reset`, above what it had then."""

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        self._before = self._read("VmRSS")

    def peak(self) -> int:
        return self._read("VmHWM") - self._before

    def _read(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Answerer(AgentExecutor):
    """Answers with the hash of what came, then with as many bytes as asked for; and with what memory it took."""

    def __init__(self) -> None:
        self._memory = Memory()

    async def execute(self, context: Any, event_queue: Any) -> None:
        text = context.get_user_input()
        parts = [hashlib.sha256(text.encode()).hexdigest()]
        if text == "reset":
            self._memory.reset()
        elif text == "peak":
            parts.append(str(self._memory.peak()))
        elif text.startswith("answer "):
            parts.append(body(int(text.removeprefix("answer "))))
        status = TaskStatus(state=TaskState.TASK_STATE_SUBMITTED)
        await event_queue.enqueue_event(Task(id=context.task_id, context_id=context.context_id, status=status))
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        await updater.add_artifact([Part(text=part) for part in parts])
        await updater.complete()

    async def cancel(self, context: Any, event_queue: Any) -> None:
        raise NotImplementedError


def body(size: int) -> str:
    """The same text of that size in both processes; gzip makes three quarters of it."""
    return base64.b64encode(hashlib.shake_256(b"large").digest(size * 3 // 4 + 3)).decode()[:size]


async def _ask(client: Any, text: str) -> list[str]:
    message = question(1)
    message.message.parts[0].text = text
    async for event in client.send_message(message):
        if event.HasField("task"):
            return [part.text for artifact in event.task.artifacts for part in artifact.parts]
    raise RuntimeError("no answer")


async def _measure(client: Any, *, size: int, text: str, streaming: bool) -> tuple[float, int, int]:
    """Seconds, peak memory of the caller and of the server, of one call."""
    client._config.streaming = False
    await _ask(client, "reset")
    memory = Memory()
    expected = [hashlib.sha256(text.encode()).hexdigest()]
    memory.reset()
    begun = time.perf_counter()
    if streaming:
        client._config.streaming = True
        message = question(1)
        message.message.parts[0].text = text
        answer = []
        async for event in client.send_message(message):
            if event.HasField("artifact_update"):
                answer = [part.text for part in event.artifact_update.artifact.parts]
        client._config.streaming = False
    else:
        answer = await _ask(client, text)
    seconds = time.perf_counter() - begun
    peak = memory.peak()
    if text.startswith("answer "):
        expected.append(body(size))
    if answer != expected:
        raise SystemExit("A body arrived changed.")
    del answer, expected
    return seconds, peak, int((await _ask(client, "peak"))[1])


async def _raw(config: RocketMQConfig, size: int) -> float:
    """Seconds for so many bytes in messages of 3.9 MB, sent one after the other and received meanwhile."""
    observers = f"{config.reply_group}_OBSERVER"
    text, lite_topic = body(RAW).encode(), uuid.uuid4().hex
    messages = -(-size // RAW)
    async with (
        Connection.from_config(config) as connection,
        Producer(connection) as producer,
        LiteConsumer(connection, config.reply_topic, observers) as consumer,
    ):
        await consumer.subscribe([lite_topic])

        async def receive() -> None:
            count = 0
            async for item in consumer.batches():
                if isinstance(item, LiteBatch):
                    count += sum(message.body() == text for message in item.messages)
                    await consumer.ack(item.messages)
                if count == messages:
                    return

        begun = time.perf_counter()
        receiving = asyncio.create_task(receive())
        for _ in range(messages):
            await producer.send(Message(topic=config.reply_topic, lite_topic=lite_topic, body=text))
        await receiving
        return (time.perf_counter() - begun) * size / (messages * RAW)


async def run(options: argparse.Namespace) -> int:
    size = int(options.mb * MB)
    async with contextlib.AsyncExitStack() as stack:
        config, agent_card = await stack.enter_async_context(provisioned(options.engine, card))
        blobs = stack.enter_context(tempfile.TemporaryDirectory()) if options.blobs else None
        settings = json.dumps([config.model_dump(mode="json"), agent_card, blobs])
        server = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.large", "--serve"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(settings.encode() + b"\n")
        try:
            published = parse_card((await server.stdout.readline()).decode())
            return await _compare(_sharing(config, blobs), published, size, options.rounds)
        finally:
            server.stdin.close()
            await server.wait()


async def _compare(config: RocketMQConfig, published: Any, size: int, rounds: int) -> int:
    plain = parse_card(published)
    kept = [entry for entry in plain.supported_interfaces if entry.protocol_binding == JSONRPC]
    del plain.supported_interfaces[:]
    plain.supported_interfaces.extend(kept)
    kinds = {
        "request": (body(size), False),
        "answer": (f"answer {size}", False),
        "streamed answer": (f"answer {size}", True),
    }
    table = Table(title=f"Bodies of {size / MB:g} MB; medians of {rounds}")
    figures = ("seconds", "HTTP s", "carried", "of raw", "caller own", "server own", "caller HTTP", "server HTTP")
    for column in ("what", *figures):
        table.add_column(column, justify="left" if column == "what" else "right")
    bad = []
    raw = []
    found: dict[tuple[str, str], list[tuple[float, int, int]]] = {}
    async with RocketMQ(config, card_cache=None) as rocketmq:
        clients = {
            "RocketMQ": await rocketmq.client(published),
            "HTTP": await rocketmq.client(plain, allow_jsonrpc=True),
        }
        for _ in range(rounds):
            raw.append(await _raw(config, size))
            for kind, (text, streaming) in kinds.items():
                for way, client in clients.items():
                    once = await _measure(client, size=size, text=text, streaming=streaming)
                    found.setdefault((kind, way), []).append(once)
    raw_seconds = statistics.median(raw)
    table.add_row("raw 3.9 MB messages", f"{raw_seconds:.2f}", "", f"{raw_seconds:.2f}", "1", *[""] * 4)
    for kind in kinds:
        ours = [statistics.median(values) for values in zip(*found[kind, "RocketMQ"], strict=True)]
        http = [statistics.median(values) for values in zip(*found[kind, "HTTP"], strict=True)]
        own = [(one - other) / size for one, other in zip(ours[1:], http[1:], strict=True)]
        carried = max(ours[0] - http[0], 0.001)
        share = raw_seconds / carried
        table.add_row(
            kind,
            f"{ours[0]:.2f}",
            f"{http[0]:.2f}",
            f"{carried:.2f}",
            f"{share:.2f}",
            *(f"{times:.2f}x" for times in own),
            *(f"{peak / size:.2f}x" for peak in http[1:]),
        )
        if (share < SLOWEST and kind in CARRIED) or max(own) > MOST_OWN:
            bad.append(kind)
    Console().print(table)
    if bad:
        print(f"Not as it should be: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


def _sharing(config: RocketMQConfig, blobs: str | None) -> RocketMQConfig:
    """The configuration with a blob store in that directory; as it is without one."""
    store = None if blobs is None else DirectoryBlobStore(blobs, name="bench")
    return config.model_copy(update={"blobs": store})


async def serve() -> None:
    """The server's process: settings come on its input, its card goes out, and it serves until the input ends."""
    loop = asyncio.get_running_loop()
    settings, agent_card, blobs = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    config = _sharing(RocketMQConfig(**settings), blobs)
    async with A2AServer.from_executor(Answerer(), card=agent_card, config=config) as server:
        print(json.dumps(card_to_dict(server.card)), flush=True)
        await loop.run_in_executor(None, sys.stdin.read)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default=APACHE, metavar="apache|HOST:PORT")
    parser.add_argument("--mb", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blobs", action="store_true", help="with a blob store")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    logging.getLogger("a2a").setLevel(logging.ERROR)
    options = parser.parse_args()
    return asyncio.run(serve() if options.serve else run(options)) or 0


if __name__ == "__main__":
    sys.exit(main())
