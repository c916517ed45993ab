"""Sessions: replay, rewind, take-over, and many of them in one process.

    scripts/bench sessions [--engine embedded|apache|HOST:PORT] [--events 10000] [--sessions 10000] [--opens 200]
                           [--stored 0]

Exits non-zero when an event was lost, doubled or out of order, or a session heard nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import logging
import statistics
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from agentscope_rocketmq import RocketMQ
from agentscope_rocketmq.envelope import ResponseEnvelope
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from agentscope_rocketmq.sse import render_event
from benchmarks.agent import card
from benchmarks.engine import APACHE, provisioned

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agentscope_rocketmq import RocketMQConfig, Session, SessionEvent

IN_FLIGHT = 32
ROCKSDB = {"storeType": "defaultRocksDB"}
LATE = 30.0  # seconds; what was not heard then is lost
SETTLES = 15.0  # seconds after which the broker has looked at new subscriptions, and nothing but idling is left


class Bench:
    """What all measurements share, and what they found."""

    def __init__(self, config: RocketMQConfig, producer: Producer) -> None:
        self.config = config
        self.producer = producer
        self.table = Table("what", "measured", title=f"Sessions, {config.endpoint}")
        self.wrong: list[str] = []

    def row(self, what: str, measured: str) -> None:
        self.table.add_row(what, measured)
        print(f"{what}: {measured}", flush=True)

    def expect(self, what: str, found: object, wanted: object) -> None:
        if found != wanted:
            self.wrong.append(f"{what}: {found!r:.200} instead of {wanted!r:.200}")

    async def fill(self, name: str, count: int, *, a_message: int = 1) -> None:
        """A response of so many events, in order."""
        request_id, run = uuid.uuid4().hex, uuid.uuid4().hex[:16]
        for seq, first in enumerate(range(0, count, a_message)):
            numbers = range(first, min(first + a_message, count))
            await self.say(name, request_id, run, seq, list(numbers), end=numbers.stop == count)

    async def say(self, name: str, request_id: str, run: str, seq: int, numbers: list[int], *, end: bool) -> None:
        envelope = ResponseEnvelope(
            request_id=request_id,
            body="".join(render_event(_event(number)) for number in numbers),
            stream=True,
            end=end,
            seq=seq,
            attempt=0,
            run=run,
        )
        await self.producer.send(Message(topic=self.config.reply_topic, lite_topic=name, body=envelope.encode()))


def _event(number: int) -> str:
    chunk = {"artifact": {"artifactId": "a", "parts": [{"text": str(number)}]}, "append": number > 0}
    return json.dumps({"jsonrpc": "2.0", "id": "1", "result": {"artifactUpdate": chunk}})


def _number(event: SessionEvent) -> int:
    return int(json.loads(event.raw)["result"]["artifactUpdate"]["artifact"]["parts"][0]["text"])


@contextlib.asynccontextmanager
async def process(config: RocketMQConfig) -> AsyncIterator[RocketMQ]:
    """Another process, as far as RocketMQ can tell."""
    async with RocketMQ(config, card_cache=None) as rocketmq:
        yield rocketmq


async def replay(bench: Bench, count: int) -> None:
    """How fast a session is replayed, and whether rewinding by time finds the right event."""
    for a_message in (1, 10):
        name = f"replayed-{a_message}"
        await bench.fill(name, count, a_message=a_message)
        async with process(bench.config) as rocketmq:
            begun = time.perf_counter()
            events = [event async for event in rocketmq.session(name).events(from_start=True, follow=False)]
            seconds = time.perf_counter() - begun
        bench.expect("replayed", [_number(event) for event in events], list(range(count)))
        bench.row(f"replay of {count} events, {a_message} a message", f"{count / seconds:.0f} events/s")
    async with process(bench.config) as rocketmq:
        session = rocketmq.session(name)
        for place in (0.0, 0.123, 0.5, 0.789, 1.0):
            since = events[round(place * (count - 1))].store_time
            wanted = next(_number(event) for event in events if event.store_time >= since)
            begun = time.perf_counter()
            found = _number(await first(session, since=since))
            bench.expect("rewound by time", found, wanted)
            bench.row(f"rewind by time to event {wanted} of {count}", f"{(time.perf_counter() - begun) * 1000:.0f} ms")


async def opening(bench: Bench, count: int) -> None:
    """From a new owner's opening of a session to its first event, while the former one holds a batch un-acked."""
    taken = []
    async with process(bench.config) as one, process(bench.config) as other:
        await bench.fill("warm-up", 2)
        await first(one.session("warm-up"))
        await first(other.session("warm-up"))
        for number in range(count):
            name = f"opened-{number}"
            await bench.fill(name, 6)
            async with contextlib.aclosing(one.session(name).events()) as events:
                for expected in range(3):
                    bench.expect("read by the former owner", _number(await anext(events)), expected)
                await asyncio.sleep(0.05)  # until its acks are through
                begun = time.perf_counter()
                event = await first(other.session(name))
                taken.append(time.perf_counter() - begun)
                bench.expect("taken up", _number(event), 2)
    bench.row(f"open a session of another owner to its first event, {count} times", percentiles(taken))


