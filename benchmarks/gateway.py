"""Thousands of live sessions in one gateway process, each with a client that follows it.

    scripts/bench gateway [--engine embedded|apache|HOST:PORT] [--sessions 10000]

The clients come as those of a gateway that died do, with the id of their last event. Then one event is sent to each
session. Memory is that of the gateway's process: of a session that a client follows, its HTTP connection included.
Exits non-zero when a client did not hear its event, or heard another.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import secrets
import statistics
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from agentscope_rocketmq import Cursor
from agentscope_rocketmq.envelope import ResponseEnvelope
from agentscope_rocketmq.gateway.cursors import Cursors, Place
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from agentscope_rocketmq.session import lite_topic_name
from agentscope_rocketmq.sse import render_event
from benchmarks.agent import card
from benchmarks.chaos import streams
from benchmarks.chaos.streams import Process
from benchmarks.engine import APACHE, provisioned
from benchmarks.sessions import percentiles

if TYPE_CHECKING:
    from agentscope_rocketmq import RocketMQConfig

OWNER = "anonymous"
CONNECTING = 200  # clients that connect at a time
IN_FLIGHT = 32
LATE = 30.0  # seconds; what was not heard then is lost
SETTLES = 15.0  # seconds after which nothing but idling is left


@dataclass(slots=True, eq=False)
class Follower:
    """A client that follows one session.

    Attributes:
        name: Of the session.
        request_id: Of the response that is in it.
        cursor: Its last event's.
        sent: Events that were sent to the session.
        heard: Numbers that came, not looked at yet.
    """

    name: str
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    cursor: str = ""
    sent: int = 0
    heard: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    following: asyncio.Task[None] | None = None

    async def connect(self, port: int) -> None:
        """Ask for what comes after the cursor; returns when the answer has begun."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
        request = f"GET /sessions/{self.name}/events HTTP/1.1\r\nhost: bench\r\nlast-event-id: {self.cursor}\r\n\r\n"
        writer.write(request.encode())
        status = await asyncio.wait_for(reader.readline(), LATE)
        if b" 200 " not in status:
            raise SystemExit(f"The gateway answered {status!r} for {self.name}.")
        self.following = asyncio.create_task(self._follow(reader, writer), name=f"follow[{self.name}]")

    async def _follow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async for line in reader:
                if line.startswith(b"data: "):
                    part = json.loads(line[6:])["result"]["artifactUpdate"]["artifact"]["parts"][0]
                    self.heard.put_nowait(int(part["text"]))
        finally:
            writer.close()


class Bench:
    """The gateway, and what was found."""

    def __init__(self, config: RocketMQConfig, producer: Producer, port: int) -> None:
        self.table = Table("what", "measured", title=f"Sessions of one gateway, {config.endpoint}")
        self.wrong: list[str] = []
        self._config = config
        self._secret = "" if config.a2a_secret is None else config.a2a_secret.get_secret_value()
        self._producer = producer
        self._port = port

    def row(self, what: str, measured: str) -> None:
        self.table.add_row(what, measured)
        print(f"{what}: {measured}", flush=True)

    async def say(self, follower: Follower) -> str:
        """Send the next number to a session; the message's id."""
        number, follower.sent = follower.sent, follower.sent + 1
        chunk = {"artifact": {"artifactId": "a", "parts": [{"text": str(number)}]}, "append": number > 0}
        text = json.dumps({"jsonrpc": "2.0", "id": "1", "result": {"artifactUpdate": chunk}})
        envelope = ResponseEnvelope(
            request_id=follower.request_id,
            body=render_event(text),
            stream=True,
            end=False,
            seq=number,
            attempt=0,
            run="run",
        )
        name = lite_topic_name(follower.name, owner=OWNER, secret=self._secret)
        message = Message(topic=self._config.reply_topic, lite_topic=name, body=envelope.encode())
        return (await self._producer.send(message)).message_id

    async def begin(self, followers: list[Follower]) -> None:
        """Give each session its first event, and each client the cursor of it."""
        cursors, gate = Cursors(self._secret), asyncio.Semaphore(IN_FLIGHT)

        async def one(follower: Follower) -> None:
            async with gate:
                cursor = Cursor.of(0, 0, await self.say(follower))
            follower.cursor = cursors.write(Place(follower.name, str(cursor)), owner=OWNER)

        await asyncio.gather(*map(one, followers))

    async def connect(self, followers: list[Follower]) -> float:
        """Have clients connect; how long it took."""
        gate = asyncio.Semaphore(CONNECTING)

        async def one(follower: Follower) -> None:
            async with gate:
                await follower.connect(self._port)

        begun = time.perf_counter()
        await asyncio.gather(*map(one, followers))
        return time.perf_counter() - begun

    async def hears(self, follower: Follower) -> float:
        """Send a session its next number; how long until its client had it."""
        number, begun = follower.sent, time.perf_counter()
        await self.say(follower)
        try:
            async with asyncio.timeout(LATE):
                heard = await follower.heard.get()
        except TimeoutError:
            heard = -1
        if heard != number:
            self.wrong.append(f"{follower.name} heard {heard} instead of {number}")
        return time.perf_counter() - begun


