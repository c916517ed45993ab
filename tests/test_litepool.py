"""Many LiteTopics in one process: as many client ids as the group's limits ask for, and each message of each."""

from __future__ import annotations

import asyncio

import pytest

from agentscope_rocketmq.rocketmq.lite import LiteLost, Position
from agentscope_rocketmq.rocketmq.litepool import LitePool
from agentscope_rocketmq.rocketmq.message import Message
from tests.waiting import LIMIT

NAMES = [f"session-{number}" for number in range(700)]


async def hear(pool, count):
    """So many messages, each acked; what was lost meanwhile."""
    heard, lost = [], []
    async with asyncio.timeout(2 * LIMIT):
        async for item in pool.batches():
            if isinstance(item, LiteLost):
                lost.append(item.lite_topic)
                continue
            heard += [(message.lite_topic, message.body().decode()) for message in item.messages]
            await pool.ack(item.messages)
            if len(heard) >= count:
                return heard, lost
    raise AssertionError


async def send_to_all(producer, lite, names):
    gate = asyncio.Semaphore(16)

    async def send(name):
        async with gate:
            await producer.send(Message(topic=lite.topic, lite_topic=name, body=name.encode()))

    await asyncio.gather(*map(send, names))


@pytest.mark.parametrize("provisioned", [True, False], ids=["provisioned", "nothing raised"])
async def test_all_of_many_are_heard_on_as_many_clients_as_it_takes(connection, producer, make_topic, provisioned):
    attributes = None if provisioned else {"lite.sub.model": "Exclusive"}
    lite = await make_topic("LITE", group_attributes=attributes)
    async with LitePool(connection, lite.topic, lite.group) as pool:
        await pool.subscribe(NAMES, at=Position.last())
        assert pool.clients == (1 if provisioned else 3)
        sending = asyncio.create_task(send_to_all(producer, lite, NAMES))
        heard, _ = await hear(pool, len(NAMES))
        await sending
        assert sorted(heard) == sorted((name, name) for name in NAMES)


async def test_what_is_left_or_lost_makes_room_for_others(connection, producer, make_topic):
    lite = await make_topic("LITE", group_attributes={"lite.sub.model": "Exclusive"})
    async with (
        LitePool(connection, lite.topic, lite.group) as pool,
        LitePool(connection, lite.topic, lite.group) as other,
    ):
        await pool.subscribe(NAMES[:300], at=Position.last())
        await pool.unsubscribe(NAMES[:10])
        await other.subscribe(NAMES[10:20], at=Position.last())
        await pool.subscribe(NAMES[300:310], at=Position.last())
        assert pool.clients == 1
        await send_to_all(producer, lite, NAMES[20:310])
        heard, lost = await hear(pool, 290)
        assert sorted(heard) == sorted((name, name) for name in NAMES[20:310])
        assert sorted(lost) == sorted(NAMES[10:20])
        await pool.subscribe(NAMES[310:320], at=Position.last())
        assert pool.clients == 1
