"""JSON-RPC texts, read without trusting them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentscope_rocketmq.jsonrpc import Progress, RpcRequest, error_response, plain_error, progress


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