async def store(bench: Bench, count: int) -> None:
    """So many sessions that nobody reads, on the broker."""
    gate = asyncio.Semaphore(IN_FLIGHT)

    async def one(number: int) -> None:
        async with gate:
            await bench.say(f"stored-{number}", uuid.uuid4().hex, "run", 0, [0], end=False)

    begun = time.perf_counter()
    for first_one in range(0, count, 1000):
        await asyncio.gather(*(one(number) for number in range(first_one, min(first_one + 1000, count))))
    bench.row(f"store {count} sessions", f"{count / (time.perf_counter() - begun):.0f}/s")
    async with process(bench.config) as rocketmq:
        taken = []
        for number in range(0, count, max(1, count // 100)):
            begun = time.perf_counter()
            found = await first(rocketmq.session(f"stored-{number}"), from_start=True)
            taken.append(time.perf_counter() - begun)
            bench.expect(f"stored in {number}", _number(found), 0)
    bench.row("open one of these to its first event", percentiles(taken))


async def many(bench: Bench, count: int) -> None:
    """So many live sessions in one process."""
    async with process(bench.config) as rocketmq, asyncio.TaskGroup() as tasks:
        following = [Following(tasks, rocketmq.session(f"many-{number}")) for number in range(10)]
        await asyncio.gather(*(one.hears(bench) for one in following))
        with_ten = [await following[0].hears(bench) for _ in range(300)]
        sessions = [rocketmq.session(f"many-{number}") for number in range(10, count)]
        await asyncio.gather(*(session.open() for session in sessions[:990]))
        await asyncio.sleep(SETTLES)
        before, begun = memory(), time.perf_counter()
        await asyncio.gather(*(session.open() for session in sessions[990:]))
        seconds = time.perf_counter() - begun
        await asyncio.sleep(SETTLES)
        idle = (memory() - before) / len(sessions[990:])
        bench.row(f"set up {len(sessions[990:])} sessions", f"{len(sessions[990:]) / seconds:.0f} sessions/s")
        bench.row("memory of an idle session, between 1,000 and all", f"{idle / 1024:.1f} KB")
        following += [Following(tasks, session) for session in sessions]
        gate = asyncio.Semaphore(IN_FLIGHT)

        async def one_each(one: Following) -> float:
            async with gate:
                return await one.hears(bench)

        begun = time.perf_counter()
        taken = await asyncio.gather(*map(one_each, following))
        seconds = time.perf_counter() - begun
        bench.row(
            f"one event to each of {count}, {IN_FLIGHT} in flight", f"{count / seconds:.0f}/s, {percentiles(taken)}"
        )
        await asyncio.sleep(SETTLES)
        with_many = [await following[0].hears(bench) for _ in range(300)]
        bench.row("send to event, with 10 sessions", percentiles(with_ten))
        bench.row(f"send to event on one of {count}", percentiles(with_many))
        ratio = statistics.median(with_many) / statistics.median(with_ten)
        bench.row("  p50 of these, in relation", f"{ratio:.2f}")
        for one in following:
            one.stop()


class Following:
    """Listens to a session."""

    def __init__(self, tasks: asyncio.TaskGroup, session: Session) -> None:
        self.session = session
        self.sent = 0
        self.heard: asyncio.Queue[int] = asyncio.Queue()
        self.request_id = uuid.uuid4().hex
        self._task = tasks.create_task(self._listen())

    async def _listen(self) -> None:
        async with contextlib.aclosing(self.session.events()) as events:
            async for event in events:
                self.heard.put_nowait(_number(event))

    async def hears(self, bench: Bench) -> float:
        """Send it an event; how long it took to hear it."""
        number, self.sent = self.sent, self.sent + 1
        begun = time.perf_counter()
        await bench.say(self.session.lite_topic, self.request_id, "run", number, [number], end=False)
        try:
            async with asyncio.timeout(LATE):
                bench.expect(f"heard on {self.session.lite_topic}", await self.heard.get(), number)
        except TimeoutError:
            bench.expect(f"heard on {self.session.lite_topic} within {LATE} s", None, number)
        return time.perf_counter() - begun

    def stop(self) -> None:
        self._task.cancel()


async def first(session: Session, **where: Any) -> SessionEvent:
    """The first event from some place on."""
    async with contextlib.aclosing(session.events(**where)) as events:
        return await anext(events)


def memory() -> int:
    """Resident bytes of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def percentiles(seconds: list[float]) -> str:
    """p50, p99 and the longest."""
    p99 = statistics.quantiles(seconds, n=100)[98]
    return f"p50 {statistics.median(seconds) * 1000:.1f} ms, p99 {p99 * 1000:.0f} ms, max {max(seconds) * 1000:.0f} ms"


async def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default=APACHE, help="apache or embedded to launch one, or HOST:PORT")
    parser.add_argument("--events", type=int, default=10_000, help="events of the session that is replayed")
    parser.add_argument("--opens", type=int, default=200, help="sessions that are taken over")
    parser.add_argument("--sessions", type=int, default=10_000, help="live sessions, more than 1,000; 0 for none")
    parser.add_argument("--stored", type=int, default=0, help="further sessions that lie on the broker")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    async with (
        # Otherwise each LiteTopic costs the broker a file descriptor.
        provisioned(options.engine, card, broker_options=ROCKSDB if options.stored else None) as (config, _),
        Connection(config.endpoint) as connection,
        Producer(connection) as producer,
    ):
        bench = Bench(config, producer)
        await replay(bench, options.events)
        await opening(bench, options.opens)
        if options.stored:
            await store(bench, options.stored)
        if options.sessions:
            await many(bench, options.sessions)
    Console().print(bench.table)
    for problem in bench.wrong[:20]:
        print(f"WRONG: {problem}", file=sys.stderr)
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
