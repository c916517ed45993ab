"""The travel assistant with a Java agent in the place of its weather agent: nobody notices."""

from __future__ import annotations

import asyncio
import uuid
from datetime import date, timedelta
from functools import partial

import pytest
import pytest_asyncio
from agentscope.message import UserMsg

from examples.travel_assistant.agents import make_supervisor, make_travel_agent, stream_answer
from tests.agents import scripted, user_texts
from tests.conftest import new_topic
from tests.java.peers import JavaServer
from tests.services import Keeper, card_for, server_for
from tests.waiting import LIMIT

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("java travel")]

TODAY = date(2026, 11, 22)
DAYS = [TODAY + timedelta(days=number) for number in range(3, 8)]
WEATHER = "".join(["asked: {asked}\n", *(f"- {day.isoformat()}:晴,最高 {day.day}°C,降雨概率 10%\n" for day in DAYS)])
QUESTION = "帮我做一个下周三到下周日杭州周边自驾游方案"


def make_python_agent(_session):
    async def script(messages):
        for line in WEATHER.splitlines(keepends=True):
            yield line.replace("{asked}", user_texts(messages)[-1])

    return scripted(script, name="WeatherAgent")


@pytest.fixture
def _offline(monkeypatch):
    monkeypatch.setenv("MODEL", "offline")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def java_weather(engine, module_config):
    """Where the card of a Java agent is that tells that weather."""
    names = await new_topic(engine)
    async with JavaServer(module_config, names, name="WeatherAgent", answer=WEATHER) as server:
        yield server.url


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def python_weather(engine, module_config):
    """Where that of a Python one is."""
    names = await new_topic(engine)
    card = card_for(module_config, names.topic, name="WeatherAgent")
    async with server_for(make_python_agent, module_config, names.topic, card=card) as server:
        yield server.url


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def travel(engine, module_config):
    """Where that of the travel agent is."""
    names = await new_topic(engine)
    card = card_for(module_config, names.topic, name="TravelAgent")

    def make(session):
        return make_travel_agent(session, today=lambda: TODAY)

    async with server_for(make, module_config, names.topic, card=card) as server:
        yield server.url


async def conversation(config, weather_url, travel_url):
    """All that the supervisor says while it answers: what it asks its agents, what they answer, and the plan."""
    session = f"trip-{uuid.uuid4().hex}"
    async with (
        Keeper(config, card_cache=None) as rocketmq,
        await rocketmq.agent(weather_url, session=session) as weather,
        await rocketmq.agent(travel_url, session=session) as travel,
        asyncio.timeout(LIMIT),
    ):
        assert rocketmq.choice(weather).binding == "RocketMQ"
        supervisor = make_supervisor(
            session,
            ask_weather=partial(stream_answer, weather),
            ask_travel=partial(stream_answer, travel),
            today=lambda: TODAY,
        )
        events = [event async for event in supervisor.reply_stream(UserMsg(name="user", content=QUESTION))]
        deltas = [getattr(event, "delta", "") for event in events]
        return "".join(delta for delta in deltas if isinstance(delta, str))


@pytest.mark.usefixtures("_offline")
async def test_a_java_weather_agent_gives_the_same_trip(module_config, java_weather, python_weather, travel):
    with_python = await conversation(module_config, python_weather, travel)
    with_java = await conversation(module_config, java_weather, travel)
    assert with_java == with_python
    # The Java agent repeats its question: it has reached it, and what it answered has reached the travel agent.
    assert "asked: 杭州下周三到周日的天气情况怎么样?" in with_java
    for day in DAYS:
        # In its answer, in the request to the travel agent, and in the plan.
        assert with_java.count(f"最高 {day.day}°C") >= 3