async def run(config: RocketMQConfig, topic: str, count: int, folder: Path) -> Bench:
    """Measure.

    Args:
        config: The cluster; topics and groups exist.
        topic: An agent's topic.
        count: Sessions.
        folder: For the gateway's card and log.
    """
    config = config.model_copy(update={"a2a_secret": SecretStr(secrets.token_hex(16))})
    command = ["-c", "from agentscope_rocketmq.cli import main; main()", "gateway", "--port", "0"]
    command += ["--agent", str(streams.written_card(config, topic, folder))]
    gateway = Process("gateway", command, streams.environment(config), folder)
    await gateway.start()
    try:
        async with Connection(config.endpoint) as connection, Producer(connection) as producer:
            bench = Bench(config, producer, await _port(folder / "gateway.log"))
            await _measure(bench, gateway, count)
            return bench
    finally:
        await gateway.kill()


async def _port(log: Path) -> int:
    async with asyncio.timeout(60):
        while True:
            said = await asyncio.to_thread(log.read_text, encoding="utf-8")
            if (found := re.search(r"http://127\.0\.0\.1:(\d+)", said)) is not None:
                return int(found[1])
            await asyncio.sleep(0.1)


async def _measure(bench: Bench, gateway: Process, count: int) -> None:
    followers = [Follower(f"followed-{number}") for number in range(count)]
    await bench.begin(followers)
    await bench.connect(followers[:10])
    with_ten = [await bench.hears(followers[0]) for _ in range(300)]
    await bench.connect(followers[10:1000])
    await asyncio.sleep(SETTLES)
    before, rest = gateway.memory(), followers[1000:]
    seconds = await bench.connect(rest)
    await asyncio.sleep(SETTLES)
    bench.row(f"{len(rest)} clients come", f"{len(rest) / seconds:.0f}/s")
    each = (gateway.memory() - before) / len(rest)
    bench.row("memory of a session that a client follows, between 1,000 and all", f"{each / 1024:.1f} KB")
    gate = asyncio.Semaphore(IN_FLIGHT)

    async def one(follower: Follower) -> float:
        async with gate:
            return await bench.hears(follower)

    begun = time.perf_counter()
    taken = await asyncio.gather(*map(one, followers))
    seconds = time.perf_counter() - begun
    bench.row(f"one event to each of {count}, {IN_FLIGHT} in flight", f"{count / seconds:.0f}/s, {percentiles(taken)}")
    with_many = [await bench.hears(followers[0]) for _ in range(300)]
    bench.row("send to event at the client, with 10", percentiles(with_ten))
    bench.row(f"send to event at one of {count}", percentiles(with_many))
    bench.row("  p50 of these, in relation", f"{statistics.median(with_many) / statistics.median(with_ten):.2f}")
    tasks = [follower.following for follower in followers if follower.following is not None]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default=APACHE, help="apache or embedded to launch one, or HOST:PORT")
    parser.add_argument("--sessions", type=int, default=10_000, help="more than 1,000")
    options = parser.parse_args()
    async with contextlib.AsyncExitStack() as stack:
        config, agent_card = await stack.enter_async_context(provisioned(options.engine, card))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        topic = agent_card["supportedInterfaces"][0]["url"].rpartition("/")[2]
        bench = await run(config, topic, options.sessions, folder)
    Console().print(bench.table)
    for problem in bench.wrong[:20]:
        print(f"WRONG: {problem}", file=sys.stderr)
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
