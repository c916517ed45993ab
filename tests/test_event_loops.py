"""Objects live in one event loop, and say so to another."""

from __future__ import annotations

import asyncio

import pytest

from agentscope_rocketmq import RocketMQ
from agentscope_rocketmq.errors import WrongEventLoop
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from tests.agents import make_echo_agent
from tests.conftest import new_config, new_topic
from tests.services import card_for, reply, request, server_for
from tests.waiting import root_cause


@pytest.fixture
def config(engine):
    return asyncio.run(new_config(engine))


@pytest.fixture
def topic(engine):
    return asyncio.run(new_topic(engine)).topic


def test_a_rocketmq_object_of_another_loop_is_refused_with_what_to_do(config, topic):
    rocketmq = RocketMQ(config, card_cache=None)
    with asyncio.Runner() as home:
        client = home.run(rocketmq.client(card_for(config, topic)))

        async def elsewhere():
            for door in (rocketmq.client(card_for(config, topic)), rocketmq.aclose(), rocketmq.__aenter__()):
                with pytest.raises(WrongEventLoop, match=r"another event loop.*asyncio\.run"):
                    await door
            with pytest.raises(Exception, match=r"another event loop.*asyncio\.run") as caught:
                [event async for event in client.send_message(request("hello"))]
            assert isinstance(root_cause(caught.value), WrongEventLoop)

        asyncio.run(elsewhere())
        home.run(rocketmq.aclose())


def test_a_server_serves_in_one_loop_and_after_its_close_in_another(config, topic):
    server = server_for(make_echo_agent, config, topic)
    with asyncio.Runner() as home:
        home.run(server.start())

        async def elsewhere():
            for door in (server.start(), server.serve(), server.aclose()):
                with pytest.raises(WrongEventLoop, match="in its own loop"):
                    await door

        asyncio.run(elsewhere())
        home.run(server.aclose())

    async def again():
        async with server, RocketMQ(config, card_cache=None) as rocketmq, await rocketmq.client(server.card) as client:
            assert await reply(client, "again") == "echo:again"

    asyncio.run(again())


def test_the_loop_that_has_ended_is_said(engine, topic):
    connection = Connection(engine.endpoint)
    producer = Producer(connection)

    async def first():
        await producer.start()
        await producer.send(Message(topic=topic, body=b"x"))

    async def second():
        with pytest.raises(WrongEventLoop, match="which has ended"):
            await producer.send(Message(topic=topic, body=b"x"))

    asyncio.run(first())
    asyncio.run(second())
