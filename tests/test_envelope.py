"""The envelopes: what the Java reference wrote is read and written back, and nothing from outside does harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentscope_rocketmq.envelope import ReplyAddress, RequestEnvelope, ResponseEnvelope, encoded_size
from agentscope_rocketmq.errors import EnvelopeError
from agentscope_rocketmq.fields import MAX_HEADER_BYTES, MAX_HEADERS
from agentscope_rocketmq.jsonrpc import RpcRequest

SESSION = [
    json.loads(line)
    for line in (Path(__file__).parent / "wire" / "java-session.jsonl").read_text(encoding="utf-8").splitlines()
]
REQUESTS = [record["body"].encode() for record in SESSION if record["where"] == "request"]
RESPONSES = [record["body"].encode() for record in SESSION if record["where"] == "clientResponse"]

REQUEST: dict[str, Any] = {
    "requestId": "100d2f6415d66dd5bf5a4e592e0cd9bb",
    "requestBody": "{}",
    "destAgentTopic": "Worker",
    "workAgentResponseTopic": "Replies",
    "liteTopic": "trip-42",
}
RESPONSE: dict[str, Any] = {"requestId": REQUEST["requestId"], "responseBody": "{}", "stream": False, "end": True}

names = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]))
header_maps = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9-]{1,20}", fullmatch=True),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40),
    max_size=5,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def dump(value: object) -> bytes:
    return json.dumps(value).encode()


def test_the_captured_session_holds_both_kinds():
    assert len(REQUESTS) == 3
    assert len(RESPONSES) == 10


@pytest.mark.parametrize("data", REQUESTS)
def test_a_java_request_is_read_and_written_back(data):
    envelope = RequestEnvelope.decode(data)
    assert json.loads(envelope.encode()) == json.loads(data)
    assert envelope.dest_topic == "JWorker"
    assert (envelope.reply_topic, envelope.lite_topic) == ("JClientResp", "78ba7daa-8d18-4a9f-85c3-41993adf87ac")
    assert envelope.headers == {}
    assert not envelope.reads_batches
    assert RpcRequest.read(envelope.body).method in ("message/send", "message/stream", "tasks/get")


@pytest.mark.parametrize("data", RESPONSES)
def test_a_java_response_is_read_and_written_back(data):
    envelope = ResponseEnvelope.decode(data)
    assert json.loads(envelope.encode()) == json.loads(data)
    assert (envelope.seq, envelope.attempt, envelope.status, envelope.headers) == (None, None, None, None)
    assert envelope.stream or (envelope.server_reply_topic, envelope.server_lite_topic) == (
        "JServerResp",
        "f9971ee1-2a6b-40c6-8628-5d550c59d4f7",
    )


@settings(deadline=None)
@given(
    st.builds(
        RequestEnvelope,
        request_id=names,
        body=texts,
        headers=header_maps,
        dest_topic=st.none() | names,
        reply_topic=names,
        lite_topic=names,
    )
)
def test_a_request_survives_the_wire(envelope):
    assert RequestEnvelope.decode(envelope.encode()) == envelope


@settings(deadline=None)
@given(
    st.builds(
        ResponseEnvelope,
        request_id=names,
        body=st.none() | texts,
        stream=st.booleans(),
        end=st.booleans(),
        server_reply_topic=st.none() | names,
        server_lite_topic=st.none() | names,
        context_id=st.none() | texts,
        task_id=st.none() | texts,
        seq=st.none() | st.integers(0, 2**53 - 1),
        attempt=st.none() | st.integers(0, 2**53 - 1),
        status=st.none() | st.integers(100, 599),
        headers=st.none() | header_maps,
    )
)
def test_a_response_survives_the_wire(envelope):
    assert ResponseEnvelope.decode(envelope.encode()) == envelope


def test_non_ascii_stays_raw_and_nulls_are_left_out():
    data = ResponseEnvelope(request_id="r", body="杭州", stream=False, end=True).encode()
    assert "杭州".encode() in data
    assert json.loads(data) == {"requestId": "r", "responseBody": "杭州", "stream": False, "end": True}


def test_unknown_fields_and_nulls_are_ignored():
    data = dump(RESPONSE | {"later": [1, {"a": 2}], "contextId": None, "seq": None, "headers": {"x-a": None}})
    envelope = ResponseEnvelope.decode(data)
    assert envelope == ResponseEnvelope(request_id=RESPONSE["requestId"], body="{}", stream=False, end=True, headers={})


@pytest.mark.parametrize(
    ("header", "reads"),
    [({"X-RocketMQ-A2A": "1"}, True), ({"x-rocketmq-a2a": " 1"}, True), ({"x-rocketmq-a2a": "0"}, False), ({}, False)],
)
def test_a_caller_announces_that_it_reads_batches(header, reads):
    assert RequestEnvelope.decode(dump(REQUEST | {"requestHeader": header})).reads_batches is reads


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    data = json.dumps(RESPONSE | {"responseBody": "a\ud83db", "headers": {"x-a": "\udc00"}}).encode()
    envelope = ResponseEnvelope.decode(data)
    assert envelope.body == "a\ufffdb"
    assert envelope.headers == {"x-a": "\ufffd"}
    assert ResponseEnvelope.decode(envelope.encode()) == envelope


@pytest.mark.parametrize(
    "change",
    [
        {"requestId": None},
        {"requestId": ""},
        {"requestId": "a b"},
        {"requestId": "a\n"},
        {"requestId": 7},
        {"requestBody": None},
        {"requestBody": {"jsonrpc": "2.0"}},
        {"destAgentTopic": "no spaces"},
        {"destAgentTopic": "t" * 128},
        {"workAgentResponseTopic": None},
        {"workAgentResponseTopic": "../x"},
        {"workAgentResponseTopic": "Replies\n"},
        {"liteTopic": None},
        {"liteTopic": ""},
        {"liteTopic": "l" * 65},
        {"liteTopic": "杭州"},
        {"requestHeader": []},
        {"requestHeader": {"a": 1}},
        {"requestHeader": {"a b": "1"}},
        {"requestHeader": {"": "1"}},
        {"requestHeader": {"a": "1\r\nset-cookie: x"}},
        {"requestHeader": {f"a{n}": "" for n in range(MAX_HEADERS + 1)}},
        {"requestHeader": {"a": "x" * MAX_HEADER_BYTES}},
    ],
)
def test_a_bad_request_is_refused(change):
    RequestEnvelope.decode(dump(REQUEST))
    with pytest.raises(EnvelopeError) as caught:
        RequestEnvelope.decode(dump(REQUEST | change))
    assert caught.value.request_id == (None if "requestId" in change else REQUEST["requestId"])


@pytest.mark.parametrize(
    "change",
    [
        {"requestId": None},
        {"responseBody": []},
        {"stream": "true"},
        {"end": 1},
        {"seq": -1},
        {"seq": 1.5},
        {"seq": True},
        {"seq": 2**53},
        {"seq": 10**400},
        {"attempt": "1"},
        {"status": 99},
        {"status": 600},
        {"headers": "x"},
        {"contextId": "c" * 1025},
        {"taskId": 1},
        {"serverLiteTopic": "a.b"},
        {"serverWorkAgentResponseTopic": ""},
    ],
)
def test_a_bad_response_is_refused(change):
    ResponseEnvelope.decode(dump(RESPONSE))
    with pytest.raises(EnvelopeError) as caught:
        ResponseEnvelope.decode(dump(RESPONSE | change))
    assert caught.value.request_id == (None if "requestId" in change else RESPONSE["requestId"])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe{}",
        b"null",
        b"[]",
        b'"text"',
        b'{"requestId":NaN}',
        b'{"requestId":"a"',
        b"[" * 100_000,
        b'{"requestId":' * 100_000,
        b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"seq":' + b"9" * 10_000 + b"}",
        b'\xef\xbb\xbf{"requestId":"a"}',
    ],
)
def test_what_is_no_envelope_is_refused(data):
    for kind in (RequestEnvelope, ResponseEnvelope):
        with pytest.raises(EnvelopeError):
            kind.decode(data)
    assert ReplyAddress.find(data) is None


@settings(deadline=None)
@given(
    st.binary()
    | json_values.map(dump)
    | st.dictionaries(st.sampled_from([*REQUEST, *RESPONSE, "seq", "headers"]), json_values).map(dump)
    | st.tuples(st.sampled_from(REQUESTS + RESPONSES), st.integers(0, 400), st.binary(max_size=4)).map(
        lambda cut: cut[0][: cut[1]] + cut[2] + cut[0][cut[1] + 1 :]
    )
)
def test_decoding_raises_nothing_else(data):
    for kind in (RequestEnvelope, ResponseEnvelope):
        try:
            envelope = kind.decode(data)
        except EnvelopeError:
            continue
        assert kind.decode(envelope.encode()) == envelope


def test_a_bad_request_can_still_be_answered():
    data = dump(REQUEST | {"requestBody": None, "requestHeader": 3})
    assert ReplyAddress.find(data) == ReplyAddress(
        request_id=REQUEST["requestId"], reply_topic="Replies", lite_topic="trip-42"
    )
    found = ReplyAddress.find(dump(REQUEST | {"requestHeader": 3}))
    assert found is not None
    assert found.body == REQUEST["requestBody"]
    assert ReplyAddress.find(dump(REQUEST | {"liteTopic": "a b"})) is None


@settings(deadline=None)
@given(texts)
def test_encoded_size_is_what_a_text_adds_to_a_message(text):
    def message(body: str) -> bytes:
        return ResponseEnvelope(request_id="r", body=body, stream=True, end=False).encode()

    assert len(message(text)) == len(message("")) + encoded_size(text)
