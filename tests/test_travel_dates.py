"""The days a question is about."""

from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.travel_assistant.dates import MAX_DAYS, Dates, describe, find_dates
from examples.travel_assistant.policies import weather_question

SUNDAY = date(2026, 11, 22)
WEDNESDAY = date(2026, 11, 25)
LEAP_EVE = date(2028, 2, 28)
NEW_YEARS_EVE = date(2026, 12, 31)

TABLE = [
    # question, today, first day, last day (month-day, year where it differs)
    ("帮我做一个下周三到下周日杭州周边自驾游方案", SUNDAY, "2026-11-25", "2026-11-29"),
    ("帮我做一个下周三到下周日杭州周边自驾游方案", WEDNESDAY, "2026-12-02", "2026-12-06"),
    ("帮我做一个下周三到下周日杭州周边自驾游方案", NEW_YEARS_EVE, "2027-01-06", "2027-01-10"),
    ("杭州下周三到周日的天气情况怎么样?", WEDNESDAY, "2026-12-02", "2026-12-06"),
    ("今天", SUNDAY, "2026-11-22", "2026-11-22"),
    ("明天", LEAP_EVE, "2028-02-29", "2028-02-29"),
    ("后天", NEW_YEARS_EVE, "2027-01-02", "2027-01-02"),
    ("大后天", SUNDAY, "2026-11-25", "2026-11-25"),
    ("三天后", SUNDAY, "2026-11-25", "2026-11-25"),
    ("今天到后天", SUNDAY, "2026-11-22", "2026-11-24"),
    ("周三", WEDNESDAY, "2026-11-25", "2026-11-25"),
    ("周三", SUNDAY, "2026-11-25", "2026-11-25"),
    ("这周三", SUNDAY, "2026-11-18", "2026-11-18"),
    ("星期天", SUNDAY, "2026-11-22", "2026-11-22"),
    ("下周天气怎么样", SUNDAY, "2026-11-23", "2026-11-29"),
    ("本周日程", WEDNESDAY, "2026-11-25", "2026-11-29"),
    ("这周天气怎么样", WEDNESDAY, "2026-11-25", "2026-11-29"),
    ("一周天气", SUNDAY, "2026-11-23", "2026-11-29"),
    ("北京周三天气", SUNDAY, "2026-11-25", "2026-11-25"),
    ("下下周一", SUNDAY, "2026-11-30", "2026-11-30"),
    ("周五到下周二", WEDNESDAY, "2026-11-27", "2026-12-01"),
    ("下周五到下周二", WEDNESDAY, "2026-12-04", "2026-12-08"),
    ("下个周三至下个星期日", WEDNESDAY, "2026-12-02", "2026-12-06"),
    ("周六和周日", WEDNESDAY, "2026-11-28", "2026-11-29"),
    ("这周末", WEDNESDAY, "2026-11-28", "2026-11-29"),
    ("周末", SUNDAY, "2026-11-22", "2026-11-22"),
    ("下周末", WEDNESDAY, "2026-12-05", "2026-12-06"),
    ("6月3日到5日", SUNDAY, "2027-06-03", "2027-06-05"),
    ("6月3-5号", SUNDAY, "2027-06-03", "2027-06-05"),
    ("6月28日到7月2日", SUNDAY, "2027-06-28", "2027-07-02"),
    ("12月30日到1月2日", SUNDAY, "2026-12-30", "2027-01-02"),
    ("十二月三号", SUNDAY, "2026-12-03", "2026-12-03"),
    ("2月29日", SUNDAY, "2028-02-29", "2028-02-29"),
    ("3号到5号", SUNDAY, "2026-12-03", "2026-12-05"),
    ("31号", date(2026, 11, 30), "2026-12-31", "2026-12-31"),
    ("下个月3号", NEW_YEARS_EVE, "2027-01-03", "2027-01-03"),
    ("2026年12月3日到5日", SUNDAY, "2026-12-03", "2026-12-05"),
    ("2026-12-03到2026-12-07", SUNDAY, "2026-12-03", "2026-12-07"),
    ("2026/12/7 - 2026/12/3", SUNDAY, "2026-12-03", "2026-12-07"),
    ("未来三天", SUNDAY, "2026-11-23", "2026-11-25"),
    ("这几天", SUNDAY, "2026-11-22", "2026-11-24"),
    ("杭州三日游", SUNDAY, "2026-11-23", "2026-11-25"),
    ("下周三出发玩5天", SUNDAY, "2026-11-25", "2026-11-29"),
    ("今天起两天一夜", SUNDAY, "2026-11-22", "2026-11-23"),
    ("today", SUNDAY, "2026-11-22", "2026-11-22"),
    ("the day after tomorrow", NEW_YEARS_EVE, "2027-01-02", "2027-01-02"),
    ("tomorrow for two days", SUNDAY, "2026-11-23", "2026-11-24"),
    ("from next Wednesday to Sunday", SUNDAY, "2026-11-25", "2026-11-29"),
    ("next wednesday to next sunday", WEDNESDAY, "2026-12-02", "2026-12-06"),
    ("from Wed to next Sunday", SUNDAY, "2026-11-25", "2026-11-29"),
    ("from Wed to next Sunday", WEDNESDAY, "2026-11-25", "2026-12-06"),
    ("this Friday", SUNDAY, "2026-11-27", "2026-11-27"),
    ("Saturday and Sunday", WEDNESDAY, "2026-11-28", "2026-11-29"),
    ("this weekend", WEDNESDAY, "2026-11-28", "2026-11-29"),
    ("next weekend", SUNDAY, "2026-11-28", "2026-11-29"),
    ("next week", WEDNESDAY, "2026-11-30", "2026-12-06"),
    ("in 3 days", SUNDAY, "2026-11-25", "2026-11-25"),
    ("a 3-day trip", SUNDAY, "2026-11-23", "2026-11-25"),
    ("a week in Rome", SUNDAY, "2026-11-23", "2026-11-29"),
    ("the next few days", SUNDAY, "2026-11-23", "2026-11-25"),
    ("June 3-5", SUNDAY, "2027-06-03", "2027-06-05"),
    ("June 3rd to July 2nd", SUNDAY, "2027-06-03", "2027-07-02"),
    ("3 to 5 June", SUNDAY, "2027-06-03", "2027-06-05"),
    ("on 3 June 2028", SUNDAY, "2028-06-03", "2028-06-03"),
    ("December 30 - January 2", SUNDAY, "2026-12-30", "2027-01-02"),
]


