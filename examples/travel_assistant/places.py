"""Cities: the bundled ones, and how to find the city a question is about, be it bundled or not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

__all__ = ["City", "cities", "find_city", "known_city"]

_DATA = Path(__file__).parent / "data" / "cities.json"


@dataclass(frozen=True, slots=True)
class City:
    """A bundled city with its monthly climate normals (approximate), January first.

    Attributes:
        zh: Chinese name.
        en: English name.
        lat: Latitude in degrees.
        lon: Longitude in degrees.
        high: Mean daily maximum of each month in °C.
        low: Mean daily minimum of each month in °C.
        wet_days: Days with precipitation in each month.
        also: Other names it goes by.
    """

    zh: str
    en: str
    lat: float
    lon: float
    high: tuple[int, ...]
    low: tuple[int, ...]
    wet_days: tuple[int, ...]
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the city."""
        return (self.zh, self.en, *self.also)

    def name(self, *, chinese: bool) -> str:
        """Its name in Chinese or in English."""
        return self.zh if chinese else self.en


@cache
def cities() -> tuple[City, ...]:
    """The bundled cities."""
    return TypeAdapter(tuple[City, ...]).validate_json(_DATA.read_bytes())


def known_city(name: str) -> City | None:
    """The bundled city of that name ("杭州", "杭州市", "hangzhou"), or None."""
    wanted = name.strip().removesuffix("市").casefold()
    return next((city for city in cities() if wanted in (known.casefold() for known in city.names)), None)


def find_city(text: str, *, chinese: bool) -> str | None:
    """Find the city a question is about; where one departs from another, the one one goes to.

    Args:
        text: A question, best without its dates.
        chinese: In which language to name it.

    Returns:
        The name of a bundled city in that language, else the words that stand where a city would, else None.
    """
    found = [
        (position, city) for city in cities() for name in city.names if (position := _position(name, text)) is not None
    ]
    if found:
        return min(found, key=lambda pair: pair[0])[1].name(chinese=chinese)
    return _unknown_chinese(text) or _unknown_english(text)


def _position(name: str, text: str) -> int | None:
    """Where a text names a city, other than as the point of departure."""
    if name.isascii():
        pattern = rf"(?<!\bfrom )(?<![A-Za-z]){re.escape(name)}(?![A-Za-z])"
    else:
        pattern = rf"(?<![从离由]){re.escape(name)}(?!出发)"
    match = re.search(pattern, text, re.IGNORECASE)
    return None if match is None else match.start()


# What a Chinese question about a trip or the weather consists of besides the city, longest first where one word begins
# with another.
_ZH_OTHER_WORDS = re.compile(
    r"从[\u4e00-\u9fff]{2,4}?(?=去|到|往|出发)|帮我们?|麻烦|给我们?|告诉我们?|替我们?|我们|我[想要]?|您|你好?|请问?|想要?|打算|准备|可以|能不能|能否|能|"
    r"制定|规划|计划|安排|设计|生成|推荐|查询?|看看?|问问?|了解|知道|做|写|来|改成?|换成?|那边?|"
    r"一下|一[个份条趟次]|[个份条趟次]|周边|附近|周围|郊区|市区?|本地|当地|自驾游?|亲子|家庭|情侣|徒步|骑行|"
    r"旅游|旅行|旅程|出行|出差|游玩|游览|短途|深度|度假|观光|[一二三四五六七八九十\d]+[天日]游?|两夜|一夜|游|玩儿?|"
    r"方案|行程|攻略|路线|日程|"
    r"天气|气温|温度|气候|预报|情况|怎么样|怎样|如何|什么样|多少度?|会不会|是不是|有没有|会|有|要|带伞|带|"
    r"下雨|下雪|降雨|降水|刮风|雨|雪|冷不冷|热不热|冷|热|好不好|好|适合|合适|穿什么|什么|哪里|哪儿|"
    r"出发|开始|前往|去|到|在|从|往|的|了|吗|呢|吧|啊|呀|嘛|和|与|或|是|不|还|再|也|都|就|谢谢|您好|嗯|哦"
)


def _unknown_chinese(text: str) -> str | None:
    rest = re.findall(r"[\u4e00-\u9fff]{2,8}", _ZH_OTHER_WORDS.sub(" ", text))
    return rest[0] if rest else None


_NAME = r"[A-Z][\w'’.-]*(?:\s+(?:de|da|do|la|le|el|di|am|upon|[A-Z][\w'’.-]*))*"
_EN_OTHER_WORDS = re.compile(
    r"\b(?:I|I'm|I'd|We|You|What|What's|Whats|How|How's|Is|Are|Will|Would|Could|Can|Should|Does|Do|Please|Plan|Make|Give|"
    r"Show|Tell|Check|Find|Create|Suggest|Recommend|Hi|Hello|Hey|Thanks|Thank|And|Or|The|A|An|My|Me|It|There|Then|Now|"
    r"Weather|Forecast|Temperature|Trip|Travel|Road|Tour|Itinerary|Visit|Holiday|Vacation|From|To|In|On|For|At|Ok|Okay|Yes|No)\b"
)


def _unknown_english(text: str) -> str | None:
    placed = re.search(rf"\b(?:in|to|around|near|for|at|visit|about|of|explore)\s+({_NAME})", text)
    if placed is None:
        placed = re.search(rf"({_NAME})", _EN_OTHER_WORDS.sub(" ", text))
    return placed[1].rstrip(".'’-") if placed else None
