"""Server-sent events, in any chunking and for every reader."""

from __future__ import annotations

import json

import httpx
import pytest
from a2a.client.transports.http_helpers import parse_sse_stream
from hypothesis import given, settings
from hypothesis import strategies as st

from agentscope_rocketmq.sse import Event, EventParser, parse_events, render_event
from tests.wires import chunked

values = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("data: a\n\n", [Event(data="a")]),
        ("data:a\r\n\r\n", [Event(data="a")]),
        ("data: a\r\rdata: b\r\r", [Event(data="a"), Event(data="b")]),
        ("data:a\nid: 3\n\n", [Event(data="a", id="3")]),
        ("id:3\nevent:error\ndata:  a", [Event(data=" a", name="error", id="3")]),
        ("data: a\ndata: b\n\n", [Event(data="a\nb")]),
        (": ping\r\n\r\ndata: a\n\n: ping\n\n", [Event(data="a")]),
        ("retry: 5\nevent: x\n\ndata\n\ndata: a\n\n", [Event(data="a")]),
        ("", []),
    ],
)
def test_events_of_a_text(text, events):
    assert parse_events(text) == events


@settings(deadline=None)
@given(st.data())
def test_any_chunking_gives_the_same_events(data):
    pieces = data.draw(
        st.lists(
            st.sampled_from(
                ["data: ", "data:杭州😀", "\n", "\r\n", "\r", ": ping", "id: 1", "event: e", "\n\n", "\r\n\r\n"]
            ),
            max_size=30,
        )
    )
    whole = "".join(pieces).encode()
    parser = EventParser()
    events = [event for chunk in data.draw(chunked(whole)) for event in parser.feed(chunk)] + parser.close()
    assert events == parse_events(whole.decode())
    assert parser.pending_bytes == 0


def test_pending_bytes_count_what_is_not_complete():
    parser = EventParser()
    parser.feed(b"data: 12345\ndata: 678")
    assert parser.pending_bytes == 5 + len(b"data: 678")
    parser.feed(b"\n\n")
    assert parser.pending_bytes == 0


@settings(deadline=None)
@given(values, st.none() | st.sampled_from(["error", "x"]), st.none() | st.sampled_from(["0", "17"]))
def test_what_was_rendered_is_read_back(value, name, event_id):
    document = json.dumps(value, ensure_ascii=False)
    (event,) = parse_events(render_event(document, name=name, event_id=event_id))
    assert json.loads(event.data) == value
    assert (event.name, event.id) == (name, event_id)


@settings(deadline=None)
@given(st.lists(values, min_size=1, max_size=5))
async def test_the_sdk_reads_every_event(items):
    text = "".join(render_event(json.dumps(item, ensure_ascii=False)) for item in items)
    response = httpx.Response(200, content=text.encode())
    assert [json.loads(data) async for _, data in parse_sse_stream(response)] == items


async def test_line_ends_of_unicode_do_not_tear_an_event_apart():
    document = json.dumps({"text": "a\u2028b\u2029c\x85d"}, ensure_ascii=False)
    response = httpx.Response(200, content=render_event(document).encode())
    assert [json.loads(data) async for _, data in parse_sse_stream(response)] == [{"text": "a\u2028b\u2029c\x85d"}]
