"""The caller's half: whatever the broker and the servers do to the messages, the reader sees each event once, in order."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentscope_rocketmq.envelope import BodyPart, Part, ResponseEnvelope
from agentscope_rocketmq.errors import CallTimeout, EnvelopeError, ResponseCorrupt
from agentscope_rocketmq.exchange import END_GRACE, Call, Exchange, ResponseHead
from agentscope_rocketmq.spool import Spools
from agentscope_rocketmq.sse import parse_events, render_event
from tests.wires import chunk_event, status_event

if TYPE_CHECKING:
    from collections.abc import Sequence

JAVA_STREAM = [
    record["body"].encode()
    for record in map(
        json.loads,
        (Path(__file__).parent / "wire" / "java-session.jsonl").read_text(encoding="utf-8").splitlines(),
    )
    if record["where"] == "clientResponse" and "64531df69b57f59eefe3411367388814" in record["body"]
]


def opened(
    request_id: str = "r", *, idle: float | None = 10.0, total: float | None = 100.0, **bounds: Any
) -> tuple[Exchange, Call]:
    exchange = Exchange(**bounds)
    return exchange, exchange.open(request_id, idle=idle, total=total, now=0.0)


def ours(
    seq: int, text: str | None = None, *, end: bool = False, attempt: int = 0, stream: bool = True, **more: Any
) -> bytes:
    body = render_event(text) if text is not None and stream else text
    return ResponseEnvelope(
        request_id="r", body=body, stream=stream, end=end, seq=seq, attempt=attempt, **more
    ).encode()


def java(body: str | None = None, *, end: bool = False, stream: bool = True, **more: Any) -> bytes:
    return ResponseEnvelope(request_id="r", body=body, stream=stream, end=end, **more).encode()


def java_event(number: int, data: str) -> bytes:
    return java(render_event(data, event_id=str(number)))


JAVA_END = java(end=True)


def feed_all(exchange: Exchange, messages: Sequence[bytes], now: float = 0.0) -> list[str]:
    texts: list[str] = []
    for message in messages:
        taken = exchange.feed(message, now)
        texts += taken[1] if taken else []
    return texts


def data_of(texts: list[str]) -> list[str]:
    assert all(text.endswith("\n\n") for text in texts)
    return [event.data for text in texts for event in parse_events(text)]


# Servers that number their messages


@settings(deadline=None)
@given(
    st.integers(1, 30).flatmap(
        lambda count: st.tuples(
            st.just(count),
            st.permutations(range(count)),
            st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, 2 * count)), max_size=20),
        )
    ),
    st.lists(st.integers(0, 60), max_size=5),
)
def test_order_duplicates_and_strangers_do_not_show(shuffled, strangers):
    count, order, repeats = shuffled
    arriving = list(order)
    for number, place in repeats:
        arriving.insert(place, number)
    exchange, call = opened()
    messages = [ours(number, f'"{number}"', end=number == count - 1) for number in arriving]
    for place in strangers:
        messages.insert(place, ResponseEnvelope(request_id="other", body="x", stream=True, end=True).encode())
    late = ours(0, '"late"')
    assert data_of(feed_all(exchange, [*messages, late])) == [f'"{number}"' for number in range(count)]
    assert call.finished
    assert exchange.unknown + exchange.duplicates == len(strangers) + len(repeats) + 1
    assert (exchange.malformed, exchange.outdated) == (0, 0)


def test_the_head_is_known_with_the_first_message_in_order():
    exchange, call = opened()
    exchange.feed(ours(1, "2"), 0.0)
    assert call.head is None
    assert call.sticky is None
    headers = {"X-Trace": "t", "set-cookie": "c", "content-encoding": "gzip"}
    first = ours(0, "1", status=202, headers=headers, server_reply_topic="Servers", server_lite_topic="i-1")
    assert exchange.feed(first, 0.0) == (call, ["data: 1\n\n", "data: 2\n\n"])
    assert call.head == ResponseHead(
        status=202, headers={"content-type": "text/event-stream", "x-trace": "t"}, stream=True
    )
    assert call.sticky == ("Servers", "i-1")
    assert not call.finished


def test_the_time_to_be_taken_is_apart_from_the_time_between_two_signs_of_life():
    exchange = Exchange()
    call = exchange.open("r", idle=5.0, total=100.0, ack=20.0, now=0.0)
    assert call.check(19.9) == []
    with pytest.raises(CallTimeout, match="ack time limit") as caught:
        call.check(20.0)
    assert (caught.value.which, caught.value.seconds) == ("ack", 20.0)
    exchange.feed(ours(0), 19.0)  # taken, nothing said yet
    assert call.begun
    assert call.head is None
    assert call.check(23.9) == []
    exchange.feed(ours(1), 23.9)  # still worked on
    assert call.check(28.8) == []
    with pytest.raises(CallTimeout) as caught:
        call.check(28.9)
    assert caught.value.which == "idle"


@given(st.lists(st.sampled_from("AB"), min_size=2, max_size=40))
def test_of_two_runs_with_one_attempt_the_first_heard_is_listened_to(turns):
    exchange, call = opened()
    sent = {"A": 0, "B": 0}
    texts: list[str] = []
    for run in turns:
        texts += feed_all(exchange, [ours(sent[run], f'"{run}{sent[run]}"', run=run)])
        sent[run] += 1
    first = turns[0]
    assert data_of(texts) == [f'"{first}{number}"' for number in range(sent[first])]
    assert (call.run, exchange.outdated) == (first, len(turns) - sent[first])
    # The next delivery of the request is listened to, whoever runs it.
    assert data_of(feed_all(exchange, [ours(0, '"again"', attempt=1, run="C", end=True)])) == ['"again"']
    assert (call.run, call.finished) == ("C", True)


def test_an_opening_message_tells_only_that_the_request_is_taken():
    exchange, call = opened()
    assert not call.begun
    first = ours(0, server_reply_topic="Servers", server_lite_topic="i-1")
    assert exchange.feed(first, 3.0) == (call, [])
    assert (call.begun, call.head, call.sticky) == (True, None, ("Servers", "i-1"))
    assert call.next_deadline() == 13.0
    refusal = ours(1, "no", stream=False, end=True, status=403, headers={"content-type": "text/plain"})
    assert exchange.feed(refusal, 3.0) == (call, ["no"])
    assert call.head == ResponseHead(status=403, headers={"content-type": "text/plain"}, stream=False)


def test_a_batch_of_events_is_one_text():
    exchange, call = opened()
    body = "data: 1\n\ndata: 2\n\n"
    message = ResponseEnvelope(request_id="r", body=body, stream=True, end=True, seq=0, attempt=0)
    assert exchange.feed(message.encode(), 0.0) == (call, [body])
    assert call.finished


def test_an_error_document_answers_a_stream():
    exchange, call = opened()
    message = ours(0, '{"error":1}', stream=False, end=True, status=401, headers={"content-type": "application/json"})
    assert exchange.feed(message, 0.0) == (call, ['{"error":1}'])
    assert call.head == ResponseHead(status=401, headers={"content-type": "application/json"}, stream=False)
    assert call.finished


def test_the_end_alone_ends_a_stream():
    exchange, call = opened()
    assert feed_all(exchange, [ours(1, end=True), ours(0, "1")]) == ["data: 1\n\n"]
    assert call.finished
    assert call.next_deadline() is None
    assert call.check(1000.0) == []


def test_what_is_numbered_after_the_end_is_dropped():
    exchange, call = opened()
    assert data_of(feed_all(exchange, [ours(2, "3"), ours(1, "2", end=True), ours(0, "1")])) == ["1", "2"]
    assert call.finished


def test_messages_of_an_earlier_run_are_dropped():
    exchange, call = opened()
    texts = feed_all(
        exchange,
        [
            ours(0, '"old 0"'),
            ours(2, '"old 2"'),
            ours(1, '"new 1"', attempt=1),
            ours(1, '"old 1"'),
            ours(0, '"new 0"', attempt=1),
            ours(3, '"old 3"', end=True),
            ours(2, '"new 2"', attempt=1, end=True),
        ],
    )
    assert data_of(texts) == ['"old 0"', '"new 0"', '"new 1"', '"new 2"']
    assert (call.attempt, call.restarts, call.finished) == (1, 1, True)
    assert exchange.outdated == 2


def test_a_first_message_of_a_later_run_is_no_restart():
    exchange, call = opened()
    exchange.feed(ours(0, "1", attempt=4), 0.0)
    assert (call.attempt, call.restarts) == (4, 0)
    exchange.feed(ours(0, "1", attempt=3), 0.0)
    assert exchange.outdated == 1


def test_a_later_run_that_answers_with_a_document_ends_a_begun_stream_with_an_event():
    exchange, call = opened()
    error = '{"error":{"code":-32603}}'
    texts = feed_all(exchange, [ours(0, "1"), ours(0, error, stream=False, end=True, attempt=1)])
    assert data_of(texts) == ["1", error]
    assert call.head is not None
    assert call.head.stream
    assert call.finished


def test_a_run_on_one_of_our_servers_takes_over_from_a_java_server():
    exchange, call = opened()
    texts = feed_all(
        exchange, [java_event(0, "1"), ours(0, "2", attempt=0), ours(0, "3", attempt=1, end=True), JAVA_END]
    )
    assert data_of(texts) == ["1", "3"]
    assert call.finished
    assert (exchange.outdated, exchange.unknown) == (1, 1)


@pytest.mark.parametrize("bounds", [{"max_held": 3}, {"max_held_bytes": 40}])
def test_a_gap_is_not_held_for_ever(bounds):
    exchange, call = opened(**bounds)
    for seq in (1, 2, 3):
        exchange.feed(ours(seq, "12"), 0.0)
    with pytest.raises(ResponseCorrupt) as caught:
        exchange.feed(ours(4, "1" * 10), 0.0)
    assert caught.value.request_id == "r"
    assert exchange.feed(ours(0, "1"), 0.0) is None
    assert (exchange.unknown, len(exchange)) == (1, 0)
    exchange.close(call)


def test_bounds_count_only_what_is_held():
    exchange, call = opened(max_held=2, max_held_bytes=60)
    order = [n + 1 if n % 2 == 0 else n - 1 for n in range(200)]
    texts = feed_all(exchange, [ours(n, f"{n}" * 5, end=n == 199) for n in order])
    assert data_of(texts) == [f"{n}" * 5 for n in range(200)]
    assert call.finished


# The Java reference


@settings(deadline=None)
@given(st.permutations(JAVA_STREAM), st.lists(st.tuples(st.sampled_from(JAVA_STREAM), st.integers(0, 8)), max_size=6))
def test_a_captured_java_stream_comes_out_in_order_however_it_arrives(messages, repeats):
    arriving = list(messages)
    for message, place in repeats:
        arriving.insert(place, message)
    exchange = Exchange()
    call = exchange.open("64531df69b57f59eefe3411367388814", idle=None, total=None, now=0.0)
    texts = feed_all(exchange, arriving)
    assert call.finished
    assert [event.id for text in texts for event in parse_events(text)] == [str(n) for n in range(7)]
    chunks = [result["artifact"]["parts"][0]["text"] for result in map(_result, data_of(texts)) if "artifact" in result]
    assert chunks == [f"chunk{n}:hello" for n in range(1, 6)]
    assert call.head == ResponseHead(headers={"content-type": "text/event-stream"}, stream=True)
    assert call.missing == 0


def _result(data: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(data)["result"]
    return result


def test_a_java_document_names_the_instance():
    exchange, call = opened()
    body = '{"jsonrpc":"2.0","id":1,"result":null}'
    message = java(body, stream=False, end=True, server_reply_topic="JServerResp", server_lite_topic="f99")
    assert exchange.feed(message, 0.0) == (call, [body])
    assert call.finished
    assert call.sticky == ("JServerResp", "f99")
    assert call.head == ResponseHead(headers={"content-type": "application/json"}, stream=False)


def test_a_java_error_encoded_twice_is_unwrapped():
    exchange, call = opened()
    error = {"@type": "x.Y", "code": -32601, "message": "no such method", "stackTrace": [{}]}
    body = json.dumps(json.dumps({"jsonrpc": "2.0", "id": 1, "error": error}))
    (text,) = feed_all(exchange, [java(body, stream=False, end=True)])
    assert json.loads(text) == {"jsonrpc": "2.0", "id": 1, "error": {"code": -32601, "message": "no such method"}}
    assert call.finished


def test_a_java_document_in_a_begun_stream_comes_as_its_last_event():
    exchange, call = opened()
    texts = feed_all(exchange, [java_event(0, "1"), java_event(2, "3"), java('{"error":1}', stream=False)])
    assert data_of(texts) == ["1", "3", '{"error":1}']
    assert call.finished


@pytest.mark.parametrize("form", ["data:{}\n\n", "data:{}", "data: {}\nid: 0\n\n", "data:{}\r\nid:0"])
def test_events_are_brought_into_one_form(form):
    exchange, _ = opened()
    (text,) = feed_all(exchange, [java(form.format(chunk_event("a")))])
    assert text.startswith("data: {")
    assert data_of([text]) == [chunk_event("a")]


def test_the_end_on_the_last_event_ends_the_stream():
    exchange, call = opened()
    feed_all(exchange, [java_event(0, "1"), java(render_event("2", event_id="1"), end=True)])
    assert call.finished


def test_the_end_on_an_event_that_came_early_waits_for_those_before_it():
    exchange, call = opened()
    assert feed_all(exchange, [java(render_event("2", event_id="1"), end=True)]) == []
    assert not call.finished
    assert data_of(feed_all(exchange, [java_event(0, "1")])) == ["1", "2"]
    assert call.finished


def test_events_without_id_come_as_they_arrive():
    exchange, call = opened()
    done = status_event("COMPLETED")
    texts = feed_all(exchange, [java(render_event(event)) for event in ("1", "2", done)])
    assert data_of(texts) == ["1", "2", done]
    assert not call.finished
    feed_all(exchange, [JAVA_END])
    assert call.finished


@pytest.mark.parametrize("event_id", ["a1", "-1", "٣", "9" * 30])
def test_an_id_that_does_not_count_is_no_number(event_id):
    exchange, _ = opened()
    assert data_of(feed_all(exchange, [java(render_event("1", event_id=event_id))])) == ["1"]


def test_an_end_that_came_early_waits_for_late_events_but_not_for_ever():
    exchange, call = opened()
    feed_all(exchange, [java_event(0, "1"), JAVA_END], now=5.0)
    assert not call.finished
    assert call.next_deadline() == 5.0 + END_GRACE
    assert call.check(5.5) == []
    assert data_of(feed_all(exchange, [java_event(1, "2"), java_event(3, "4")], now=5.5)) == ["2"]
    assert call.next_deadline() == 5.5 + END_GRACE
    feed_all(exchange, [java_event(1, "2"), JAVA_END], now=6.0)
    assert call.next_deadline() == 5.5 + END_GRACE
    fourth, error = data_of(call.check(6.5))
    assert fourth == "4"
    assert "1 of its events never came" in json.loads(error)["error"]["message"]
    assert call.finished
    assert call.missing == 1
    assert exchange.duplicates == 2


def test_a_stream_that_ends_while_its_task_is_at_work_ends_with_an_error():
    # As the a2a-java-sdk does when an executor raises at the wrong moment.
    exchange, call = opened()
    feed_all(exchange, [java_event(0, status_event("WORKING")), JAVA_END])
    assert not call.finished
    (error,) = data_of(call.check(END_GRACE))
    assert json.loads(error)["error"]["code"] == -32603
    assert "GetTask" in json.loads(error)["error"]["message"]
    assert call.finished


def test_an_empty_stream_has_a_head():
    exchange, call = opened()
    feed_all(exchange, [JAVA_END])
    (error,) = data_of(call.check(END_GRACE))
    assert "too early" in json.loads(error)["error"]["message"]
    assert call.finished
    assert call.head is not None
    assert call.head.stream


def test_a_missing_end_marker_does_not_keep_a_finished_task_open():
    exchange, call = opened()
    feed_all(exchange, [java_event(0, status_event("COMPLETED"))], now=3.0)
    assert not call.finished
    assert call.check(3.0 + END_GRACE) == []
    assert call.finished


def test_a_task_that_waits_for_input_is_not_cut_off_without_an_end_marker():
    exchange, call = opened()
    feed_all(exchange, [java_event(0, status_event("INPUT_REQUIRED"))])
    assert call.next_deadline() == 10.0
    feed_all(exchange, [JAVA_END])
    assert call.finished


def test_what_follows_a_terminal_event_still_comes():
    exchange, call = opened()
    feed_all(exchange, [java_event(1, status_event("COMPLETED"))])
    assert call.next_deadline() == END_GRACE
    texts = feed_all(exchange, [java_event(0, "1"), java_event(2, "3")], now=0.5)
    assert len(data_of(texts)) == 3
    assert call.next_deadline() == 10.5


def test_too_large_a_gap_in_a_java_stream_is_an_error():
    exchange, _ = opened(max_held=2)
    feed_all(exchange, [java_event(1, "1"), java_event(2, "1")])
    with pytest.raises(ResponseCorrupt):
        exchange.feed(java_event(3, "1"), 0.0)


# Time


def test_idle_time_counts_from_the_last_message():
    exchange, call = opened(idle=10.0, total=100.0)
    assert call.next_deadline() == 10.0
    exchange.feed(ours(0, "1"), 8.0)
    assert call.next_deadline() == 18.0
    exchange.feed(ours(0, "1"), 9.0)
    exchange.feed(ours(2, "3"), 9.5)
    assert call.next_deadline() == 19.5
    assert call.check(19.0) == []
    with pytest.raises(CallTimeout) as caught:
        call.check(19.5)
    assert (caught.value.which, caught.value.seconds, caught.value.request_id) == ("idle", 10.0, "r")


def test_total_time_counts_from_the_beginning():
    exchange, call = opened(idle=10.0, total=15.0)
    exchange.feed(ours(0, "1"), 8.0)
    assert call.next_deadline() == 15.0
    with pytest.raises(CallTimeout) as caught:
        call.check(15.0)
    assert (caught.value.which, caught.value.seconds) == ("total", 15.0)


def test_without_limits_there_is_no_deadline():
    _, call = opened(idle=None, total=None)
    assert call.next_deadline() is None
    assert call.check(1e9) == []


def test_a_short_idle_time_does_not_fail_a_stream_that_waits_for_stragglers():
    exchange, call = opened(idle=0.1, total=0.5)
    feed_all(exchange, [java_event(1, status_event("COMPLETED"))], now=0.05)
    assert call.check(0.4) == []
    completed, error = data_of(call.check(0.5))
    assert completed == status_event("COMPLETED")
    assert "never came" in error
    assert call.finished


# The book of calls


def test_a_request_is_waited_for_once():
    exchange, call = opened()
    with pytest.raises(ValueError, match="already"):
        exchange.open("r", idle=None, total=None, now=0.0)
    exchange.close(call)
    exchange.close(call)
    again = exchange.open("r", idle=None, total=None, now=0.0)
    exchange.close(call)
    assert exchange.feed(ours(0, "1"), 0.0) == (again, ["data: 1\n\n"])


def test_late_and_foreign_messages_are_counted():
    exchange, call = opened()
    exchange.close(call)
    assert exchange.feed(ours(0, "1"), 0.0) is None
    assert exchange.unknown == 1


def test_malformed_messages_are_counted():
    exchange, call = opened()
    for data in (b"", b"{}", b'{"requestId":"other","seq":-1}', b"\xff"):
        assert exchange.feed(data, 0.0) is None
    assert exchange.malformed == 4
    assert exchange.feed(ours(0, "1"), 0.0) == (call, ["data: 1\n\n"])


def test_a_malformed_message_of_a_call_does_not_leave_it_waiting():
    exchange, _ = opened()
    with pytest.raises(ResponseCorrupt) as caught:
        exchange.feed(b'{"requestId":"r","seq":-1}', 0.0)
    assert caught.value.request_id == "r"
    assert (exchange.malformed, len(exchange)) == (1, 0)


@settings(deadline=None)
@given(
    st.lists(
        st.binary(max_size=60) | st.sampled_from([*JAVA_STREAM, ours(0, "1"), ours(5, "2"), JAVA_END]), max_size=20
    )
)
def test_nothing_from_outside_raises_anything_but_a_call_error(messages):
    exchange, call = opened(max_held=2)
    failed = set()
    for message in messages:
        try:
            exchange.feed(message, 0.0)
        except ResponseCorrupt as error:
            failed.add(error.request_id)
    assert failed <= {call.request_id}


def part(seq: int, index: int, data: bytes, whole: bytes | None = None, **more: Any) -> bytes:
    """A message with a part of a document; with the whole of it, the last one."""
    last: dict[str, Any] = {} if whole is None else {"size": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    piece = Part(index=index, data=data, **last)
    return ours(seq, stream=False, end=whole is not None, status=200 if seq == 0 else None, part=piece, **more)


def test_a_body_in_parts_is_whole_when_its_last_one_came_whatever_their_order():
    whole = "née\n".encode() * 3
    for order in itertools.permutations(range(3)):
        exchange, call = opened(spools=Spools(most=100, total=100, in_memory=5))
        parts = [part(0, 0, whole[:2]), part(1, 1, whole[2:7]), part(2, 2, whole[7:], whole)]
        assert feed_all(exchange, [parts[number] for number in (*order, *order)]) == [whole.decode()]
        assert call.finished
        assert exchange.spools.held == 0


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([part(0, 0, b"ab"), part(1, 1, b"cd", b"abcx")], "SHA-256"),
        ([part(0, 0, b"ab"), part(1, 1, b"cd", b"abcde")], "size"),
        ([part(0, 0, b"ab"), part(1, 2, b"cd", b"abcd")], "part 1 of its body is missing"),
        ([part(0, 1, b"ab")], "part 0 of its body is missing"),
        ([part(0, 0, b"a" * 8), part(1, 1, b"a" * 8)], "more than the 10 bytes"),
    ],
)
def test_parts_that_make_no_body_end_the_call_and_leave_nothing(messages, reason):
    exchange, _ = opened(spools=Spools(most=10, total=15, in_memory=5))
    with pytest.raises(ResponseCorrupt, match=reason):
        feed_all(exchange, messages)
    assert exchange.spools.held == 0
    assert len(exchange) == 0


def test_all_bodies_of_a_process_are_bounded_together():
    exchange = Exchange(spools=Spools(most=10, total=15, in_memory=5))
    first = exchange.open("r", idle=None, total=None, now=0.0)
    exchange.open("s", idle=None, total=None, now=0.0)
    exchange.feed(part(0, 0, b"a" * 10), 0.0)
    other = ResponseEnvelope(
        request_id="s", body=None, stream=False, end=False, seq=0, attempt=0, part=Part(index=0, data=b"b" * 10)
    )
    with pytest.raises(ResponseCorrupt, match="more than 15 bytes"):
        exchange.feed(other.encode(), 0.0)
    assert exchange.spools.held == 10
    exchange.close(first)
    assert exchange.spools.held == 0


def test_a_later_run_begins_its_body_anew():
    exchange, _ = opened()
    later = b"the second"
    messages = [part(0, 0, b"the fi"), part(0, 0, later[:5], attempt=1), part(1, 1, b"rst", b"the first")]
    assert feed_all(exchange, [*messages, part(1, 1, later[5:], later, attempt=1)]) == [later.decode()]
    assert exchange.spools.held == 0


def test_a_body_that_nothing_is_added_to_is_dropped_after_a_while():
    exchange, _ = opened()
    feed_all(exchange, [part(0, 0, b"ab")])
    exchange.spools.expire(3600.0)
    assert exchange.spools.held == 2
    exchange.spools.expire(-1.0)
    assert exchange.spools.held == 0
    with pytest.raises(ResponseCorrupt, match="in time"):
        feed_all(exchange, [part(1, 1, b"cd", b"abcd")])


@pytest.mark.parametrize(
    "head",
    [
        b'{"part":{},"requestId":"r"}\nx',
        b'{"part":{"index":-1},"requestId":"r"}\nx',
        b'{"part":{"index":0},"requestId":"r"}\n',
        b'{"part":{"index":0},"requestId":"r"}',
        b'{"part":{"index":0,"size":1},"requestId":"r"}\nx',
        b'{"part":{"index":0,"size":1,"sha256":"x"},"requestId":"r"}\nx',
        b'{"part":7,"requestId":"r"}\nx',
        b'{"part":{"index":0},"requestId":7}\nx',
        b'{"part":',
    ],
)
def test_what_is_no_part_is_no_envelope(head):
    with pytest.raises(EnvelopeError):
        ResponseEnvelope.decode(head)
    with pytest.raises(EnvelopeError):
        BodyPart.decode(head)
