"""A session's messages, read again from anywhere, give the same events with the same cursors. No broker."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentscope_rocketmq import Cursor, Limits
from agentscope_rocketmq.cursor import CURSOR_EXTENSION, with_cursor
from agentscope_rocketmq.envelope import ResponseEnvelope
from agentscope_rocketmq.errors import ReplayGapError, WrongOwner
from agentscope_rocketmq.jsonrpc import RpcError
from agentscope_rocketmq.listening import Listener, Start
from agentscope_rocketmq.replay import EventReader, SessionEvent, SessionRecord
from agentscope_rocketmq.rerun import RESTART_EXTENSION
from agentscope_rocketmq.sse import render_event
from tests.wires import chunk_event, result_event

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Stored:
    """A message as `EventReader` and `Listener` look at it."""

    def __init__(self, offset: int, body: bytes) -> None:
        self.offset = offset
        self.message_id = f"message-{offset}"
        self.store_time = NOON + timedelta(seconds=offset)
        self.content = body


def said(request_id: str, seq: int, events: list[str], *, attempt: int = 0, end: bool = False) -> bytes:
    body = "".join(map(render_event, events)) or None
    return ResponseEnvelope(
        request_id=request_id, body=body, stream=True, end=end, seq=seq, attempt=attempt, run=f"run-{attempt}"
    ).encode()


def task_event(state: str) -> str:
    return result_event({"task": {"id": "t", "contextId": "c", "status": {"state": f"TASK_STATE_{state}"}}})


def text_event(text: str, *, append: bool) -> str:
    artifact = {"artifactId": "a", "parts": [{"text": text}]}
    return result_event({"artifactUpdate": {"taskId": "t", "contextId": "c", "artifact": artifact, "append": append}})


def stored(*bodies: bytes) -> list[Stored]:
    return [Stored(offset, body) for offset, body in enumerate(bodies)]


def feed(reader: EventReader, message: Stored) -> list[SessionEvent]:
    return reader.feed(
        message.content, offset=message.offset, message_id=message.message_id, store_time=message.store_time
    )


def read(messages: list[Stored], *, start: int = 0) -> list[SessionEvent]:
    reader = EventReader()
    return [event for message in messages[start:] for event in feed(reader, message)]


RERUN = stored(
    said("r", 0, [task_event("SUBMITTED"), text_event("1", append=False)]),
    said("r", 1, [text_event("2", append=True)]),
    said("other", 0, [chunk_event("x")]),
    said("r", 0, [task_event("SUBMITTED"), text_event("1", append=False)], attempt=1),
    said("r", 2, [text_event("3", append=True)]),
    said("r", 1, [text_event("2", append=True)], attempt=1),
    said("other", 1, [chunk_event("y")], end=True),
    said("r", 2, [text_event("3", append=True)], attempt=1, end=True),
)


@given(after=st.integers(0, 8))
async def test_going_on_behind_any_event_gives_the_rest_also_at_the_seam_of_two_runs(after):
    everything = read(RERUN)
    assert sum(RESTART_EXTENSION in event.raw for event in everything) == 1
    cursor = everything[min(after, len(everything) - 1)].cursor
    listener = Listener("s", Start(offset=cursor.offset, after=cursor), limits=Limits(), on_taken=lambda: None)
    reader = EventReader()
    for message in RERUN:
        listener.hear(message, feed(reader, message))  # type: ignore[arg-type]
    heard: list[SessionEvent] = []
    while listener.given > len(heard):
        event = await listener.next()
        assert event is not None
        heard.append(event)
        listener.took(event)
    expected = [event for event in everything if event.cursor.place > cursor.place]
    if cursor.index < 0:  # what was added at the seam is repeated as a whole
        expected = [event for event in everything if event.cursor.place >= cursor.place]
    assert heard == expected


@pytest.mark.parametrize("start", range(1, len(RERUN)))
def test_reading_from_the_middle_gives_what_is_there_the_places_it_has(start):
    whole = {event.cursor: event.raw for event in read(RERUN) if event.cursor.index >= 0}
    # Message 4 is of the older run: who begins at it can't know of the newer one.
    found = [event for event in read(RERUN, start=start) if event.cursor.offset != 4]
    assert found
    for event in found:
        if event.cursor.index >= 0 and event.cursor in whole:
            assert event.raw == whole[event.cursor] or event.cursor.offset == 3


def test_what_is_no_answer_is_no_event():
    record = SessionRecord(id="1", name="trip", owner="ann", time=1.0)
    messages = stored(record.encode(), b"not json", b"[]", said("r", 0, [chunk_event("1")]))
    assert [event.cursor.offset for event in read(messages)] == [3]


def test_a_record_is_read_as_it_was_written_and_nothing_else_is_one():
    record = SessionRecord(id="1", name="Reise nach 杭州", owner="ann", time=1.5, mark=True)
    assert SessionRecord.decode(record.encode()) == record
    fields = json.loads(record.encode())
    assert ResponseEnvelope.decode(record.encode()).body is None  # for readers that do not know of records
    for change in ({"session": 1}, {"responseBody": "x"}, {"requestId": 7}, {"session": {"name": "x"}}):
        assert SessionRecord.decode(json.dumps({**fields, **change}).encode()) is None
    absurd: dict[str, Any] = {"name": "n", "owner": "o", "time": 10**400}
    assert SessionRecord.decode(json.dumps({**fields, "session": absurd}).encode()) is None


@given(st.integers(0, 10**12), st.integers(-1, 10**6), st.text())
def test_a_cursor_is_read_as_it_was_written(offset, index, message_id):
    cursor = Cursor.of(offset, index, message_id)
    assert Cursor.parse(str(cursor)) == cursor
    assert cursor.is_of(message_id)
    assert not cursor.is_of(message_id + "x")
    assert not replace(cursor, index=index + 1).is_of(message_id)


@given(st.text())
def test_any_other_text_is_a_gap(text):
    with pytest.raises(ReplayGapError) as caught:
        Cursor.parse(text)
    assert caught.value.wanted == text


@pytest.mark.parametrize("kind", ["task", "message", "statusUpdate", "artifactUpdate"])
def test_a_cursor_goes_into_the_metadata_of_whatever_event_it_is(kind):
    cursor = Cursor.of(1, 2, "m")
    for result in ({kind: {"metadata": {"x": 1}}}, {"kind": kind, "metadata": {"x": 1}}):
        marked = json.loads(with_cursor(result_event(result), cursor))["result"]
        assert marked.get(kind, marked)["metadata"] == {"x": 1, CURSOR_EXTENSION: str(cursor)}
    for other in ("x", "[]", '{"error": {}}', '{"result": {"tasks": []}}', '{"result": {"task": 1}}'):
        assert with_cursor(other, cursor) == other


def test_an_error_is_an_events_payload():
    error = json.dumps({"jsonrpc": "2.0", "id": "1", "error": {"code": -32001, "message": "no such task"}})
    [event] = read(stored(said("r", 0, [error], end=True)))
    assert (event.payload, event.ends) == (RpcError(code=-32001, message="no such task"), True)


@pytest.mark.parametrize(
    "start",
    [
        Start(offset=0, whole=True),
        Start(offset=2, after=Cursor.of(2, 0, "message-2")),
        Start(offset=5, after=Cursor.of(5, 0, "another message")),
    ],
    ids=["its start", "a cursor that is no longer kept", "a cursor of another message"],
)
async def test_what_is_no_longer_kept_is_a_gap_and_nothing_is_given_out(start):
    listener = Listener("s", start, limits=Limits(), on_taken=lambda: None)
    reader = EventReader()
    message = Stored(5, said("r", 7, [chunk_event("x")]))
    listener.hear(message, feed(reader, message))  # type: ignore[arg-type]
    assert listener.given == 0
    with pytest.raises(ReplayGapError, match="not kept"):
        await listener.next()


async def test_a_listener_is_behind_by_events_or_by_bytes_and_no_further():
    listener = Listener(
        "s", Start(), limits=Limits(listener_buffer=100, stream_buffer_bytes=2**20), on_taken=lambda: None
    )
    reader = EventReader()
    for number in range(3):
        assert listener.has_room
        message = Stored(number, said("r", number, [chunk_event("x" * 400_000)]))
        listener.hear(message, feed(reader, message))  # type: ignore[arg-type]
    assert not listener.has_room
    await listener.next()
    assert listener.has_room
    assert "1,048,576 bytes" in listener.bound


async def test_the_first_record_says_whose_a_session_is_and_later_ones_change_nothing():
    records = [
        SessionRecord(id=str(number), name="s", owner=owner, time=1.0) for number, owner in enumerate(("ann", "bob"))
    ]
    mark = SessionRecord(id="m", name="s", owner="eve", time=1.0, mark=True)
    anns = Listener("s", Start(owner="ann"), limits=Limits(), on_taken=lambda: None)
    bobs = Listener("s", Start(owner="bob"), limits=Limits(), on_taken=lambda: None)
    for record in (mark, *records):
        anns.read_record(record)
        bobs.read_record(record)
    assert anns.waits
    with pytest.raises(WrongOwner):
        await bobs.next()
