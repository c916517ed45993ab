"""JSON-RPC texts, read without trusting them."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentscope_rocketmq.jsonrpc import Progress, RpcRequest, error_response, excerpt, plain_error, progress


@pytest.mark.parametrize(
    ("body", "rpc_id", "method", "streams"),
    [
        ('{"id": "a", "method": "message/send"}', "a", "message/send", False),
        ('{"id": 7, "method": "message/stream"}', 7, "message/stream", True),
        ('{"id": 1, "method": "tasks/resubscribe"}', 1, "tasks/resubscribe", True),
        ('{"id": 1, "method": "SendStreamingMessage"}', 1, "SendStreamingMessage", True),
        ('{"id": 1, "method": "SubscribeToTask"}', 1, "SubscribeToTask", True),
        ('{"id": true, "method": ["message/stream"]}', None, None, False),
        ('{"id": {"a": 1}}', None, None, False),
        ('{"id": 1e999}', None, None, False),
        ('{"id": "' + "x" * 2000 + '"}', None, None, False),
        ("[1]", None, None, False),
        ("{", None, None, False),
        ("[" * 100_000, None, None, False),
    ],
)
def test_id_and_method_of_a_request(body, rpc_id, method, streams):
    request = RpcRequest.read(body)
    assert (request.id, request.method, request.wants_stream) == (rpc_id, method, streams)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"task": {"status": {"state": "TASK_STATE_SUBMITTED"}}}, Progress.OPEN),
        ({"task": {"status": {"state": "TASK_STATE_COMPLETED"}}}, Progress.ENDED),
        ({"statusUpdate": {"status": {"state": "TASK_STATE_WORKING"}}}, Progress.OPEN),
        ({"statusUpdate": {"status": {"state": "TASK_STATE_FAILED"}}}, Progress.ENDED),
        ({"statusUpdate": {"status": {"state": "TASK_STATE_CANCELED"}}}, Progress.ENDED),
        ({"statusUpdate": {"status": {"state": "TASK_STATE_REJECTED"}}}, Progress.ENDED),
        ({"statusUpdate": {"status": {"state": "TASK_STATE_INPUT_REQUIRED"}}}, Progress.INTERRUPTED),
        ({"statusUpdate": {"status": {"state": "TASK_STATE_AUTH_REQUIRED"}}}, Progress.INTERRUPTED),
        ({"artifactUpdate": {"artifact": {"parts": [{"text": "completed"}]}}}, Progress.OPEN),
        ({"message": {"role": "ROLE_AGENT"}}, Progress.ENDED),
        ({"kind": "task", "status": {"state": "submitted"}}, Progress.OPEN),
        ({"kind": "task", "status": {"state": "completed"}}, Progress.ENDED),
        ({"kind": "status-update", "final": False, "status": {"state": "working"}}, Progress.OPEN),
        ({"kind": "status-update", "final": False, "status": {"state": "input-required"}}, Progress.INTERRUPTED),
        ({"kind": "status-update", "final": True, "status": {"state": "input-required"}}, Progress.ENDED),
        ({"kind": "status-update", "final": True}, Progress.ENDED),
        ({"kind": "artifact-update", "artifact": {}}, Progress.OPEN),
        ({"kind": "message", "role": "agent"}, Progress.ENDED),
        ({"kind": "task", "status": {"state": 3}}, Progress.OPEN),
        ({"kind": "task", "status": []}, Progress.OPEN),
        ("text", Progress.OPEN),
    ],
)
def test_what_an_event_says_about_its_stream(result, expected):
    assert progress(json.dumps({"jsonrpc": "2.0", "id": 1, "result": result})) is expected


def test_an_error_ends_a_stream_and_what_is_no_response_does_not():
    assert progress(error_response("a", -32603, "x")) is Progress.ENDED
    for text in ("", "[]", "{", "[" * 100_000):
        assert progress(text) is Progress.OPEN


@settings(deadline=None)
@given(st.text())
def test_reading_raises_nothing(text):
    RpcRequest.read(text)
    progress(text)
    plain_error(text)
    progress(json.dumps(text))
    plain_error(json.dumps(text))


def test_a_java_exception_loses_its_stack_trace():
    inner = {
        "jsonrpc": "2.0",
        "id": "7",
        "error": {
            "@type": "io.a2a.spec.MethodNotFoundError",
            "code": -32601,
            "message": "Method not found",
            "stackTrace": [{"className": "secret.Place", "lineNumber": 1}],
        },
    }
    cleaned = {"jsonrpc": "2.0", "id": "7", "error": {"code": -32601, "message": "Method not found"}}
    for body in (json.dumps(json.dumps(inner)), json.dumps(inner)):
        assert json.loads(plain_error(body)) == cleaned


def test_a_java_exception_without_code_and_message_still_is_an_error():
    body = json.dumps({"error": {"@type": "java.lang.NullPointerException", "message": None}})
    error = json.loads(plain_error(body))["error"]
    assert error["code"] == -32603
    assert error["message"]


@pytest.mark.parametrize(
    "body",
    [
        '{"jsonrpc":"2.0","id":1,"result":null}',
        '{"jsonrpc":"2.0","id":1,"error":{"code":-32001,"message":"m","data":[{"@type":"type/ErrorInfo"}]}}',
        '{"result":{"metadata":{"@type":"kept","stackTrace":"kept"}}}',
        '"not JSON inside"',
        '"[1]"',
        "",
        "{",
    ],
)
def test_any_other_body_stays_as_it_is(body):
    assert plain_error(body) == body


def test_a_result_encoded_twice_is_unwrapped():
    body = '{"jsonrpc":"2.0","id":1,"result":{"a":1}}'
    assert plain_error(json.dumps(body)) == body


_PARTS = st.recursive(
    st.none() | st.integers() | st.text(max_size=20) | st.just("x" * 5000) | st.just('"\\' * 3000),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.sampled_from(["id", "message", "text", "ü"]), children)
    ),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "id": st.integers() | st.text(max_size=10) | _PARTS,
            "method": st.sampled_from(["SendMessage", "GetTask"]) | _PARTS,
            "params": _PARTS
            | st.fixed_dictionaries(
                {},
                optional={
                    "id": st.text(max_size=10),
                    "taskId": st.text(max_size=10),
                    "configuration": st.fixed_dictionaries({}, optional={"blocking": st.booleans(), "x": _PARTS}),
                    "message": st.fixed_dictionaries({"parts": _PARTS}, optional={"contextId": st.text(max_size=10)}),
                },
            ),
        },
    ),
    st.booleans(),
)
def test_an_excerpt_says_of_a_request_what_the_request_says(request, ascii_only):
    body = json.dumps(request, ensure_ascii=ascii_only)
    whole, read = RpcRequest.read(body), RpcRequest.read(excerpt(body.encode()))
    if not any(isinstance(text, str) and len(text) > 4096 for text in (whole.method, *whole.params.values())):
        assert (read.id, read.method) == (whole.id, whole.method)
    assert read.returns_at_once == whole.returns_at_once
    message = whole.params.get("message")
    for name in ("taskId", "contextId"):
        if isinstance(message, dict) and isinstance(message.get(name), str) and len(message[name]) < 4096:
            assert read.params["message"][name] == message[name]


@pytest.mark.parametrize("body", ["", "[1]", "{", "[" * 100_000, '{"id": NaN}', '{"id": 1, "id'])
def test_an_excerpt_of_what_is_no_request_is_empty(body):
    assert json.loads(excerpt(body.encode())) == {"jsonrpc": "2.0", "id": None, "method": None, "params": {}}


def test_an_excerpt_of_many_small_parts_takes_little_memory():
    parts = [{"text": "x" * 58, "metadata": {"id": number}} for number in range(30_000)]
    request = {"id": 1, "method": "SendMessage", "params": {"message": {"taskId": "t", "parts": parts}}}
    body = json.dumps(request).encode()
    tracemalloc.start()
    try:
        read = RpcRequest.read(excerpt(body))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read.params["message"] == {"taskId": "t"}
    # The text itself, twice, and little more; parsed as a whole it takes five times its size besides.
    assert peak < 3 * len(body)
