"""Everything may die, hang or be cut off while streams run: callers get each event once and in order.

The faults are real: processes killed and stopped, TCP connections reset and blackholed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import uuid
from dataclasses import dataclass

import pytest

from agentscope_rocketmq import RocketMQ
from agentscope_rocketmq.config import Timeouts
from agentscope_rocketmq.dev import ApacheRocketMQ
from agentscope_rocketmq.errors import BrokerUnreachable
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from agentscope_rocketmq.rocketmq.lite import LiteConsumer, Position
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from tests.conftest import Engine, Names
from tests.faults import Counter, Follower, Ledger, Wire, process
from tests.services import card_for, server_for
from tests.waiting import take, until

# Seconds in which everything must go on after a fault. A LiteTopic that is only subscribed again with the regular
# refresh of the whole set would take up to 30.
GOES_ON = 25.0


@pytest.fixture(scope="module")
def engine():
    """A RocketMQ of this module's own, to be broken. Its proxy forgets topics of absent brokers after a second."""
    caches = ("topicRouteService", "topicConfig", "subscriptionGroupConfig")
    with ApacheRocketMQ(proxy_options={f"{cache}CacheRefreshSeconds": 1 for cache in caches}) as launched:
        yield Engine(launched.endpoint, launched.namesrv, launched)


@pytest.fixture
def counter(tmp_path):
    return Counter(Ledger(tmp_path / "ledger"))


@pytest.fixture
async def topic(make_topic):
    return await make_topic("NORMAL")


@contextlib.asynccontextmanager
async def client_for(config, topic, **options):
    async with RocketMQ(config, card_cache=None) as rocketmq:
        async with await rocketmq.client(card_for(config, topic.topic), **options) as client:
            yield client


@contextlib.asynccontextmanager
async def served(counter, config, topic):
    """A worker, a caller, and an endless stream between them that has begun; ends with a look at all of it."""
    async with server_for(counter, config, topic.topic) as server, client_for(config, topic) as client:
        name = uuid.uuid4().hex
        follower = Follower(client, name)
        await follower.more(20)
        yield follower
        await follower.more(20, limit=GOES_ON)
        counter.enough[name].set()
        numbers = await follower.whole()
        assert numbers == list(range(len(numbers)))
        assert (counter.ledger.count("begin", name), counter.ledger.count("end", name)) == (1, 1)
        # Worker and caller serve new calls.
        assert await Follower(client, "new 5").whole() == [0, 1, 2, 3, 4]
        assert server.bridges[0].counters.answered == 2


@dataclass
class Bystander:
    """A consumer of each kind and a producer, used as a program would that knows nothing of the fault."""

    producer: Producer
    group: GroupConsumer
    lite: LiteConsumer
    normal_topic: Names
    lite_topic: Names
    session: str

    async def send(self, body: bytes, *, timeout: float = 120.0) -> None:
        await asyncio.gather(
            self.producer.send(Message(topic=self.normal_topic.topic, body=body), timeout=timeout),
            self.producer.send(
                Message(topic=self.lite_topic.topic, lite_topic=self.session, body=body), timeout=timeout
            ),
        )

    async def receive(self, body: bytes, *, limit: float) -> None:
        """Receive that on both ways. What was sent before may come once more: delivery is at least once."""
        async with asyncio.timeout(limit):
            async for leased in self.group.messages():
                assert await self.group.ack(leased)
                if leased.message.body() == body:
                    break
            async for batch in self.lite.batches():
                await self.lite.ack(batch.messages)
                if batch.messages[-1].body() == body:
                    break


@pytest.fixture
async def bystander(engine, make_topic):
    normal, lite = await make_topic("NORMAL"), await make_topic("LITE")
    async with (
        Connection(engine.endpoint) as connection,
        Producer(connection) as producer,
        GroupConsumer(connection, normal.topic, normal.group) as group,
        LiteConsumer(connection, lite.topic, lite.group) as consumer,
    ):
        await consumer.subscribe(["session"], at=Position.last())
        bystander = Bystander(producer, group, consumer, normal, lite, "session")
        await bystander.send(b"before")
        await bystander.receive(b"before", limit=GOES_ON)
        yield bystander


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        ("kill_proxy", "start_proxy"),
        ("kill_broker", "start_broker"),
        ("stop_broker", "start_broker"),
        ("pause_broker", "resume_broker"),
    ],
    ids=["proxy killed", "broker killed", "broker restarted", "broker paused"],
)
async def test_a_restart_in_mid_stream_loses_and_doubles_nothing(
    engine, config, topic, counter, bystander, fault, remedy
):
    loop = asyncio.get_running_loop()
    async with served(counter, config, topic) as follower:
        await asyncio.to_thread(getattr(engine.launched, fault))
        begun = loop.time()
        patient = asyncio.create_task(bystander.send(b"patient"))
        with pytest.raises(BrokerUnreachable, match="Sending to topic"):
            await bystander.producer.send(Message(topic=bystander.normal_topic.topic, body=b"impatient"), timeout=3)
        assert loop.time() - begun < 6
        # Longer than the proxy remembers the topics of a broker that is away.
        await asyncio.sleep(20 if fault == "pause_broker" else 3)
        assert not patient.done()
        await asyncio.to_thread(getattr(engine.launched, remedy))
        await follower.more(20, limit=GOES_ON)
        await patient
        await bystander.receive(b"patient", limit=GOES_ON)
        assert bystander.lite.lite_topics == {"session"}
