"""A session that sleeps past the expiration of its topic: a gap error, not old events and not wrong ones."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from agentscope_rocketmq import RocketMQ, RocketMQConfig
from agentscope_rocketmq.dev import ApacheRocketMQ, DevBroker
from agentscope_rocketmq.dev.embedded import broker as embedded
from agentscope_rocketmq.errors import ReplayGapError
from agentscope_rocketmq.provision import apply, plan
from agentscope_rocketmq.rocketmq.admin import Admin, TopicSettings
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.producer import Producer
from agentscope_rocketmq.survey import oldest_of
from tests.sessions import Agent, Listening, heard, texts

pytestmark = pytest.mark.xdist_group("own brokers")


@contextlib.asynccontextmanager
async def apache():
    """One that looks for expired LiteTopics all the time."""
    options = {"minLiteTTl": "1000", "liteTtlCheckInterval": "1000"}
    broker = ApacheRocketMQ(broker_options=options)
    await asyncio.to_thread(broker.start)
    try:
        yield broker.endpoint, broker.namesrv
    finally:
        await asyncio.to_thread(broker.stop)


@contextlib.asynccontextmanager
async def embedded_broker():
    async with DevBroker(port=0) as broker:
        yield broker.endpoint, broker.namesrv


@pytest.mark.parametrize("engine", [apache, embedded_broker], ids=["apache", "embedded"])
async def test_a_session_that_sleeps_past_its_expiration_is_a_gap(engine, monkeypatch):
    monkeypatch.setattr(embedded, "_TIDY_INTERVAL", 0.5)
    async with engine() as (endpoint, namesrv):
        config = RocketMQConfig(endpoint=endpoint, namesrv=namesrv)
        await apply(plan([], config), config)
        async with (
            RocketMQ(config, card_cache=None) as rocketmq,
            Connection(endpoint) as connection,
            Producer(connection) as producer,
        ):
            session = rocketmq.session("sleeper")
            await Agent(producer, config, "sleeper").say("1", "2", "3")
            cursor = (await heard(session, from_start=True))[1].cursor
            assert await texts(session, 1, after=cursor) == ["3"]
            async with Listening(session) as asleep:
                await asleep.count(0)
                await expire(config, config.reply_topic)
                await until_gone(session)
                with pytest.raises(ReplayGapError, match="Nothing is kept") as caught:
                    await heard(rocketmq.session("sleeper"), 1, after=cursor, observe=True)
                assert (caught.value.wanted, caught.value.oldest) == (cursor, None)
                await Agent(producer, config, "sleeper").say("of another life")
                error = await asleep.ended()
                assert isinstance(error, ReplayGapError)
                assert "began anew" in str(error)
            with pytest.raises(ReplayGapError) as caught:
                await heard(session, 1, after=cursor)
            assert caught.value.oldest is not None
            assert await texts(session, 1, after=caught.value.oldest) == ["of another life"]


async def expire(config, topic, *, minutes=1):
    """LiteTopics of the topic live so long after their last message: a minute is the shortest of a real one; -1 for ever."""
    async with Admin(config.namesrv) as admin:
        for broker in (await admin.brokers()).values():
            attributes = {"message.type": "LITE", "lite.topic.expiration": str(minutes)}
            await admin.put_topic(broker, TopicSettings(topic, attributes))


async def until_gone(session):
    # Looking sends nothing, so it keeps nothing alive.
    async with asyncio.timeout(240):
        while await session._look(lambda look: oldest_of(look, seconds=3.0)) is not None:
            await asyncio.sleep(1)
