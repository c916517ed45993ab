"""A session's events, from any place on: replayed, then live, each once and in order, or a gap error."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta

import pytest
from a2a.types import StreamResponse

from agentscope_rocketmq import CURSOR_EXTENSION, Cursor, RocketMQ, cursor_of
from agentscope_rocketmq.errors import ConfigurationError, ReplayGapError, ResyncRequired, SessionTakenOver, WrongOwner
from tests.sessions import Agent, Listening, heard, text_of, texts
from tests.waiting import LIMIT, take, until

NUMBERS = [str(number) for number in range(40)]
MANY = [str(number) for number in range(100)]  # more than the broker hands out before any of it is taken


@pytest.fixture
async def rocketmq(config):
    async with RocketMQ(config, card_cache=None) as rocketmq:
        yield rocketmq


@pytest.fixture
async def other(config):
    """Another process, as far as RocketMQ can tell."""
    async with RocketMQ(config, card_cache=None) as rocketmq:
        yield rocketmq


@pytest.fixture
async def agent(producer, config):
    return Agent(producer, config, "trip")


async def test_a_replay_has_all_events_in_order_with_cursors_that_parse(rocketmq, agent):
    await agent.send(["0", "1"])
    await agent.say("2", "3", end=True)
    events = await heard(rocketmq.session("trip"), from_start=True)
    assert [text_of(event) for event in events] == ["0", "1", "2", "3"]
    assert [event.cursor.place for event in events] == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert all(Cursor.parse(str(event.cursor)) == event.cursor for event in events)
    assert [event.ends for event in events] == [False, False, False, True]
    assert {(event.request_id, event.attempt, event.run) for event in events} == {(agent.request_id, 0, agent.run)}
    assert all(datetime.now(UTC) - event.store_time < timedelta(minutes=5) for event in events)
    first = events[0].payload
    assert isinstance(first, StreamResponse)
    assert first.artifact_update.artifact.parts[0].text == "0"


async def test_a_replay_from_a_session_s_record_is_one_from_its_beginning(rocketmq, agent):
    """What was overtaken on its way to the broker is waited for: nothing of it can have come before."""
    session = rocketmq.session("trip")
    await session.announce()
    await agent.send(["1"], seq=1)
    await agent.send(["0"], seq=0)
    await agent.send(["2"], seq=2, end=True)
    assert await texts(session, from_start=True) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"from_start": True}, NUMBERS),
        ({"after": 7}, NUMBERS[8:]),
        ({"after": 38}, NUMBERS[39:]),
        ({"since": 13}, NUMBERS[13:]),
        ({"tail": 5}, NUMBERS[35:]),
        ({"tail": 1000}, NUMBERS),
        ({}, NUMBERS),
    ],
    ids=str,
)
@pytest.mark.parametrize("observe", [False, True], ids=["live", "observed"])
async def test_what_is_there_then_what_comes_without_seam_or_double(rocketmq, agent, where, expected, observe):
    session = rocketmq.session("trip")
    await agent.say(*NUMBERS)
    if "after" in where or "since" in where:
        known = await heard(session, from_start=True, observe=True)
    if "after" in where:
        where = {"after": str(known[where["after"]].cursor)}
    if "since" in where:
        where = {"since": known[where["since"]].store_time}
        expected = [text_of(event) for event in known if event.store_time >= where["since"]]
    async with Listening(session, observe=observe, **where) as listening:
        await listening.count(len(expected))
        await agent.say("live", "and more", end=True)
        assert await listening.count(len(expected) + 2) == [*expected, "live", "and more"]
    assert await texts(session, from_start=True, observe=True) == [*NUMBERS, "live", "and more"]


async def test_without_a_start_it_goes_on_behind_what_was_taken(rocketmq, agent):
    await agent.say(*NUMBERS)
    session = rocketmq.session("trip")
    async with contextlib.aclosing(session.events()) as events:
        taken = [text_of(await anext(events)) for _ in range(21)]
    assert taken == NUMBERS[:21]
    # The one in hand was not taken: it had not been asked for the next.
    assert await texts(session, 20) == NUMBERS[20:]
    assert session.cursor is not None


async def test_another_process_goes_on_behind_what_was_taken_and_the_former_reader_is_told(rocketmq, other, agent):
    await agent.say(*NUMBERS[:30])
    async with contextlib.aclosing(rocketmq.session("trip").events()) as events:
        taken = [text_of(await anext(events)) for _ in range(11)]
        assert taken == NUMBERS[:11]
        async with Listening(other.session("trip")) as heir:
            assert await heir.count(20) == NUMBERS[10:30]
            await agent.say(*NUMBERS[30:])
            assert await heir.count(30) == NUMBERS[10:]
            with pytest.raises(SessionTakenOver, match="trip"):
                async with asyncio.timeout(LIMIT):
                    async for _ in events:
                        pass


async def test_two_listeners_share_one_reader_and_each_has_its_own_place(rocketmq, agent):
    session = rocketmq.session("trip")
    await agent.say(*NUMBERS[:20])
    async with Listening(session) as first:
        assert await first.count(20) == NUMBERS[:20]
        async with Listening(session, from_start=True) as second:
            assert await second.count(20) == NUMBERS[:20]
            await agent.say(*NUMBERS[20:])
            assert await first.count(40) == NUMBERS
            assert await second.count(40) == NUMBERS


async def test_an_observer_disturbs_neither_the_live_reader_nor_its_position(rocketmq, other, agent):
    await agent.say(*NUMBERS[:10])
    async with Listening(rocketmq.session("trip")) as live:
        await live.count(10)
        assert await texts(other.session("trip"), from_start=True, observe=True) == NUMBERS[:10]
        await agent.say(*NUMBERS[10:20])
        assert await live.count(20) == NUMBERS[:20]
    await agent.say(*NUMBERS[20:])
    assert await texts(other.session("trip"), 20) == NUMBERS[20:]


@pytest.mark.parametrize(
    "cursor",
    ["3.0.000000000000", "999999.0.0123456789ab", "0.0", "x", "", "-1.0.0123456789ab", "1.0.0123456789AB", "1e3.0.ab"],
)
async def test_a_forged_cursor_is_a_gap_with_what_is_there(rocketmq, agent, cursor):
    await agent.say(*NUMBERS[:5])
    session = rocketmq.session("trip")
    with pytest.raises(ReplayGapError) as caught:
        await heard(session, 1, after=cursor)
    if caught.value.session is not None:
        assert caught.value.session == "trip"
        assert caught.value.oldest is not None
        assert await texts(session, 5, after=caught.value.oldest) == NUMBERS[:5]


async def test_a_cursor_of_another_session_is_a_gap(rocketmq, producer, config, agent):
    await agent.say(*NUMBERS[:5])
    await Agent(producer, config, "elsewhere").say(*NUMBERS[:5])
    foreign = (await heard(rocketmq.session("elsewhere"), from_start=True))[2].cursor
    with pytest.raises(ReplayGapError, match="trip"):
        await heard(rocketmq.session("trip"), 1, after=foreign)


async def test_duplicates_and_older_runs_are_dropped_from_a_replay_too(rocketmq, producer, config, agent):
    await agent.send(["0"])
    await agent.send(["0"], seq=0)
    await agent.send(["1"])
    rerun = Agent(producer, config, "trip", request_id=agent.request_id, attempt=1)
    await rerun.send(["again 0"])
    await agent.send(["late"])
    await rerun.send(["again 1"], end=True)
    await rerun.send(["again 1"], end=True, seq=1)
    assert await texts(rocketmq.session("trip"), from_start=True) == ["0", "1", "again 0", "again 1"]
    events = await heard(rocketmq.session("trip"), from_start=True)
    assert [event.attempt for event in events] == [0, 0, 1, 1]
    # From the middle the same: what came shortly before is looked at for who answers.
    assert [e.cursor for e in await heard(rocketmq.session("trip"), 1, after=events[2].cursor)] == [events[3].cursor]


async def test_a_session_belongs_to_its_first_owner(rocketmq, other, config, make_topic):
    from tests.agents import make_echo_agent
    from tests.services import card_for, reply, server_for

    topic = (await make_topic("NORMAL")).topic
    async with server_for(make_echo_agent, config, topic):
        async with await rocketmq.client(card_for(config, topic), session="mine", owner="ann") as client:
            assert await reply(client, "hello") == "echo:hello"
            with pytest.raises(WrongOwner, match="another owner"):
                await heard(other.session("mine", owner="bob"), 1, from_start=True)
            # Nobody was disturbed by the attempt.
            assert "still" in await reply(client, "still")
        events = await heard(other.session("mine", owner="ann"), from_start=True)
        assert any("still" in event.raw for event in events)
        assert all(event.agent is None for event in events)


async def test_a_listener_that_lags_while_others_go_on_is_cut_off_with_its_cursor(config, agent):
    limits = config.limits.model_copy(update={"listener_buffer": 5})
    async with RocketMQ(config.model_copy(update={"limits": limits}), card_cache=None) as rocketmq:
        session = rocketmq.session("trip")
        async with (
            Listening(session, from_start=True) as quick,
            contextlib.aclosing(session.events(from_start=True)) as slow,
        ):
            await agent.say("0", "1")
            assert await quick.count(2) == NUMBERS[:2]
            assert text_of(await anext(slow)) == "0"
            assert text_of(await anext(slow)) == "1"
            await agent.say(*NUMBERS[2:])
            assert await quick.count(40) == NUMBERS
            with pytest.raises(ResyncRequired) as caught:
                async for _ in slow:
                    pass
        assert caught.value.cursor is not None
        rest = await texts(session, after=caught.value.cursor)
        assert rest == NUMBERS[-len(rest) :]
        assert "1" in NUMBERS[: -len(rest)]


async def test_a_listener_that_takes_nothing_holds_up_nobody_who_wants_what_comes_behind(rocketmq, agent):
    await agent.say(*NUMBERS)
    session = rocketmq.session("trip")
    late = (await heard(session, from_start=True))[38].cursor
    async with Listening(session, after=late) as quick, contextlib.aclosing(session.events(from_start=True)) as slow:
        assert await quick.count(1) == ["39"]
        assert text_of(await anext(slow)) == "0"
        await agent.say("40")
        assert await quick.count(2) == ["39", "40"]
        assert [text_of(event) for event in await take(slow, 40)] == [*NUMBERS[1:], "40"]


async def test_a_listener_that_makes_the_reader_go_back_does_not_take_for_the_application(rocketmq, other, agent):
    """What lies read and not taken is still the application's when others hear it."""
    await agent.say(*NUMBERS[:20])
    session = rocketmq.session("trip")
    async with contextlib.aclosing(session.events()) as application:
        assert [text_of(event) for event in await take(application, 4)] == NUMBERS[:4]
        async with Listening(session, from_start=True) as listening:
            assert await listening.count(20) == NUMBERS[:20]
            # Its last one is taken as well, and whatever was to be acked for it is.
            assert await texts(session, 20, from_start=True) == NUMBERS[:20]
        # The three before it are taken, the fourth is in its hands.
        assert await texts(other.session("trip"), 17) == NUMBERS[3:20]


