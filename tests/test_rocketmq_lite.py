"""LiteTopics: order, seek, acks, many at once, and clean take-over."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from agentscope_rocketmq.dev import DevBroker
from agentscope_rocketmq.dev.embedded.lite import Subscriptions
from agentscope_rocketmq.errors import GroupNotBound, GroupNotFound, IllegalRequest
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer, LiteLost, Position
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from tests.waiting import LIMIT, take


class Reader:
    """Reads a consumer's batches, acks them, and remembers."""

    def __init__(self, consumer: LiteConsumer) -> None:
        self.consumer = consumer
        self.messages: list = []
        self.lost: list[str] = []
        self.changed = asyncio.Condition()

    async def run(self) -> None:
        async for item in self.consumer.batches():
            async with self.changed:
                if isinstance(item, LiteLost):
                    self.lost.append(item.lite_topic)
                else:
                    self.messages += item.messages
                self.changed.notify_all()
            if isinstance(item, LiteBatch):
                await self.consumer.ack(item.messages)

    async def until(self, condition) -> None:
        async with asyncio.timeout(LIMIT), self.changed:
            await self.changed.wait_for(lambda: condition(self))

    def bodies(self, lite_topic=None) -> list[str]:
        return [m.body().decode() for m in self.messages if lite_topic in (None, m.lite_topic)]


@pytest.fixture
async def lite(make_topic):
    return await make_topic("LITE")


@pytest.fixture
async def reading(connection, lite):
    """Starts readers; closes them at the end."""
    async with asyncio.TaskGroup() as tasks:
        consumers = []

        async def start() -> Reader:
            consumer = LiteConsumer(connection, lite.topic, lite.group)
            await consumer.start()
            consumers.append(consumer)
            reader = Reader(consumer)
            tasks.create_task(reader.run())
            return reader

        yield start
        for consumer in consumers:
            await consumer.aclose()


async def send(producer, lite, name, bodies):
    for body in bodies:
        await producer.send(Message(topic=lite.topic, lite_topic=name, body=str(body).encode()))


def fresh() -> str:
    return uuid.uuid4().hex


async def test_a_lite_topic_is_read_in_order_with_offsets_from_zero(producer, lite, reading):
    reader, name = await reading(), fresh()
    await reader.consumer.subscribe([name])
    await send(producer, lite, name, range(100))
    await reader.until(lambda r: len(r.messages) == 100)
    assert reader.bodies() == [str(number) for number in range(100)]
    assert [message.offset for message in reader.messages] == list(range(100))
    times = [message.store_time for message in reader.messages]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("position", "first"),
    [
        (Position.offset(0), 0),
        (Position.offset(7), 7),
        (Position.first(), 0),
        (Position.tail(3), 17),
        (Position.last(), 20),
    ],
    ids=["offset 0", "offset 7", "first", "last 3", "end"],
)
async def test_a_seek_replays_from_there_and_goes_on_live(producer, lite, reading, position, first):
    reader, name = await reading(), fresh()
    await reader.consumer.subscribe([name])
    await send(producer, lite, name, range(20))
    await reader.until(lambda r: len(r.messages) == 20)
    await reader.consumer.ack([])  # nothing to ack is no error
    reader.messages.clear()
    await reader.consumer.seek(name, position)
    await send(producer, lite, name, ["live"])
    await reader.until(lambda r: "live" in r.bodies())
    assert reader.bodies() == [*(str(number) for number in range(first, 20)), "live"]
    assert reader.lost == []


async def test_the_next_batch_comes_only_after_the_ack(connection, producer, lite):
    name = fresh()
    async with LiteConsumer(connection, lite.topic, lite.group) as consumer:
        await consumer.subscribe([name])
        await send(producer, lite, name, ["first"])
        batches = consumer.batches()
        [batch] = await take(batches, 1)
        await send(producer, lite, name, ["second"])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting := asyncio.ensure_future(anext(batches))), 2)
        await consumer.ack(batch.messages)
        async with asyncio.timeout(LIMIT):
            second = await waiting
        assert isinstance(second, LiteBatch)
        assert [message.body() for message in second.messages] == [b"second"]


async def test_another_consumer_takes_over_at_once_and_the_first_is_told(producer, lite, reading):
    first, second, name, kept = await reading(), await reading(), fresh(), fresh()
    await first.consumer.subscribe([name, kept])
    await send(producer, lite, name, range(5))
    await first.until(lambda r: len(r.messages) == 5)
    await second.consumer.subscribe([name], at=Position.offset(3))
    await second.until(lambda r: len(r.messages) == 2)
    assert second.bodies() == ["3", "4"]
    await first.until(lambda r: r.lost == [name])
    assert first.consumer.lite_topics == {kept}
    await send(producer, lite, name, ["for the second"])
    await send(producer, lite, kept, ["for the first"])
    await second.until(lambda r: r.bodies()[-1] == "for the second")
    await first.until(lambda r: r.bodies()[-1] == "for the first")


