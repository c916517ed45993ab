"""The three agents of the travel assistant on their offline model, and on the real model classes."""

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator, Callable
from datetime import date
from typing import Any

import pytest
from agentscope.agent import Agent, ContextConfig
from agentscope.message import Msg, TextBlock, UserMsg
from agentscope.model import ChatResponse, DashScopeChatModel, OpenAIChatModel
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from examples.travel_assistant.agents import (
    make_supervisor,
    make_travel_agent,
    make_weather_agent,
    stream_answer,
)
from examples.travel_assistant.models import choose_model
from examples.travel_assistant.offline_model import OfflineModel, Say, Turn
from examples.travel_assistant.plan import is_wet
from examples.travel_assistant.terminal import Route, Terminal
from examples.travel_assistant.trip import read_request, weather_of_days
from examples.travel_assistant.understanding import understand
from examples.travel_assistant.weather import OpenMeteo

TODAY = date(2026, 11, 22)
Ask = Callable[[str], AsyncIterator[str]]
REFERENCE = "帮我做一个下周三到下周日杭州周边自驾游方案"
MARKER = "marker-7f3a"


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("MODEL", "offline")


class Remote:
    """Stands for an agent in another process: remembers what it was asked, and answers in small pieces."""

    def __init__(self, answer: str | Exception) -> None:
        self.asked: list[str] = []
        self._answer = answer

    async def __call__(self, text: str) -> AsyncIterator[str]:
        self.asked.append(text)
        if isinstance(self._answer, Exception):
            raise self._answer
        for start in range(0, len(self._answer), 7):
            yield self._answer[start : start + 7]


def supervisor(weather: Ask, travel: Ask) -> Agent:
    return make_supervisor("s", ask_weather=weather, ask_travel=travel, today=lambda: TODAY)


async def ask(agent: Agent, text: str) -> str:
    reply = await agent.reply(UserMsg(name="user", content=text))
    return reply.get_text_content() or ""


def no_open_meteo() -> OpenMeteo:
    return OpenMeteo(forecast_url="http://127.0.0.1:9", geocoding_url="http://127.0.0.1:9")


# --- the supervisor --------------------------------------------------------------------------------------------------


async def test_a_trip_asks_for_the_weather_first_and_carries_it_to_the_travel_agent():
    weather = Remote(f"{MARKER}\n- 周三 12.25°C\n来源:标记")
    travel = Remote("plan")
    await ask(supervisor(weather, travel), REFERENCE)
    assert weather.asked == ["杭州下周三到周日的天气情况怎么样?"]
    (request,) = travel.asked
    assert request.endswith(f"{MARKER}\n- 周三 12.25°C\n来源:标记")
    assert "杭州" in request
    assert "2026-11-25到2026-11-29" in request
    assert REFERENCE in request


@pytest.mark.parametrize(
    ("question", "passed_on"),
    [
        ("杭州明天天气怎么样", "杭州明天的天气情况怎么样?"),
        ("喀什这周末冷吗", "喀什这周末的天气情况怎么样?"),
        ("上海天气", "上海今天到后天的天气情况怎么样?"),
        ("What's the weather in Paris tomorrow?", "What will the weather be like in Paris tomorrow?"),
        (
            "Will it rain in Cape Town from Friday to Sunday?",
            "What will the weather be like in Cape Town from Friday to Sunday?",
        ),
    ],
)
async def test_a_weather_question_goes_to_the_weather_agent_alone(question, passed_on):
    weather, travel = Remote("sunny"), Remote("plan")
    await ask(supervisor(weather, travel), question)
    assert (weather.asked, travel.asked) == ([passed_on], [])


@pytest.mark.parametrize(("question", "answer"), [("你好", "WeatherAgent"), ("hello", "Plan a road trip")])
async def test_anything_else_is_answered_by_the_supervisor(question, answer):
    weather, travel = Remote("sunny"), Remote("plan")
    assert answer in await ask(supervisor(weather, travel), question)
    assert weather.asked == travel.asked == []


async def test_a_missing_city_is_asked_for_and_then_used():
    weather, travel = Remote("sunny"), Remote("plan")
    agent = supervisor(weather, travel)
    assert "哪个城市" in await ask(agent, "明天天气怎么样")
    await ask(agent, "阿尔山")
    assert weather.asked == ["阿尔山明天的天气情况怎么样?"]


