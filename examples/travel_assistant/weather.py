"""The weather of a city: the forecast of Open-Meteo where it can be had, else bundled monthly normals. It says which."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING

import httpx
from pydantic import BaseModel, ValidationError

from examples.travel_assistant.dates import MAX_DAYS, Dates, day_name, describe
from examples.travel_assistant.places import City, known_city

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FORECAST_DAYS", "OpenMeteo", "report"]

FORECAST_DAYS = 15
"""How far Open-Meteo looks ahead, today included; one day less than it says, since its today may be yesterday's here."""

_DAYS_IN_MONTH = (31, 28.25, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

# WMO code 4677 as Open-Meteo uses it.
_CONDITIONS = {
    0: ("晴", "clear"),
    1: ("晴间少云", "mainly clear"),
    2: ("多云", "partly cloudy"),
    3: ("阴", "overcast"),
    45: ("雾", "fog"),
    48: ("雾凇", "rime fog"),
    51: ("小毛毛雨", "light drizzle"),
    53: ("毛毛雨", "drizzle"),
    55: ("大毛毛雨", "heavy drizzle"),
    56: ("冻毛毛雨", "freezing drizzle"),
    57: ("冻毛毛雨", "freezing drizzle"),
    61: ("小雨", "light rain"),
    63: ("中雨", "rain"),
    65: ("大雨", "heavy rain"),
    66: ("冻雨", "freezing rain"),
    67: ("冻雨", "freezing rain"),
    71: ("小雪", "light snow"),
    73: ("中雪", "snow"),
    75: ("大雪", "heavy snow"),
    77: ("米雪", "snow grains"),
    80: ("小阵雨", "light rain showers"),
    81: ("阵雨", "rain showers"),
    82: ("强阵雨", "violent rain showers"),
    85: ("小阵雪", "light snow showers"),
    86: ("阵雪", "snow showers"),
    95: ("雷阵雨", "thunderstorm"),
    96: ("雷阵雨伴冰雹", "thunderstorm with hail"),
    99: ("强雷暴伴冰雹", "heavy thunderstorm with hail"),
}


class _Daily(BaseModel):
    time: list[date]
    weather_code: list[int | None]
    temperature_2m_max: list[float | None]
    temperature_2m_min: list[float | None]
    precipitation_sum: list[float | None]
    precipitation_probability_max: list[float | None]


class _Forecast(BaseModel):
    daily: _Daily


class _Place(BaseModel):
    name: str
    latitude: float
    longitude: float


class _Places(BaseModel):
    results: list[_Place] = []


@dataclass(frozen=True, slots=True)
class _Day:
    code: int
    high: float
    low: float
    millimetres: float | None
    probability: float | None

    def text(self, *, chinese: bool) -> str:
        condition = _CONDITIONS.get(self.code, (f"天气代码 {self.code}", f"weather code {self.code}"))
        parts = [condition[0 if chinese else 1], f"{self.low:.0f}~{self.high:.0f}°C"]
        if self.probability is not None:
            name = "降水概率" if chinese else "precipitation probability"
            parts.append(f"{name} {self.probability:.0f}%")
        if self.millimetres:
            parts.append(f"降水 {self.millimetres:.1f} 毫米" if chinese else f"{self.millimetres:.1f} mm")
        return (", " if not chinese else ",").join(parts)


class OpenMeteo:
    """Client of the Open-Meteo forecast (https://open-meteo.com, no key needed).

    Attributes:
        forecast_url: Base URL of the forecast API.
        geocoding_url: Base URL of the API that finds places by name.
        timeout: For each of the two calls, in seconds; to connect, at most half of it.
    """

    def __init__(
        self,
        *,
        forecast_url: str = "https://api.open-meteo.com",
        geocoding_url: str = "https://geocoding-api.open-meteo.com",
        timeout: float = 4.0,
    ) -> None:
        self.forecast_url = forecast_url
        self.geocoding_url = geocoding_url
        self.timeout = timeout

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> OpenMeteo:
        """The public service, or one of your own by `OPEN_METEO_URL` and `OPEN_METEO_GEOCODING_URL`.

        Args:
            environ: The variables; None takes those of the process.
        """
        source = os.environ if environ is None else environ
        service = cls()
        service.forecast_url = source.get("OPEN_METEO_URL") or service.forecast_url
        service.geocoding_url = source.get("OPEN_METEO_GEOCODING_URL") or service.geocoding_url
        return service

    async def find(self, name: str, *, chinese: bool) -> tuple[float, float] | None:
        """Latitude and longitude of a place, or None where there is none of that name.

        Raises:
            httpx.HTTPError: The service can't be reached or refuses.
            ValidationError: Its answer can't be read.
        """
        query: dict[str, str | int] = {"name": name, "count": 1, "language": "zh" if chinese else "en"}
        found = _Places.model_validate_json(await self._get(f"{self.geocoding_url.rstrip('/')}/v1/search", query))
        return (found.results[0].latitude, found.results[0].longitude) if found.results else None

    async def forecast(self, place: tuple[float, float], start: date, end: date) -> dict[date, _Day]:
        """The forecast of some days; days that it does not know are left out.

        Raises:
            httpx.HTTPError: The service can't be reached or refuses.
            ValidationError: Its answer can't be read.
        """
        names = [name for name in _Daily.model_fields if name != "time"]
        query: dict[str, str | int] = {
            "latitude": str(place[0]),
            "longitude": str(place[1]),
            "daily": ",".join(names),
            "timezone": "auto",
            "start_date": start.isoformat(),
            "end_date": end.isoformat(),
        }
        body = await self._get(f"{self.forecast_url.rstrip('/')}/v1/forecast", query)
        daily = _Forecast.model_validate_json(body).daily
        rows = zip(daily.time, *(getattr(daily, name) for name in names), strict=False)
        return {
            day: _Day(code, high, low, millimetres, probability)
            for day, code, high, low, millimetres, probability in rows
            if code is not None and high is not None and low is not None
        }

    async def _get(self, url: str, query: Mapping[str, str | int]) -> bytes:
        timeout = httpx.Timeout(self.timeout, connect=self.timeout / 2)
        async with httpx.AsyncClient(timeout=timeout) as client:
            response = await client.get(url, params=dict(query))
            response.raise_for_status()
            return response.content


async def report(service: OpenMeteo, city: str, dates: Dates, *, today: date, chinese: bool) -> str:
    """Report the weather of a city: a line for each day, then the source.

    Args:
        service: Where to ask for the forecast.
        city: Name of the city, in Chinese or English.
        dates: The days; the first `MAX_DAYS` of them are reported.
        today: Today's date.
        chinese: Whether to write in Chinese, else in English.
    """
    bundled = known_city(city)
    days = dates.days()
    forecast: dict[date, _Day] = {}
    unreachable = False
    unknown = False
    wanted = _forecast_days(days, today)
    try:
        place = (bundled.lat, bundled.lon) if bundled else await service.find(city, chinese=chinese)
        unknown = place is None
        if place is not None and wanted:
            forecast = await service.forecast(place, wanted[0], wanted[-1])
    except (httpx.HTTPError, ValidationError):
        unreachable = True
    if bundled is None and (unknown or unreachable):
        return _no_data(city, unreachable=unreachable, chinese=chinese)
    lines = [
        f"- {day_name(day, chinese=chinese)}{':' if chinese else ': '}{_line(day, forecast, bundled, chinese=chinese)}"
        for day in days
    ]
    when = describe(days[0], days[-1], chinese=chinese)
    title = f"{city} {when} 的天气" if chinese else f"Weather in {city}, {when}"
    if days[-1] < dates.end:
        title += f"(只列前 {MAX_DAYS} 天)" if chinese else f" (the first {MAX_DAYS} days)"
    source = _source(days, forecast, bundled, today=today, unreachable=unreachable, chinese=chinese)
    return "\n".join([title, *lines, source])


def _line(day: date, forecast: Mapping[date, _Day], bundled: City | None, *, chinese: bool) -> str:
    if day in forecast:
        return forecast[day].text(chinese=chinese)
    if bundled is None:
        return "暂无预报" if chinese else "no forecast yet"
    month = day.month - 1
    wet = 100 * bundled.wet_days[month] / _DAYS_IN_MONTH[month]
    low, high = bundled.low[month], bundled.high[month]
    if chinese:
        return f"{day.month} 月常年均值 {low}~{high}°C,降水概率约 {wet:.0f}%"
    return f"normal of the month {low}~{high}°C, precipitation on about {wet:.0f}% of days"


def _source(
    days: list[date],
    forecast: Mapping[date, _Day],
    bundled: City | None,
    *,
    today: date,
    unreachable: bool,
    chinese: bool,
) -> str:
    """Say where the lines come from."""
    parts = []
    if forecast:
        parts.append("Open-Meteo 预报" if chinese else "Open-Meteo forecast")
    without = [day for day in days if day not in forecast]
    if without and bundled:
        parts.append(
            "内置的月平均气候值(近似,不是预报)" if chinese else "bundled monthly normals (approximate, not a forecast)"
        )
        if forecast:
            parts[-1] += f":{'、'.join(map(str, without))}" if chinese else f": {', '.join(map(str, without))}"
    if unreachable:
        parts.append("Open-Meteo 连接不上" if chinese else "Open-Meteo can't be reached")
    elif any(day not in _forecast_days(days, today) for day in without):
        parts.append(
            f"Open-Meteo 只预报今天起 {FORECAST_DAYS} 天" if chinese else f"Open-Meteo looks {FORECAST_DAYS} days ahead"
        )
    elif without:
        parts.append("Open-Meteo 没有给出这些天的数据" if chinese else "Open-Meteo gave no values for these days")
    return f"来源:{';'.join(parts)}。" if chinese else f"Source: {'; '.join(parts)}."


def _forecast_days(days: list[date], today: date) -> list[date]:
    return [day for day in days if today <= day < today + timedelta(days=FORECAST_DAYS)]


def _no_data(city: str, *, unreachable: bool, chinese: bool) -> str:
    if chinese:
        reason = "Open-Meteo 连接不上" if unreachable else "Open-Meteo 找不到这个地名"
        return f"没有 {city} 的天气资料:内置的城市里没有它,{reason}。"
    reason = "Open-Meteo can't be reached" if unreachable else "Open-Meteo finds no such place"
    return f"No weather data for {city}: it is not among the bundled cities, and {reason}."
