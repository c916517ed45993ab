"""What a conversation asks for: the weather or a trip, where, and on which days.

This is how the offline model "understands" a user. A later message fills in or changes what the earlier ones said: after
"杭州明天天气怎么样", "上海呢" is the weather of tomorrow in Shanghai.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from examples.travel_assistant.dates import Dates, describe, find_dates, is_chinese
from examples.travel_assistant.places import find_city, known_city

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import date

__all__ = ["Wish", "understand"]

Topic = Literal["weather", "trip", "other"]

_PLANNING = re.compile(
    r"方案|行程|计划|规划|攻略|安排|制定|路线|日程|自驾"
    r"|\b(?:plan|itinerary|suggest|organi[sz]e|arrange|road ?trip|schedule)\b",
    re.IGNORECASE,
)
_WEATHER = re.compile(
    r"天气|气温|温度|气候|下雨|下雪|降水|降雨|预报|多少度|刮风|带伞|冷|热(?![门闹情])|晴"
    r"|\b(?:weather|forecast|temperatures?|rain(?:y|ing)?|snow(?:y|ing)?|sunny|warm|cold|hot|umbrella|degrees|windy?)\b",
    re.IGNORECASE,
)
_TRAVEL = re.compile(
    r"游|旅|玩|度假|景点|出行"
    r"|\b(?:trips?|travel(?:l?ing)?|tour|vacation|holidays?|visit(?:ing)?|sightseeing|getaway)\b",
    re.IGNORECASE,
)
_AROUND_A_NAME = re.compile(
    r"^那|[换改][成到为]?|去|呢|吧|[??!!。.,,]|\b(?:and|how about|what about|then)\b", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user wants, as far as the conversation tells.

    Attributes:
        topic: The weather, a trip, or something else.
        city: Where, in the language of the last message; None when nobody said.
        dates: When; None when nobody said.
        chinese: Whether the last message is in Chinese.
        said: What the user said about it: the message that began it, and those that went on with it.
    """

    topic: Topic
    city: str | None
    dates: Dates | None
    chinese: bool
    said: tuple[str, ...]


def understand(messages: Iterable[str], today: date) -> Wish:
    """Understand a conversation.

    Args:
        messages: What the user said, oldest first.
        today: The day relative dates count from.

    Returns:
        What the last message asks for, with what it leaves open taken from the earlier ones.
    """
    wish = Wish("other", None, None, chinese=True, said=())
    known: Topic = "other"
    for text in messages:
        chinese = is_chinese(text)
        dates = find_dates(text, today, start=wish.dates.start if wish.dates else None)
        rest = text if dates is None else f"{text[: dates.span[0]]} {text[dates.span[1] :]}"
        city = find_city(rest, chinese=chinese)
        topic = _topic(text)
        if topic == "other" and (known == "other" or not (dates or _names_only(rest, city))):
            wish = Wish("other", wish.city, wish.dates, chinese, wish.said)
            continue
        said = (*wish.said, text) if topic == "other" else (text,)
        known = known if topic == "other" else topic
        city = city or _renamed(wish.city, chinese=chinese)
        wish = Wish(known, city, dates or _rephrased(wish.dates, chinese=chinese), chinese, said)
    return wish


def _topic(text: str) -> Topic:
    if _PLANNING.search(text):
        return "trip"
    if _WEATHER.search(text):
        return "weather"
    return "trip" if _TRAVEL.search(text) else "other"


def _names_only(text: str, city: str | None) -> bool:
    """Whether a message says no more than another city: "上海呢", "那换成大理吧", "How about Oslo?", but not "你真厉害"."""
    if city is None:
        return False
    return known_city(city) is not None or _AROUND_A_NAME.sub("", text).strip() == city


def _renamed(city: str | None, *, chinese: bool) -> str | None:
    """A city from an earlier message, in the language of this one where that is known."""
    bundled = known_city(city) if city else None
    return bundled.name(chinese=chinese) if bundled else city


def _rephrased(dates: Dates | None, *, chinese: bool) -> Dates | None:
    """Dates from an earlier message, worded so that they fit into the language of this one."""
    if dates is None or is_chinese(dates.phrase) == chinese:
        return dates
    return replace(dates, phrase=describe(dates.start, dates.end, chinese=chinese))
