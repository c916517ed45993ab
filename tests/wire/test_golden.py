"""Golden messages: what real Java peers and this package said to each other is still read, and still said, like that.

`capture.py` writes them; `java-session.jsonl` is a conversation between two Java peers.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agentscope_rocketmq.app import A2AApp, BoundedTaskStore
from agentscope_rocketmq.asgi import Receive, Response, http_scope, with_rpc_id
from agentscope_rocketmq.card import Address, choose, complete_card, parse_card, read_card
from agentscope_rocketmq.envelope import RequestEnvelope, ResponseEnvelope
from agentscope_rocketmq.exchange import END_GRACE, Exchange
from agentscope_rocketmq.jsonrpc import RpcRequest
from agentscope_rocketmq.replay import EventReader, SessionEvent
from agentscope_rocketmq.reply import ReplyEncoder
from agentscope_rocketmq.sse import parse_events, render_event
from tests.commanded import Commanded
from tests.services import card_for

FOLDER = Path(__file__).parent


class Conversation:
    """One call: its name, its request and the messages of its response."""

    def __init__(self) -> None:
        self.call = ""
        self.request = b""
        self.responses: list[bytes] = []


def lines_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def conversations(name: str) -> dict[str, Conversation]:
    """By call."""
    by_id: dict[str, Conversation] = defaultdict(Conversation)
    for line in lines_of(name):
        one = by_id[json.loads(line["body"])["requestId"]]
        if line["kind"] == "request":
            one.call, one.request = line["call"], line["body"].encode()
        else:
            one.responses.append(line["body"].encode())
    # What was said to calls from before the recording has no request here.
    return {one.call: one for one in by_id.values() if one.request}


MESSAGES = [(line["kind"], line["body"].encode()) for name in ("java-client", "java-server") for line in lines_of(name)]
JAVA_CLIENT = conversations("java-client")
JAVA_SERVER = conversations("java-server")
STICKY = next(
    (found["serverWorkAgentResponseTopic"], found["serverLiteTopic"])
    for _, body in MESSAGES
    if "serverLiteTopic" in (found := json.loads(body))
)


@pytest.mark.parametrize(("kind", "body"), MESSAGES)
def test_a_message_is_read_and_written_as_it_was(kind, body):
    envelope = (RequestEnvelope if kind == "request" else ResponseEnvelope).decode(body)
    # Objects have no order; a null that is written instead of left out would show.
    assert json.loads(envelope.encode()) == json.loads(body)


METHODS = {
    *("message/send", "message/stream", "tasks/get", "tasks/cancel", "agent/getAuthenticatedExtendedCard"),
    *(f"tasks/pushNotificationConfig/{what}" for what in ("set", "get", "list", "delete")),
}


@pytest.mark.parametrize(
    ("captured", "methods"),
    # The Java client never sends what its own server takes to resubscribe.
    [(JAVA_CLIENT, METHODS), (JAVA_SERVER, METHODS | {"tasks/resubscribe", "tasks/dance", None})],
)
def test_every_method_was_captured(captured, methods):
    sent = {RpcRequest.read(RequestEnvelope.decode(one.request).body).method for one in captured.values()}
    assert sent == methods


# Our server


@pytest.fixture
async def executor():
    return Commanded()


@pytest.fixture
async def app(executor):
    """The app of a server, as `capture.py` had it, without a broker."""
    config = cast("Any", SimpleNamespace(endpoint="127.0.0.1:8081"))
    card = card_for(config, "Worker")
    card["capabilities"]["extendedAgentCard"] = True
    extended = parse_card(card)
    extended.supported_interfaces[0].protocol_version = "0.3"

    async def any_url(_url: str) -> bool:
        return True

    app = A2AApp(
        executor,
        complete_card(parse_card(card), jsonrpc_url="http://127.0.0.1:9/"),
        path="/",
        task_store=BoundedTaskStore(most=100),
        on_task=lambda _task: None,
        extended_card=extended,
        push_url_validator=any_url,
    )
    yield app
    await app.aclose()


async def answer(app: A2AApp, data: bytes, **changes: Any) -> list[dict[str, Any]]:
    """The messages with which our server answers a request."""
    request = RequestEnvelope.decode(json.dumps(json.loads(data) | changes).encode())
    rpc = RpcRequest.read(request.body)
    request = with_rpc_id(request, rpc)
    encoder = ReplyEncoder(
        request.request_id,
        peer_reads_batches=request.reads_batches,
        sticky=STICKY,
        attempt=0,
        run="run",
        max_message_bytes=2**22,
        wants_stream=rpc.wants_stream,
        rpc_id=rpc.id,
    )
    response = Response(encoder, limit=2**22)
    message = cast("Any", SimpleNamespace(topic="Worker", message_id="message"))
    scope = http_scope(request, message, path="/", attempt=0)
    await app(scope, Receive(request.body.encode(), response.complete), response.send)
    encoder.finish()
    messages = []
    while not encoder.finished:
        taken = encoder.take()
        assert taken is not None
        messages.append(json.loads(taken.encode()))
    return messages


def normal(messages: list[dict[str, Any]]) -> Any:
    """Without what differs from one run to the next: times, ids of messages, ports, and in which order members stand."""
    text = json.dumps([message | {"responseBody": members(message.get("responseBody"))} for message in messages])
    text = re.sub(r'"timestamp": "[^"]*"', '"timestamp": ""', text)
    text = re.sub(r"http://127\.0\.0\.1:\d+", "http://127.0.0.1", text)
    return json.loads(re.sub(r'"messageId": "[^"]*"', '"messageId": ""', text))


def members(body: str | None) -> Any:
    events = parse_events(body or "")
    if events:
        return [(event.name, event.id, json.loads(event.data)) for event in events]
    return None if body is None else json.loads(body)


async def test_our_server_answers_a_java_client_as_it_did(app, executor):
    for call, one in JAVA_CLIENT.items():
        if "cancel" in call and "ended" not in call:
            continue  # a running one
        gate = re.search(r"held (\w+)", one.request.decode())
        if gate:
            executor.open(gate[1])
        # Ids of tasks and contexts are made from the request, so that they are the same.
        said = await answer(app, one.request)
        assert (call, normal(said)) == (call, normal([json.loads(message) for message in one.responses]))


async def test_each_event_to_a_java_client_is_one_message_with_its_number(app, executor):
    one = JAVA_CLIENT["stream"]
    executor.open(re.findall(r"held (\w+)", one.request.decode())[0])
    *events, end = await answer(app, one.request)
    for number, event in enumerate(events):
        assert re.fullmatch(rf"data: \{{.*\}}\nid: {number}\n\n", event["responseBody"])
        assert set(event) == {"requestId", "responseBody", "stream", "end"}
        assert (event["stream"], event["end"]) == (True, False)
    assert end == {"requestId": end["requestId"], "stream": True, "end": True}


@pytest.mark.parametrize("rpc_id", [7, "seven", "7"])
async def test_ids_come_back_as_they_were(app, rpc_id):
    body = {"jsonrpc": "2.0", "id": rpc_id, "method": "tasks/get", "params": {"id": "no-such-task"}}
    [message] = await answer(app, JAVA_CLIENT["get"].request, requestBody=json.dumps(body))
    response = json.loads(message["responseBody"])
    assert (response["id"], response["error"]["code"]) == (rpc_id, -32001)


@pytest.mark.parametrize("rpc_id", [{}, {"id": None}])
@pytest.mark.parametrize("method", ["message/send", "message/stream"])
async def test_a_request_without_an_id_is_answered_all_the_same(app, rpc_id, method):
    body = json.loads(json.loads(JAVA_CLIENT["send"].request)["requestBody"])
    body = {name: value for name, value in body.items() if name != "id"} | {"method": method} | rpc_id
    messages = await answer(app, JAVA_CLIENT["send"].request, requestBody=json.dumps(body))
    assert messages[-1]["end"]
    first = members(messages[0]["responseBody"])
    response = first[0][2] if method == "message/stream" else first
    assert (response["id"], response["result"]["kind"]) == (messages[0]["requestId"], "task")


async def test_a_request_without_an_id_may_say_what_can_not_be_written_as_utf_8(app):
    # Half a surrogate pair: JSON can escape it.
    body = json.loads(json.loads(JAVA_CLIENT["send"].request)["requestBody"])
    del body["id"]
    body["params"]["later"] = "\ud83d"
    [message] = await answer(app, JAVA_CLIENT["send"].request, requestBody=json.dumps(body))
    response = json.loads(message["responseBody"])
    assert (response["id"], response["result"]["kind"]) == (message["requestId"], "task")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"configuration": None, "metadata": None},
        {"configuration": {}},
        {"configuration": {"acceptedOutputModes": [], "blocking": True, "historyLength": 0}},
        {"configuration": {"blocking": True, "historyLength": 10, "pushNotificationConfig": None}},
        {"metadata": {}},
        {"later": {"a": 1}},
    ],
)
async def test_parameters_may_be_there_or_not(app, change):
    body = json.loads(json.loads(JAVA_CLIENT["send"].request)["requestBody"])
    body["params"] = {"message": body["params"]["message"]} | change
    [message] = await answer(app, JAVA_CLIENT["send"].request, requestBody=json.dumps(body))
    assert json.loads(message["responseBody"])["result"]["status"]["state"] == "completed"


@pytest.mark.parametrize("limit", [{}, {"historyLength": None}, {"historyLength": 0}, {"historyLength": 5}])
async def test_a_history_length_that_is_no_limit_gives_the_whole_history(app, limit):
    [sent] = await answer(app, JAVA_CLIENT["send"].request)
    task = json.loads(sent["responseBody"])["result"]
    body = {"jsonrpc": "2.0", "id": "1", "method": "tasks/get", "params": {"id": task["id"], **limit}}
    [got] = await answer(app, JAVA_CLIENT["get"].request, requestBody=json.dumps(body))
    assert json.loads(got["responseBody"])["result"]["history"] == task["history"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("{", -32700),
        ('{"jsonrpc":"2.0","id":1,"method":"tasks/dance","params":{}}', -32601),
        # A Java server says -32602 of these; the codes are the a2a-sdk's.
        ('{"jsonrpc":"2.0","id":1,"method":"message/send","params":{}}', -32600),
        ('{"jsonrpc":"2.0","id":1,"method":"message/stream","params":{}}', -32600),
        ('{"jsonrpc":"2.0","id":1,"method":"tasks/resubscribe","params":{"id":"no-such-task"}}', -32001),
    ],
)
async def test_an_error_comes_in_the_form_that_its_method_is_answered_in(app, body, code):
    # A document in answer to a stream hangs the Java client for ever.
    stream = "stream" in body or "resubscribe" in body
    first, *_ = messages = await answer(app, JAVA_CLIENT["get"].request, requestBody=body)
    response = members(first["responseBody"])
    assert (response[0][2] if stream else response)["error"]["code"] == code
    assert {message["stream"] for message in messages} == {stream}
    assert messages[-1]["end"]


async def test_a_result_of_nothing_is_said(app):
    [sent] = await answer(app, JAVA_CLIENT["send"].request)
    task_id = json.loads(sent["responseBody"])["result"]["id"]
    params = {"id": task_id, "pushNotificationConfigId": "none"}
    body = {"jsonrpc": "2.0", "id": "1", "method": "tasks/pushNotificationConfig/delete", "params": params}
    [message] = await answer(app, JAVA_CLIENT["get"].request, requestBody=json.dumps(body))
    assert json.loads(message["responseBody"]) == {"jsonrpc": "2.0", "id": "1", "result": None}


# Our client


def outcome(messages: list[bytes]) -> list[Any]:
    """What a caller is told: states, texts, error codes."""
    exchange = Exchange()
    call = exchange.open(json.loads(messages[0])["requestId"], idle=None, total=None, now=0.0)
    texts = []
    for message in messages:
        fed = exchange.feed(message, 0.0)
        texts += fed[1] if fed else []
    texts += call.check(END_GRACE)
    assert call.finished
    assert call.head is not None
    responses = [event.data for text in texts for event in parse_events(text)] if call.head.stream else texts
    return [told(json.loads(response)) for response in responses]


def told(response: dict[str, Any]) -> Any:  # noqa: PLR0911
    if "error" in response:
        assert set(response["error"]) <= {"code", "message", "data"}
        assert "io.a2a" not in str(response["error"].get("data"))
        return response["error"]["code"]
    result = response["result"]
    match result:
        case {"status": status}:
            return status["state"]
        case {"artifact": {"parts": parts}} | {"kind": "message", "parts": parts}:
            return "".join(part["text"] for part in parts)
        case {"pushNotificationConfig": config}:
            return config["id"]
        case {"description": description}:
            return description
        case list():
            return [config["pushNotificationConfig"]["id"] for config in result]
    return result


WORKING = ["submitted", "working"]
OUTCOMES: dict[str, list[Any]] = {
    "stream": [*WORKING, "0,", "1,", "completed"],
    "stream, a message for an answer": ["杭州"],
    "stream, a task that fails": [*WORKING, "failed"],
    "stream, a question": [*WORKING, "input-required"],
    "send": ["completed"],
    "send, a failing executor": [-32603],
    "get": ["completed"],
    "get, an unknown task": [-32001],
    "cancel, an ended task": [-32002],
    "push config set": ["mine"],
    "push config get": ["mine"],
    "push config list": [["mine"]],
    "push config delete": [None],
    "extended card": ["For those who may know more."],
    "stream, to be resubscribed": [*WORKING, "begin ", "end", "completed"],
    "resubscribe": ["end", "completed"],
    "get, again": ["completed"],
    "open the gate": [*WORKING, "completed"],
    "no JSON": [-32700],
    "an unknown method": [-32601],
    "bad parameters": [-32602],
    "bad parameters of a stream": [-32602],
}


@pytest.mark.parametrize("call", sorted(OUTCOMES))
def test_what_a_java_server_said_is_understood(call):
    assert outcome(JAVA_SERVER[call].responses) == OUTCOMES[call]


def test_nothing_that_was_captured_is_left_out():
    assert set(JAVA_SERVER) == set(OUTCOMES)


def events_of(messages: list[bytes]) -> list[SessionEvent]:
    """What a session holds when these came into it."""
    reader, heard = EventReader(), []
    time = datetime(2026, 1, 1, tzinfo=UTC)
    for offset, message in enumerate(messages):
        heard += reader.feed(message, offset=offset, message_id=f"m{offset}", store_time=time)
    return heard


def test_a_session_holds_a_stream_once_that_was_subscribed_to_while_it_ran():
    # Both answer into the session: the subscription brings again what the stream brings.
    heard = events_of([line["body"].encode() for line in lines_of("java-server") if line["kind"] == "response"])
    task = json.loads(RequestEnvelope.decode(JAVA_SERVER["resubscribe"].request).body)["params"]["id"]
    of_task = [told(json.loads(event.raw)) for event in heard if f'"taskId":"{task}"' in event.raw]
    assert of_task == OUTCOMES["stream, to be resubscribed"]


def test_a_session_holds_what_a_task_says_when_its_question_was_answered():
    asked = JAVA_SERVER["stream, a question"].responses
    asking, answering = (re.findall(r'"taskId\\":\\"([^\\]+)', one[0].decode())[0] for one in (asked, STREAM))
    answered = [message.replace(answering.encode(), asking.encode()) for message in STREAM]
    told_of = [told(json.loads(event.raw)) for event in events_of([*asked, *answered])]
    assert told_of == OUTCOMES["stream, a question"] + OUTCOMES["stream"]


def test_a_session_holds_each_answer_that_is_no_stream():
    # Also where the task says the same as before, or its stream says it as well.
    [sent], [got], [again] = (JAVA_SERVER[call].responses for call in ("send", "get", "get"))
    again = json.dumps(json.loads(again) | {"requestId": "f" * 32}).encode()
    heard = events_of([*STREAM, sent, got, again])
    assert [told(json.loads(event.raw)) for event in heard] == [*OUTCOMES["stream"], *["completed"] * 3]


def changed(change: Any) -> list[bytes]:
    return [json.dumps(change(json.loads(body))).encode() for body in JAVA_SERVER["stream"].responses]


def with_body(pattern: str, replacement: str) -> list[bytes]:
    def change(message: dict[str, Any]) -> dict[str, Any]:
        if "responseBody" in message:
            message["responseBody"] = re.sub(pattern, replacement, message["responseBody"])
        return message

    return changed(change)


def end_on_the_last_event() -> list[bytes]:
    *events, last, end = JAVA_SERVER["stream"].responses
    return [*events, json.dumps(json.loads(last) | {"end": json.loads(end)["end"]}).encode()]


STREAM = JAVA_SERVER["stream"].responses
VARIANTS = {
    "as it came": STREAM,
    "without ids": with_body(r"id: \d+\n", ""),
    "without a blank behind data:": with_body("data: ", "data:"),
    "without blank lines": with_body(r"\n\n$", ""),
    "with carriage returns": with_body(r"\n", "\r\n"),
    "with the end on the last event": end_on_the_last_event(),
    "without an end marker": STREAM[:-1],
    "with the end before the last event": [*STREAM[:-2], STREAM[-1], STREAM[-2]],
    "with the end first": [STREAM[-1], *STREAM[:-1]],
    "backwards": STREAM[::-1],
    "each message twice": [message for message in STREAM for _ in range(2)],
    "with unknown fields": changed(lambda message: message | {"later": {"a": [1]}, "contextId": None}),
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_stream_reads_the_same_in_all_its_forms(variant):
    assert outcome(VARIANTS[variant]) == OUTCOMES["stream"]


def test_an_error_in_the_midst_of_a_stream_ends_it_in_whatever_form_it_comes():
    [error] = JAVA_SERVER["bad parameters of a stream"].responses
    request_id = json.loads(STREAM[0])["requestId"]
    document = json.loads(error) | {"requestId": request_id}
    plain = json.loads(json.loads(document["responseBody"]))
    event = document | {"responseBody": render_event(json.dumps(plain), event_id="2"), "stream": True, "end": False}
    for form in (document, event):
        messages = [*STREAM[:2], json.dumps(form).encode(), STREAM[-1]]
        assert outcome(messages) == [*WORKING, -32602]


def test_the_card_of_a_java_server_leads_to_its_topic():
    card = read_card(FOLDER / "java-card.json")
    choice = choose(card, allow_jsonrpc=False)
    assert (choice.binding, choice.version) == ("RocketMQ", "0.3.0")
    address = Address.parse(choice.url)
    assert (address.namespace, address.topic) == ("", "Worker")
    assert choice.url == f"http://{address.endpoint}//Worker"
