"""What the embedded broker can do, and what it costs. The broker runs in its own process, kept on one core.

    scripts/bench embedded [--sends 10000] [--lite-topics 10000] [--messages 200000]

Where other work keeps it from its core, what it did in a second of that core's time says what it can. Exits non-zero
when something is worse than it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from agentscope_rocketmq.dev import EmbeddedRocketMQ
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from agentscope_rocketmq.rocketmq.protocol import MessagingServiceStub, definition, service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

_BODY = b"x" * 1024


@dataclass(frozen=True)
class Broker:
    """A running broker."""

    endpoint: str
    pid: int
    ready: float

    def rss(self) -> float:
        """Resident memory in MB."""
        for line in Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")

    def cpu(self) -> float:
        """Seconds of CPU it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running(data: str = "", *, fsync: bool = True) -> Iterator[Broker]:
    """A broker process on one core, the last."""
    begun = time.perf_counter()
    with EmbeddedRocketMQ(data=Path(data) if data else None, fsync=fsync) as launched:
        ready = time.perf_counter() - begun
        assert launched.pid is not None
        cores = sorted(os.sched_getaffinity(0))
        for thread in Path(f"/proc/{launched.pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores[-1:])
        yield Broker(launched.endpoint, launched.pid, ready)


class Report:
    """The table, and whether all of it is as it should be."""

    def __init__(self) -> None:
        self.well = True

    def row(self, what: str, value: str, *, wanted: str = "", well: bool = True) -> None:
        """Print one line.

        Args:
            what: What was measured.
            value: What came out.
            wanted: What it should be; empty for nothing in particular.
            well: Whether it is.
        """
        self.well = self.well and well
        verdict = f"{'' if well else 'NOT '}{wanted}" if wanted else ""
        print(f"{what:<54} {value:<52} {verdict}".rstrip(), flush=True)


async def sends(broker: Broker, count: int, *, in_flight: int) -> float:
    """Sends a second of 1 KiB messages, over the bare protocol."""
    async with grpc.aio.insecure_channel(broker.endpoint) as channel:
        stub: Any = MessagingServiceStub(channel)
        metadata = (("x-mq-client-id", uuid.uuid4().hex),)
        numbers = iter(range(count))

        async def worker() -> None:
            for _ in numbers:
                system = definition.SystemProperties(message_id=uuid.uuid4().hex, message_type=1)
                message = definition.Message(
                    topic=definition.Resource(name="Bench"), body=_BODY, system_properties=system
                )
                answer = await stub.SendMessage(service.SendMessageRequest(messages=[message]), metadata=metadata)
                assert answer.status.code == definition.Code.OK

        begun = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(in_flight)))
        return count / (time.perf_counter() - begun)


@asynccontextmanager
async def lite_trip(broker: Broker, *, idle: int) -> AsyncIterator[Callable[[], Awaitable[float]]]:
    """One way through one LiteTopic while so many others are live (subscribed, and each had a message); in ms."""
    async with (
        Connection(broker.endpoint) as connection,
        Producer(connection) as producer,
        LiteConsumer(connection, "Lite", "LiteGroup") as consumer,
    ):
        names = [f"idle-{number}" for number in range(idle)]
        await consumer.subscribe(["measured", *names])
        gate = asyncio.Semaphore(32)

        async def touch(name: str) -> None:
            async with gate:
                await producer.send(Message(topic="Lite", lite_topic=name, body=b"1"))

        touching = asyncio.gather(*map(touch, names))
        batches = consumer.batches()
        for_idle = 0
        while for_idle < idle:
            batch = await anext(batches)
            assert isinstance(batch, LiteBatch)
            await consumer.ack(batch.messages)
            for_idle += len(batch.messages)
        await touching

        async def once() -> float:
            begun = time.perf_counter()
            sending = asyncio.create_task(
                producer.send(Message(topic="Lite", lite_topic="measured", body=_BODY)), name="send"
            )
            batch = await anext(batches)
            taken = (time.perf_counter() - begun) * 1000
            assert isinstance(batch, LiteBatch)
            await sending
            await consumer.ack(batch.messages)
            return taken

        yield once


