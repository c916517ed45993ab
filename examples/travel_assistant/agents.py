"""The three agents: plain AgentScope agents, which know nothing of RocketMQ."""

from __future__ import annotations

from contextlib import aclosing
from datetime import date
from typing import TYPE_CHECKING, Any, Literal, Protocol

from agentscope.agent import Agent, InjectionConfig
from agentscope.event import ReplyEndEvent, TextBlockDeltaEvent, TextBlockStartEvent
from agentscope.message import Msg, UserMsg
from agentscope.permission import PermissionBehavior, PermissionDecision
from agentscope.state import AgentState
from agentscope.tool import FunctionTool, Toolkit
from agentscope.types import ReplyFinishedReason

from examples.travel_assistant.dates import Dates, day_name
from examples.travel_assistant.guide import look_up
from examples.travel_assistant.models import choose_model
from examples.travel_assistant.policies import (
    Clock,
    local_today,
    supervise,
    tell_weather,
    write_itinerary,
)
from examples.travel_assistant.weather import OpenMeteo, report

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from agentscope.event import AgentEvent

    from examples.travel_assistant.offline_model import Policy

__all__ = ["make_supervisor", "make_travel_agent", "make_weather_agent", "stream_answer"]

Language = Literal["zh", "en"]


class Answerer(Protocol):
    """What can be asked: an AgentScope agent, here or, as an A2AAgent, in another process."""

    name: str

    def reply_stream(self, inputs: Msg, /) -> AsyncGenerator[AgentEvent | Msg, None]:
        """Stream the events of a reply."""


def make_weather_agent(session: str, *, service: OpenMeteo | None = None, today: Clock = local_today) -> Agent:
    """Make the weather agent of a session.

    Args:
        session: The conversation it is for.
        service: Where the forecast comes from; None takes the one that the environment names.
        today: What day it is.
    """
    open_meteo = service or OpenMeteo.from_env()

    async def get_weather(city: str, start_date: str, end_date: str, language: Language = "zh") -> str:
        """Look up the weather of a city, day by day, and where it comes from.

        Args:
            city: Name of the city.
            start_date: First day, as YYYY-MM-DD.
            end_date: Last day, as YYYY-MM-DD; the same as start_date for a single day.
            language: Language of the report.
        """
        start, end = sorted((date.fromisoformat(start_date), date.fromisoformat(end_date)))
        dates = Dates(start, end, "")
        return await report(open_meteo, city, dates, today=today(), chinese=language == "zh")

    return _agent(
        "WeatherAgent", _WEATHER_PROMPT, policy=tell_weather, tools=[get_weather], session=session, today=today
    )


def make_travel_agent(session: str, *, today: Clock = local_today) -> Agent:
    """Make the travel agent of a session.

    Args:
        session: The conversation it is for.
        today: What day it is.
    """

    async def find_places(city: str, language: Language = "zh") -> str:
        """Look up sights (outdoor, indoor, nearby by car), food and places to stay in a city, as JSON.

        No sights mean that the bundled guide does not know the city.

        Args:
            city: Name of the city.
            language: Language of the answer.
        """
        return look_up(city, chinese=language == "zh").model_dump_json()

    return _agent(
        "TravelAgent", _TRAVEL_PROMPT, policy=write_itinerary, tools=[find_places], session=session, today=today
    )


def make_supervisor(
    session: str,
    *,
    ask_weather: Callable[[str], AsyncIterator[str]],
    ask_travel: Callable[[str], AsyncIterator[str]],
    today: Clock = local_today,
) -> Agent:
    """Make the supervisor of a session.

    Args:
        session: The conversation it is for.
        ask_weather: Asks the weather agent and streams its answer; an exception makes the call a failed one.
        ask_travel: The same for the travel agent.
        today: What day it is.
    """

    async def ask_weather_agent(question: str) -> AsyncIterator[str]:
        """Ask the weather agent. It answers for a city and the days you name, in the language you ask in.

        Args:
            question: The question, with the city and the days in the user's words, such as 杭州下周三到周日的天气情况怎么样?
        """
        async for delta in ask_weather(question):
            yield delta

    async def ask_travel_agent(request: str) -> AsyncIterator[str]:
        """Ask the travel agent for a trip plan. It knows nothing but what the request says.

        Args:
            request: Where to, on which days, what the user wants, and the weather agent's answer, word for word and whole.
        """
        async for delta in ask_travel(request):
            yield delta

    return _agent(
        "Supervisor",
        _SUPERVISOR_PROMPT,
        policy=supervise,
        tools=[ask_weather_agent, ask_travel_agent],
        session=session,
        today=today,
    )


async def stream_answer(agent: Answerer, text: str) -> AsyncIterator[str]:
    """Ask an agent, be it in this process or a remote one, and stream the text of its answer.

    Args:
        agent: The agent.
        text: What to ask.

    Raises:
        RuntimeError: The agent failed or was interrupted.
    """
    blocks = 0
    async with aclosing(agent.reply_stream(UserMsg(name="Supervisor", content=text))) as events:
        async for event in events:
            if isinstance(event, TextBlockStartEvent):
                blocks += 1
                if blocks > 1:
                    yield "\n"
            elif isinstance(event, TextBlockDeltaEvent):
                yield event.delta
            elif isinstance(event, ReplyEndEvent) and event.finished_reason != ReplyFinishedReason.COMPLETED:
                raise RuntimeError(f"{agent.name} ended its reply with {event.finished_reason!s}.")


def _agent(
    name: str,
    prompt: str,
    *,
    policy: Callable[[Clock], Policy],
    tools: list[Callable[..., Any]],
    session: str,
    today: Clock,
) -> Agent:
    allowed = PermissionDecision(behavior=PermissionBehavior.ALLOW, message="The tools of this example only read.")
    return Agent(
        name,
        f"{prompt}\n\nToday is {day_name(today(), chinese=False)}. A week runs from Monday to Sunday; 下周三 and next "
        "Wednesday are the Wednesday of the next calendar week.",
        choose_model(policy(today)),
        # One call at a time: a trip plan needs the weather first.
        Toolkit(tools=[FunctionTool(tool, permission=allowed, is_concurrency_safe=False) for tool in tools]),
        state=AgentState(session_id=session),
        injection_config=InjectionConfig(inject_runtime_state=False),
    )


_SUPERVISOR_PROMPT = """You are the supervisor of a travel assistant. You have two agents to ask, through your tools.

- A question about the weather only: ask the weather agent, nobody else.
- A trip (a plan, an itinerary, what to do somewhere): ask the weather agent first, for the city and the days of the trip. Then
  ask the travel agent, with a request that holds the city, the dates as YYYY-MM-DD, the user's wishes, and the weather agent's
  answer copied word for word and whole.
- Anything else: say in a sentence or two what you can do.

When the city is missing, ask for it. When an agent fails, say so. The user sees what the agents answer as it comes: do not repeat
it, end with one or two sentences of your own. Always use the language of the user."""

_WEATHER_PROMPT = """You are the weather agent. Work out the city and the days of the question, call get_weather once with the dates as YYYY-MM-DD, and
answer with its report unchanged: a line for each day, and the line that says where it comes from. Never invent weather. Use the
language of the question."""

_TRAVEL_PROMPT = """You are the travel agent. Call find_places once for the city, then write a plan day by day for exactly the days asked: for each day the date
with its weekday, the weather line you were given for it, quoted as it stands, sights, food and where to stay. A rainy or snowy day
goes under a roof. Quote what the weather report says of its source. Name areas and kinds of lodging, no hotels. When find_places
knows no sights, say that you plan in general terms. Use the language of the request."""
