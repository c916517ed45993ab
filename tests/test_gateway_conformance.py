"""A gateway answers as the plain a2a-sdk server behind it does: the same requests, to both, the same answers."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.routes import create_jsonrpc_routes
from a2a.server.tasks import InMemoryPushNotificationConfigStore, InMemoryTaskStore
from starlette.applications import Starlette

from agentscope_rocketmq import A2AServer
from agentscope_rocketmq.card import parse_card
from agentscope_rocketmq.httpserver import listen, serve_http
from agentscope_rocketmq.sse import parse_events
from tests.faults import Counter, Ledger
from tests.gateways import VERSIONS, about, call, client, gateway_for, message, stream
from tests.services import card_for

NAMES = {
    "1.0": {
        "set": "CreateTaskPushNotificationConfig",
        "get": "GetTaskPushNotificationConfig",
        "list": "ListTaskPushNotificationConfigs",
        "delete": "DeleteTaskPushNotificationConfig",
        "card": "GetExtendedAgentCard",
    },
    "0.3": {
        "set": "tasks/pushNotificationConfig/set",
        "get": "tasks/pushNotificationConfig/get",
        "list": "tasks/pushNotificationConfig/list",
        "delete": "tasks/pushNotificationConfig/delete",
        "card": "agent/getAuthenticatedExtendedCard",
    },
}
# Byte for byte, whatever they are: (what is sent, headers).
MALFORMED = [
    (b"", {}),
    (b"{", {}),
    (b"nonsense", {}),
    (b"{}", {}),
    (b'{"jsonrpc":"2.0"}', {}),
    (b'{"jsonrpc":"1.0","id":1,"method":"GetTask","params":{"id":"x"}}', {}),
    (b'{"jsonrpc":"2.0","id":1,"method":"NoSuchMethod","params":{}}', {}),
    (b'{"jsonrpc":"2.0","id":1,"method":7,"params":{}}', {}),
    (b'{"jsonrpc":"2.0","id":1,"method":"GetTask"}', {}),
    (b'{"jsonrpc":"2.0","id":1,"method":"GetTask","params":[]}', {}),
    (b'{"jsonrpc":"2.0","id":1,"method":"GetTask","params":{"id":7}}', {}),
    (b'{"jsonrpc":"2.0","id":true,"method":"GetTask","params":{"id":"x"}}', {}),
    (b'{"jsonrpc":"2.0","id":1.5,"method":"GetTask","params":{"id":"x"}}', {}),
    (b'{"jsonrpc":"2.0","id":null,"method":"GetTask","params":{"id":"x"}}', {}),
    (b'{"jsonrpc":"2.0","id":[1],"method":"GetTask","params":{"id":"x"}}', {}),
    (b'{"jsonrpc":"2.0","method":"GetTask","params":{"id":"x"}}', {}),
    (b'{"jsonrpc":"2.0","id":1,"method":"SendMessage","params":{}}', {}),
    (b'{"jsonrpc":"2.0","id":{"bad":"type"},"method":"SendMessage","params":{}}', {}),
    (b'{"jsonrpc":"2.0","method":"message/send","params":{}}', {"A2A-Version": "0.3"}),
    (b'{"jsonrpc":"2.0","id":1,"method":"SendMessage","params":{"message":7}}', {}),
    (b'{"jsonrpc":"2.0","id":1,"method":"SendMessage","params":{"message":{"role":"ROLE_USER","parts":[]}}}', {}),
    (b'{"jsonrpc":"2.0","id":1,"method":"SendStreamingMessage","params":{"message":{"messageId":"m"}}}', {}),
    (b'{"jsonrpc":"2.0","id":1,"method":"SendMessage","params":{"message":{"messageId":"m","contextId":7}}}', {}),
    (b'{"jsonrpc":"2.0","id":1,"method":"message/send","params":{}}', {"A2A-Version": "0.3"}),
    (b'{"jsonrpc":"2.0","id":1,"method":"message/stream","params":{"message":{}}}', {"A2A-Version": "0.3"}),
    (b'{"jsonrpc":"2.0","id":1,"method":"GetTask","params":{"id":"x"}}', {"A2A-Version": "0.3"}),
    (b'{"jsonrpc":"2.0","id":1,"method":"GetTask","params":{"id":"x"}}', {"A2A-Version": "9.9"}),
    (b'{"jsonrpc":"2.0","id":1,"method":"tasks/get","params":{"id":"x"}}', {"A2A-Version": "1.0"}),
    (b'{"jsonrpc":"2.0","id":1,"method":"GetTask","params":{"id":"x","more":{"a":[1]}},"and":2}', {}),
]
# The gateway lets nothing pass that it can't read as one request: the same error, in its own words.
NO_OBJECTS = [
    b"[]",
    b"[1]",
    b'[{"jsonrpc":"2.0","id":1,"method":"GetTask","params":{"id":"x"}}]',
    b'"text"',
    b"7",
    b"null",
]


@contextlib.asynccontextmanager
async def both(config, make_topic, tmp_path):
    """A plain a2a-sdk server, and a gateway before another one of the same kind."""
    names = await make_topic("NORMAL")
    card = card_for(config, names.topic)
    handlers = [_handler(Counter(Ledger(tmp_path / f"ledger-{number}")), card) for number in range(2)]
    apps = [Starlette(routes=create_jsonrpc_routes(each, "/", enable_v0_3_compat=True)) for each in handlers]
    with contextlib.closing(listen("127.0.0.1", 0)) as listening:
        plain = f"http://127.0.0.1:{listening.getsockname()[1]}"
        async with (
            serve_http(apps[0], listening, 1.0),
            A2AServer.from_app(apps[1], card=card, config=config) as server,
            gateway_for(config, server.url) as served,
        ):
            try:
                yield plain, served.url
            finally:
                for handler in handlers:
                    await handler.aclose()


def _handler(counter, card):
    return DefaultRequestHandler(
        counter,
        InMemoryTaskStore(),
        parse_card(card),
        push_config_store=InMemoryPushNotificationConfigStore(),
        push_url_validator=_anywhere,
    )


async def _anywhere(_url):
    return True


class Talk:
    """One conversation with one server: each answer, with what differs by nature made equal."""

    def __init__(self, http):
        self.http = http
        self.answers = []
        self._known = {}

    async def say(self, body, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = await self.http.post("/", content=content, headers={"Content-Type": "application/json", **headers})
        kind = response.headers["content-type"].partition(";")[0]
        streamed = kind == "text/event-stream"
        said = [json.loads(e.data) for e in parse_events(response.text)] if streamed else [response.json()]
        self.answers.append((response.status_code, kind, self._same(said)))
        return said

    def _same(self, value):
        text = re.sub(r'"(timestamp|nextPageToken)": "[^"]+"', r'"\1": "T"', json.dumps(value, sort_keys=True))
        for found in re.findall(r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}", text):
            self._known.setdefault(found, f"id-{len(self._known)}")
        for found, name in self._known.items():
            text = text.replace(found, name)
        return json.loads(text)


def task(said):
    found = said[0]["result"]
    return found.get("task", found)


async def converse(talk, version):
    """Every method, in one version's words."""
    names = NAMES[version]
    sent = task(await talk.say(message("first 2", version=version, stream=False)))
    await talk.say(message("second 3", version=version))
    await talk.say(message("third 1", version=version, contextId=sent["contextId"]))
    await talk.say(about("get", sent["id"], version=version))
    await talk.say(call(about("get", "", version=version)["method"], {"id": sent["id"], "historyLength": 0}))
    for unknown in ("get", "cancel", "subscribe"):
        await talk.say(about(unknown, "no-such-task", version=version))
        if unknown != "get":
            await talk.say(about(unknown, sent["id"], version=version))
    await talk.say(message("again 1", version=version, taskId=sent["id"]))
    await talk.say(message("again 1", version=version, stream=False, taskId="no-such-task"))
    await talk.say(message("again 1", version=version, taskId=sent["id"], contextId="another"))
    if version == "1.0":
        await talk.say(call("ListTasks", {"contextId": sent["contextId"], "pageSize": 1}))
        await talk.say(call("ListTasks", {"pageSize": -1}))
    running = await talk.say(_in_background(message("running", version=version, stream=False), version))
    running = task(running)
    async with stream(talk.http, "/", about("subscribe", running["id"], version=version)) as subscribed:
        first = await anext(subscribed.events)
        canceled = task(await talk.say(about("cancel", running["id"], version=version)))
        rest = [json.loads(event.data) async for event in subscribed.events]
    assert canceled["status"]["state"] in ("TASK_STATE_CANCELED", "canceled")
    talk.answers.pop()  # how far it had counted is chance
    assert json.loads(first.data)["result"].get("task", json.loads(first.data)["result"])["id"] == running["id"]
    talk.answers.append(talk._same(rest[-1]))
    config = {"id": "c1", "url": "http://127.0.0.1:9/hook"}
    new = {"taskId": sent["id"], **config}
    await talk.say(
        call(names["set"], new if version == "1.0" else {"taskId": sent["id"], "pushNotificationConfig": config})
    )
    one = (
        {"taskId": sent["id"], "id": "c1"} if version == "1.0" else {"id": sent["id"], "pushNotificationConfigId": "c1"}
    )
    every = {"taskId": sent["id"]} if version == "1.0" else {"id": sent["id"]}
    for name, params in (("get", one), ("list", every), ("delete", one), ("get", one), ("list", {"id": "x"})):
        await talk.say(call(names[name], params))
    await talk.say(call(names["card"], {}))