async def test_a_conversation_goes_on():
    weather, travel = Remote("sunny"), Remote("plan")
    agent = supervisor(weather, travel)
    for text in ("杭州明天天气怎么样", "上海呢", "后天呢", "谢谢", "帮我安排个自驾游", "改成三天", "how about Paris?"):
        await ask(agent, text)
    assert weather.asked == [
        "杭州明天的天气情况怎么样?",
        "上海明天的天气情况怎么样?",
        "上海后天的天气情况怎么样?",
        "上海后天的天气情况怎么样?",
        "上海2026-11-24到2026-11-26的天气情况怎么样?",
        "What will the weather be like in Paris from 2026-11-24 to 2026-11-26?",
    ]
    assert ["上海" in request or "Paris" in request for request in travel.asked] == [True, True, True]
    # What was said before about the same trip is not lost.
    assert "自驾" in travel.asked[-1]


async def test_a_failing_weather_agent_is_admitted_and_nobody_else_asked():
    weather, travel = Remote(RuntimeError("the broker is gone")), Remote("plan")
    answer = await ask(supervisor(weather, travel), REFERENCE)
    assert "WeatherAgent 没有答上来" in answer
    assert "the broker is gone" in answer
    assert travel.asked == []


async def test_a_failing_travel_agent_is_admitted():
    answer = await ask(supervisor(Remote("sunny"), Remote(RuntimeError("x"))), "Plan a trip to Paris tomorrow")
    assert "TravelAgent could not answer" in answer


# --- the workers -----------------------------------------------------------------------------------------------------


async def test_the_weather_agent_looks_up_the_days_of_the_question():
    agent = make_weather_agent("s", service=no_open_meteo(), today=lambda: TODAY)
    text = await ask(agent, "杭州下周三到周日的天气情况怎么样?")
    days = ["2026-11-25 周三", "2026-11-26 周四", "2026-11-27 周五", "2026-11-28 周六", "2026-11-29 周日"]
    assert [line.split(":")[0] for line in text.splitlines()[1:-1]] == [f"- {day}" for day in days]
    assert "来源:内置的月平均气候值(近似,不是预报);Open-Meteo 连接不上。" in text


async def test_the_weather_agent_answers_in_english_and_asks_for_the_city():
    agent = make_weather_agent("s", service=no_open_meteo(), today=lambda: TODAY)
    assert await ask(agent, "What is the weather tomorrow?") == "The weather of which city?"
    assert "Weather in Paris, 2026-11-23" in await ask(agent, "Paris")


async def test_the_travel_agent_plans_each_day_by_its_weather():
    agent = make_travel_agent("s", today=lambda: TODAY)
    plan = await ask(
        agent,
        "请做旅行方案\n目的地:杭州\n出行日期:2026-11-25到2026-11-27\n用户原话:杭州周边自驾游\nWeatherAgent 提供的天气:\n"
        f"{MARKER} 下周三到周五\n- 2026-11-25 周三:晴,31.5°C\n- 2026-11-26 周四:大雨,3~9°C\n- 2026-11-27 周五:多云\n来源:某处",
    )
    before, first, second, third = plan.split("\n## 第 ")
    assert MARKER in before
    assert "来源:某处" in before
    for part, line in ((first, "晴,31.5°C"), (second, "大雨,3~9°C"), (third, "多云")):
        assert line in part
        assert all(f"- {word}:" in part for word in ("景点", "美食", "住宿"))
    assert "千岛湖" in first
    assert "博物馆" in second
    assert "改走室内" in second
    assert "厚外套" in second
    assert "提示" not in third


async def test_the_travel_agent_admits_what_it_does_not_know():
    agent = make_travel_agent("s", today=lambda: TODAY)
    plan = await ask(agent, "Plan a trip to Reykjavik from next Wednesday to Thursday")
    assert "does not know Reykjavik" in plan
    assert "No weather was given" in plan
    assert "## Day 2 · 2026-11-26 Thu" in plan
    assert "Where is the trip to go?" in await ask(agent, "Plan a trip")


async def test_more_days_than_sights_are_planned_too():
    agent = make_travel_agent("s", today=lambda: TODAY)
    plan = await ask(agent, "三亚2026-12-01到2026-12-12旅行方案")
    assert "## 第 12 天 · 2026-12-12 周六" in plan
    assert "自由活动" in plan


WORDS = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(lines=st.lists(WORDS, min_size=1, max_size=8), city=st.sampled_from(["杭州", "敦煌", "Reykjavik"]))
def test_whatever_the_weather_says_is_in_the_plan(lines, city):
    async def check() -> None:
        report = f"{MARKER}\n" + "\n".join(f"{line}!" for line in lines)
        weather, plans = Remote(report), []

        async def travel(request: str) -> AsyncIterator[str]:
            async for delta in stream_answer(make_travel_agent("s", today=lambda: TODAY), request):
                plans.append(delta)
                yield delta

        question = (
            f"{city}下周三到下周五旅行方案" if city != "Reykjavik" else f"Trip to {city} next Wednesday to Friday"
        )
        await ask(supervisor(weather, travel), question)
        plan = "".join(plans)
        assert city in plan
        assert plan.count("\n## ") == 3
        for line in report.splitlines():
            assert line.strip().removeprefix("- ").removeprefix("* ") in plan

    asyncio.run(check())


