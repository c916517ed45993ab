"""Write a trip plan day by day: a rainy day goes under a roof, and every day has sights, food and a place to stay."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from examples.travel_assistant.dates import MAX_DAYS, Dates, day_name
from examples.travel_assistant.trip import Trip, weather_of_days

if TYPE_CHECKING:
    from collections.abc import Iterator

    from examples.travel_assistant.guide import Guide, Sight

__all__ = ["is_wet", "write_plan"]

_DRY_WORDS = re.compile(r"无雨|没有?雨|不下雨|无降水|\bno (?:rain|snow)\b|\bdry\b", re.IGNORECASE)
_WET_WORDS = re.compile(
    r"雨|雪|雷|冰雹|\b(?:rain|snow|showers?|drizzle|thunderstorms?|storms?|hail|sleet)", re.IGNORECASE
)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*[%%]")
_DEGREES = re.compile(r"(?:(-?\d+(?:\.\d+)?)\s*[~~–—到至/-]\s*)?(-?\d+(?:\.\d+)?)\s*(?:°\s*C?|℃|度)", re.IGNORECASE)


def is_wet(line: str) -> bool:
    """Whether a line of a weather report means rain or snow: it says so, or gives a chance of 50 % or more."""
    said = _WET_WORDS.search(_DRY_WORDS.sub("", line)) is not None
    return said or any(float(chance) >= 50 for chance in _PERCENT.findall(line))


def write_plan(trip: Trip, dates: Dates, guide: Guide) -> str:
    """Write the plan of a trip.

    Args:
        trip: What was asked, with the weather given.
        dates: The days; the first `MAX_DAYS` of them are planned.
        guide: What there is to see and eat.
    """
    chinese = trip.chinese
    days = dates.days()
    weather, other_lines = weather_of_days(trip.weather, days)
    sights = _choose(guide, [is_wet(weather.get(day, "")) for day in days], around=trip.around)
    parts = [_title(trip, dates), _basis(trip, other_lines)]
    if not guide.sights:
        parts.append(
            f"内置资料里没有 {guide.city} 的景点,下面只是通用的安排,具体去处请以当地信息为准。"
            if chinese
            else f"The bundled guide does not know {guide.city}: what follows is a general outline, please check locally."
        )
    for number, (day, sight) in enumerate(zip(days, sights, strict=True), start=1):
        last = number == len(days)
        parts.append(
            _day(
                number,
                day_name(day, chinese=chinese),
                weather.get(day),
                sight,
                guide,
                chinese=chinese,
                last=last,
            )
        )
    return "\n\n".join(part for part in parts if part)


def _choose(guide: Guide, wet: list[bool], *, around: bool) -> Iterator[Sight | None]:
    """A sight for each day, each only once; None when none is left."""
    nearby = [sight for sight in guide.sights if sight.kind == "nearby"]
    outdoor = [sight for sight in guide.sights if sight.kind == "outdoor"]
    indoor = [sight for sight in guide.sights if sight.kind == "indoor"]
    dry = nearby + outdoor if around else outdoor + nearby
    for rain in wet:
        first, second = (indoor, dry) if rain else (dry, indoor)
        yield first.pop(0) if first else second.pop(0) if second else None


def _title(trip: Trip, dates: Dates) -> str:
    days = dates.days()
    first, last = (day_name(day, chinese=trip.chinese) for day in (days[0], days[-1]))
    if trip.chinese:
        kind = "周边自驾" if trip.around else "旅行"
        cut = f",只排前 {MAX_DAYS} 天" if days[-1] < dates.end else ""
        return f"# {trip.city}{kind} {len(days)} 天方案({first} 至 {last}{cut})"
    kind = "Road trip around" if trip.around else "Trip to"
    cut = f", the first {MAX_DAYS} days" if days[-1] < dates.end else ""
    plural = "s" if len(days) > 1 else ""
    return f"# {kind} {trip.city}, {len(days)} day{plural} ({first} to {last}{cut})"


def _basis(trip: Trip, lines: list[str]) -> str:
    """Quote what the weather report says besides its lines for single days: place, source, warnings."""
    if not trip.weather:
        return (
            "没有收到天气资料,出发前请再查一次。"
            if trip.chinese
            else "No weather was given: check it before you leave."
        )
    heading = "依据的天气:" if trip.chinese else "Weather it is based on:"
    return "\n".join([heading, *(f"> {line}" for line in lines)]) if lines else ""


def _day(
    number: int,
    name: str,
    weather: str | None,
    sight: Sight | None,
    guide: Guide,
    *,
    chinese: bool,
    last: bool,
) -> str:
    food = [guide.food[(2 * number + offset - 2) % len(guide.food)] for offset in (0, 1) if guide.food]
    see = f"{sight.name}{':' if chinese else ': '}{sight.do}" if sight else _no_sight(guide, chinese=chinese)
    stay = (sight.stay if sight else "") or guide.stay
    tips = _tips(weather or "", chinese=chinese)
    if chinese:
        lines = [
            f"## 第 {number} 天 · {name}",
            f"- 天气:{weather or '见上文'}",
            f"- 景点:{see}",
            f"- 美食:{'、'.join(food) or '当地特色菜'}",
            f"- 住宿:{'当天返程;若多住一晚,' if last else ''}{stay or '市中心或车站附近,出行方便'}",
        ]
    else:
        lines = [
            f"## Day {number} · {name}",
            f"- Weather: {weather or 'see above'}",
            f"- Sights: {see}",
            f"- Food: {', '.join(food) or 'what the place is known for'}",
            f"- Lodging: {'return today; for one more night, ' if last else ''}{stay or 'the centre or near the station'}",
        ]
    if tips:
        lines.append(f"- {'提示' if chinese else 'Tips'}{':' if chinese else ': '}{tips}")
    return "\n".join(lines)


def _no_sight(guide: Guide, *, chinese: bool) -> str:
    if guide.sights:
        return "自由活动,或重游喜欢的地方" if chinese else "free time, or back to what you liked best"
    return "老城区步行,当地博物馆和市场" if chinese else "a walk through the old town, the local museum and market"


def _tips(weather: str, *, chinese: bool) -> str:
    degrees = [float(value) for pair in _DEGREES.findall(weather) for value in pair if value]
    tips = []
    if is_wet(weather):
        tips.append(
            "有雨雪,改走室内,带雨具,山路慢行" if chinese else "wet: under a roof, umbrella, slow on mountain roads"
        )
    if degrees and min(degrees) <= 5:
        tips.append("早晚冷,带厚外套" if chinese else "cold mornings, bring a warm coat")
    if degrees and max(degrees) >= 33:
        tips.append("午后炎热,户外放在早晚" if chinese else "hot afternoons, go out early or late")
    return (";" if chinese else "; ").join(tips)