def _in_background(body, version):
    body["params"]["configuration"] = {"blocking": False} if version == "0.3" else {"returnImmediately": True}
    return body


@pytest.mark.parametrize("version", VERSIONS)
async def test_every_method_gets_the_answer_of_the_plain_server(config, make_topic, tmp_path, version):
    answers = []
    async with both(config, make_topic, tmp_path) as servers:
        for url in servers:
            async with client(url, version=version) as http:
                talk = Talk(http)
                await converse(talk, version)
                answers.append(talk.answers)
    assert len(answers[0]) >= 20
    for number, (plain, through) in enumerate(zip(*answers, strict=True)):
        assert through == plain, number


async def test_malformed_requests_get_the_answer_of_the_plain_server(config, make_topic, tmp_path):
    answers = []
    async with both(config, make_topic, tmp_path) as servers:
        for url in servers:
            async with client(url) as http:
                talk = Talk(http)
                for body, headers in MALFORMED:
                    await talk.say(body, **headers)
                for version in ("", None):  # none named is 0.3
                    await talk.say(
                        message("x 1", version="0.3"), **({} if version is None else {"A2A-Version": version})
                    )
                for body in NO_OBJECTS:
                    [said] = await talk.say(body)
                    talk.answers[-1] = (*talk.answers[-1][:2], said["id"], said["error"]["code"])
                answers.append([*talk.answers, (await http.get("/")).status_code, (await http.put("/")).status_code])
    for plain, through, sent in zip(
        *answers, [*MALFORMED, "no version", "no version", *NO_OBJECTS, "GET", "PUT"], strict=True
    ):
        assert through == plain, sent