async def lite(report: Report, *, idle: int, count: int = 1000) -> None:
    """Latency of a LiteTopic alone and among many, on two brokers in turn: what disturbs one disturbs the other."""
    with running() as quiet, running() as busy:
        async with lite_trip(quiet, idle=0) as alone, lite_trip(busy, idle=idle) as among:
            taken = [(await alone(), await among()) for _ in range(count)]
        one, many = (statistics.quantiles(column, n=100) for column in zip(*taken, strict=True))
        report.row(
            "LiteTopic one way, alone",
            f"p50 {one[49]:.2f} ms, p99 {one[98]:.2f} ms",
            wanted="p50 < 5 ms",
            well=one[49] < 5,
        )
        ratio = many[49] / one[49]
        report.row(
            f"LiteTopic one way, {idle} others live",
            f"p50 {many[49]:.2f} ms, p99 {many[98]:.2f} ms, {ratio:.2f} times",
            wanted="<= 1.3 times",
            well=ratio <= 1.3,
        )
        report.row(f"memory with {idle} LiteTopics", f"{busy.rss():.0f} MB")


async def flow(broker: Broker, count: int) -> list[float]:
    """Send, receive and ack so many messages; the broker's memory in MB after each tenth."""
    memory = []
    async with (
        Connection(broker.endpoint) as connection,
        Producer(connection) as producer,
        GroupConsumer(connection, "Flow", "FlowGroup", concurrency=256) as consumer,
    ):
        gate = asyncio.Semaphore(64)
        messages = consumer.messages()

        async def send() -> None:
            async with gate:
                await producer.send(Message(topic="Flow", body=_BODY))

        for _ in range(10):
            sending = asyncio.gather(*(send() for _ in range(count // 10)))
            acks = set()
            for _ in range(count // 10):
                acks.add(asyncio.create_task(consumer.ack(await anext(messages))))
            await asyncio.gather(sending, *acks)
            memory.append(round(broker.rss(), 1))
    return memory


async def sending(report: Report, what: str, broker: Broker, count: int, *, least: int = 0) -> None:
    """Rates of sending."""
    for in_flight in (1, 64):
        cpu, begun = broker.cpu(), time.perf_counter()
        rate = await sends(broker, count // (1 if in_flight > 1 else 5), in_flight=in_flight)
        used = (broker.cpu() - cpu) / (time.perf_counter() - begun)
        report.row(
            f"{what}, {in_flight} in flight",
            f"{rate:.0f} sends/s, {rate / used:.0f} a second of its core",
            wanted=f">= {least}" if least and in_flight > 1 else "",
            well=in_flight == 1 or rate / used >= least,
        )


async def measure(options: argparse.Namespace, report: Report) -> None:
    """Everything, once."""
    with running() as broker:
        report.row("ready after", f"{broker.ready:.2f} s", wanted="< 1.5 s", well=broker.ready < 1.5)
        report.row("memory at rest", f"{broker.rss():.0f} MB", wanted="< 120 MB", well=broker.rss() < 120)
        await sending(report, "in memory", broker, options.sends, least=1500)
    await lite(report, idle=options.lite_topics)
    for fsync in (True, False):
        with tempfile.TemporaryDirectory() as data, running(data, fsync=fsync) as broker:
            what = "durable" if fsync else "durable, no fsync"
            await sending(report, what, broker, options.sends, least=500)
    if options.messages:
        with running() as broker:
            memory = await flow(broker, options.messages)
            report.row(
                f"MB after each tenth of {options.messages} messages with acks",
                json.dumps(memory),
                wanted="flat",
                well=max(memory[5:]) <= 1.15 * max(memory[:5]),
            )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sends", type=int, default=10_000, help="messages for each rate of sending")
    parser.add_argument("--lite-topics", type=int, default=10_000, help="LiteTopics that are live besides one")
    parser.add_argument("--messages", type=int, default=200_000, help="messages to send, receive and ack; 0 for none")
    report = Report()
    asyncio.run(measure(parser.parse_args(), report))
    return 0 if report.well else 1


if __name__ == "__main__":
    sys.exit(main())
