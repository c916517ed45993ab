"""What the offline model does in each of the three roles: the rules that a language model gets as a prompt."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, timedelta

from examples.travel_assistant.dates import Dates
from examples.travel_assistant.guide import Guide
from examples.travel_assistant.offline_model import CallTool, Policy, Say, ToolResult, Turn
from examples.travel_assistant.plan import write_plan
from examples.travel_assistant.trip import compose_request, read_request
from examples.travel_assistant.understanding import Wish, understand

__all__ = ["Clock", "local_today", "supervise", "tell_weather", "weather_question", "write_itinerary"]

Clock = Callable[[], date]
"""Tells what day it is."""

ASK_WEATHER = "ask_weather_agent"
ASK_TRAVEL = "ask_travel_agent"
GET_WEATHER = "get_weather"
FIND_PLACES = "find_places"


def local_today() -> date:
    """Today, where this process runs."""
    return datetime.now().astimezone().date()


def supervise(today: Clock) -> Policy:
    """The supervisor: the weather alone is the weather agent's; a trip goes to the travel agent, with the weather first.

    Args:
        today: What day it is.
    """

    def decide(turn: Turn) -> Say | CallTool:
        wish = understand(turn.questions, today())
        if wish.topic == "other":
            return Say(_INTRODUCTION[wish.chinese])
        if wish.city is None:
            return Say("请告诉我是哪个城市。" if wish.chinese else "Which city is it about?")
        return _next_step(turn, wish, wish.city, wish.dates or _usual_dates(wish, today()))

    return decide


def _next_step(turn: Turn, wish: Wish, city: str, dates: Dates) -> Say | CallTool:
    weather = turn.result(ASK_WEATHER)
    if weather is None:
        return CallTool(ASK_WEATHER, {"question": weather_question(city, dates, chinese=wish.chinese)})
    last = turn.results[-1]
    if last.failed:
        return Say(_failure(last, chinese=wish.chinese))
    if wish.topic == "trip" and last is weather:
        return CallTool(ASK_TRAVEL, {"request": compose_request(wish, dates, weather.text)})
    return Say(_CLOSING[wish.topic, wish.chinese])


def tell_weather(today: Clock) -> Policy:
    """The weather agent: look the weather up, pass on what was found.

    Args:
        today: What day it is.
    """

    def decide(turn: Turn) -> Say | CallTool:
        found = turn.result(GET_WEATHER)
        if found is not None:
            return Say(found.text)
        wish = understand(turn.questions, today())
        if wish.city is None:
            return Say("请告诉我是哪个城市的天气。" if wish.chinese else "The weather of which city?")
        dates = wish.dates or _next_days(today())
        return CallTool(
            GET_WEATHER,
            {
                "city": wish.city,
                "start_date": dates.start.isoformat(),
                "end_date": dates.end.isoformat(),
                "language": "zh" if wish.chinese else "en",
            },
        )

    return decide


def write_itinerary(today: Clock) -> Policy:
    """The travel agent: look up what the place has, plan each day by the weather given.

    Args:
        today: What day it is.
    """

    def decide(turn: Turn) -> Say | CallTool:
        trip = read_request(turn.questions[-1], today())
        if trip.city is None:
            return Say("请告诉我去哪个城市。" if trip.chinese else "Where is the trip to go?")
        places = turn.result(FIND_PLACES)
        if places is None:
            language = "zh" if trip.chinese else "en"
            return CallTool(FIND_PLACES, {"city": trip.city, "language": language})
        guide = Guide(city=trip.city) if places.failed else Guide.model_validate_json(places.text)
        return Say(write_plan(trip, trip.dates or _next_weekend(today()), guide))

    return decide


def weather_question(city: str, dates: Dates, *, chinese: bool) -> str:
    """Word the question to the weather agent: "杭州下周三到周日的天气情况怎么样?"."""
    if chinese:
        return f"{city}{dates.phrase}的天气情况怎么样?"
    when = f"from {dates.phrase}" if dates.start != dates.end else dates.phrase
    return f"What will the weather be like in {city} {when}?"


def _usual_dates(wish: Wish, today: date) -> Dates:
    """The days meant when nobody says: the next three for the weather, the weekend of next week for a trip."""
    return (
        _next_days(today, chinese=wish.chinese)
        if wish.topic == "weather"
        else _next_weekend(today, chinese=wish.chinese)
    )


def _next_days(today: date, *, chinese: bool = True) -> Dates:
    phrase = "今天到后天" if chinese else "today to the day after tomorrow"
    return Dates(today, today + timedelta(days=2), phrase)


def _next_weekend(today: date, *, chinese: bool = True) -> Dates:
    saturday = today + timedelta(days=12 - today.weekday())
    return Dates(saturday, saturday + timedelta(days=1), "下周末" if chinese else "next weekend")


def _failure(result: ToolResult, *, chinese: bool) -> str:
    agent = "WeatherAgent" if result.tool == ASK_WEATHER else "TravelAgent"
    reason = result.text.strip()
    return f"{agent} 没有答上来:{reason}" if chinese else f"{agent} could not answer: {reason}"


_INTRODUCTION = {
    True: (
        "我可以回答天气问题,也可以做旅行方案:天气由 WeatherAgent 查,方案由 TravelAgent 按天气安排。"
        "比如:“杭州明天天气怎么样”,“帮我做一个下周三到下周日杭州周边自驾游方案”。"
    ),
    False: (
        "I answer questions about the weather and plan trips: WeatherAgent looks up the weather, TravelAgent plans by it. "
        'For example: "What is the weather in Hangzhou tomorrow?", "Plan a road trip around Hangzhou from next Wednesday '
        'to Sunday".'
    ),
}
_CLOSING = {
    ("weather", True): "以上是 WeatherAgent 查到的天气。",
    ("weather", False): "That is what WeatherAgent found.",
    ("trip", True): "以上是 TravelAgent 根据 WeatherAgent 的天气做的方案。想换日期或目的地,直接告诉我。",
    ("trip", False): (
        "That is TravelAgent's plan, by WeatherAgent's weather. Tell me if the dates or the place should change."
    ),
}
