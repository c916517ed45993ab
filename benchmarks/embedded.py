"""What the embedded broker can do, and what it costs. The broker runs in its own process, kept on one core.

scripts/bench embedded [--messages N] [--lite-topics N]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from agentscope_rocketmq.rocketmq.protocol import MessagingServiceStub, definition, service

if TYPE_CHECKING:
    from collections.abc import Iterator

_BODY = b"x" * 1024
_PROGRAM = """
import json, sys
from pathlib import Path
from agentscope_rocketmq.dev.embedded.run import run_embedded
data = Path(sys.argv[1]) if sys.argv[1] else None
run_embedded(0, data, fsync=sys.argv[2] == "fsync", on_ready=lambda broker: print(broker.endpoint, flush=True))
"""


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
    process = subprocess.Popen(  # noqa: S603  (this very interpreter)
        [sys.executable, "-c", _PROGRAM, data, "fsync" if fsync else ""], stdout=subprocess.PIPE, text=True
    )
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(process.pid, cores[-1:])
    try:
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        yield Broker(endpoint, process.pid, time.perf_counter() - begun)
    finally:
        process.terminate()
        process.wait()


def row(what: str, value: object) -> None:
    """Print one line of the table."""
    print(f"{what:<58} {value}", flush=True)


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


async def lite_latency(broker: Broker, *, idle: int, count: int) -> tuple[float, float]:
    """One way through one LiteTopic while so many others are live: p50 and p99 in ms."""
    topic = f"Lite{idle}"
    async with (
        Connection(broker.endpoint) as connection,
        Producer(connection) as producer,
        LiteConsumer(connection, topic, f"{topic}Group") as consumer,
    ):
        names = [f"idle-{number}" for number in range(idle)]
        await consumer.subscribe(["measured", *names])
        gate = asyncio.Semaphore(32)

        async def touch(name: str) -> None:
            async with gate:
                await producer.send(Message(topic=topic, lite_topic=name, body=b"1"))

        touching = asyncio.gather(*map(touch, names))
        batches = consumer.batches()
        for_idle = 0
        while for_idle < idle:
            batch = await anext(batches)
            assert isinstance(batch, LiteBatch)
            await consumer.ack(batch.messages)
            for_idle += len(batch.messages)
        await touching
        taken = []
        for _ in range(count):
            sent = time.perf_counter()
            sending = asyncio.create_task(
                producer.send(Message(topic=topic, lite_topic="measured", body=_BODY)), name="send"
            )
            batch = await anext(batches)
            taken.append((time.perf_counter() - sent) * 1000)
            assert isinstance(batch, LiteBatch)
            await sending
            await consumer.ack(batch.messages)
        return statistics.median(taken), statistics.quantiles(taken, n=100)[98]


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


async def sending(what: str, broker: Broker, count: int) -> None:
    """Print rates of sending."""
    for in_flight in (1, 64):
        cpu, begun = broker.cpu(), time.perf_counter()
        rate = await sends(broker, count // (1 if in_flight > 1 else 5), in_flight=in_flight)
        used = (broker.cpu() - cpu) / (time.perf_counter() - begun)
        row(f"{what}, {in_flight} in flight", f"{rate:.0f} sends/s on {100 * used:.0f} % of a core")


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sends", type=int, default=10_000, help="messages for each rate of sending")
    parser.add_argument("--lite-topics", type=int, default=10_000, help="LiteTopics that are live besides one")
    parser.add_argument("--messages", type=int, default=200_000, help="messages to send, receive and ack; 0 for none")
    options = parser.parse_args()
    with running() as broker:
        row("ready after", f"{broker.ready:.2f} s")
        row("memory at rest", f"{broker.rss():.0f} MB")
        await sending("in memory", broker, options.sends)
        one = await lite_latency(broker, idle=0, count=1000)
        row("LiteTopic one way, alone", f"p50 {one[0]:.2f} ms, p99 {one[1]:.2f} ms")
        many = await lite_latency(broker, idle=options.lite_topics, count=1000)
        row(f"LiteTopic one way, {options.lite_topics} others live", f"p50 {many[0]:.2f} ms, p99 {many[1]:.2f} ms")
        row("  that is", f"{many[0] / one[0]:.2f} times the p50, memory {broker.rss():.0f} MB")
    for fsync in (True, False):
        with tempfile.TemporaryDirectory() as data, running(data, fsync=fsync) as broker:
            await sending("durable" if fsync else "durable, no fsync", broker, options.sends)
    if options.messages:
        with running() as broker:
            row(
                f"memory after each tenth of {options.messages} messages",
                json.dumps(await flow(broker, options.messages)),
            )


if __name__ == "__main__":
    asyncio.run(main())
