"""Closing: in bounded time, whole although it was cancelled, and said where it was forgotten."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import httpx
import pytest

from agentscope_rocketmq import RocketMQ
from agentscope_rocketmq.card import parse_card
from agentscope_rocketmq.config import Timeouts
from agentscope_rocketmq.errors import BrokerUnreachable, ClosedError
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from agentscope_rocketmq.rocketmq.lite import LiteConsumer, Position
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from tests.agents import Gate, make_blocked_agent, make_echo_agent
from tests.faults import Wire
from tests.services import card_for, reply, server_for
from tests.waiting import LIMIT, closed_port, take, until

# Seconds within which everything closes although nobody answers.
CLOSES = 30.0


@pytest.fixture
async def wire(engine):
    async with Wire(engine.endpoint) as wire:
        yield wire


async def a_producer(wire, _config, _make_topic):
    producer = Producer(Connection(wire.endpoint))
    await producer.start()
    return producer


async def a_group_consumer(wire, _config, make_topic):
    names = await make_topic("NORMAL")
    consumer = GroupConsumer(Connection(wire.endpoint), names.topic, names.group)
    await consumer.start()
    return consumer


async def a_lite_consumer(wire, _config, make_topic):
    names = await make_topic("LITE")
    consumer = LiteConsumer(Connection(wire.endpoint), names.topic, names.group)
    await consumer.start()
    await consumer.subscribe(["session"])
    return consumer


async def a_rocketmq(wire, config, make_topic):
    config = config.model_copy(update={"endpoint": wire.endpoint})
    rocketmq = RocketMQ(config, card_cache=None)
    rocketmq.kept = await rocketmq.client(card_for(config, (await make_topic("NORMAL")).topic))  # type: ignore[attr-defined]
    return rocketmq


async def a_server(wire, config, make_topic):
    config = config.model_copy(update={"endpoint": wire.endpoint, "timeouts": Timeouts(drain=1)})
    server = server_for(make_echo_agent, config, (await make_topic("NORMAL")).topic)
    await server.start()
    return server


@pytest.mark.parametrize("make", [a_producer, a_group_consumer, a_lite_consumer, a_rocketmq, a_server])
async def test_a_close_that_was_cancelled_goes_on_and_can_be_waited_for(wire, config, make_topic, make):
    wire.blackhole()
    wire.pass_on()
    before = asyncio.all_tasks()
    thing = await make(wire, config, make_topic)
    wire.blackhole()  # so that every farewell takes its time
    async with asyncio.timeout(CLOSES):
        closing = asyncio.create_task(thing.aclose())
        await asyncio.sleep(0.1)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await thing.aclose()
        await thing.aclose()
    wire.cut()
    wire.pass_on()
    await until(lambda: not ours(before))


def ours(before):
    return [
        task
        for task in asyncio.all_tasks() - before
        if task.get_name().startswith(("rocketmq", "lite[", "consumer[", "replies[", "bridge[", "a2a-", "connection["))
    ]


async def test_a_server_is_started_once_at_a_time(config, topic):
    server = server_for(make_echo_agent, config, topic)
    results = await asyncio.gather(server.start(), server.start(), return_exceptions=True)
    try:
        assert [type(result) for result in results] == [type(None), ClosedError]
        with pytest.raises(ClosedError, match="started already"):
            await server.serve()
        # The one that was there first serves on.
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{server.url}/.well-known/agent-card.json")).status_code == 200
    finally:
        await server.aclose()
    async with server, RocketMQ(config, card_cache=None) as rocketmq, await rocketmq.client(server.card) as client:
        assert await reply(client, "again") == "echo:again"


async def test_clients_over_json_rpc_end_with_their_rocketmq_too(config, topic):
    async with server_for(make_echo_agent, config, topic) as server:
        card = parse_card(server.card)
        kept = [entry for entry in card.supported_interfaces if entry.protocol_binding == "JSONRPC"]
        del card.supported_interfaces[:]
        card.supported_interfaces.extend(kept)
        async with RocketMQ(config, card_cache=None) as rocketmq:
            client = await rocketmq.client(card, allow_jsonrpc=True)
            assert await reply(client, "over HTTP") == "echo:over HTTP"
        assert client._transport.httpx_client.is_closed  # type: ignore[attr-defined]


async def test_what_is_dropped_without_a_close_says_so(config, topic):
    objects = [RocketMQ(config, card_cache=None)]
    clients = [await objects[0].client(card_for(config, topic, name="the weather"))]
    carriers = list(objects[0]._carriers.values())
    with pytest.warns(ResourceWarning, match="'the weather' was dropped"):
        drop(clients)
    with pytest.warns(ResourceWarning, match="RocketMQ object was dropped"):
        drop(objects)
    for connection, carrier in carriers:
        await carrier.aclose()
        await connection.aclose()


def drop(things):
    things.clear()
    gc.collect()


async def test_what_was_closed_is_dropped_in_silence(config, topic):
    async with RocketMQ(config, card_cache=None) as rocketmq:
        async with await rocketmq.client(card_for(config, topic)) as client:
            assert rocketmq.choice(client).binding == "RocketMQ"
        del client
        gc.collect()
        kept = await rocketmq.client(card_for(config, topic))
    del kept, rocketmq
    gc.collect()


async def test_calls_keep_to_their_time_while_nobody_answers(wire, make_topic, producer):
    loop = asyncio.get_running_loop()
    normal, lite = await make_topic("NORMAL"), await make_topic("LITE")
    async with (
        Connection(wire.endpoint) as connection,
        GroupConsumer(connection, normal.topic, normal.group) as group,
        LiteConsumer(connection, lite.topic, lite.group) as consumer,
    ):
        await consumer.subscribe(["session", "other"], at=Position.first())
        await producer.send(Message(topic=normal.topic, body=b"x"))
        await producer.send(Message(topic=lite.topic, lite_topic="session", body=b"x"))
        [leased], [batch] = await take(group.messages(), 1), await take(consumer.batches(), 1)
        wire.blackhole()
        # A refresh without an answer holds up what changes the set of subscriptions.
        consumer._refresh_now.set()
        await until(lambda: consumer._changes.refreshing)
        begun = loop.time()
        assert await group.ack(leased, timeout=1) is False
        await consumer.ack(batch.messages * 500, timeout=1)
        with pytest.raises(BrokerUnreachable):
            await consumer.subscribe(["another"], timeout=1)
        with pytest.raises(BrokerUnreachable):
            await consumer.unsubscribe(["other"])  # 3 s
        assert loop.time() - begun < 3 * 1 + 3 + 2
        assert consumer.lite_topics == {"session"}
        wire.pass_on()


@pytest.mark.parametrize("kind", [GroupConsumer, LiteConsumer])
async def test_a_start_takes_its_time_once_and_not_for_each_step(engine, make_topic, kind):
    loop = asyncio.get_running_loop()
    names = await make_topic("NORMAL" if kind is GroupConsumer else "LITE")
    async with Wire(engine.endpoint) as wire, Connection(wire.endpoint) as connection:
        consumer = kind(connection, names.topic, names.group, connect_timeout=4)
        consumer._client._on_established = wire.blackhole  # the first step works, the others do not
        begun = loop.time()
        with pytest.raises(BrokerUnreachable):
            await consumer.start()
        assert loop.time() - begun < 4 + 2 + 3  # and the farewell
        wire.pass_on()


async def test_a_response_may_be_closed_after_its_client(config, topic):
    gate = Gate()
    message = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hello"}]}
    body = {"jsonrpc": "2.0", "id": 1, "method": "SendStreamingMessage", "params": {"message": message}}
    async with server_for(make_blocked_agent(gate), config, topic), RocketMQ(config, card_cache=None) as rocketmq:
        client: Any = await rocketmq.client(card_for(config, topic))
        async with client._transport.httpx_client.stream("POST", client._transport.url, json=body) as response:
            assert await anext(response.aiter_lines())
            await rocketmq.aclose()
        gate.open.set()


async def test_a_closed_object_says_so(config):
    rocketmq = RocketMQ(config.model_copy(update={"endpoint": f"127.0.0.1:{closed_port()}"}), card_cache=None)
    await rocketmq.aclose()
    with pytest.raises(ClosedError, match="make a new one"):
        async with asyncio.timeout(LIMIT):
            await rocketmq.client(card_for(config, "T"))
    with pytest.raises(ClosedError, match="make a new one"):
        await rocketmq.__aenter__()
