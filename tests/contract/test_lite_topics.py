"""LiteTopics: order, one batch at a time, seeking, sharing and taking over."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import pytest

from agentscope_rocketmq.rocketmq.admin import Admin, GroupSettings
from agentscope_rocketmq.rocketmq.protocol import definition
from tests.conftest import Names
from tests.contract.wire import LIMIT, Code, attempts, bodies, offsets
from tests.waiting import until

MIN, MAX, LAST = (definition.OffsetOption.Policy.Value(name) for name in ("MIN", "MAX", "LAST"))


def fresh() -> str:
    return f"s-{uuid.uuid4().hex}"


@pytest.fixture
async def lite(make):
    return await make("LITE")


@pytest.fixture
async def reader(lite_consumer, lite):
    return await lite_consumer(lite)


async def subscribe(one, lite, *names, **option):
    status = await one.sync(lite.group, lite.topic, "PARTIAL_ADD", list(names), **option)
    assert status.code == Code.OK, status


async def drain(one, lite, count):
    """Receive and ack until there are so many."""
    got: list[Any] = []
    async with asyncio.timeout(LIMIT):
        while len(got) < count:
            messages = await one.take(lite.group, lite.topic)
            await one.ack(lite.group, lite.topic, messages)
            got += messages
    return got


@pytest.fixture
async def observer(target, lite_consumer, lite):
    """A reader of the same LITE topic in a group of its own, and that group."""
    names = Names(lite.topic, f"{lite.group}_OBSERVER")
    attributes = {"lite.bind.topic": lite.topic, "lite.sub.model": "Exclusive"}
    async with Admin(target.namesrv) as admin:
        for broker in (await admin.brokers()).values():
            await admin.put_group(broker, GroupSettings(names.group, attributes))
    return await lite_consumer(names), names


async def nothing_comes(one, lite):
    _, messages = await one.poll(lite.group, lite.topic)
    assert bodies(messages) == []


async def test_a_lite_topic_is_made_by_its_first_message_and_counts_from_zero(producer, reader, lite):
    name = fresh()
    await producer.send_lite(lite.topic, name, *range(40))
    await subscribe(reader, lite, name, policy=MIN)
    got = await drain(reader, lite, 40)
    assert offsets(got) == list(range(40))
    assert bodies(got) == [str(number) for number in range(40)]
    assert {item.system_properties.lite_topic for item in got} == {name}
    assert {item.system_properties.message_type for item in got} == {definition.MessageType.LITE}


async def test_a_lite_topic_is_made_by_its_first_subscriber(producer, reader, lite):
    name = fresh()
    await subscribe(reader, lite, name)
    poll = asyncio.create_task(reader.take(lite.group, lite.topic))
    await producer.send_lite(lite.topic, name, "first")
    assert offsets(await poll) == [0]


async def test_one_batch_of_a_lite_topic_is_out_until_all_of_it_is_acked(producer, reader, lite):
    name = fresh()
    await subscribe(reader, lite, name)
    await producer.send_lite(lite.topic, name, *range(40))
    batch = await reader.take(lite.group, lite.topic, count=50)
    assert 1 <= len(batch) <= 32
    await reader.ack(lite.group, lite.topic, batch[1:])
    await nothing_comes(reader, lite)
    await reader.ack(lite.group, lite.topic, batch[:1])
    rest = await drain(reader, lite, 40 - len(batch))
    assert offsets(batch + rest) == list(range(40))


async def test_a_batch_whose_time_is_over_comes_again_from_the_first_unacked_message(producer, reader, lite):
    name = fresh()
    await subscribe(reader, lite, name)
    await producer.send_lite(lite.topic, name, *range(4))
    batch = await reader.take(lite.group, lite.topic, 4, invisible=20)
    assert offsets(batch) == [0, 1, 2, 3]
    await reader.ack(lite.group, lite.topic, batch[:2])
    for item in batch[2:]:
        assert (await reader.hide(lite.group, lite.topic, item, 1)).status.code == Code.OK
    again = await reader.take(lite.group, lite.topic, 2)
    assert (offsets(again), attempts(again)) == ([2, 3], [2, 2])


async def test_what_was_acked_behind_an_unacked_message_comes_again_with_it(producer, reader, lite):
    name = fresh()
    await subscribe(reader, lite, name)
    await producer.send_lite(lite.topic, name, *range(5))
    batch = await reader.take(lite.group, lite.topic, 5, invisible=20)
    assert offsets(batch) == [0, 1, 2, 3, 4]
    await reader.ack(lite.group, lite.topic, [batch[0], batch[2], batch[4]])
    for item in (batch[1], batch[3]):
        assert (await reader.hide(lite.group, lite.topic, item, 1)).status.code == Code.OK
    again = await reader.take(lite.group, lite.topic, 4)
    assert (offsets(again), attempts(again)) == ([1, 2, 3, 4], [2, 2, 2, 2])


async def test_a_repeated_try_gets_its_batch_again(producer, reader, lite):
    name = fresh()
    await subscribe(reader, lite, name)
    await producer.send_lite(lite.topic, name, *range(3))
    attempt_id = uuid.uuid4().hex
    batch = await reader.take(lite.group, lite.topic, 3, attempt_id=attempt_id)
    await nothing_comes(reader, lite)
    await producer.send_lite(lite.topic, name, "wakes the poll")
    again = await reader.take(lite.group, lite.topic, 3, attempt_id=attempt_id)
    assert offsets(again)[:3] == offsets(batch)
    assert attempts(again) == [1] * len(again)


async def test_only_what_is_subscribed_comes(target, producer, reader, lite):
    mine, theirs = fresh(), fresh()
    await subscribe(reader, lite, mine)
    await producer.send_lite(lite.topic, theirs, "not for me")
    await producer.send_lite(lite.topic, mine, "for me")
    got = await drain(reader, lite, 1)
    assert bodies(got) == ["for me"]
    await reader.sync(lite.group, lite.topic, "PARTIAL_REMOVE", [mine])
    await producer.send_lite(lite.topic, mine, "no longer")
    _, messages = await reader.poll(lite.group, lite.topic)
    assert bodies(messages) == [] or (not target.differs("after-unsubscribing") and bodies(messages) == ["no longer"])


async def test_a_complete_set_replaces_the_former_one(producer, reader, lite):
    dropped, kept, added = fresh(), fresh(), fresh()
    await subscribe(reader, lite, dropped, kept)
    assert (await reader.sync(lite.group, lite.topic, "COMPLETE_ADD", [kept, added])).code == Code.OK
    for name in (dropped, kept, added):
        await producer.send_lite(lite.topic, name, name)
    assert sorted(bodies(await drain(reader, lite, 2))) == sorted([kept, added])
    assert (await reader.sync(lite.group, lite.topic, "COMPLETE_REMOVE", [])).code == Code.OK
    await producer.send_lite(lite.topic, kept, "to nobody")
    await nothing_comes(reader, lite)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"offset": 3}, [3, 4, 5]),
        ({"offset": 0}, [0, 1, 2, 3, 4, 5]),
        ({"policy": MIN}, [0, 1, 2, 3, 4, 5]),
        ({"policy": MAX}, []),
        ({"policy": LAST}, [4, 5]),
        ({"tail_n": 2}, [2, 3, 4, 5]),
        ({"tail_n": 100}, [0, 1, 2, 3, 4, 5]),
        ({"offset": 1_000_000}, []),
    ],
    ids=str,
)
async def test_a_subscription_seeks(producer, lite_consumer, lite, observer, option, expected):
    name = fresh()
    witness, names = observer
    first, second = await lite_consumer(lite), await lite_consumer(lite)
    await subscribe(first, lite, name, policy=MIN)
    await producer.send_lite(lite.topic, name, *range(4))
    await drain(first, lite, 4)
    await first.sync(lite.group, lite.topic, "COMPLETE_REMOVE", [])
    await producer.send_lite(lite.topic, name, 4, 5)
    # A real broker puts a message into its LiteTopic a moment after it has taken it, and MAX is before that.
    await subscribe(witness, names, name, policy=MIN)
    await drain(witness, names, 6)
    await subscribe(second, lite, name, **option)
    if expected:
        assert offsets(await drain(second, lite, len(expected))) == expected
    else:
        await nothing_comes(second, lite)
    await producer.send_lite(lite.topic, name, "live")
    live = await drain(second, lite, 1)
    assert (offsets(live), bodies(live)) == ([6], ["live"])


async def test_a_seek_by_time(target, producer, reader, lite):
    name = fresh()
    await producer.send_lite(lite.topic, name, "old")
    between = int(time.time() * 1000) + 2
    await until(lambda: time.time() * 1000 > between)
    await producer.send_lite(lite.topic, name, "new")
    await subscribe(reader, lite, name, timestamp=between)
    got = await drain(reader, lite, 1 if target.differs("seek-by-time") else 2)
    assert bodies(got) == (["new"] if target.differs("seek-by-time") else ["old", "new"])


async def test_a_seek_to_the_committed_offset_with_a_batch_out(target, producer, reader, lite):
    name = fresh()
    await subscribe(reader, lite, name)
    await producer.send_lite(lite.topic, name, *range(3))
    await reader.take(lite.group, lite.topic, 3)
    await reader.sync(lite.group, lite.topic, "PARTIAL_REMOVE", [name])
    await subscribe(reader, lite, name, policy=MIN)
    if target.differs("seek-to-committed"):
        assert offsets(await drain(reader, lite, 3)) == [0, 1, 2]
    else:
        await nothing_comes(reader, lite)


async def test_in_an_exclusive_group_a_lite_topic_is_taken_over_with_its_batch_out(producer, lite_consumer, lite):
    first, second, name = await lite_consumer(lite), await lite_consumer(lite), fresh()
    await subscribe(first, lite, name)
    await producer.send_lite(lite.topic, name, *range(6))
    batch = await first.take(lite.group, lite.topic, 6)
    await first.ack(lite.group, lite.topic, batch[:3])
    await subscribe(second, lite, name, offset=2)
    async with asyncio.timeout(LIMIT):
        command = await first.commands.get()
    assert command.notify_unsubscribe_lite_command.lite_topic == name
    got = await drain(second, lite, 4)
    assert offsets(got) == [2, 3, 4, 5]
    late = await first.ack(lite.group, lite.topic, batch[3:])
    assert late.status.code == Code.OK
    await producer.send_lite(lite.topic, name, "live")
    assert offsets(await drain(second, lite, 1)) == [6]
    await nothing_comes(first, lite)


async def test_a_plain_take_over_waits_for_the_batch_that_is_out(producer, lite_consumer, lite):
    first, second, name = await lite_consumer(lite), await lite_consumer(lite), fresh()
    await subscribe(first, lite, name)
    await producer.send_lite(lite.topic, name, *range(2))
    await first.take(lite.group, lite.topic, 2, invisible=10)
    await subscribe(second, lite, name)
    await nothing_comes(second, lite)
    assert offsets(await drain(second, lite, 2)) == [0, 1]


async def test_a_shared_group_gives_each_batch_to_one_of_its_clients(producer, lite_consumer, make):
    lite = await make("LITE", group_attributes={"lite.sub.model": "Shared"})
    readers = [await lite_consumer(lite), await lite_consumer(lite)]
    name = fresh()
    for one in readers:
        await subscribe(one, lite, name)
    assert all(one.commands.empty() for one in readers)
    got: list[int] = []

    async def read(one):
        while len(got) < 30:
            _, messages = await one.poll(lite.group, lite.topic, count=4)
            got.extend(offsets(messages))
            if messages:
                await one.ack(lite.group, lite.topic, messages)

    reading = [asyncio.create_task(read(one)) for one in readers]
    await producer.send_lite(lite.topic, name, *range(30))
    async with asyncio.timeout(2 * LIMIT):
        await asyncio.gather(*reading)
    assert got == list(range(30))


async def test_each_group_has_its_own_place(producer, lite_consumer, lite, observer):
    live, name = await lite_consumer(lite), fresh()
    watching, names = observer
    await subscribe(live, lite, name)
    await producer.send_lite(lite.topic, name, *range(3))
    assert offsets(await drain(live, lite, 3)) == [0, 1, 2]
    await subscribe(watching, names, name, policy=MIN)
    assert offsets(await drain(watching, names, 3)) == [0, 1, 2]
    await producer.send_lite(lite.topic, name, 3)
    assert offsets(await drain(live, lite, 1)) == offsets(await drain(watching, names, 1)) == [3]
    assert live.commands.empty()


async def test_an_ack_must_name_its_lite_topic(target, producer, reader, lite):
    name = fresh()
    await subscribe(reader, lite, name)
    await producer.send_lite(lite.topic, name, *range(2))
    batch = await reader.take(lite.group, lite.topic, 2)
    answer = await reader.ack(lite.group, lite.topic, batch, name_lite_topic=False)
    codes = {entry.status.code for entry in answer.entries}
    if target.differs("lite-ack-unnamed"):
        assert codes == {Code.INVALID_RECEIPT_HANDLE}
    else:
        assert codes <= {Code.OK, Code.INTERNAL_SERVER_ERROR}
    await producer.send_lite(lite.topic, name, "waits")
    await nothing_comes(reader, lite)
    await reader.ack(lite.group, lite.topic, batch)
    assert bodies(await drain(reader, lite, 1)) == ["waits"]


async def test_a_client_that_leaves_takes_its_subscriptions_along(producer, lite_consumer, lite):
    name = fresh()
    first = await lite_consumer(lite)
    await subscribe(first, lite, name)
    await first.cut()
    second = await lite_consumer(lite)
    await subscribe(second, lite, name)
    await producer.send_lite(lite.topic, name, *range(3))
    assert offsets(await drain(second, lite, 3)) == [0, 1, 2]


async def test_a_thousand_lite_topics_of_one_client_all_deliver(producer, reader, lite):
    names = [fresh() for _ in range(1000)]
    for start in range(0, len(names), 200):
        await subscribe(reader, lite, *names[start : start + 200])
    gate = asyncio.Semaphore(8)

    async def send(name):
        async with gate:
            await producer.send_lite(lite.topic, name, name)

    sending = asyncio.gather(*map(send, names))
    got = await drain(reader, lite, len(names))
    await sending
    assert sorted(bodies(got)) == sorted(names)
    assert all(item.system_properties.lite_topic == item.body.decode() for item in got)