async def test_all_three_work_together():
    weather = make_weather_agent("s", service=no_open_meteo(), today=lambda: TODAY)
    travel = make_travel_agent("s", today=lambda: TODAY)
    agent = supervisor(lambda text: stream_answer(weather, text), lambda text: stream_answer(travel, text))
    shown = await transcript(agent, REFERENCE)
    assert "[Supervisor → WeatherAgent · topic WeatherAgentTask] 杭州下周三到周日的天气情况怎么样?\n" in shown
    assert "WeatherAgent > 杭州 2026-11-25到2026-11-29 的天气\n" in shown
    assert "[Supervisor → TravelAgent · topic TravelAgentTask] 请为用户做一份旅行方案" in shown
    assert (
        "[TravelAgent → Supervisor · LiteTopic s of WorkerAgentResponse]\nTravelAgent > # 杭州周边自驾 5 天方案"
        in shown
    )
    assert shown.index("## 第 1 天 · 2026-11-25 周三") < shown.index("## 第 5 天 · 2026-11-29 周日")
    assert shown.rstrip().endswith(
        "Supervisor > 以上是 TravelAgent 根据 WeatherAgent 的天气做的方案。想换日期或目的地,直接告诉我。"
    )
    assert "\x1b" not in shown


async def test_the_terminal_tells_when_nobody_answered():
    output = io.StringIO()
    terminal = make_terminal(output)
    agent = supervisor(Remote(RuntimeError("gone")), Remote("plan"))
    async for event in agent.reply_stream(UserMsg(name="user", content="杭州明天天气")):
        if not isinstance(event, Msg):
            terminal.show(event)
    assert terminal.failed
    assert "[WeatherAgent gave no answer: error]" in output.getvalue()


def make_terminal(output: io.StringIO) -> Terminal:
    reply = "LiteTopic s of WorkerAgentResponse"
    return Terminal(
        {
            "ask_weather_agent": Route("WeatherAgent", request="topic WeatherAgentTask", reply=reply),
            "ask_travel_agent": Route("TravelAgent", request="topic TravelAgentTask", reply=reply),
        },
        console=Console(file=output, width=40),
    )


async def transcript(agent: Agent, text: str) -> str:
    output = io.StringIO()
    terminal = make_terminal(output)
    async for event in agent.reply_stream(UserMsg(name="user", content=text)):
        if not isinstance(event, Msg):
            terminal.show(event)
    assert not terminal.failed
    return output.getvalue()


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "topic", "city"),
    [
        (["去杭州旅游天气怎么样"], "weather", "杭州"),
        (["去杭州旅游,先查天气,再做个方案"], "trip", "杭州"),
        (["北京和上海哪个热"], "weather", "北京"),
        (["杭州有什么热门景点"], "trip", "杭州"),
        (["杭州明天天气怎么样", "你真厉害"], "other", "杭州"),
        (["杭州明天天气怎么样", "那换成大理吧"], "weather", "大理"),
        (["杭州明天天气怎么样", "what about the weather there?"], "weather", "Hangzhou"),
        ([], "other", None),
    ],
)
def test_a_conversation_is_understood(messages, topic, city):
    wish = understand(messages, TODAY)
    assert (wish.topic, wish.city) == (topic, city)


def test_a_request_in_other_words_is_read():
    trip = read_request("杭州三天自驾方案\n12月1日 晴 8°C\n12月2日 小雨 7°C\n12月3日 阴 6°C", TODAY)
    assert trip.weather == "12月1日 晴 8°C\n12月2日 小雨 7°C\n12月3日 阴 6°C"
    assert trip.city == "杭州"
    assert trip.around


@pytest.mark.parametrize(
    "line",
    ["2026-12-01 x", "12月1日 x", "12/1 x", "12/01 x", "Dec 1: x", "December 1 x", "1 December x", "周二 x", "Tue x"],
)
def test_a_day_is_found_in_a_report_however_it_is_named(line):
    found, others = weather_of_days(f"from 2026-11-30 to 2026-12-02\n- {line}", [date(2026, 11, 30), date(2026, 12, 1)])
    assert found == {date(2026, 12, 1): line}
    assert others == ["from 2026-11-30 to 2026-12-02"]


@pytest.mark.parametrize(
    ("line", "wet"),
    [
        ("小雨,8~14°C", True),
        ("多云,降水概率 70%", True),
        ("多云,降水概率 20%", False),
        ("晴,无雨", False),
        ("light rain showers", True),
        ("no rain", False),
        ("11 月常年均值 9~17°C,降水概率约 27%", False),
        ("", False),
    ],
)
def test_rain_is_recognised(line, wet):
    assert is_wet(line) is wet


