"""The newest owner of a LiteTopic has it: at once, from where it asked, whatever its former owner was doing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import pytest

from agentscope_rocketmq.errors import BrokerUnreachable
from agentscope_rocketmq.rocketmq import lite as lite_module
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer, LiteLost, Position
from agentscope_rocketmq.rocketmq.message import Message
from tests.faults import Wire
from tests.waiting import LIMIT, until

SESSION = "session"


class Owner:
    """Reads a LiteTopic and acks at once, as long as it may."""

    def __init__(self, consumer: LiteConsumer) -> None:
        self.consumer = consumer
        self.offsets: list[int] = []
        self.lost = 0
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for item in self.consumer.batches():
            if isinstance(item, LiteLost):
                self.lost += 1
            else:
                self.offsets += [message.offset for message in item.messages]
                await self.consumer.ack(item.messages)

    async def take(self, at: Position) -> None:
        self.offsets.clear()
        await self.consumer.subscribe([SESSION], at=at)


@pytest.fixture
async def lite(make_topic):
    return await make_topic("LITE")


@pytest.fixture
def never_visible_again(monkeypatch):
    """What is not given back does not come within the time that a test waits."""
    monkeypatch.setattr(lite_module, "INVISIBLE", 5 * LIMIT)


@contextlib.asynccontextmanager
async def owner(connection, lite):
    async with LiteConsumer(connection, lite.topic, lite.group) as consumer:
        owner = Owner(consumer)
        yield owner
    async with asyncio.timeout(LIMIT):
        await owner.reading


@contextlib.asynccontextmanager
async def busy(producer, lite, *, senders=4):
    """Messages without end, meanwhile."""

    async def send():
        for number in itertools.count():
            await producer.send(Message(topic=lite.topic, lite_topic=SESSION, body=str(number).encode()))

    tasks = [asyncio.create_task(send()) for _ in range(senders)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def send(producer, lite, count):
    for number in range(count):
        await producer.send(Message(topic=lite.topic, lite_topic=SESSION, body=str(number).encode()))


def consecutive(offsets):
    return offsets == list(range(offsets[0], offsets[0] + len(offsets)))


# Not to the end: there the broker rarely keeps a batch of the old owner (docs/rocketmq-client.md).
@pytest.mark.parametrize("back", [0, 3], ids=["where the old owner is", "before that"])
async def test_fifty_take_overs_of_a_busy_stream_begin_at_once_where_they_ask(
    connection, producer, lite, back, never_visible_again
):
    async with owner(connection, lite) as one, owner(connection, lite) as other, busy(producer, lite):
        old, new = one, other
        await old.take(Position.last())
        await until(lambda: len(old.offsets) > 10)
        for _ in range(50):
            told, before = old.lost, list(old.offsets)
            await new.take(Position.offset(before[-1] + 1 - back))
            await until(lambda new=new: len(new.offsets) > 10)
            await until(lambda old=old, told=told: old.lost == told + 1)
            assert new.offsets[0] == before[-1] + 1 - back
            assert consecutive(new.offsets)
            old, new = new, old


async def test_what_the_old_owner_has_in_hand_goes_to_the_new_one_and_is_not_acked_from_behind(
    connection, producer, lite, never_visible_again
):
    async with (
        LiteConsumer(connection, lite.topic, lite.group) as slow,
        owner(connection, lite) as new,
    ):
        await slow.subscribe([SESSION], at=Position.offset(0))
        await send(producer, lite, 3)
        batches = slow.batches()
        async with asyncio.timeout(LIMIT):
            in_hand = await anext(batches)
            assert isinstance(in_hand, LiteBatch)
            # The very offset that the group is at: such a seek alone changes nothing on the broker.
            await new.take(Position.offset(0))
            assert isinstance(await anext(batches), LiteLost)
        await slow.ack(in_hand.messages)
        await until(lambda: len(new.offsets) == 3)
        assert new.offsets == [0, 1, 2]


async def test_what_is_given_back_gets_through_although_the_broker_is_busy(
    connection, producer, lite, never_visible_again, monkeypatch
):
    async with (
        LiteConsumer(connection, lite.topic, lite.group) as slow,
        owner(connection, lite) as new,
    ):
        await slow.subscribe([SESSION], at=Position.offset(0))
        await send(producer, lite, 3)
        failures: list[str] = []
        call = slow._client.call

        async def busy_twice(method, *arguments, **options):
            if method == "ChangeInvisibleDuration" and len(failures) < 2:
                failures.append(method)
                raise BrokerUnreachable("No answer from the broker.", transient=True)
            return await call(method, *arguments, **options)

        monkeypatch.setattr(slow._client, "call", busy_twice)
        async with asyncio.timeout(LIMIT):
            await anext(slow.batches())
            await new.take(Position.offset(0))
        # The embedded broker does not need them back to hand them out: the new owner may be through before.
        await until(lambda: len(new.offsets) == 3 and len(failures) == 2)
        assert new.offsets == [0, 1, 2]


@pytest.mark.parametrize("fault", ["silent", "cut off"])
async def test_an_owner_that_missed_the_take_over_leaves_it_to_the_newest(engine, connection, producer, lite, fault):
    async with (
        Wire(engine.endpoint) as wire,
        Connection(wire.endpoint) as away,
        owner(away, lite) as old,
        owner(connection, lite) as new,
    ):
        await old.take(Position.last())
        await send(producer, lite, 5)
        await until(lambda: len(old.offsets) == 5)
        wire.blackhole() if fault == "silent" else wire.cut()
        await new.take(Position.offset(5))
        await send(producer, lite, 5)
        await until(lambda: len(new.offsets) == 5)
        if fault == "silent":
            wire.pass_on()
        else:
            accepted = wire.accepted
            await wire.mend()
            await until(lambda: wire.accepted > accepted)
        async with busy(producer, lite, senders=1):
            await until(lambda: old.lost == 1)
            reached = len(new.offsets)
            await until(lambda: len(new.offsets) > reached + 100)
        assert old.offsets == [0, 1, 2, 3, 4]
        assert new.offsets[0] == 5
        assert consecutive(new.offsets)
        assert new.lost == 0
        assert (old.consumer.lite_topics, new.consumer.lite_topics) == (frozenset(), {SESSION})