@pytest.mark.parametrize(("text", "today", "start", "end"), TABLE)
def test_a_question_names_its_days(text, today, start, end):
    dates = find_dates(text, today)
    assert dates is not None
    assert (dates.start.isoformat(), dates.end.isoformat()) == (start, end)


@pytest.mark.parametrize(
    "text",
    [
        "杭州",
        "杭州周边自驾游",
        "坐地铁2号线",
        "2月30日",
        "9999年12月31日玩三天",
        "will there be sun in Paris",
        "",
        "5",
        "May I ask",
    ],
)
def test_a_text_without_a_real_day_names_none(text):
    assert find_dates(text, SUNDAY) is None


def test_a_length_alone_begins_where_the_trip_began():
    dates = find_dates("改成三天", SUNDAY, start=date(2026, 12, 5))
    assert dates is not None
    assert (dates.start, dates.end) == (date(2026, 12, 5), date(2026, 12, 7))


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("下周三到下周日", "下周三到周日"),
        ("下周三至周日", "下周三到周日"),
        ("周三到下周日", "周三到下周日"),
        ("next Wednesday to next Sunday", "next Wednesday to Sunday"),
        ("明天", "明天"),
        ("明天开始三天", "2026-11-23到2026-11-25"),
    ],
)
def test_a_phrase_repeats_nothing(text, phrase):
    dates = find_dates(text, SUNDAY)
    assert dates is not None
    assert dates.phrase == phrase


TODAYS = st.dates(date(2024, 1, 1), date(2032, 12, 31))


@given(
    first=st.sampled_from("一二三四五六日"),
    last=st.sampled_from("一二三四五六日"),
    today=TODAYS,
)
def test_two_weekdays_of_next_week_are_in_order_and_begin_there(first, last, today):
    dates = find_dates(f"下周{first}到下周{last}", today)
    assert dates is not None
    monday = today + timedelta(days=7 - today.weekday())
    assert dates.start == monday + timedelta(days="一二三四五六日".index(first))
    assert dates.end.weekday() == "一二三四五六日".index(last)
    assert dates.start <= dates.end < dates.start + timedelta(days=7)


@given(start=TODAYS, length=st.integers(0, 60), today=TODAYS, chinese=st.booleans())
def test_described_days_are_found_again(start, length, today, chinese):
    end = start + timedelta(days=length)
    dates = find_dates(describe(start, end, chinese=chinese), today)
    assert dates is not None
    assert (dates.start, dates.end) == (start, end)


@given(question=st.sampled_from([row[0] for row in TABLE]), today=TODAYS)
def test_the_question_to_the_weather_agent_means_the_same_days(question, today):
    asked = find_dates(question, today)
    assert asked is not None
    chinese = not question.isascii()
    passed_on = find_dates(weather_question("杭州" if chinese else "Paris", asked, chinese=chinese), today)
    assert passed_on is not None
    assert (passed_on.start, passed_on.end) == (asked.start, asked.end)


@given(text=st.text(max_size=60), today=TODAYS)
def test_any_text_is_read_without_an_error(text, today):
    dates = find_dates(text, today)
    assert dates is None or dates.start <= dates.end


def test_many_days_are_cut():
    dates = Dates(SUNDAY, SUNDAY + timedelta(days=400), "")
    assert len(dates.days()) == MAX_DAYS
