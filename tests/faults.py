"""What faults are made with, and what shows that nothing was lost or doubled.

python -m tests.faults work CONFIG TOPIC LEDGER     a worker in a process of its own, to be killed
python -m tests.faults call CONFIG TOPIC TEXT       a caller in a process of its own, to be killed
python -m tests.faults call-in CONFIG TOPIC "SESSION TEXT"      one that calls in a session
python -m tests.faults work-bulk CONFIG TOPIC LEDGER            a worker whose answers are large
python -m tests.faults call-bulk CONFIG TOPIC "NAME MEGABYTES"  a caller whose request is large
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import itertools
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Self

from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskUpdater
from a2a.types import Part, Task, TaskState, TaskStatus

from agentscope_rocketmq import A2AServer, RocketMQ, RocketMQConfig
from agentscope_rocketmq.card import LARGE_BODIES_EXTENSION
from agentscope_rocketmq.dev.ports import Ports
from agentscope_rocketmq.rerun import RESTART_EXTENSION
from tests.services import card_for, request
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from a2a.client import Client

INTERVAL = 0.05  # seconds between two numbers of a stream


class Wire:
    """A TCP connection's way to a server, as a proxy that can be cut, reset and blackholed.

    Args:
        target: `host:port` of the server.

    Attributes:
        endpoint: `host:port` to connect to instead.
        accepted: Connections so far.
        sent: What was passed on to the server since `hold_after`.
    """

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._ports = Ports()
        self.endpoint = ""
        self.accepted = 0
        self.sent = bytearray()
        self._most: int | None = None
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._passes = asyncio.Event()
        self._passes.set()

    async def __aenter__(self) -> Self:
        self.endpoint = f"127.0.0.1:{self._ports.choose()}"
        await self.mend()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        self.pass_on()
        # A connection that was accepted just now reaches `_serve` within a few turns of the loop.
        for _turn in range(5):
            await asyncio.sleep(0)
        while self._serving:
            self.reset()
            await asyncio.wait(self._serving, timeout=0.1)
        self._ports.close()

    def reset(self) -> None:
        """End all connections with a TCP reset; new ones are accepted."""
        for writer in [writer for writer in self._writers if not writer.transport.is_closing()]:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

    def cut(self) -> None:
        """End all connections and refuse new ones."""
        if self._server is not None:
            self._server.close()
        self.reset()

    async def mend(self) -> None:
        """Accept connections again after a cut."""
        port = int(self.endpoint.rpartition(":")[2])
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)

    def blackhole(self) -> None:
        """Pass nothing on, without a word: connections stay open, new ones are accepted."""
        self._passes.clear()

    def pass_on(self) -> None:
        """End a blackhole; what was held is passed on."""
        self._passes.set()

    def hold_after(self, count: int) -> None:
        """Pass some bytes on to the server, then be a blackhole: as many as these, and what is left of a read."""
        self.sent.clear()
        self._most = count

    @property
    def holds(self) -> bool:
        """Whether nothing is passed on."""
        return not self._passes.is_set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        self._writers.add(writer)
        try:
            await self._passes.wait()
            with contextlib.suppress(OSError):
                far_reader, far_writer = await asyncio.open_connection(self._host, int(self._port))
                self._writers.add(far_writer)
                await self._pass_both_ways(reader, writer, far_reader, far_writer)
        finally:
            self._serving.discard(task)
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pass_both_ways(self, reader, writer, far_reader, far_writer):
        pumps = [
            asyncio.create_task(self._pump(reader, far_writer, to_server=True)),
            asyncio.create_task(self._pump(far_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._writers.discard(far_writer)
            far_writer.transport.abort()

    async def _pump(self, reader, writer, *, to_server=False):
        while data := await reader.read(64 * 1024):
            await self._passes.wait()
            if to_server and self._most is not None:
                self.sent += data
                if len(self.sent) >= self._most:
                    self.blackhole()
                    self._most = None
            writer.write(data)
            await writer.drain()


class Ledger:
    """What was executed, in a file that outlives its writers: lines of what happened and to which name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def note(self, what: str, name: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{what} {name}\n")

    def count(self, what: str, name: str) -> int:
        return self.path.read_text(encoding="utf-8").splitlines().count(f"{what} {name}")


class Counter(AgentExecutor):
    """Answers `NAME COUNT` with that many numbers as a stream, `NAME` with numbers until `enough[NAME]` is set.

    `NAME COUNT SECONDS` holds the interpreter's lock for that long, once, when the ledger says `hold NAME`;
    `NAME COUNT dies` kills its own process with -9 after its first number.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.enough: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        # Where there is an event here, the first number waits for it.
        self.starts: dict[str, asyncio.Event] = {}

    async def execute(self, context, event_queue):
        name, count, hold = [*context.get_user_input().split(), "", ""][:3]
        self.ledger.note("begin", name)
        await event_queue.enqueue_event(
            Task(
                id=context.task_id,
                context_id=context.context_id,
                status=TaskStatus(state=TaskState.TASK_STATE_SUBMITTED),
                history=[context.message],
            )
        )
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        if name in self.starts:
            await self.starts[name].wait()
        for number in itertools.count():
            last = number + 1 == int(count) if count else self.enough[name].is_set()
            await updater.add_artifact([Part(text=str(number))], artifact_id="a", append=number > 0, last_chunk=last)
            if last:
                break
            await asyncio.sleep(INTERVAL)
            if hold == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if hold and self.ledger.count("hold", name) > self.ledger.count("held", name):
                self.ledger.note("held", name)
                # A C call that does not let go of the GIL: nothing else of this process runs, no thread either.
                ctypes.PyDLL(None).sleep(int(hold))
        await updater.complete()
        self.ledger.note("end", name)

    async def cancel(self, context, event_queue):
        await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()


class Bulk(AgentExecutor):
    """Answers `NAME MEGABYTES` with the `bulk` of that in one artifact."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    async def execute(self, context, event_queue):
        name, megabytes = context.get_user_input().split()[:2]
        self.ledger.note("begin", name)
        status = TaskStatus(state=TaskState.TASK_STATE_SUBMITTED)
        await event_queue.enqueue_event(Task(id=context.task_id, context_id=context.context_id, status=status))
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        await updater.add_artifact([Part(text=bulk(name, int(megabytes)))])
        await updater.complete()
        self.ledger.note("end", name)

    async def cancel(self, context, event_queue):
        await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()


def bulk(name: str, megabytes: int) -> str:
    """So much text, the same for the same name; compression would save a quarter of it, which is too little."""
    data = random.Random(name).randbytes(megabytes * 1024 * 1024 * 3 // 4)
    return base64.b64encode(data).decode()


class Follower:
    """Reads one streamed answer of a `Counter` in a task of its own, which ends with `async with`.

    Attributes:
        numbers: What came, in the order of its coming.
        artifact: The same, put together as A2A says: what is not appended replaces.
        restarts: Runs that begun after the first was cut, by their numbers.
        states: The states that the task went through.
        tasks: Ids of the tasks that answered.
    """

    def __init__(self, client: Client, text: str) -> None:
        self.numbers: list[int] = []
        self.artifact: list[int] = []
        self.restarts: list[int] = []
        self.states: list[str] = []
        self.tasks: list[str] = []
        self._changed = asyncio.Condition()
        self.reading = asyncio.create_task(self._read(client, text))

    async def _read(self, client: Client, text: str) -> None:
        async for event in client.send_message(request(text)):
            async with self._changed:
                if event.HasField("artifact_update"):
                    update = event.artifact_update
                    came = [int(part.text) for part in update.artifact.parts if part.text]
                    self.numbers += came
                    self.artifact = [*(self.artifact if update.append else ()), *came]
                elif event.HasField("status_update") and RESTART_EXTENSION in event.status_update.metadata:
                    self.restarts.append(int(event.status_update.metadata[RESTART_EXTENSION]["attempt"]))
                elif event.HasField("status_update"):
                    self.states.append(TaskState.Name(event.status_update.status.state))
                elif event.HasField("task"):
                    self.tasks.append(event.task.id)
                    for artifact in event.task.artifacts:
                        self.artifact = [int(part.text) for part in artifact.parts if part.text]
                self._changed.notify_all()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.reading.cancel()
        await asyncio.gather(self.reading, return_exceptions=True)

    async def more(self, count: int, *, limit: float = LIMIT) -> None:
        """Wait for so many more numbers; raises what ended the stream before."""
        wanted = len(self.numbers) + count
        waiting = asyncio.create_task(self._until(lambda: len(self.numbers) >= wanted))
        await asyncio.wait((waiting, self.reading), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return
        waiting.cancel()
        if self.reading.done():
            await self.reading
        raise AssertionError(f"{len(self.numbers)} numbers came, not {wanted}, within {limit} s")

    async def _until(self, condition) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)

    async def whole(self, *, limit: float = LIMIT) -> list[int]:
        """Wait for the end; all numbers, after a look at the states."""
        async with asyncio.timeout(limit):
            await self.reading
        assert self.states == ["TASK_STATE_COMPLETED"], self.states
        return self.numbers


@contextlib.contextmanager
def process(role: str, config: RocketMQConfig, topic: str, argument: str):
    """A worker or caller in a process of its own; `kill()` on what is yielded is kill -9."""
    shown = config.model_dump_json(exclude_defaults=True)
    command = [sys.executable, "-m", "tests.faults", role, shown, topic, argument]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, env={**os.environ}) as running:
        try:
            yield running
        finally:
            running.kill()


async def _work(config: RocketMQConfig, topic: str, ledger: str) -> None:
    counter = Counter(Ledger(Path(ledger)))
    await A2AServer.from_executor(counter, card=card_for(config, topic), config=config).serve(port=0)


async def _work_bulk(config: RocketMQConfig, topic: str, ledger: str) -> None:
    bulky = Bulk(Ledger(Path(ledger)))
    await A2AServer.from_executor(bulky, card=card_for(config, topic), config=config).serve(port=0)


async def _call_bulk(config: RocketMQConfig, topic: str, name_and_megabytes: str) -> None:
    name, megabytes = name_and_megabytes.split()
    params = {"topic": config.state_topic, "requestBytes": config.limits.request_bytes}
    extensions = [{"uri": LARGE_BODIES_EXTENSION, "params": params}]
    card = card_for(config, topic, capabilities={"streaming": True, "extensions": extensions})
    async with RocketMQ(config, card_cache=None) as rocketmq, await rocketmq.client(card) as client:
        async for _event in client.send_message(request(f"{name} 1 {bulk(name, int(megabytes))}")):
            pass


async def _call(config: RocketMQConfig, topic: str, text: str) -> None:
    async with RocketMQ(config, card_cache=None) as rocketmq, await rocketmq.client(card_for(config, topic)) as client:
        async for _event in client.send_message(request(text)):
            pass


async def _call_in(config: RocketMQConfig, topic: str, session_and_text: str) -> None:
    session, _, text = session_and_text.partition(" ")
    async with (
        RocketMQ(config, card_cache=None) as rocketmq,
        await rocketmq.client(card_for(config, topic), session=session) as client,
    ):
        async for _event in client.send_message(request(text)):
            pass


if __name__ == "__main__":
    _role, _config, *_arguments = sys.argv[1:]
    asyncio.run(
        {"work": _work, "call": _call, "call-in": _call_in, "work-bulk": _work_bulk, "call-bulk": _call_bulk}[_role](
            RocketMQConfig.model_validate_json(_config), *_arguments
        )
    )
