"""What is worth seeing, eating and where to stay: a small bundled guide."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from examples.travel_assistant.places import known_city

__all__ = ["Guide", "Sight", "look_up"]

_DATA = Path(__file__).parent / "data" / "guide.json"


class Sight(BaseModel):
    """A place to visit.

    Attributes:
        kind: In the open, under a roof, or a drive away from the city.
        name: What it is called.
        do: What to do there.
        stay: Where to spend the night nearby; empty for anywhere in the city.
    """

    kind: Literal["outdoor", "indoor", "nearby"]
    name: str
    do: str
    stay: str = ""


class Guide(BaseModel):
    """What the bundled guide knows of a city, in one language.

    Attributes:
        city: Its name.
        sights: Places to visit; empty for a city that the guide does not know.
        food: Dishes of the place.
        stay: Where in the city to stay.
    """

    city: str
    sights: list[Sight] = []
    food: list[str] = []
    stay: str = ""


class _Row(BaseModel):
    kind: Literal["outdoor", "indoor", "nearby"]
    zh: tuple[str, str, str]
    en: tuple[str, str, str]


class _Entry(BaseModel):
    sights: list[_Row]
    food: dict[str, list[str]]
    stay: dict[str, str]


class _File(BaseModel):
    cities: dict[str, _Entry]


@cache
def _file() -> dict[str, _Entry]:
    return _File.model_validate_json(_DATA.read_bytes()).cities


def look_up(city: str, *, chinese: bool) -> Guide:
    """What the guide knows of a city; nothing but the name for one it does not have."""
    bundled = known_city(city)
    entry = _file().get(bundled.zh) if bundled else None
    if entry is None:
        return Guide(city=city)
    language = "zh" if chinese else "en"
    rows = [(row.kind, row.zh if chinese else row.en) for row in entry.sights]
    return Guide(
        city=city,
        sights=[Sight(kind=kind, name=name, do=do, stay=stay) for kind, (name, do, stay) in rows],
        food=entry.food[language],
        stay=entry.stay[language],
    )
