"""Ordinary topics: what is sent arrives, is leased, acked, hidden and given up."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

from agentscope_rocketmq.rocketmq.protocol import definition, service
from tests.contract.wire import Code, attempts, bodies, message, resource


async def test_a_message_arrives_as_it_was_sent(producer, consumer, make):
    names = await make()
    sent = message(names.topic, "grüß dich", tag="t", keys=["k1", "k2"], message_id="ID-1")
    sent.user_properties.update({"a": "1", "b": "zwei"})
    answer = await producer.send(sent)
    assert answer.status.code == Code.OK
    assert [entry.message_id for entry in answer.entries] == ["ID-1"]
    one = await consumer(names)
    (got,) = await one.take(names.group, names.topic)
    system = got.system_properties
    assert (got.topic.name, got.body.decode(), dict(got.user_properties)) == (
        names.topic,
        "grüß dich",
        {"a": "1", "b": "zwei"},
    )
    assert (system.tag, list(system.keys), system.message_id) == ("t", ["k1", "k2"], "ID-1")
    assert (system.message_type, system.delivery_attempt) == (definition.MessageType.NORMAL, 1)
    assert system.body_encoding == definition.Encoding.IDENTITY
    assert system.born_timestamp.ToMilliseconds() == sent.system_properties.born_timestamp.ToMilliseconds()
    assert abs(system.store_timestamp.ToMilliseconds() - system.born_timestamp.ToMilliseconds()) < 60_000
    assert system.body_digest.type == definition.DigestType.MD5
    assert system.body_digest.checksum.lower() == hashlib.md5("grüß dich".encode()).hexdigest()
    assert system.receipt_handle
    assert system.store_host
    assert system.born_host


async def test_a_compressed_body_is_passed_on_untouched(producer, consumer, make):
    names = await make()
    await producer.send(message(names.topic, b"\x1f\x8bnot really", body_encoding=definition.Encoding.GZIP))
    (got,) = await (await consumer(names)).take(names.group, names.topic)
    assert (got.body, got.system_properties.body_encoding) == (b"\x1f\x8bnot really", definition.Encoding.GZIP)


async def test_a_body_of_4_mib_passes(producer, consumer, make):
    names, body = await make(), bytes(range(256)) * 16 * 1024
    assert (await producer.send(message(names.topic, body))).status.code == Code.OK
    (got,) = await (await consumer(names)).take(names.group, names.topic)
    assert got.body == body


async def test_a_batch_is_delivered_one_by_one(target, producer, consumer, make):
    names = await make()
    sent = [message(names.topic, str(number)) for number in range(5)]
    answer = await producer.send(*sent)
    assert answer.status.code == Code.OK
    ids = [item.system_properties.message_id for item in sent]
    expected = ids if target.differs("batch-entries") else [",".join(ids)]
    assert [entry.message_id for entry in answer.entries] == expected
    got = await (await consumer(names)).take(names.group, names.topic, 5)
    assert sorted(bodies(got)) == ["0", "1", "2", "3", "4"]


async def test_a_waiting_poll_is_woken(producer, consumer, make):
    names = await make()
    one = await consumer(names)
    polls = [asyncio.create_task(one.poll(names.group, names.topic, wait=20)) for _ in range(4)]
    done: set[asyncio.Task[Any]] = set()
    while not done:
        # A real broker may miss a wake-up while a poll is being registered.
        await producer.send(message(names.topic, "wake up"))
        done, _ = await asyncio.wait(polls, timeout=3, return_when=asyncio.FIRST_COMPLETED)
    # One that is not woken ends after its 20 s, with nothing.
    for poll in done:
        _, messages = await poll
        assert set(bodies(messages)) == {"wake up"}
    for poll in polls:
        poll.cancel()
    await asyncio.gather(*polls, return_exceptions=True)


async def test_a_poll_lasts_5_seconds_at_least(consumer, make):
    names = await make()
    one = await consumer(names)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    status, messages = await one.poll(names.group, names.topic, wait=0.1)
    assert (status.code, messages) == (Code.MESSAGE_NOT_FOUND, [])
    assert loop.time() - begun > 4.5


async def test_an_acked_message_is_done_and_others_come_again_with_a_higher_attempt(producer, consumer, make):
    names = await make()
    for number in range(4):
        await producer.send(message(names.topic, str(number)))
    one = await consumer(names)
    got = await one.take(names.group, names.topic, 4)
    assert attempts(got) == [1] * 4
    by_body = dict(zip(bodies(got), got, strict=True))
    answer = await one.ack(names.group, names.topic, [by_body["0"], by_body["2"]])
    assert [entry.status.code for entry in answer.entries] == [Code.OK, Code.OK]
    for body in ("1", "3"):
        hidden = await one.hide(names.group, names.topic, by_body[body], 1)
        assert hidden.status.code == Code.OK
        assert hidden.receipt_handle != by_body[body].system_properties.receipt_handle
    again = await one.take(names.group, names.topic, 2)
    assert sorted(bodies(again)) == ["1", "3"]
    assert attempts(again) == [2, 2]
    assert (await one.ack(names.group, names.topic, again)).status.code == Code.OK
    _, messages = await one.poll(names.group, names.topic)
    assert messages == []


async def test_a_hidden_message_is_acked_with_its_new_handle(producer, consumer, make):
    names = await make()
    await producer.send(message(names.topic))
    one = await consumer(names)
    (got,) = await one.take(names.group, names.topic, invisible=10)
    hidden = await one.hide(names.group, names.topic, got, 2)
    got.system_properties.receipt_handle = hidden.receipt_handle
    assert (await one.ack(names.group, names.topic, [got])).status.code == Code.OK
    _, messages = await one.poll(names.group, names.topic)
    assert messages == []


async def test_acking_twice_is_no_error(producer, consumer, make):
    names = await make()
    await producer.send(message(names.topic))
    one = await consumer(names)
    got = await one.take(names.group, names.topic)
    assert (await one.ack(names.group, names.topic, got)).status.code == Code.OK
    assert (await one.ack(names.group, names.topic, got)).status.code == Code.OK


async def test_an_unacked_message_comes_again_when_its_time_is_over_and_its_handle_is_void(producer, consumer, make):
    names = await make()
    await producer.send(message(names.topic))
    one = await consumer(names)
    (got,) = await one.take(names.group, names.topic, invisible=10)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    (again,) = await one.take(names.group, names.topic)
    assert loop.time() - begun > 8
    assert attempts([again]) == [2]
    answer = await one.ack(names.group, names.topic, [got])
    assert [entry.status.code for entry in answer.entries] == [Code.INVALID_RECEIPT_HANDLE]


async def test_each_group_gets_every_message_and_shares_it_among_its_consumers(producer, consumer, make):
    names, other = await make(), await make()
    readers = [(names.group, await consumer(names)) for _ in range(2)] + [(other.group, await consumer(other))]
    got: dict[str, list[str]] = {names.group: [], other.group: []}

    async def read(group, one):
        while len(got[group]) < 20:
            _, messages = await one.poll(group, names.topic, count=3)
            got[group] += bodies(messages)
            if messages:
                await one.ack(group, names.topic, messages)

    reading = asyncio.gather(*(read(group, one) for group, one in readers))
    for number in range(20):
        await producer.send(message(names.topic, str(number)))
    async with asyncio.timeout(60):
        await reading
    for found in got.values():
        assert sorted(found, key=int) == [str(number) for number in range(20)]


async def test_tags_are_filtered_for_the_group(producer, consumer, make):
    names = await make()
    for tag in ("red", "green", "blue", "red"):
        await producer.send(message(names.topic, tag, tag=tag))
    await producer.send(message(names.topic, "none"))
    got = await (await consumer(names)).take(names.group, names.topic, 3, tags="red || blue")
    assert sorted(bodies(got)) == ["blue", "red", "red"]


async def test_whichever_queue_a_poll_names_it_brings_messages_of_all(producer, consumer, make):
    names = await make()
    for number in range(16):
        await producer.send(message(names.topic, str(number)))
    got = await (await consumer(names)).take(names.group, names.topic, 16, queue=3)
    assert sorted(bodies(got), key=int) == [str(number) for number in range(16)]
    assert len({item.system_properties.queue_id for item in got}) > 1


async def test_a_dead_letter_is_not_delivered_again(producer, consumer, make):
    names = await make()
    await producer.send(message(names.topic))
    one = await consumer(names)
    (got,) = await one.take(names.group, names.topic)
    request = service.ForwardMessageToDeadLetterQueueRequest(
        group=resource(names.group),
        topic=resource(names.topic),
        receipt_handle=got.system_properties.receipt_handle,
        message_id=got.system_properties.message_id,
        delivery_attempt=1,
        max_delivery_attempts=1,
    )
    assert (await one.call("ForwardMessageToDeadLetterQueue", request)).status.code == Code.OK
    _, messages = await one.poll(names.group, names.topic)
    assert messages == []


async def test_priorities_come_from_the_top_first_in_first_out_within_one(producer, consumer, make):
    names = await make("PRIORITY")
    for priority in (0, 3, 7, 3, 0, 99):
        await producer.send(message(names.topic, str(priority), priority=priority))
    one = await consumer(names)
    got = []
    for _ in range(6):
        got += await one.take(names.group, names.topic, count=1)
    assert bodies(got) == ["7", "99", "3", "3", "0", "0"]


async def test_a_priority_topic_takes_no_normal_messages(producer, make):
    names = await make("PRIORITY")
    answer = await producer.send(message(names.topic))
    assert answer.status.code == Code.MESSAGE_PROPERTY_CONFLICT_WITH_TYPE
    assert "the expected type is PRIORITY, but actual type is NORMAL" in answer.status.message


async def test_messages_of_one_group_share_a_queue_and_keep_their_order(producer, consumer, make):
    names = await make("FIFO")
    for number in range(10):
        await producer.send(message(names.topic, str(number), message_group="g"))
    got = await (await consumer(names)).take(names.group, names.topic, 10)
    assert len({item.system_properties.queue_id for item in got}) == 1
    assert [item.system_properties.queue_offset for item in got] == list(range(10))
    assert bodies(got) == [str(number) for number in range(10)]
    assert {item.system_properties.message_group for item in got} == {"g"}
