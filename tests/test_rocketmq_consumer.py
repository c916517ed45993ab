"""A consumer group shares a topic: leases, concurrency, redelivery, long polls."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from agentscope_rocketmq.errors import GroupNotFound, TopicNotFound
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from agentscope_rocketmq.rocketmq.message import Message
from tests.waiting import LIMIT, take


async def test_every_message_goes_to_exactly_one_consumer_of_the_group(connection, producer, make_topic):
    topic = await make_topic("NORMAL")
    sent = {str(number) for number in range(60)}
    taken: list[list[str]] = [[], []]
    everything = asyncio.Event()

    async def work(index, consumer):
        async for leased in consumer.messages():
            taken[index].append(leased.message.body().decode())
            await asyncio.sleep(0.02)  # leaves work for the other
            await consumer.ack(leased)
            if sum(map(len, taken)) == len(sent):
                everything.set()

    async with AsyncExitStack() as stack:
        workers = []
        for index in range(2):
            consumer = await stack.enter_async_context(
                GroupConsumer(connection, topic.topic, topic.group, concurrency=2)
            )
            workers.append(asyncio.create_task(work(index, consumer)))
        for number in sent:
            await producer.send(Message(topic=topic.topic, body=number.encode()))
        async with asyncio.timeout(LIMIT):
            await everything.wait()
        for worker in workers:
            worker.cancel()
    assert sorted(taken[0] + taken[1]) == sorted(sent)
    assert taken[0]
    assert taken[1]


async def test_a_full_consumer_leaves_the_backlog_on_the_broker(connection, producer, make_topic):
    topic = await make_topic("NORMAL")
    for number in range(12):
        await producer.send(Message(topic=topic.topic, body=str(number).encode()))
    async with GroupConsumer(connection, topic.topic, topic.group, concurrency=3) as consumer:
        first = await take(consumer.messages(), 3)
        with pytest.raises(TimeoutError):
            await take(consumer.messages(), 1, limit=2)
        taken = [leased.message.body() for leased in first]
        for leased in first:
            await consumer.ack(leased)
        while len(taken) < 12:
            [leased] = await take(consumer.messages(), 1)
            taken.append(leased.message.body())
            await consumer.ack(leased)
    assert sorted(taken) == sorted(str(number).encode() for number in range(12))


async def test_a_lease_is_renewed_while_the_work_takes_longer_than_the_lease(connection, producer, make_topic):
    topic = await make_topic("NORMAL")
    async with (
        GroupConsumer(connection, topic.topic, topic.group, lease=10, concurrency=1) as worker,
        GroupConsumer(connection, topic.topic, topic.group, lease=10, concurrency=1) as other,
    ):
        await producer.send(Message(topic=topic.topic, body=b"long work"))
        waiting = {
            asyncio.create_task(take(worker.messages(), 1)): worker,
            asyncio.create_task(take(other.messages(), 1)): other,
        }
        done, still = await asyncio.wait(waiting, timeout=LIMIT, return_when=asyncio.FIRST_COMPLETED)
        [taker] = done
        [leased] = taker.result()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(15):
                await next(iter(still))
        assert not leased.lost.is_set()
        assert await waiting[taker].ack(leased)


async def test_a_released_message_is_delivered_again_with_a_higher_attempt(connection, producer, make_topic):
    topic = await make_topic("NORMAL")
    async with GroupConsumer(connection, topic.topic, topic.group) as consumer:
        await producer.send(Message(topic=topic.topic, body=b"x"))
        [first] = await take(consumer.messages(), 1)
        assert await consumer.release(first)
        [second] = await take(consumer.messages(), 1)
        assert second.message.message_id == first.message.message_id
        assert (first.message.attempt, second.message.attempt) == (1, 2)
        assert await consumer.ack(second)


async def test_what_a_stopped_consumer_had_goes_to_another(connection, producer, make_topic):
    topic = await make_topic("NORMAL")
    async with GroupConsumer(connection, topic.topic, topic.group) as stopped:
        await producer.send(Message(topic=topic.topic, body=b"unfinished"))
        await take(stopped.messages(), 1)
    async with GroupConsumer(connection, topic.topic, topic.group) as other:
        [leased] = await take(other.messages(), 1)
        assert leased.message.body() == b"unfinished"
        assert await other.ack(leased)


async def test_messages_one_at_a_time_never_wait_for_the_end_of_a_long_poll(connection, producer, make_topic):
    # With one poll in flight about one in a hundred waits for seconds; the poller's stagger bounds that to about one.
    topic = await make_topic("NORMAL")
    loop = asyncio.get_running_loop()
    slowest = 0.0
    async with GroupConsumer(connection, topic.topic, topic.group) as consumer:
        messages = consumer.messages()
        for number in range(300):
            begun = loop.time()
            await producer.send(Message(topic=topic.topic, body=str(number).encode()))
            [leased] = await take(messages, 1)
            slowest = max(slowest, loop.time() - begun)
            assert leased.message.body() == str(number).encode()
            await consumer.ack(leased)
    assert slowest < 3.5  # a lost wake-up with one poll costs 5 s and more


async def test_an_unknown_topic_or_group_fails_the_start(connection, make_topic):
    topic = await make_topic("NORMAL")
    with pytest.raises(TopicNotFound, match="NoSuchTopic"):
        await GroupConsumer(connection, "NoSuchTopic", topic.group).start()
    with pytest.raises(GroupNotFound, match="NoSuchGroup"):
        await GroupConsumer(connection, topic.topic, "NoSuchGroup").start()
