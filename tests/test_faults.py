"""Everything may die, hang or be cut off while streams run: callers get each event once and in order.

The faults are real: processes killed and stopped, TCP connections reset and blackholed.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from dataclasses import dataclass

import pytest

from agentscope_rocketmq import RocketMQ
from agentscope_rocketmq.config import Timeouts
from agentscope_rocketmq.dev import ApacheRocketMQ, EmbeddedRocketMQ
from agentscope_rocketmq.errors import BrokerUnreachable
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer, Position
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from tests.conftest import APACHE, EMBEDDED, Engine, Names, new_config
from tests.faults import Follower, Wire, process
from tests.services import card_for, server_for
from tests.waiting import until

# Seconds in which everything must go on after a fault: what was handed to polls that nobody reads any more comes again
# after at most 15 (LiteTopics) or a lease and 5 (requests).
GOES_ON = 25.0


pytestmark = pytest.mark.xdist_group("a RocketMQ to be broken")

# What happens to a broker and how it comes back.
FAULTS = {
    APACHE: {
        "killed": ("kill_broker", "start_broker"),
        "restarted": ("stop_broker", "start_broker"),
        "paused": ("pause_broker", "resume_broker"),
    },
    EMBEDDED: {
        "killed": ("kill", "start"),
        "restarted": ("terminate", "start"),
        "paused": ("pause", "resume"),
    },
}


@pytest.fixture(scope="module")
def rocketmq(chosen_engine, tmp_path_factory):
    """A RocketMQ of this module's own, to be broken."""
    if chosen_engine == EMBEDDED:
        with EmbeddedRocketMQ(data=tmp_path_factory.mktemp("data"), strict=True) as embedded:
            yield embedded
    else:
        # Its proxy forgets topics of absent brokers after a second.
        caches = ("topicRouteService", "topicConfig", "subscriptionGroupConfig")
        with ApacheRocketMQ(proxy_options={f"{cache}CacheRefreshSeconds": 1 for cache in caches}) as apache:
            yield apache


@pytest.fixture(scope="module")
def engine(rocketmq):
    name = EMBEDDED if isinstance(rocketmq, EmbeddedRocketMQ) else APACHE
    return Engine(rocketmq.endpoint, rocketmq.namesrv, name)


@pytest.fixture
async def config(engine):
    config = await new_config(engine)
    return config.model_copy(update={"timeouts": Timeouts(lease=10)})


@pytest.fixture
async def topic(make_topic):
    return await make_topic("NORMAL")


@contextlib.asynccontextmanager
async def client_for(config, topic, **options):
    async with (
        RocketMQ(config, card_cache=None) as rocketmq,
        await rocketmq.client(card_for(config, topic.topic), **options) as client,
    ):
        yield client


@contextlib.asynccontextmanager
async def served(counter, config, topic):
    """A worker, a caller, and an endless stream between them that has begun; ends with a look at all of it."""
    name = uuid.uuid4().hex
    async with (
        server_for(counter, config, topic.topic) as server,
        client_for(config, topic) as client,
        Follower(client, name) as follower,
    ):
        await follower.more(20)
        yield follower
        await follower.more(20, limit=GOES_ON)
        counter.enough[name].set()
        numbers = await follower.whole()
        assert numbers == list(range(len(numbers)))
        assert (counter.ledger.count("begin", name), counter.ledger.count("end", name)) == (1, 1)
        # Worker and caller serve new calls.
        assert await Follower(client, "new 5").whole() == [0, 1, 2, 3, 4]
        await until(lambda: server.bridges[0].counters.answered == 2)


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
                assert isinstance(batch, LiteBatch)
                await self.lite.ack(batch.messages)
                if batch.messages[-1].body() == body:
                    break


@pytest.fixture
async def bystander(engine, make_topic):
    normal, lite = await make_topic("NORMAL"), await make_topic("LITE")
    async with (
        Connection(engine.endpoint) as connection,
        Producer(connection) as producer,
        GroupConsumer(connection, normal.topic, normal.group, lease=10) as group,
        LiteConsumer(connection, lite.topic, lite.group) as consumer,
    ):
        await consumer.subscribe(["session"], at=Position.last())
        bystander = Bystander(producer, group, consumer, normal, lite, "session")
        await bystander.send(b"before")
        await bystander.receive(b"before", limit=GOES_ON)
        yield bystander


@pytest.mark.parametrize("fault", ["killed", "restarted", "paused"])
async def test_a_restart_in_mid_stream_loses_and_doubles_nothing(
    rocketmq, engine, config, topic, counter, bystander, fault
):
    # On Apache longer than the proxy remembers the topics of a broker that is away.
    away = 20 if (engine.name, fault) == (APACHE, "paused") else 3
    async with served(counter, config, topic) as follower:
        await goes_on_after(FAULTS[engine.name][fault], rocketmq, follower, bystander, away=away)


@pytest.mark.parametrize("chosen_engine", [APACHE], scope="session")
async def test_a_restart_of_the_proxy_loses_and_doubles_nothing(rocketmq, config, topic, counter, bystander):
    async with served(counter, config, topic) as follower:
        await goes_on_after(("kill_proxy", "start_proxy"), rocketmq, follower, bystander, away=3)


