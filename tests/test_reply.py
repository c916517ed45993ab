"""The server's half: what an app sends becomes messages that fit, for both kinds of callers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentscope_rocketmq.envelope import ResponseEnvelope
from agentscope_rocketmq.exchange import Exchange
from agentscope_rocketmq.reply import ReplyEncoder, error_envelope
from agentscope_rocketmq.sse import parse_events
from tests.wires import chunk_event, chunked, result_event, status_event

SSE = [(b"Content-Type", b"text/event-stream; charset=utf-8")]
JSON = [(b"content-type", b"application/json")]


def encoder(
    *,
    batches: bool = True,
    stream: bool = True,
    limit: int = 4 * 1024 * 1024,
    sticky: tuple[str, str] | None = ("Servers", "i-1"),
    attempt: int = 0,
    most: int = 1_000_000,
) -> ReplyEncoder:
    return ReplyEncoder(
        "r1",
        peer_reads_batches=batches,
        sticky=sticky,
        attempt=attempt,
        run="run-1",
        max_message_bytes=limit,
        wants_stream=stream,
        rpc_id="rpc-7",
        max_body_bytes=most,
    )


def sent(*events: str) -> bytes:
    return "".join(f"data: {event}\r\n\r\n" for event in events).encode()


def taken(reply: ReplyEncoder) -> list[ResponseEnvelope]:
    messages = []
    while (message := reply.take()) is not None:
        messages.append(message)
    return messages


def body_of(message: ResponseEnvelope) -> str:
    assert message.body is not None
    return message.body


def events_of(messages: list[ResponseEnvelope]) -> list[str]:
    return [event.data for message in messages for event in parse_events(message.body or "")]


def test_what_piles_up_rides_in_the_next_message():
    reply = encoder(attempt=3)
    reply.start(200, [*SSE, (b"X-Trace", b"t"), (b"a2a-extensions", b"u"), (b"set-cookie", b"c"), (b"Date", b"d")])
    assert reply.take() is None
    reply.feed(sent("1"))
    first = reply.take()
    assert first == ResponseEnvelope(
        request_id="r1",
        body="data: 1\n\n",
        stream=True,
        end=False,
        server_reply_topic="Servers",
        server_lite_topic="i-1",
        seq=0,
        attempt=3,
        run="run-1",
        status=200,
        headers={"content-type": "text/event-stream; charset=utf-8", "x-trace": "t", "a2a-extensions": "u"},
    )
    assert reply.take() is None
    reply.feed(sent("2", "3"))
    reply.feed(b": ping\r\n\r\n" + sent("4")[:-3])
    assert reply.take() == ResponseEnvelope(
        request_id="r1", body="data: 2\n\ndata: 3\n\n", stream=True, end=False, seq=1, attempt=3, run="run-1"
    )
    reply.feed(sent("4")[-3:])
    reply.finish()
    assert not reply.finished
    assert reply.take() == ResponseEnvelope(
        request_id="r1", body="data: 4\n\n", stream=True, end=True, seq=2, attempt=3, run="run-1"
    )
    assert reply.finished
    assert reply.take() is None


def test_an_opening_message_says_at_once_that_the_request_is_taken():
    reply = encoder(stream=True)
    reply.begin()
    assert reply.take() == ResponseEnvelope(
        request_id="r1",
        body=None,
        stream=True,
        end=False,
        server_reply_topic="Servers",
        server_lite_topic="i-1",
        seq=0,
        attempt=0,
        run="run-1",
    )
    assert reply.take() is None
    reply.start(403, [(b"content-type", b"text/plain")])
    reply.feed(b"no")
    reply.finish()
    assert taken(reply) == [
        ResponseEnvelope(
            request_id="r1",
            body="no",
            stream=False,
            end=True,
            seq=1,
            attempt=0,
            run="run-1",
            status=403,
            headers={"content-type": "text/plain"},
        )
    ]


def test_while_the_app_is_silent_the_caller_hears_that_it_is_at_work():
    reply = encoder(stream=True)
    reply.start(200, SSE)
    reply.feed(sent("1"))
    assert [message.seq for message in taken(reply)] == [0]
    reply.begin()
    assert [(message.seq, message.body, message.end) for message in taken(reply)] == [(1, None, False)]
    reply.begin()
    reply.feed(sent("2"))
    # What is said is a sign of life itself.
    assert [(message.seq, message.body) for message in taken(reply)] == [(2, "data: 2\n\n")]
    reply.finish()
    reply.begin()
    assert [(message.seq, message.end) for message in taken(reply)] == [(3, True)]


def test_java_gets_no_opening_message():
    reply = encoder(batches=False)
    reply.begin()
    assert reply.take() is None


def test_the_end_goes_alone_when_nothing_waits():
    reply = encoder()
    reply.start(200, SSE)
    reply.feed(sent("1"))
    reply.take()
    reply.finish()
    assert taken(reply) == [
        ResponseEnvelope(request_id="r1", body=None, stream=True, end=True, seq=1, attempt=0, run="run-1")
    ]


def test_java_gets_one_event_a_message_with_an_id_and_a_bare_end():
    reply = encoder(batches=False, attempt=2)
    reply.start(200, SSE)
    reply.feed(b'event: error\r\ndata: {"a":\r\ndata: 1}\r\n\r\n' + sent("2"))
    reply.finish()
    assert taken(reply) == [
        ResponseEnvelope(request_id="r1", body='data: {"a": 1}\nid: 0\n\n', stream=True, end=False),
        ResponseEnvelope(request_id="r1", body="data: 2\nid: 1\n\n", stream=True, end=False),
        ResponseEnvelope(request_id="r1", body=None, stream=True, end=True),
    ]


def test_java_gets_a_document_in_one_message_with_the_instance():
    reply = encoder(batches=False, stream=False)
    reply.start(200, JSON)
    body = '{"jsonrpc":"2.0","id":1,"result":"杭州"}'
    for byte in body.encode():
        reply.feed(bytes([byte]))
    assert reply.take() is None
    reply.finish()
    assert taken(reply) == [
        ResponseEnvelope(
            request_id="r1",
            body=body,
            stream=False,
            end=True,
            server_reply_topic="Servers",
            server_lite_topic="i-1",
        )
    ]


def test_a_document_keeps_its_status_for_callers_that_read_it():
    reply = encoder(stream=True, sticky=None)
    reply.start(401, [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer")])
    reply.feed(b"who are you")
    reply.finish()
    assert taken(reply) == [
        ResponseEnvelope(
            request_id="r1",
            body="who are you",
            stream=False,
            end=True,
            seq=0,
            attempt=0,
            run="run-1",
            status=401,
            headers={"content-type": "text/plain"},
        )
    ]


@pytest.mark.parametrize("status", [200, 400])
def test_an_error_document_for_a_java_stream_goes_as_an_event(status):
    reply = encoder(batches=False, stream=True)
    reply.start(status, JSON)
    error = '{"jsonrpc":"2.0",\r\n"id":"rpc-7","error":{"code":-32601,"message":"no"}}'
    reply.feed(error.encode())
    reply.finish()
    event, end = taken(reply)
    assert (event.stream, event.end, end.stream, end.end, end.body) == (True, False, True, True, None)
    assert json.loads(events_of([event])[0]) == json.loads(error)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("page", [b"<html>secret.Place</html>", b"", b"[1]", b"\xff"])
def test_java_never_gets_an_error_page(stream, page):
    reply = encoder(batches=False, stream=stream)
    reply.start(503, [(b"content-type", b"text/html")])
    reply.feed(page)
    reply.finish()
    messages = taken(reply)
    body = events_of(messages)[0] if stream else body_of(messages[0])
    response = json.loads(body)
    assert response["id"] == "rpc-7"
    assert response["error"]["code"] == -32603
    assert "503" in response["error"]["message"]
    assert "secret" not in body


@pytest.mark.parametrize("batches", [True, False])
def test_no_message_is_larger_than_the_limit(batches):
    reply = encoder(batches=batches, limit=2000)
    reply.start(200, [*SSE, (b"x-long", b"h" * 300)])
    events = [chunk_event('"quoted" 杭州 \n' * n) for n in range(25)]
    reply.feed(sent(*events))
    reply.finish()
    messages = taken(reply)
    assert events_of(messages) == events
    sizes = [len(message.encode()) for message in messages]
    assert max(sizes) <= 2000
    assert not batches or sizes[0] + sizes[1] > 2000


def test_pending_bytes_go_up_and_down():
    reply = encoder()
    reply.start(200, SSE)
    assert reply.pending_bytes == 0
    reply.feed(sent("1" * 100, "2" * 100) + b"data: 333")
    assert 200 < reply.pending_bytes < 300
    reply.take()
    assert 0 < reply.pending_bytes < 20
    reply.feed(b"\n\n")
    reply.take()
    assert reply.pending_bytes == 0


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_an_event_too_large_becomes_an_error_that_ends_the_stream(batches, whole):
    reply = encoder(batches=batches, limit=2000, most=2000)
    reply.start(200, SSE)
    large = sent(chunk_event("x" * 5000))
    reply.feed(sent("1"))
    reply.feed(large + sent("2") if whole else large[:2500])
    reply.feed(sent("3"))
    reply.finish()
    messages = taken(reply)
    first, last = events_of(messages)
    assert first == "1"
    error = json.loads(last)
    assert (error["id"], error["error"]["code"]) == ("rpc-7", -32603)
    assert "2000" in error["error"]["message"]
    size = len(large) if whole else 2500
    assert abs(int(error["error"]["message"].split(" bytes")[0].split()[-1]) - size) < 20
    assert messages[-1].end
    assert reply.finished
    assert reply.pending_bytes == 0


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("chunks", [1, 50])
def test_a_document_too_large_becomes_an_error(batches, chunks):
    reply = encoder(batches=batches, stream=False, limit=2000, most=4000)
    reply.start(200, JSON)
    for _ in range(chunks):
        reply.feed(b'"' * (1500 // chunks) * 3)
    reply.finish()
    (message,) = taken(reply)
    assert (message.stream, message.end) == (False, True)
    error = json.loads(body_of(message))
    assert (error["id"], error["error"]["code"]) == ("rpc-7", -32603)
    assert ("4000" if batches else "2000 bytes") in error["error"]["message"]


def test_escapes_count_towards_the_limit():
    reply = encoder(batches=False, stream=False, limit=2000)
    reply.start(200, JSON)
    reply.feed(b'"' * 1200)
    reply.finish()
    (message,) = taken(reply)
    assert json.loads(body_of(message))["error"]["code"] == -32603


def read_back(messages: list[ResponseEnvelope]) -> list[str]:
    """What a caller makes of the messages; each of them fits."""
    exchange = Exchange()
    call = exchange.open("r1", idle=None, total=None, now=0.0)
    texts: list[str] = []
    for message in messages:
        encoded = message.encode()
        assert len(encoded) <= 2000
        texts += (exchange.feed(encoded, 0.0) or (call, []))[1]
    assert call.finished
    assert exchange.spools.held == 0
    return texts


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9000), min_size=1, max_size=6))
def test_a_document_that_fits_no_message_goes_in_parts_and_comes_back_whole(sizes):
    reply = encoder(stream=False, limit=2000)
    reply.start(200, JSON)
    document = json.dumps(['é"' * size for size in sizes], ensure_ascii=False)
    data = document.encode()
    for start in range(0, len(data), 1001):
        reply.feed(data[start : start + 1001])
    reply.finish()
    messages = taken(reply)
    assert [message.seq for message in messages] == list(range(len(messages)))
    assert read_back(messages) == [document]
    assert (reply.finished, reply.pending_bytes) == (True, 0)


def test_a_document_goes_while_it_still_comes():
    reply = encoder(stream=False, limit=2000)
    reply.start(200, JSON)
    messages = []
    for _ in range(50):
        reply.feed(b"x" * 1000)
        messages += taken(reply)
        assert reply.pending_bytes < 2000
    assert len(messages) > 20
    assert not any(message.end or message.part is None or message.part.is_last for message in messages)
    reply.finish()
    assert read_back([*messages, *taken(reply)]) == ["x" * 50_000]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=6), st.booleans())
def test_events_that_fit_no_message_go_in_parts_between_the_others(sizes, at_once):
    reply = encoder(limit=2000)
    reply.start(200, SSE)
    events = [chunk_event("é" * size) for size in sizes]
    messages = []
    for event in events:
        reply.feed(sent(event))
        messages += [] if at_once else taken(reply)
    reply.finish()
    messages += taken(reply)
    assert [event.data for text in read_back(messages) for event in parse_events(text)] == events
    assert reply.pending_bytes == 0


def test_a_document_that_fails_half_way_is_an_error_for_its_reader():
    reply = encoder(stream=False, limit=2000)
    reply.start(200, JSON)
    reply.feed(b"x" * 10_000)
    messages = taken(reply)
    reply.fail(-32603, "no more")
    [text] = read_back([*messages, *taken(reply)])
    assert json.loads(text)["error"] == {"code": -32603, "message": "no more"}


def test_a_stream_that_was_cut_off_can_be_told():
    reply = encoder()
    reply.start(200, SSE)
    assert not reply.saw_end_of_task
    reply.feed(sent(chunk_event("a")))
    reply.finish()
    assert not reply.saw_end_of_task
    reply.fail(-32603, "cut off")
    last = events_of(taken(reply))[-1]
    assert json.loads(last)["error"] == {"code": -32603, "message": "cut off"}
    assert reply.saw_end_of_task


@pytest.mark.parametrize("state", ["COMPLETED", "INPUT_REQUIRED"])
def test_a_stream_that_came_to_its_end_can_be_told(state):
    reply = encoder()
    reply.start(200, SSE)
    reply.feed(sent(status_event("WORKING"), status_event(state)))
    assert reply.saw_end_of_task


def test_a_document_is_whole_when_it_is_finished():
    reply = encoder(stream=False)
    reply.start(200, JSON)
    reply.feed(b"{}")
    assert not reply.saw_end_of_task
    reply.finish()
    assert reply.saw_end_of_task


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("moment", ["before the start", "started", "half sent", "finished"])
def test_a_failure_fits_what_was_sent_already(batches, stream, moment):
    reply = encoder(batches=batches, stream=stream)
    before = []
    if moment != "before the start":
        reply.start(500, SSE if stream else JSON)
    if moment in ("half sent", "finished"):
        reply.feed(sent("1") + b"data: 2" if stream else b"{")
        before = [message for message in [reply.take()] if message]
    if moment == "finished":
        reply.finish()
    reply.fail(-32000, "the agent died")
    reply.fail(-32001, "and again")
    reply.feed(b"late")
    reply.finish()
    messages = before + taken(reply)
    form = not (batches and moment == "before the start") and stream
    assert [message.stream for message in messages] == [form] * len(messages)
    assert [message.end for message in messages] == [False] * (len(messages) - 1) + [True]
    texts = events_of(messages) if form else [body_of(messages[0])]
    assert json.loads(texts[-1]) == {
        "jsonrpc": "2.0",
        "id": "rpc-7",
        "error": {"code": -32000, "message": "the agent died"},
    }
    if form:
        assert texts[:-1] == {"half sent": ["1"], "finished": ["1", "2"]}.get(moment, [])
    else:
        assert len(messages) == 1
    if batches and not form:
        assert (messages[0].status, messages[0].headers) == (200, {"content-type": "application/json"})
    assert reply.finished


def test_a_failure_after_the_end_changes_nothing():
    reply = encoder()
    reply.start(200, SSE)
    reply.feed(sent("1"))
    reply.finish()
    assert len(taken(reply)) == 1
    reply.fail(-32000, "late")
    assert reply.take() is None


def test_an_app_that_answers_nothing_is_a_failure():
    reply = encoder(stream=False)
    reply.finish()
    (message,) = taken(reply)
    assert json.loads(body_of(message))["error"]["code"] == -32603


def test_headers_that_a_message_can_not_carry_are_left_out():
    reply = encoder(stream=False)
    reply.start(200, [*JSON, (b"x-a", b"1"), (b"x-a", b"2"), (b"x-bad", b"1\n2"), (b"x-big", b"b" * 9000)])
    reply.finish()
    (message,) = taken(reply)
    assert message.headers == {"content-type": "application/json", "x-a": "1, 2"}
    assert ResponseEnvelope.decode(message.encode()) == message


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_an_error_before_the_app_is_one_message(batches, stream):
    message = error_envelope(
        "r1", code=-32600, message="no", rpc_id=3, peer_reads_batches=batches, wants_stream=stream, attempt=1
    )
    assert message.end
    assert message.stream == (stream and not batches)
    assert message.seq == (0 if batches else None)
    body = events_of([message])[0] if message.stream else body_of(message)
    assert json.loads(body) == {"jsonrpc": "2.0", "id": 3, "error": {"code": -32600, "message": "no"}}
    assert ResponseEnvelope.decode(message.encode()) == message


documents = st.recursive(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.integers(), lambda v: st.lists(v, max_size=3)
)


@settings(deadline=None)
@given(st.data(), st.booleans(), st.lists(documents, max_size=12), st.integers(0, 40))
def test_a_stream_comes_through_in_any_chunking(data, batches, values, take_every):
    events = [result_event(value) for value in values] + [status_event("COMPLETED")]
    reply = encoder(batches=batches, limit=1500)
    exchange = Exchange()
    call = exchange.open("r1", idle=None, total=None, now=0.0)
    texts: list[str] = []

    def pump() -> None:
        for message in taken(reply):
            over = call.finished  # with the end of its task, before the end of the response
            fed = exchange.feed(message.encode(), 0.0)
            assert (fed is None) == over
            texts.extend(fed[1] if fed is not None else [])

    reply.start(200, SSE)
    for number, chunk in enumerate(data.draw(chunked(b": ping\r\n\r\n" + sent(*events)))):
        reply.feed(chunk)
        if take_every and number % take_every == 0:
            pump()
    reply.finish()
    pump()
    assert call.finished
    assert call.head is not None
    assert call.head.stream
    assert call.sticky == (("Servers", "i-1") if batches else None)
    received = [json.loads(event.data) for event in parse_events("".join(texts))]
    assert received == [json.loads(event) for event in events]


@settings(deadline=None)
@given(st.data(), st.booleans(), documents)
def test_a_document_comes_through_in_any_chunking(data, batches, value):
    body = result_event(value)
    reply = encoder(batches=batches, stream=False)
    reply.start(200, JSON)
    for chunk in data.draw(chunked(body.encode())):
        reply.feed(chunk)
    reply.finish()
    exchange = Exchange()
    call = exchange.open("r1", idle=None, total=None, now=0.0)
    (message,) = taken(reply)
    assert exchange.feed(message.encode(), 0.0) == (call, [body])
    assert call.finished
    assert call.sticky == ("Servers", "i-1")
