"""Find the days a question is about, in Chinese or English: "下周三到下周日", "next Wednesday to Sunday", "6月3-5日".

A week runs from Monday to Sunday. "下周三" and "next Wednesday" are the Wednesday of the next calendar week, "这周三" is that
of the current one, a bare "周三", "Wednesday" or "this Wednesday" the first one from today on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["MAX_DAYS", "Dates", "day_name", "describe", "find_dates", "is_chinese"]

MAX_DAYS = 31
"""Days that one answer covers at most, whatever was asked."""

_NUMBER = r"(?:\d{1,2}|[一二两三四五六七八九十]{1,3})"
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
# Short names only with a capital: "sun", "sat" and "wed" are words of their own.
_WEEKDAY = r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day|(?-i:Mon|Tues?|Wed|Thu(?:rs?)?|Fri|Sat|Sun)\b)"
_ZH_WEEK = r"(?:周|星期|礼拜)"
_ZH_WHICH = r"(?P<which>下下个?|下个?|[这本]个?)"
_JOIN = re.compile(r"\s*(?:到|至|直到|和|[-–—~～]|\b(?:to|until|till|through|and)\b)\s*", re.IGNORECASE)
_ORDINAL = r"(?:st|nd|rd|th)?"


@dataclass(frozen=True, slots=True)
class Dates:
    """The days a question is about.

    Attributes:
        start: First day.
        end: Last day, the same as `start` for a single one.
        phrase: How the question words it, without needless repetition ("下周三到周日"); a worked-out date where the
            question gives a length instead of an end.
        span: Where in the question that stands.
    """

    start: date
    end: date
    phrase: str
    span: tuple[int, int] = (0, 0)

    def days(self) -> list[date]:
        """Every day, the first `MAX_DAYS` of them."""
        count = min((self.end - self.start).days + 1, MAX_DAYS)
        return [self.start + timedelta(days=number) for number in range(count)]


@dataclass(frozen=True, slots=True)
class _Term:
    """One expression for a day or a few: the pattern, and what it means seen from today.

    `since` is the day from which the next "周三" or "June 3" is looked for: today, or where a range begins.
    """

    pattern: re.Pattern[str]
    resolve: Callable[[re.Match[str], date, date], tuple[date, date]]
    calendar: bool = False


def is_chinese(text: str) -> bool:
    """Whether a text is written in Chinese (it has at least one Chinese character)."""
    return re.search(r"[\u4e00-\u9fff]", text) is not None


def day_name(day: date, *, chinese: bool) -> str:
    """A day with its weekday: "2026-11-25 周三" or "2026-11-25 Wed"."""
    name = "周" + "一二三四五六日"[day.weekday()] if chinese else _WEEKDAYS[day.weekday()][:3].title()
    return f"{day.isoformat()} {name}"


def describe(start: date, end: date, *, chinese: bool) -> str:
    """Word a range of days without reference to today: "2026-11-25到2026-11-29"."""
    if start == end:
        return start.isoformat()
    return f"{start.isoformat()}{'到' if chinese else ' to '}{end.isoformat()}"


def find_dates(text: str, today: date, *, start: date | None = None) -> Dates | None:
    """Find the days a text is about.

    Args:
        text: A question in Chinese or English.
        today: The day it was asked.
        start: Where a bare length ("三天", "for 3 days") begins; None means tomorrow.

    Returns:
        The first expression found, or None where there is none (or it names no real day, like "2月30日").
    """
    try:
        return _find(text, today, start)
    except (ValueError, OverflowError):
        return None


def _find(text: str, today: date, start: date | None) -> Dates | None:
    length = _length(text)
    found = _whole_range(text, today) or _terms(text, today)
    if length is None:
        return found
    days, starts_today, span = length
    if found is None:
        start = start or (today if starts_today else today + timedelta(days=1))
    elif found.start == found.end and not _overlap(found.span, span):
        start, span = found.start, found.span
    else:
        return found
    end = start + timedelta(days=days - 1)
    return Dates(start, end, describe(start, end, chinese=is_chinese(text)), span)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


# --- single expressions ----------------------------------------------------------------------------------------------


def _number(text: str) -> int:
    if text.isdigit():
        return int(text)
    tens, ten, ones = text.partition("十")
    digits = {"": 0} | {digit: value for value, digit in enumerate("一二三四五六七八九", start=1)} | {"两": 2}
    if not ten:
        tens, ones = "", text
    if tens not in digits or ones not in digits:
        raise ValueError(f"{text} is not a number")
    return (10 * (digits[tens] or 1) if ten else 0) + digits[ones]


def _monday(day: date) -> date:
    return day - timedelta(days=day.weekday())


def _weeks_ahead(which: str | None) -> int | None:
    """How many calendar weeks (or months) ahead "下" or "next" points; None where nothing is said."""
    if which is None or which.lower() == "this":
        return None
    which = which.lower()
    if which.startswith("下下"):
        return 2
    return 1 if which.startswith(("下", "next")) else 0


def _weekday(match: re.Match[str], today: date, since: date) -> tuple[date, date]:
    name = match["day"]
    if name in "一二三四五六日天":
        number = 6 if name == "天" else "一二三四五六日".index(name)
    else:
        number = next(i for i, full in enumerate(_WEEKDAYS) if full.startswith(name.lower()[:3]))
    weeks = _weeks_ahead(match["which"])
    if weeks is None:
        day = since + timedelta(days=(number - since.weekday()) % 7)
    else:
        day = _monday(today) + timedelta(days=7 * weeks + number)
    return day, day


def _weekend(match: re.Match[str], today: date, since: date) -> tuple[date, date]:
    weeks = _weeks_ahead(match["which"])
    monday = _monday(since) if weeks is None else _monday(today) + timedelta(days=7 * weeks)
    sunday = monday + timedelta(days=6)
    saturday = sunday - timedelta(days=1)
    # On a Sunday "this weekend" is what is left of it.
    return (today if today == sunday else saturday), sunday


def _week(match: re.Match[str], today: date, _since: date) -> tuple[date, date]:
    weeks = _weeks_ahead(match["which"]) or 0
    monday = _monday(today) + timedelta(days=7 * weeks)
    return max(monday, today), monday + timedelta(days=6)


def _relative(match: re.Match[str], today: date, _since: date) -> tuple[date, date]:
    day = today + timedelta(days=_RELATIVE[match[0].lower().removeprefix("the ")])
    return day, day


def _in_days(match: re.Match[str], today: date, _since: date) -> tuple[date, date]:
    day = today + timedelta(days=_number(match["count"]))
    return day, day


def _iso(match: re.Match[str], _today: date, _since: date) -> tuple[date, date]:
    day = date(int(match["year"]), int(match["month"]), int(match["number"]))
    return day, day


def _month_day(match: re.Match[str], today: date, since: date) -> tuple[date, date]:
    name = match["month"].lower()
    month = _MONTHS.index(name[:3]) + 1 if name[:3] in _MONTHS else _number(name)
    year = match.groupdict().get("year")
    if year:
        day = date(int(year), month, _number(match["number"]))
    else:
        day = _next(max(today, since), month, _number(match["number"]))
    return day, day


def _day_of_month(match: re.Match[str], today: date, since: date) -> tuple[date, date]:
    which = match.groupdict().get("which")
    if which:
        months = today.month - 1 + (_weeks_ahead(which) or 0)
        day = date(today.year + months // 12, months % 12 + 1, _number(match["number"]))
    else:
        day = _next(max(today, since), None, _number(match["number"]))
    return day, day


def _next(since: date, month: int | None, number: int) -> date:
    """The first day from `since` on with that number in its month (and that month, unless None)."""
    months = since.year * 12 + since.month - 1
    for ahead in range(12 * 8 + 1):  # 29 February may be eight years away
        year, index = divmod(months + ahead, 12)
        if month not in (None, index + 1):
            continue
        try:
            day = date(year, index + 1, number)
        except ValueError:
            continue
        if day >= since:
            return day
    raise ValueError(f"there is no day {number} in month {month}")


_RELATIVE = {
    **dict.fromkeys(("今天", "今日", "今晚", "today", "tonight"), 0),
    **dict.fromkeys(("明天", "明日", "明早", "明晚", "tomorrow"), 1),
    **dict.fromkeys(("后天", "day after tomorrow"), 2),
    "大后天": 3,
}


def _pattern(source: str) -> re.Pattern[str]:
    return re.compile(source, re.IGNORECASE)


_TERMS = (
    _Term(
        _pattern(r"(?<!\d)(?P<year>\d{4})\s*[-/.年]\s*(?P<month>\d{1,2})\s*[-/.月]\s*(?P<number>\d{1,2})(?!\d)[日号]?"),
        _iso,
        calendar=True,
    ),
    _Term(
        _pattern(rf"(?P<month>{_NUMBER})月(?P<number>{_NUMBER})(?!\d)[日号]?"),
        _month_day,
        calendar=True,
    ),
    _Term(
        _pattern(rf"(?:(?P<which>下个?|[这本]个?)月)?(?P<number>{_NUMBER})号(?![线楼馆门院])"),
        _day_of_month,
        calendar=True,
    ),
    _Term(_pattern(rf"{_ZH_WHICH}?{_ZH_WEEK}(?P<day>[一二三四五六]|日(?!程)|天(?!气))"), _weekday),
    _Term(_pattern(rf"{_ZH_WHICH}?周末"), _weekend),
    _Term(_pattern(rf"{_ZH_WHICH}{_ZH_WEEK}(?!边)"), _week),
    _Term(_pattern(r"大后天|[今明][天日晚]|明早|后天"), _relative),
    _Term(_pattern(rf"(?P<count>{_NUMBER})天[之以]?后"), _in_days),
    _Term(
        _pattern(rf"\b(?P<month>{_MONTH})\s+(?P<number>\d{{1,2}})(?!\d){_ORDINAL}(?:,?\s+(?P<year>\d{{4}})\b)?"),
        _month_day,
        calendar=True,
    ),
    _Term(
        _pattern(rf"\b(?P<number>\d{{1,2}}){_ORDINAL}\s+(?:of\s+)?(?P<month>{_MONTH})\b(?:,?\s+(?P<year>\d{{4}})\b)?"),
        _month_day,
        calendar=True,
    ),
    _Term(_pattern(rf"\b(?:(?P<which>next|this)\s+|coming\s+)?(?P<day>{_WEEKDAY})"), _weekday),
    _Term(_pattern(r"\b(?:(?P<which>next|this)\s+|(?:the|coming)\s+)?weekend\b"), _weekend),
    _Term(_pattern(r"\b(?P<which>next|this)\s+week\b"), _week),
    _Term(_pattern(r"\b(?:today|tonight|tomorrow|(?:the )?day after tomorrow)\b"), _relative),
    _Term(_pattern(r"\bin\s+(?P<count>\d{1,2})\s+days\b"), _in_days),
)
# After "6月3日到" or "June 3 to", a number alone is a day.
_BARE_DAY = _Term(
    _pattern(rf"(?P<number>{_NUMBER})(?!\d|月|天|\s*days|\s*[-/.年]\s*\d)(?:[日号]|{_ORDINAL})"), _day_of_month
)
# "3-5号", "3日到5日", "3-5 June", "3 to 5 June": the first number gets its meaning from the second.
_WHOLE_RANGES = (
    _pattern(
        rf"(?<![\d月年/.-])(?P<number>{_NUMBER})[日号]?\s*(?:到|至|[-–—~～])\s*(?P<last>{_NUMBER})(?:号|日(?!游))"
    ),
    _pattern(
        rf"\b(?<![\d/.-])(?P<number>\d{{1,2}}){_ORDINAL}\s*(?:to|until|till|through|[-–—~])\s*"
        rf"(?P<last>\d{{1,2}}){_ORDINAL}\s+(?:of\s+)?(?P<month>{_MONTH})\b"
    ),
)


# --- ranges ----------------------------------------------------------------------------------------------------------


def _whole_range(text: str, today: date) -> Dates | None:
    for pattern in _WHOLE_RANGES:
        match = pattern.search(text)
        if match is None:
            continue
        resolve = _month_day if "month" in pattern.groupindex else _day_of_month
        start, _ = resolve(match, today, today)
        last = _number(match["last"])
        end = _next(start, start.month if "month" in pattern.groupindex else None, last)
        return Dates(start, end, match[0].strip(), match.span())
    return None


def _terms(text: str, today: date) -> Dates | None:
    """The first expression of the text, and the one it is joined to, if any."""
    first = _earliest(text, today)
    if first is None:
        return None
    match, term, (start, end) = first
    joint = _JOIN.match(text, match.end())
    if joint is not None:
        choices = (*_TERMS, _BARE_DAY) if term.calendar else _TERMS
        second = _longest(_matches_at(choices, text, joint.end(), today, start))
        if second is not None:
            last, _, (_, end) = second
            if end < start:
                weekly = "day" in last.re.groupindex or "which" in last.re.groupindex
                start, end = (start, end + _whole_weeks(start - end)) if weekly else (end, start)
            phrase = _joined(match, last, chinese=is_chinese(text))
            return Dates(start, end, phrase, (match.start(), last.end()))
    return Dates(start, end, match[0].strip(), match.span())


def _whole_weeks(distance: timedelta) -> timedelta:
    return timedelta(days=-(-distance.days // 7) * 7)


_Found = tuple[re.Match[str], _Term, tuple[date, date]]


def _earliest(text: str, today: date) -> _Found | None:
    found = [(match, term) for term in _TERMS if (match := term.pattern.search(text)) is not None]
    if not found:
        return None
    match, term = min(found, key=lambda pair: (pair[0].start(), -pair[0].end()))
    return match, term, term.resolve(match, today, today)


def _matches_at(terms: tuple[_Term, ...], text: str, position: int, today: date, since: date) -> Iterator[_Found]:
    for term in terms:
        match = term.pattern.match(text, position)
        if match is not None:
            yield match, term, term.resolve(match, today, since)


def _longest(found: Iterator[_Found]) -> _Found | None:
    return max(found, key=lambda item: item[0].end(), default=None)


def _joined(first: re.Match[str], last: re.Match[str], *, chinese: bool) -> str:
    """Word a range, without the second of two equal "下周" or "next"."""
    ending = last[0].strip()
    which, again = first.groupdict().get("which"), last.groupdict().get("which")
    if which and again and _weeks_ahead(which) == _weeks_ahead(again):
        ending = ending.removeprefix(again).strip()
    return f"{first[0].strip()}{'到' if chinese else ' to '}{ending}"


# --- lengths ---------------------------------------------------------------------------------------------------------

_ENGLISH_NUMBERS = {
    word: value
    for value, word in enumerate(
        ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], start=1
    )
} | {"a": 1}
_DAYS = _pattern(
    rf"(?<![周期拜第\d])(?P<zh>{_NUMBER})(?:天(?!气|[之以]?后)|日(?=[游行之]))"
    rf"|\b(?P<en>\d{{1,2}}|{'|'.join(_ENGLISH_NUMBERS)})[\s-]+days?\b(?!\s+(?:ago|after))"
)
_WEEKS = _pattern(
    rf"(?P<zh>{_NUMBER})(?:周|个?星期|个?礼拜)(?![一二三四五六日末后]|天(?!气))"
    rf"|\b(?P<en>\d|{'|'.join(_ENGLISH_NUMBERS)})\s+weeks?\b(?!\s+(?:ago|after))"
)
_FEW_DAYS = _pattern(r"[这近几]几?天(?!气)|\b(?:next|coming|these)\s+(?:few\s+)?days\b")
_FROM_TODAY = re.compile(r"近|这几天|these")


def _length(text: str) -> tuple[int, bool, tuple[int, int]] | None:
    """A length in days, whether it counts from today ("这几天") rather than tomorrow, and where it stands."""
    for pattern, unit in ((_DAYS, 1), (_WEEKS, 7)):
        match = pattern.search(text)
        if match is None:
            continue
        count = _number(match["zh"]) if match["zh"] else _english_number(match["en"])
        days = min(max(count * unit, 1), MAX_DAYS)
        return days, bool(_FROM_TODAY.search(text)), match.span()
    match = _FEW_DAYS.search(text)
    return None if match is None else (3, bool(_FROM_TODAY.search(text)), match.span())


def _english_number(word: str) -> int:
    return int(word) if word.isdigit() else _ENGLISH_NUMBERS[word.lower()]