async def test_a_take_over_does_not_wait_for_the_batch_that_the_dead_left_unacked(connection, producer, lite, reading):
    name = fresh()
    async with LiteConsumer(connection, lite.topic, lite.group) as frozen:
        await frozen.subscribe([name])
        await send(producer, lite, name, range(3))
        await take(frozen.batches(), 1)  # and never acks
        heir = await reading()
        await heir.consumer.subscribe([name], at=Position.offset(1))
        await heir.until(lambda r: r.bodies() == ["1", "2"])


async def test_two_nodes_of_one_group_each_have_their_own_set_and_change_it_alone(producer, lite, reading):
    a, b = await reading(), await reading()
    mine, dropped, added, theirs = fresh(), fresh(), fresh(), fresh()
    await a.consumer.subscribe([mine, dropped])
    await b.consumer.subscribe([theirs])
    sending = asyncio.create_task(send(producer, lite, theirs, range(200)))
    await a.consumer.unsubscribe([dropped])
    await a.consumer.subscribe([added])
    await send(producer, lite, dropped, ["to nobody"])
    await send(producer, lite, added, ["to a"])
    await send(producer, lite, mine, ["also to a"])
    async with asyncio.timeout(LIMIT):
        await sending
    await b.until(lambda r: len(r.messages) == 200)
    await a.until(lambda r: len(r.messages) == 2)
    assert b.bodies() == [str(number) for number in range(200)]
    assert sorted(a.bodies()) == ["also to a", "to a"]
    assert (a.lost, b.lost) == ([], [])


async def test_five_hundred_lite_topics_of_one_client_all_deliver(producer, lite, reading):
    reader = await reading()
    names = [f"session-{number}" for number in range(500)]
    await reader.consumer.subscribe(names)
    gate = asyncio.Semaphore(32)

    async def one(name):
        async with gate:
            await send(producer, lite, name, [name])

    await asyncio.gather(*map(one, names))
    await reader.until(lambda r: len(r.messages) == len(names))
    assert all(message.body().decode() == message.lite_topic for message in reader.messages)
    assert sorted(reader.bodies()) == sorted(names)


async def test_a_group_bound_to_another_topic_or_none_is_refused_with_the_remedy(connection, make_topic):
    one, other, normal = await make_topic("LITE"), await make_topic("LITE"), await make_topic("NORMAL")
    with pytest.raises(GroupNotBound, match=rf"{one.topic}.*provision"):
        await LiteConsumer(connection, one.topic, other.group).start()
    with pytest.raises(GroupNotBound, match="provision"):
        await LiteConsumer(connection, one.topic, normal.group).start()
    with pytest.raises(GroupNotFound, match="NoSuchGroup"):
        await LiteConsumer(connection, one.topic, "NoSuchGroup").start()


async def test_an_illegal_lite_topic_name_is_refused_and_spoils_nothing(producer, lite, reading):
    reader, name = await reading(), fresh()
    await reader.consumer.subscribe([name])
    with pytest.raises(IllegalRequest, match="a b"):
        await reader.consumer.subscribe(["a b"])
    assert reader.consumer.lite_topics == {name}
    await send(producer, lite, name, ["still here"])
    await reader.until(lambda r: r.bodies() == ["still here"])


async def test_a_message_that_the_broker_does_not_announce_is_found(monkeypatch):
    # A real broker drops an announcement now and then, a message in ten thousand; this one drops them all.
    monkeypatch.setattr(Subscriptions, "offer", lambda *_, **__: None)
    async with DevBroker() as broker, Connection(broker.endpoint) as connection, Producer(connection) as producer:
        async with LiteConsumer(connection, "Answers", "AnswersGroup") as consumer:
            reader, name = Reader(consumer), fresh()
            reading = asyncio.create_task(reader.run())
            await consumer.subscribe([name], at=Position.last())
            # The second one comes to a LiteTopic that was read and acked before.
            for count in (1, 2):
                await producer.send(Message(topic="Answers", lite_topic=name, body=str(count).encode()))
                await reader.until(lambda one, count=count: len(one.messages) == count)
            assert reader.bodies() == ["1", "2"]
            assert reader.lost == []
        await reading