async def test_a_listener_that_begins_further_on_makes_nobody_miss_what_lies_between(rocketmq, agent):
    await agent.say(*MANY)
    session = rocketmq.session("trip")
    async with contextlib.aclosing(session.events()) as application:
        assert [text_of(event) for event in await take(application, 3)] == MANY[:3]
        channel = rocketmq.carrier(None).replies._channels[session.lite_topic]
        async with Listening(session, tail=2) as late:
            await until(lambda: len(channel.listeners) == 2 and not channel.opened.locked())
            assert [text_of(event) for event in await take(application, 97)] == MANY[3:]
            assert await late.count(2) == MANY[98:]


async def test_a_listener_that_left_too_much_is_cut_off_for_one_that_comes_after_it(config, agent):
    await agent.say(*MANY)
    limits = config.limits.model_copy(update={"listener_buffer": 5})
    async with RocketMQ(config.model_copy(update={"limits": limits}), card_cache=None) as rocketmq:
        session = rocketmq.session("trip")
        async with contextlib.aclosing(session.events(from_start=True)) as slow:
            assert text_of(await anext(slow)) == "0"
            async with Listening(session, tail=1) as late:
                assert await late.count(1) == ["99"]
            with pytest.raises(ResyncRequired):
                await anext(slow)


@pytest.mark.parametrize(
    "where",
    [{"from_start": True, "tail": 3}, {"since": datetime(2026, 1, 1)}, {"tail": -1}, {"tail": 2.0}],  # noqa: DTZ001
    ids=["two starts", "no zone", "negative", "part of an event"],
)
async def test_a_start_that_is_none_is_refused_at_once(rocketmq, where):
    with pytest.raises(ConfigurationError):
        rocketmq.session("trip").events(**where)


