"""Latency of A2A over RocketMQ, beside the same agent over plain HTTP and beside a bare RocketMQ round trip.

    scripts/bench latency [--engine embedded|apache|HOST:PORT] [--calls 2000] [--streams 200] [--events 50]

Calls are sequential; the three are taken in turn, so that a change of the machine's speed meets all of them. Exits
non-zero when an answer was lost or wrong, events were out of order, or anything over RocketMQ took over 2 s.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import statistics
import sys
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.table import Table

from agentscope_rocketmq import A2AServer, RocketMQ
from agentscope_rocketmq.card import ROCKETMQ, parse_card
from agentscope_rocketmq.provision import apply, plan
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from benchmarks.agent import CountingExecutor, card, numbers, question
from benchmarks.engine import APACHE, provisioned

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

SLOW_SECONDS = 2.0
WARM_UP = 20


@dataclass
class Series:
    """One row: how long each took, and what was wrong."""

    name: str
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0

    async def measure(self, once: Callable[[], Awaitable[bool]]) -> None:
        begun = time.perf_counter()
        right = await once()
        self.seconds.append(time.perf_counter() - begun)
        self.wrong += not right

    def row(self) -> list[str]:
        cuts = statistics.quantiles(self.seconds, n=100)
        figures = (cuts[49], cuts[98], max(self.seconds))
        slow = sum(seconds > SLOW_SECONDS for seconds in self.seconds)
        return [
            self.name,
            str(len(self.seconds)),
            *(f"{value * 1000:.1f}" for value in figures),
            str(slow),
            str(self.wrong),
        ]


class RoundTrip:
    """A bare round trip: a message to a NORMAL topic, its echo on a LiteTopic."""

    def __init__(self, config: Any, topic: str) -> None:
        self.connection = Connection.from_config(config)
        self.producer = Producer(self.connection)
        self.consumer = GroupConsumer(self.connection, topic, f"{topic}ConsumerGroup")
        self.replies = LiteConsumer(self.connection, config.reply_topic, config.reply_group)
        self.reply_topic, self.topic, self.session = config.reply_topic, topic, uuid.uuid4().hex
        self._expected = b""
        self._arrived = asyncio.Event()

    async def __aenter__(self) -> Self:
        for part in (self.producer, self.consumer, self.replies):
            await part.start()
        await self.replies.subscribe([self.session])
        self._tasks = [asyncio.create_task(self._echo()), asyncio.create_task(self._read())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for part in (self.consumer, self.replies, self.producer, self.connection):
            await part.aclose()

    async def _echo(self) -> None:
        async for leased in self.consumer.messages():
            await self.producer.send(
                Message(topic=self.reply_topic, lite_topic=self.session, body=leased.message.body())
            )
            await self.consumer.ack(leased)

    async def _read(self) -> None:
        async for item in self.replies.batches():
            if isinstance(item, LiteBatch):
                if any(message.body() == self._expected for message in item.messages):
                    self._arrived.set()
                await self.replies.ack(item.messages)

    async def once(self) -> bool:
        self._expected = uuid.uuid4().hex.encode()
        self._arrived.clear()
        await self.producer.send(Message(topic=self.topic, body=self._expected))
        async with asyncio.timeout(60):
            await self._arrived.wait()
        return True


async def run(options: argparse.Namespace) -> int:
    async with (
        provisioned(options.engine, card) as (config, agent_card),
        _round_trip(config) as trip,
        A2AServer.from_executor(CountingExecutor(), card=agent_card, config=config) as server,
        RocketMQ(config, card_cache=None) as rocketmq,
    ):
        over_rocketmq = await rocketmq.client(server.url, session="bench")
        over_http = await rocketmq.client(_without_rocketmq(server.card), allow_jsonrpc=True)
        rows = await _measure(options, over_rocketmq, over_http, trip)
    table = Table(title="A2A latency, sequential calls, milliseconds")
    for column in ("what", "calls", "p50", "p99", "max", f"over {SLOW_SECONDS:g} s", "wrong"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for series in rows:
        table.add_row(*series.row())
    Console().print(table)
    bad = [s.name for s in rows if s.wrong or (s.name.endswith("RocketMQ") and max(s.seconds) > SLOW_SECONDS)]
    if bad:
        print(f"Not as it should be: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


@contextlib.asynccontextmanager
async def _round_trip(config: Any) -> AsyncIterator[RoundTrip]:
    """A bare round trip on a topic of its own; the observer group is the one that nothing else here uses."""
    topic = f"BenchEcho-{uuid.uuid4().hex[:8]}"
    await apply(plan([card(config.endpoint, topic)], config), config)
    async with RoundTrip(config.model_copy(update={"reply_group": f"{config.reply_group}_OBSERVER"}), topic) as trip:
        yield trip


async def _measure(options: argparse.Namespace, over_rocketmq: Any, over_http: Any, trip: RoundTrip) -> list[Series]:
    bare = Series("bare RocketMQ round trip")
    unary = Series("unary call over HTTP"), Series("unary call over RocketMQ")
    streams = (
        Series(f"stream of {options.events} over HTTP"),
        Series(f"stream of {options.events} over RocketMQ"),
    )

    async def ask(client: Any, count: int, *, streaming: bool) -> bool:
        client._config.streaming = streaming
        events = [event async for event in client.send_message(question(count))]
        return numbers(events) == list(range(count))

    for _ in range(WARM_UP):
        await trip.once()
        for client in (over_http, over_rocketmq):
            await ask(client, 1, streaming=False)
            await ask(client, options.events, streaming=True)
    for number in range(options.calls):
        await bare.measure(trip.once)
        for series, client in zip(unary, (over_http, over_rocketmq), strict=True):
            await series.measure(lambda client=client: ask(client, 1, streaming=False))  # type: ignore[misc]
        if number % max(1, options.calls // options.streams) == 0 and len(streams[0].seconds) < options.streams:
            for series, client in zip(streams, (over_http, over_rocketmq), strict=True):
                await series.measure(lambda client=client: ask(client, options.events, streaming=True))  # type: ignore[misc]
    return [bare, *unary, *streams]


def _without_rocketmq(published: Any) -> Any:
    plain = parse_card(published)
    kept = [entry for entry in plain.supported_interfaces if entry.protocol_binding != ROCKETMQ]
    del plain.supported_interfaces[:]
    plain.supported_interfaces.extend(kept)
    return plain


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default=APACHE, metavar="embedded|apache|HOST:PORT")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--events", type=int, default=50)
    logging.getLogger("a2a").setLevel(logging.ERROR)
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