# --- models ----------------------------------------------------------------------------------------------------------


@given(text=st.text(min_size=1, max_size=200))
def test_the_offline_model_loses_no_character_of_its_answer(text):
    async def check() -> list[str]:
        model = OfflineModel(lambda _turn: Say(text))
        stream = await model([UserMsg(name="user", content="?")])
        assert not isinstance(stream, ChatResponse)
        pieces = []
        async for chunk in stream:
            (block,) = chunk.content
            assert isinstance(block, TextBlock)
            if chunk.is_last:
                assert block.text == text
            else:
                pieces.append(block.text)
        return pieces

    assert "".join(asyncio.run(check())) == text


async def test_a_long_conversation_is_compressed_again_and_again_and_goes_on():
    weather = Remote("sunny")
    agent = supervisor(weather, Remote("plan"))
    agent.model.context_size = 3000
    summaries = set()
    await ask(agent, "杭州后天天气怎么样?")
    for _ in range(60):
        await ask(agent, "谢谢" + "…" * 60)
        summaries.add(str(agent.state.summary))
        assert len(str(agent.state.summary)) < 3000
    await ask(agent, "杭州后天天气怎么样?")
    await agent.compress_context(ContextConfig(trigger_ratio=0.002, reserve_ratio=0.001))
    assert not agent.state.context
    await ask(agent, "上海呢")
    assert len(summaries) > 1
    assert weather.asked[-1] == "上海后天的天气情况怎么样?"


def test_the_environment_chooses_the_model():
    def policy(_turn: Turn) -> Say:
        return Say("")

    def choose(**environ: str):
        return choose_model(policy, environ)

    assert isinstance(choose(), OfflineModel)
    dashscope = choose(DASHSCOPE_API_KEY="k")
    assert isinstance(dashscope, DashScopeChatModel)
    assert dashscope.model == "qwen-plus"
    openai = choose(OPENAI_BASE_URL="http://127.0.0.1:1/v1", MODEL="m")
    assert isinstance(openai, OpenAIChatModel)
    assert (openai.model, str(openai.client.base_url)) == ("m", "http://127.0.0.1:1/v1/")
    assert isinstance(choose(OPENAI_API_KEY="k"), OpenAIChatModel)
    assert isinstance(choose(OPENAI_API_KEY="k", DASHSCOPE_API_KEY="k", MODEL="offline"), OfflineModel)


@contextlib.asynccontextmanager
async def chat_completions(asked: list[dict[str, Any]]) -> AsyncIterator[str]:
    """A stand-in for an OpenAI-compatible endpoint: calls the first tool it is given once, then says what it got."""

    def decide(body: dict[str, Any]) -> dict[str, Any]:
        results = [message for message in body["messages"] if message["role"] == "tool"]
        if results:
            return {"content": f"got {results[-1]['content']}"}
        call = {"name": "ask_weather_agent", "arguments": '{"question": "杭州明天?"}'}
        return {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": call}]}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length:")[1].split()[0])
        body = json.loads(await reader.readexactly(length))
        asked.append(body)
        chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": body["model"]}
        choice = {"index": 0, "delta": {"role": "assistant", **decide(body)}, "finish_reason": None}
        events = f"data: {json.dumps(chunk | {'choices': [choice]})}\n\ndata: [DONE]\n\n".encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + events)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


@pytest.mark.parametrize(
    ("key", "url"), [("DASHSCOPE_API_KEY", "DASHSCOPE_BASE_URL"), ("OPENAI_API_KEY", "OPENAI_BASE_URL")]
)
async def test_a_real_model_class_drives_the_same_tools(monkeypatch, key, url):
    asked: list[dict[str, Any]] = []
    weather = Remote(f"{MARKER} sunny")
    async with chat_completions(asked) as base_url:
        for name, value in ((key, "k"), (url, base_url), ("MODEL", "some-model")):
            monkeypatch.setenv(name, value)
        agent = supervisor(weather, Remote("plan"))
        answer = await ask(agent, "杭州明天天气怎么样")
        assert isinstance(agent.model, OpenAIChatModel | DashScopeChatModel)
        await agent.model.client.close()
    assert weather.asked == ["杭州明天?"]
    assert f"got {MARKER} sunny" in answer
    first = asked[0]
    assert first["model"] == "some-model"
    assert [tool["function"]["name"] for tool in first["tools"]] == ["ask_weather_agent", "ask_travel_agent"]
    assert "Today is 2026-11-22 Sun" in str(first["messages"])
