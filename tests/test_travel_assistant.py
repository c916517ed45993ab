"""The travel assistant, whole: its agents over a real RocketMQ, and the demo as a user starts it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import uuid
from datetime import date, timedelta
from functools import partial
from pathlib import Path

import pytest
from agentscope.message import UserMsg

from agentscope_rocketmq import RocketMQ
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from examples.travel_assistant.agents import make_supervisor, make_travel_agent, stream_answer
from tests.agents import scripted, user_texts
from tests.conftest import unique
from tests.services import card_for, server_for
from tests.waiting import LIMIT, take

ROOT = Path(__file__).parents[1]
WEEKDAYS = "一二三四五六日"
# Bundled ones, and some that the example knows nothing about.
CITIES = ["杭州", "北京", "成都", "西安", "敦煌", "漠河", "景德镇", "拉萨"]
SESSION_GROUP = pytest.mark.xdist_group("the demo's own topics")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("MODEL", "offline")


@pytest.mark.parametrize("seed", range(4))
async def test_the_weather_found_is_in_the_message_on_the_travel_topic_and_in_the_plan(
    config, make_topic, connection, seed
):
    chance = random.Random(seed)
    city, today = chance.choice(CITIES), date(2026, 1, 1) + timedelta(days=chance.randrange(365))
    first = chance.randrange(0, 6)
    last = chance.randrange(first + 1, 7)
    monday = today - timedelta(days=today.weekday()) + timedelta(days=7)
    days = [monday + timedelta(days=number) for number in range(first, last + 1)]
    marker = f"marker-{uuid.UUID(int=chance.getrandbits(128)).hex[:10]}"
    highs = {day: chance.randrange(-10, 40) for day in days}
    asked = []

    def make_stand_in(_session):
        async def script(messages):
            asked.append(user_texts(messages)[-1])
            yield f"{city} 的天气 {marker}\n"
            for day in days:
                yield f"- {day.isoformat()} 周{WEEKDAYS[day.weekday()]}:晴,最高 {highs[day]}°C\n"

        return scripted(script, name="WeatherAgent")

    weather_topic, travel_topic = await make_topic("NORMAL"), await make_topic("NORMAL")
    other_group = unique("WatcherGroup")
    await _make_group(config, other_group)
    weather_card = card_for(config, weather_topic.topic, name="WeatherAgent")
    travel_card = card_for(config, travel_topic.topic, name="TravelAgent")
    async with (
        GroupConsumer(connection, travel_topic.topic, other_group) as watcher,
        server_for(make_stand_in, config, weather_topic.topic, card=weather_card),
        server_for(
            lambda session: make_travel_agent(session, today=lambda: today),
            config,
            travel_topic.topic,
            card=travel_card,
        ),
        RocketMQ(config, card_cache=None) as rocketmq,
        await rocketmq.agent(weather_card, session=f"trip-{seed}") as weather,
        await rocketmq.agent(travel_card, session=f"trip-{seed}") as travel,
    ):
        supervisor = make_supervisor(
            f"trip-{seed}",
            ask_weather=partial(stream_answer, weather),
            ask_travel=partial(stream_answer, travel),
            today=lambda: today,
        )
        question = f"帮我做一个下周{WEEKDAYS[first]}到下周{WEEKDAYS[last]}{city}周边自驾游方案"
        async with asyncio.timeout(LIMIT):
            events = [event async for event in supervisor.reply_stream(UserMsg(name="user", content=question))]
        deltas = [getattr(event, "delta", "") for event in events]
        plan_text = "".join(delta for delta in deltas if isinstance(delta, str))
        [request] = await take(watcher.messages(), 1)
        await watcher.ack(request)
    assert asked == [f"{city}下周{WEEKDAYS[first]}到周{WEEKDAYS[last]}的天气情况怎么样?"]
    on_the_wire = json.loads(json.loads(request.message.body())["requestBody"])
    sent = "".join(part["text"] for part in on_the_wire["params"]["message"]["parts"])
    assert marker in sent
    assert marker in plan_text
    for day in days:
        assert day.isoformat() in plan_text
        assert f"最高 {highs[day]}°C" in sent
        assert f"最高 {highs[day]}°C" in plan_text
    assert plan_text.count("住宿") >= len(days)


@SESSION_GROUP
def test_the_demo_plans_the_reference_trip_and_leaves_nothing_behind(engine):
    output = _demo(engine, "--ask", "帮我做一个下周三到下周日杭州周边自驾游方案")
    assert "杭州下周三到周日的天气情况怎么样?" in output
    assert "topic WeatherAgentTask" in output
    assert "topic TravelAgentTask" in output
    assert re.search(r"LiteTopic \S+ of WorkerAgentResponse", output)
    monday = date.today() - timedelta(days=date.today().weekday()) + timedelta(days=7)  # noqa: DTZ011
    plan_text = output[output.index("TravelAgent > ") :]
    for number in range(2, 7):
        day = monday + timedelta(days=number)
        assert f"{day.isoformat()} 周{WEEKDAYS[number]}" in plan_text
    for word in ("住宿", "美食", "景点", "天气"):
        assert plan_text.count(word) >= 5


@SESSION_GROUP
def test_the_demo_asks_only_the_weather_agent_about_weather(engine):
    output = _demo(engine, "--ask", "杭州明天天气怎么样")
    assert "topic WeatherAgentTask" in output
    assert "TravelAgent" not in output.replace("Starting WeatherAgent and TravelAgent", "")


@SESSION_GROUP
def test_the_demo_converses_at_its_prompt_in_english(engine):
    output = _demo(engine, said="What will the weather be like in Paris tomorrow?\nexit\n")
    assert "You > " in output
    assert "WeatherAgent > " in output
    assert "Paris" in output


def test_the_demo_brings_its_own_broker_unless_it_is_given_one():
    # Neither Java nor Maven is on this path.
    output = _demo(None, "--ask", "杭州明天天气怎么样", environ={"PATH": str(Path(sys.executable).parent)})
    assert "topic WeatherAgentTask" in output
    assert "°C" in output


def test_the_demo_killed_at_its_prompt_leaves_nothing_behind(tmp_path):
    run = uuid.uuid4().hex
    environ = {**os.environ, "MODEL": "offline", "TRAVEL_ASSISTANT_RUN": run, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "examples.travel_assistant"]
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL) as demo:
        assert demo.stdout is not None
        said = b""
        while b"You > " not in said:
            more = os.read(demo.stdout.fileno(), 4096)
            assert more, said
            said += more
        others = [os.pidfd_open(pid) for pid in _pids_of(run) if pid != demo.pid]
        assert len(others) == 4  # broker, two workers, supervisor
        demo.kill()
        for descriptor in others:
            ended, _, _ = select.select([descriptor], [], [], LIMIT)
            os.close(descriptor)
            assert ended


@SESSION_GROUP
def test_the_demo_through_gateways_survives_the_kill_of_the_one_that_answers(engine):
    run = uuid.uuid4().hex
    environ = {**os.environ, "ROCKETMQ_NAMESRV": engine.namesrv, "MODEL": "offline", "TRAVEL_ASSISTANT_RUN": run}
    question = "帮我做一个下周三到下周日杭州周边自驾游方案"
    command = [sys.executable, "-m", "examples.travel_assistant", "--engine", engine.endpoint, "--gateways", "2"]
    lines, gateway = [], 0
    with subprocess.Popen(
        [*command, "--ask", question],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            lines.append(line)
            if found := re.search(r"Gateway 1 is \S+, process (\d+)", line):
                gateway = int(found[1])
            # The supervisor has asked its first agent: the answer is under way.
            if line.startswith("[Supervisor → WeatherAgent"):
                os.kill(gateway, signal.SIGKILL)
    output = "".join(lines)
    assert demo.returncode == 0, output
    assert re.search(r"went on at another gateway: [1-9]", output), output
    assert _pids_of(run) == []
    for said in ("[Supervisor → WeatherAgent", "[WeatherAgent →", "[Supervisor → TravelAgent", "[TravelAgent →"):
        assert output.count(said) == 1
    plan_text = output[output.index("TravelAgent > ") :]
    for number in range(1, 6):
        assert plan_text.count(f"## 第 {number} 天") == 1


def _demo(engine, *arguments, said="", environ=None):
    run = uuid.uuid4().hex  # inherited by all processes of this run, and by no other's
    environ = {**os.environ, "MODEL": "offline", "TRAVEL_ASSISTANT_RUN": run, **(environ or {})}
    if engine is not None:
        environ["ROCKETMQ_NAMESRV"] = engine.namesrv
        arguments = ("--engine", engine.endpoint, *arguments)
    done = subprocess.run(
        [sys.executable, "-m", "examples.travel_assistant", *arguments],
        cwd=ROOT,
        env=environ,
        input=said,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert _pids_of(run) == []
    return done.stdout + done.stderr


def _pids_of(run):
    """The processes on this machine that carry the run's mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if run.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


async def _make_group(config, group):
    from agentscope_rocketmq.rocketmq.admin import Admin, GroupSettings

    async with Admin(config.namesrv) as admin:
        for broker in (await admin.brokers()).values():
            await admin.put_group(broker, GroupSettings(group))
