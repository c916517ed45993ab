"""The weather: Open-Meteo when it answers, bundled normals when not, and always which of them it was."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable
from datetime import date, timedelta
from urllib.parse import parse_qs, urlsplit

import pytest

from examples.travel_assistant.dates import MAX_DAYS, Dates
from examples.travel_assistant.guide import look_up
from examples.travel_assistant.places import cities, find_city, known_city
from examples.travel_assistant.weather import FORECAST_DAYS, OpenMeteo, report

TODAY = date(2026, 11, 22)
Answer = Callable[[str, dict[str, str]], tuple[int, object]]


@contextlib.asynccontextmanager
async def open_meteo(answer: Answer) -> AsyncIterator[OpenMeteo]:
    """A stand-in for Open-Meteo on a port of its own: `answer(path, query)` gives status and JSON."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        url = urlsplit(request.split()[1])
        status, body = answer(url.path, {key: values[0] for key, values in parse_qs(url.query).items()})
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        writer.write(f"HTTP/1.1 {status} x\r\ncontent-length: {len(text)}\r\nconnection: close\r\n\r\n".encode() + text)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        yield OpenMeteo(forecast_url=url, geocoding_url=url, timeout=5.0)


def forecast(query: dict[str, str], **values: object) -> dict[str, object]:
    start, end = (date.fromisoformat(query[name]) for name in ("start_date", "end_date"))
    days = [str(start + timedelta(days=number)) for number in range((end - start).days + 1)]
    row = {
        "weather_code": 61,
        "temperature_2m_max": 14.6,
        "temperature_2m_min": -3.2,
        "precipitation_sum": 4.2,
        "precipitation_probability_max": 70,
    } | values
    return {"daily": {"time": days} | {name: [value] * len(days) for name, value in row.items()}}


def days(first: int, last: int) -> Dates:
    return Dates(TODAY + timedelta(days=first), TODAY + timedelta(days=last), "")


async def test_a_bundled_city_gets_the_forecast_of_its_place():
    asked = []

    def answer(path: str, query: dict[str, str]) -> tuple[int, object]:
        asked.append((path, query))
        return 200, forecast(query)

    async with open_meteo(answer) as service:
        text = await report(service, "杭州", days(3, 4), today=TODAY, chinese=True)
    assert text == (
        "杭州 2026-11-25到2026-11-26 的天气\n"
        "- 2026-11-25 周三:小雨,-3~15°C,降水概率 70%,降水 4.2 毫米\n"
        "- 2026-11-26 周四:小雨,-3~15°C,降水概率 70%,降水 4.2 毫米\n"
        "来源:Open-Meteo 预报。"
    )
    ((path, query),) = asked
    assert path == "/v1/forecast"
    assert (query["latitude"], query["longitude"]) == ("30.27", "120.16")


async def test_another_city_is_found_by_its_name():
    def answer(path: str, query: dict[str, str]) -> tuple[int, object]:
        if path == "/v1/search":
            assert query["name"] == "Reykjavík"
            return 200, {"results": [{"name": "Reykjavík", "latitude": 64.1, "longitude": -21.9}]}
        assert query["latitude"] == "64.1"
        return 200, forecast(query, precipitation_sum=None, precipitation_probability_max=None, weather_code=0)

    async with open_meteo(answer) as service:
        text = await report(service, "Reykjavík", days(1, 1), today=TODAY, chinese=False)
    assert text == ("Weather in Reykjavík, 2026-11-23\n- 2026-11-23 Mon: clear, -3~15°C\nSource: Open-Meteo forecast.")


async def test_days_beyond_the_forecast_are_normals_and_named_as_such():
    def answer(_path: str, query: dict[str, str]) -> tuple[int, object]:
        assert date.fromisoformat(query["end_date"]) == TODAY + timedelta(days=FORECAST_DAYS - 1)
        return 200, forecast(query)

    async with open_meteo(answer) as service:
        text = await report(service, "Paris", days(14, 15), today=TODAY, chinese=False)
    _, forecast_line, normal_line, source = text.splitlines()
    assert "light rain" in forecast_line
    assert "normal of the month 4~8°C" in normal_line
    assert source == (
        "Source: Open-Meteo forecast; bundled monthly normals (approximate, not a forecast): 2026-12-07; "
        "Open-Meteo looks 15 days ahead."
    )


@pytest.mark.parametrize(
    "reply",
    [(500, {}), (400, {"error": True}), (200, b"<html>"), (200, {"daily": {}}), (200, {})],
    ids=["server error", "refused", "no JSON", "empty", "nothing"],
)
async def test_a_service_that_does_not_answer_properly_leaves_the_normals(reply):
    async with open_meteo(lambda _path, _query: reply) as service:
        text = await report(service, "杭州", days(3, 4), today=TODAY, chinese=True)
    assert "- 2026-11-25 周三:11 月常年均值 9~17°C,降水概率约 27%" in text
    assert "来源:内置的月平均气候值(近似,不是预报);Open-Meteo 连接不上。" in text


