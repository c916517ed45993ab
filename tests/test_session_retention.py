"""Sessions whose oldest messages are not kept any more, on a broker that keeps them for seconds."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import SecretStr

from agentscope_rocketmq import RocketMQ, RocketMQConfig
from agentscope_rocketmq.dev import DevBroker
from agentscope_rocketmq.errors import ReplayGapError
from agentscope_rocketmq.provision import apply, plan
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.producer import Producer
from tests.sessions import Agent, texts

RETENTION = 6.0


@pytest.fixture
async def forgetful(monkeypatch):
    """Settings of a broker that keeps messages for `RETENTION` seconds, and a producer at it."""
    monkeypatch.setattr("agentscope_rocketmq.dev.embedded.broker._TIDY_INTERVAL", 0.2)
    async with DevBroker(port=0, retention=RETENTION) as broker:
        config = RocketMQConfig(
            endpoint=broker.endpoint, namesrv=broker.namesrv, a2a_secret=SecretStr("the secret of this deployment")
        )
        await apply(plan([], config), config)
        async with Connection(broker.endpoint) as connection, Producer(connection) as producer:
            yield config, producer


async def test_what_is_kept_of_a_response_can_be_had_when_its_beginning_is_gone(forgetful):
    config, producer = forgetful
    async with RocketMQ(config, card_cache=None) as rocketmq:
        session = rocketmq.session("trip", owner="alice")
        await session.announce()
        agent = Agent(producer, config, session.lite_topic)
        await agent.say(1, 2)
        await asyncio.sleep(RETENTION + 1)  # the time that it takes to be forgotten
        await agent.say(3, 4, 5)
        # Its record is gone, but its name is proof enough.
        assert await rocketmq.session("trip", owner="alice").recorded()
        assert not await rocketmq.session("trip", owner="bob").recorded()
        with pytest.raises(ReplayGapError) as caught:
            await texts(session, from_start=True)
        assert await texts(session, after=caught.value.oldest) == ["3", "4", "5"]
        assert await texts(session, tail=2) == ["4", "5"]
        assert await texts(session, tail=10) == ["3", "4", "5"]