async def goes_on_after(fault, rocketmq, follower, bystander, *, away):
    loop = asyncio.get_running_loop()
    begin, end = fault
    await asyncio.to_thread(getattr(rocketmq, begin))
    async with asyncio.timeout(GOES_ON):
        with pytest.raises(BrokerUnreachable, match="Sending to topic"):
            while True:  # a process that was sent SIGSTOP may still take one
                begun = loop.time()
                await bystander.send(b"impatient", timeout=3)
    assert loop.time() - begun < 6
    patient = asyncio.create_task(bystander.send(b"patient"))
    await asyncio.sleep(away)  # a time without RocketMQ is the fault
    assert not patient.done()
    await asyncio.to_thread(getattr(rocketmq, end))
    await follower.more(20, limit=GOES_ON)
    await patient
    await bystander.receive(b"patient", limit=GOES_ON)
    assert bystander.lite.lite_topics == {"session"}


async def test_a_stream_goes_on_after_connections_were_reset_and_refused(engine, config, topic, counter):
    async with Wire(engine.endpoint) as wire:
        config = config.model_copy(update={"endpoint": wire.endpoint})
        async with served(counter, config, topic) as follower:
            before = wire.accepted
            wire.reset()
            await follower.more(20, limit=GOES_ON)
            await until(lambda: wire.accepted > before)
            wire.cut()
            await asyncio.sleep(2)  # a time without connection is the fault
            await wire.mend()
            await follower.more(20, limit=GOES_ON)


async def test_a_stream_goes_on_after_a_silence_that_only_heartbeats_notice(engine, config, topic, counter):
    async with Wire(engine.endpoint) as wire:
        config = config.model_copy(update={"endpoint": wire.endpoint})
        async with served(counter, config, topic) as follower:
            before = wire.accepted
            wire.blackhole()
            await until(lambda: wire.accepted > before, limit=15)
            wire.pass_on()
            await follower.more(20, limit=GOES_ON)


@pytest.mark.parametrize("fault", [Wire.cut, Wire.blackhole])
async def test_the_next_endpoint_of_the_list_takes_over(engine, config, topic, counter, fault):
    async with Wire(engine.endpoint) as first, Wire(engine.endpoint) as second:
        config = config.model_copy(update={"endpoint": f"{first.endpoint};{second.endpoint}"})
        async with served(counter, config, topic) as follower:
            assert first.accepted > 0
            fault(first)
            await follower.more(20, limit=GOES_ON)
            assert second.accepted > 0
            # When the proxy at last hears that the first connection is gone, it drops what moved to the second
            # meanwhile: that is noticed with the next refresh.
            first.cut()
            await follower.more(100, limit=GOES_ON)


async def test_a_connection_that_takes_its_time_to_come_about_is_not_given_up(engine):
    async with Wire(engine.endpoint) as wire, Connection(wire.endpoint) as connection:
        wire.blackhole()
        async with asyncio.TaskGroup() as tasks:
            producer = Producer(connection, connect_timeout=GOES_ON)
            starting = tasks.create_task(producer.start())
            await until(lambda: wire.accepted > 0)
            await asyncio.sleep(1)  # a slow way is the fault
            wire.pass_on()
            await starting
        assert wire.accepted == 1
        await producer.aclose()


async def test_everything_closes_in_bounded_time_while_rocketmq_is_away(engine, config, topic, counter):
    loop = asyncio.get_running_loop()
    async with Wire(engine.endpoint) as wire:
        config = config.model_copy(update={"endpoint": wire.endpoint, "timeouts": Timeouts(drain=1)})
        async with (
            server_for(counter, config, topic.topic),
            client_for(config, topic) as client,
            Follower(client, "endless") as follower,
        ):
            await follower.more(1)
            wire.cut()
            begun = loop.time()
        assert loop.time() - begun < 30


async def test_a_request_of_a_killed_worker_goes_to_another_within_its_lease(config, topic, counter):
    loop = asyncio.get_running_loop()
    with process("work", config, topic.topic, str(counter.ledger.path)) as worker:
        async with client_for(config, topic) as client, Follower(client, "job 60") as follower:
            await follower.more(10)
            async with server_for(counter, config, topic.topic):
                worker.kill()
                killed = loop.time()
                await until(lambda: counter.ledger.count("begin", "job") == 2)
                # The lease, the seconds in which the broker looks for such messages, and a margin for a busy machine.
                assert loop.time() - killed < 10 + 10
                numbers = await follower.whole()
                # What the second run says replaces what the first one said: it is the same task, from its start.
                first_run = len(numbers) - 60
                assert numbers == [*range(first_run), *range(60)]
                assert 10 <= first_run < 60
                assert len(set(follower.tasks)) == 1
                assert counter.ledger.count("end", "job") == 1
                assert await Follower(client, "next 3").whole() == [0, 1, 2]


async def test_the_agent_ends_its_work_although_its_caller_was_cancelled(config, topic, counter):
    async with server_for(counter, config, topic.topic), client_for(config, topic) as client:
        async with Follower(client, "unwanted 40") as follower:
            await follower.more(5)
        assert counter.ledger.count("end", "unwanted") == 0
        await until(lambda: counter.ledger.count("end", "unwanted") == 1)
        assert counter.ledger.count("begin", "unwanted") == 1
        assert await Follower(client, "next 3").whole() == [0, 1, 2]


async def test_the_agent_ends_its_work_although_its_caller_was_killed(config, topic, counter):
    async with server_for(counter, config, topic.topic) as server:
        with process("call", config, topic.topic, "orphaned 40") as caller:
            await until(lambda: counter.ledger.count("begin", "orphaned") == 1)
            caller.kill()
            caller.wait()
        assert counter.ledger.count("end", "orphaned") == 0
        await until(lambda: server.bridges[0].counters.answered == 1)
        assert (counter.ledger.count("begin", "orphaned"), counter.ledger.count("end", "orphaned")) == (1, 1)