async def test_a_service_that_is_not_there_leaves_the_normals():
    async with open_meteo(lambda _path, _query: (200, {})) as service:
        pass
    text = await report(service, "Paris", days(0, 0), today=TODAY, chinese=False)
    assert "bundled monthly normals (approximate, not a forecast); Open-Meteo can't be reached" in text


async def test_a_day_without_values_is_a_normal():
    async with open_meteo(lambda _path, query: (200, forecast(query, temperature_2m_max=None))) as service:
        text = await report(service, "Paris", days(0, 0), today=TODAY, chinese=False)
    assert "normal of the month" in text
    assert "Open-Meteo gave no values for these days" in text


async def test_an_unknown_city_is_admitted():
    async with open_meteo(lambda _path, _query: (200, {"generationtime_ms": 1})) as service:
        text = await report(service, "不存在城", days(0, 0), today=TODAY, chinese=True)
    assert text == "没有 不存在城 的天气资料:内置的城市里没有它,Open-Meteo 找不到这个地名。"
    text = await report(service, "Nowhere", days(0, 0), today=TODAY, chinese=False)
    assert text == "No weather data for Nowhere: it is not among the bundled cities, and Open-Meteo can't be reached."


async def test_too_many_days_are_cut_and_that_is_said():
    async with open_meteo(lambda _path, query: (200, forecast(query))) as service:
        text = await report(service, "杭州", days(0, 90), today=TODAY, chinese=True)
    assert f"只列前 {MAX_DAYS} 天" in text
    assert len(re.findall(r"^- ", text, re.MULTILINE)) == MAX_DAYS


def test_the_service_can_be_another_one():
    service = OpenMeteo.from_env({"OPEN_METEO_URL": "http://a", "OPEN_METEO_GEOCODING_URL": "http://b"})
    assert (service.forecast_url, service.geocoding_url) == ("http://a", "http://b")
    assert OpenMeteo.from_env({"OPEN_METEO_URL": ""}).forecast_url == "https://api.open-meteo.com"


def test_the_bundled_cities_are_plausible():
    assert len(cities()) >= 50
    names = [name.casefold() for city in cities() for name in city.names]
    assert len(names) == len(set(names))
    for city in cities():
        assert -90 <= city.lat <= 90
        assert -180 <= city.lon <= 180
        assert len(city.high) == len(city.low) == len(city.wet_days) == 12
        assert all(low < high for low, high in zip(city.low, city.high, strict=True))
        assert all(0 <= wet <= 31 for wet in city.wet_days)


@pytest.mark.parametrize("city", [city.zh for city in cities()])
def test_a_guide_is_whole_in_both_languages(city):
    chinese, english = look_up(city, chinese=True), look_up(city, chinese=False)
    assert [sight.kind for sight in chinese.sights] == [sight.kind for sight in english.sights]
    assert bool(chinese.sights) == bool(chinese.food) == bool(chinese.stay) == bool(english.stay)
    assert all(sight.name and sight.do for sight in chinese.sights + english.sights)


@pytest.mark.parametrize("city", cities(), ids=lambda city: city.en)
def test_every_bundled_city_is_found_in_a_question(city):
    assert find_city(f"帮我做一个{city.zh}周边自驾游方案", chinese=True) == city.zh
    assert find_city(f"What's the weather in {city.en}?", chinese=False) == city.en
    assert known_city(city.en.upper()) == city


@pytest.mark.parametrize(
    ("text", "city"),
    [
        ("从上海去杭州玩", "杭州"),
        ("上海出发去苏州", "苏州"),
        ("我想去稻城亚丁玩", "稻城亚丁"),
        ("帮我做一个喀什周边自驾游方案", "喀什"),
        ("查一下景德镇的气温", "景德镇"),
        ("去平遥要带伞吗", "平遥"),
        ("请帮我规划去婺源的行程", "婺源"),
        ("a trip from Shanghai to Suzhou", "Suzhou"),
        ("Will it rain in Cape Town?", "Cape Town"),
        ("Plan a trip to Rio de Janeiro", "Rio de Janeiro"),
        ("Oslo weather", "Oslo"),
        ("天气怎么样", None),
        ("你好", None),
        ("Plan a trip", None),
        ("hello", None),
    ],
)
def test_the_city_of_a_question(text, city):
    assert find_city(text, chinese=not text.isascii()) == city