@pytest.mark.parametrize("version", ["1.0", "0.3"])
async def test_events_of_an_sdk_client_carry_their_cursors_for_those_who_ask(config, make_topic, version):
    from tests.agents import make_echo_agent
    from tests.services import calling, request, server_for

    topic = (await make_topic("NORMAL")).topic
    async with server_for(make_echo_agent, config, topic) as server:
        asking = calling(config, server, version=version, extensions=[CURSOR_EXTENSION], session="asked")
        async with asking as client:
            cursors = [cursor_of(event) async for event in client.send_message(request("hello"))]
        async with calling(config, server, version=version) as client:
            assert {cursor_of(event) async for event in client.send_message(request("hello"))} == {None}
    async with RocketMQ(config, card_cache=None) as rocketmq:
        session = rocketmq.session("asked")
        events = await heard(session, from_start=True)
        assert cursors == [event.cursor for event in events]
        assert len(cursors) > 2
        first, last = events[0].payload, events[-1].payload
        assert isinstance(first, StreamResponse)
        assert isinstance(last, StreamResponse)
        assert first.HasField("task")
        assert last.HasField("status_update")


@pytest.mark.parametrize("where", [{}, {"after": 39}, {"tail": 0}, {"from_start": True}], ids=str)
async def test_a_listener_is_told_when_nothing_can_be_missed_any_more(rocketmq, agent, where):
    """Which may be before there is any event."""
    await agent.say(*NUMBERS)
    session = rocketmq.session("trip")
    known = await heard(session, **({} if where == {} else {"from_start": True, "observe": True}))
    where = {**where, "after": known[-1].cursor} if "after" in where else where
    listening = asyncio.Event()
    async with (
        asyncio.timeout(LIMIT),
        contextlib.aclosing(session.events(**where, on_listening=listening.set)) as events,
    ):
        coming = asyncio.create_task(anext(events))
        await listening.wait()
        await agent.say("new")
        found = [await coming]
        while text_of(found[-1]) != "new":
            found.append(await anext(events))
    expected = [*NUMBERS, "new"] if "from_start" in where else ["new"]
    assert [text_of(event) for event in found] == expected


async def test_a_listener_whose_start_is_not_there_is_not_told_that_it_listens(rocketmq, agent):
    await agent.say("0")
    listening = asyncio.Event()
    gone = Cursor.of(7, 0, "message")
    async with contextlib.aclosing(rocketmq.session("trip").events(after=gone, on_listening=listening.set)) as events:
        with pytest.raises(ReplayGapError):
            await anext(events)
    assert not listening.is_set()
