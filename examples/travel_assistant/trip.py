"""The request that goes to the travel agent: how the supervisor words it, and how it is read there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from examples.travel_assistant.dates import Dates, describe, find_dates, is_chinese
from examples.travel_assistant.understanding import Wish, understand

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import date

__all__ = ["Trip", "compose_request", "read_request", "weather_of_days"]

_WEATHER_HEADING = {True: "WeatherAgent 提供的天气:", False: "Weather from WeatherAgent:"}
_HEADING = re.compile(r"^.{0,40}(?:天气|weather).{0,40}[::]\s*$", re.IGNORECASE | re.MULTILINE)
_CITY = re.compile(r"^(?:目的地|Destination)[::]\s*(.+)$", re.MULTILINE)
_WORDS = re.compile(r"^(?:用户原话|The user's words)[::]\s*(.+)$", re.MULTILINE)
_AROUND = re.compile(r"自驾|周边|附近|郊|\b(?:road ?trip|drive|driving|around|near|nearby)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Trip:
    """What the travel agent is asked to plan.

    Attributes:
        city: Where; None when the request does not tell.
        dates: When; None when the request does not tell.
        weather: The weather it was given, word for word; empty when none.
        around: Whether the trip is through the surroundings, by car, rather than within the city.
        chinese: Whether to answer in Chinese, else in English.
    """

    city: str | None
    dates: Dates | None
    weather: str
    around: bool
    chinese: bool


def compose_request(wish: Wish, dates: Dates, weather: str) -> str:
    """Word the request for a trip plan, with the weather agent's answer in it as it stands."""
    when = describe(dates.start, dates.end, chinese=wish.chinese)
    words = " / ".join(" ".join(text.split()) for text in wish.said)
    if wish.chinese:
        head = f"请为用户做一份旅行方案,每天都有景点、美食和住宿,并按天气安排。\n目的地:{wish.city}\n出行日期:{when}\n用户原话:{words}"
    else:
        head = (
            "Please plan a trip for the user, with sights, food and lodging for every day, to suit the weather.\n"
            f"Destination: {wish.city}\nDates: {when}\nThe user's words: {words}"
        )
    return f"{head}\n{_WEATHER_HEADING[wish.chinese]}\n{weather}"


def read_request(text: str, today: date) -> Trip:
    """Read a request, worded by `compose_request` or by anybody else.

    The weather is what follows a heading that speaks of it; without one, the lines after the first which name a day or a
    temperature.
    """
    heading = _HEADING.search(text)
    if heading is not None:
        asked, weather = text[: heading.start()], text[heading.end() :].strip("\n")
    else:
        first, *others = text.splitlines() or [""]
        told = [line for line in others if re.search(r"°|℃|\d\s*度|\d{4}-\d\d-\d\d", line)]
        asked = "\n".join([first, *(line for line in others if line not in told)])
        weather = "\n".join(told)
    wish = understand([asked], today)
    city = _CITY.search(asked)
    words = _WORDS.search(asked)
    dates = wish.dates or find_dates(weather, today)
    return Trip(
        city=city[1].strip() if city else wish.city,
        dates=dates,
        weather=weather,
        around=_AROUND.search(words[1] if words else asked) is not None,
        chinese=is_chinese(asked),
    )


def weather_of_days(weather: str, days: Sequence[date]) -> tuple[dict[date, str], list[str]]:
    """Find in a weather report what it says of each day.

    Args:
        weather: The report, in any wording.
        days: The days of the trip.

    Returns:
        The line that names each day, as it stands but for a leading bullet, and all other lines.
    """
    lines = [line.strip() for line in weather.splitlines() if line.strip()]
    found: dict[date, str] = {}
    for day in days:
        pattern = _day_pattern(day, weekday=len(days) <= 7)
        line = next((line for line in lines if pattern.search(line) and _names_one_day(line)), None)
        if line is not None:
            found[day] = line.removeprefix("- ").removeprefix("* ")
            lines.remove(line)
    return found, lines


def _day_pattern(day: date, *, weekday: bool) -> re.Pattern[str]:
    month, number = f"{day:%B}", day.day
    names = [
        rf"{day.isoformat()}",
        rf"(?<!\d){day.month}月{number}(?!\d)",
        rf"(?<![\d/])0?{day.month}/0?{number}(?![\d/])",
        rf"\b{month[:3]}(?:{month[3:]})?\.? {number}(?!\d)",
        rf"(?<!\d){number} {month[:3]}(?:{month[3:]})?\b",
    ]
    if weekday:
        names += [rf"(?:周|星期){'一二三四五六日'[day.weekday()]}", rf"\b{day:%a}(?:{f'{day:%A}'[3:]})?\b"]
    return re.compile("|".join(names))


def _names_one_day(line: str) -> bool:
    """A heading like "2026-11-25 to 2026-11-29" or "周三到周日" is about no day in particular."""
    dates = re.findall(r"\d{4}-\d\d-\d\d|\d{1,2}月\d{1,2}", line)
    weekdays = re.findall(r"(?:周|星期)[一二三四五六日]|\b(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)", line)
    return max(len(dates), len(weekdays)) <= 1
