"""Who may see what through a gateway: nothing crosses from one owner to another, and each refusal has its status."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random

import pytest
from pydantic import SecretStr

from agentscope_rocketmq.envelope import RequestEnvelope
from agentscope_rocketmq.errors import ConfigurationError, Unauthenticated
from agentscope_rocketmq.gateway import create_gateway
from agentscope_rocketmq.owners import OWNER_HEADER, TokenVerifier, make_token
from agentscope_rocketmq.rocketmq.admin import Admin, GroupSettings
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from tests.conftest import unique
from tests.faults import Counter, Ledger
from tests.gateways import about, call, client, events, gateway_for, message, task_of
from tests.services import card_for, server_for
from tests.waiting import LIMIT, take

SECRET = "the secret of this deployment"
TOKENS = {owner: make_token(owner, secret=SECRET) for owner in ("alice", "bob")}


@pytest.fixture
async def setting(config, make_topic, tmp_path):
    """Two gateways that verify tokens, before one agent."""
    config = config.model_copy(update={"a2a_secret": SecretStr(SECRET)})
    names = await make_topic("NORMAL")
    counter = Counter(Ledger(tmp_path / "ledger"))
    card = card_for(config, names.topic)
    verify = TokenVerifier(SECRET)
    async with (
        server_for(counter, config, names.topic, card=card),
        gateway_for(config, card, verify=verify) as one,
        gateway_for(config, card, verify=verify) as other,
    ):
        yield one.url, other.url, counter, config, names
        for enough in counter.enough.values():
            enough.set()


async def test_without_a_good_token_there_is_nothing_but_the_card(setting):
    url, _, counter, _, _ = setting
    forged = make_token("alice", secret="another secret")
    async with client(url) as http:
        for authorization in (
            None,
            "Bearer",
            "Basic YTpi",
            f"Bearer {forged}",
            f"Bearer {TOKENS['bob'][:-3]}",
        ):
            headers = {} if authorization is None else {"Authorization": authorization}
            for response in (
                await http.post("/", json=message("x 1"), headers=headers),
                await http.get("/sessions/talk/events", headers=headers),
            ):
                assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
                assert response.json()["error"]["data"]["reason"] == "unauthenticated"
                assert authorization is None or len(authorization) < 9 or authorization[7:] not in response.text
        card = (await http.get("/.well-known/agent-card.json")).json()
        assert card["securitySchemes"]["bearer"]
    assert counter.ledger.path.read_text() == ""


async def test_a_verifier_that_fails_makes_no_owner_and_tells_nothing(config, make_topic, caplog):
    config = config.model_copy(update={"a2a_secret": SecretStr(SECRET)})
    card = card_for(config, (await make_topic("NORMAL")).topic)

    async def fails(token):
        raise KeyError(f"no key for {token}")

    async with gateway_for(config, card, verify=fails) as served, client(served.url, token="my-token") as http:
        for response in (await http.post("/", json=message("x 1")), await http.get("/sessions/talk/events")):
            assert (response.status_code, response.json()["error"]["data"]["reason"]) == (503, "unverified")
            assert "my-token" not in response.text
    logged = [record for record in caplog.records if record.name.startswith("agentscope_rocketmq")]
    assert ["KeyError" in record.getMessage() for record in logged if record.levelno >= logging.ERROR] == [True, True]
    assert "my-token" not in caplog.text


async def test_nobody_sees_or_touches_the_tasks_of_another_owner(setting):
    one, other, _, _, _ = setting
    async with client(one, token=TOKENS["alice"]) as alice, client(other, token=TOKENS["bob"]) as bob:
        body = message("x", stream=False)
        body["params"]["configuration"] = {"returnImmediately": True}
        task = (await alice.post("/", json=body)).json()["result"]["task"]
        assert (await alice.post("/", json=about("get", task["id"]))).json()["result"]["id"] == task["id"]
        for what in ("get", "cancel", "subscribe"):
            refused = await bob.post("/", json=about(what, task["id"]))
            assert refused.json()["error"]["code"] == -32001, what
        refused = await bob.post("/", json=message("y 1", stream=False, taskId=task["id"]))
        assert refused.json()["error"]["code"] == -32001
        for context in ({}, {"contextId": task["contextId"]}):
            listed = [(await http.post("/", json=call("ListTasks", context))).json()["result"] for http in (alice, bob)]
            assert [[found["id"] for found in each["tasks"]] for each in listed] == [[task["id"]], []]
        canceled = (await alice.post("/", json=about("cancel", task["id"]))).json()["result"]
        assert canceled["status"]["state"] == "TASK_STATE_CANCELED"


async def test_sessions_and_cursors_of_another_owner_lead_nowhere(setting):
    one, other, _, _, _ = setting
    async with client(one, token=TOKENS["alice"]) as alice, client(other, token=TOKENS["bob"]) as bob:
        found = await events(alice, "/", message("x 2", contextId="talk"))
        path = "/sessions/talk/events"
        theirs = await bob.get(f"{path}?from_start=1")
        assert (theirs.status_code, theirs.json()["error"]["data"]["reason"]) == (404, "no-such-session")
        for headers in ({"last-event-id": found[0].id}, {"last-event-id": "nonsense"}):
            theirs = await bob.get(path, headers=headers)
            assert (theirs.status_code, theirs.json()["error"]["data"]["reason"]) == (403, "bad-cursor")
        body = about("subscribe", task_of(found[0])["id"])
        theirs = await bob.post("/", json=body, headers={"last-event-id": found[0].id})
        assert theirs.status_code == 403


async def test_two_owners_may_give_their_sessions_the_same_names(setting):
    one, other, counter, _, _ = setting
    chance = random.Random(5)
    plan = [(owner, f"talk-{number % 25}", f"{owner}-{number}") for owner in TOKENS for number in range(50)]
    chance.shuffle(plan)
    said: dict[tuple[str, str], list[str]] = {}
    gate = asyncio.Semaphore(8)
    async with client(one) as http_one, client(other) as http_other:

        async def say(owner, session, text, http):
            async with gate:
                headers = {"Authorization": f"Bearer {TOKENS[owner]}"}
                response = await http.post(
                    "/", json=message(f"{text} 2", stream=False, contextId=session), headers=headers
                )
                task = response.json()["result"]["task"]
                assert task["contextId"] == session
                said.setdefault((owner, session), []).append(task["id"])

        # Each session stays at one gateway, and each gateway has sessions of both owners.
        async with asyncio.timeout(2 * LIMIT), asyncio.TaskGroup() as group:
            for owner, session, text in plan:
                group.create_task(say(owner, session, text, http_one if hash(session) % 2 else http_other))
        assert sum(map(len, said.values())) == len(plan)
        for (owner, session), tasks in said.items():
            http = http_other if hash(session) % 2 else http_one
            headers = {"authorization": f"Bearer {TOKENS[owner]}"}
            found = await events(http, f"/sessions/{session}/events?from_start=1&follow=0", **headers)
            assert sorted(task_of(event)["id"] for event in found) == sorted(tasks)
    assert counter.ledger.path.read_text().count("begin") == len(plan)


async def test_what_is_on_the_broker_is_an_assertion_and_no_credential(setting):
    url, _, counter, config, names = setting
    group = unique("WatcherGroup")
    async with Admin(config.namesrv) as admin:
        for broker in (await admin.brokers()).values():
            await admin.put_group(broker, GroupSettings(group))
    from agentscope_rocketmq.rocketmq.connection import Connection

    async with (
        Connection(config.endpoint) as connection,
        GroupConsumer(connection, names.topic, group) as watcher,
        client(url, token=TOKENS["alice"]) as http,
    ):
        headers = {
            "Cookie": "a=b",
            "X-Rocketmq-Owner": "forged",
            "X-RocketMQ-Instance": "i-" + "0" * 32,
            "Last-Event-ID": "x",
            "X-Mine": "carried",
            "A2A-Extensions": "https://example.com/one",
        }
        body = json.dumps(message("x 1", stream=False), indent=3) + "\n"
        response = await http.post("/", content=body, headers=headers)
        assert response.json()["result"]["task"]["status"]["state"] == "TASK_STATE_COMPLETED"
        [leased] = await take(watcher.messages(), 1)
        raw = leased.message.body()
        await watcher.ack(leased)
    envelope = RequestEnvelope.decode(raw)
    assert envelope.body == body  # byte for byte
    assert TOKENS["alice"].encode() not in raw
    assert set(envelope.headers) >= {OWNER_HEADER, "x-mine", "a2a-extensions", "a2a-version"}
    assert {"authorization", "cookie", "last-event-id", "x-rocketmq-instance"} & set(envelope.headers) == set()
    claims = json.loads(base64.urlsafe_b64decode(envelope.headers[OWNER_HEADER].split(".")[1] + "=="))
    assert (claims["sub"], claims["aud"], claims["jti"]) == ("alice", names.topic, envelope.request_id)
    assert not envelope.lite_topic.startswith("talk")
    assert counter.ledger.count("begin", "x") == 1


async def test_any_verifier_plugs_in_by_one_function(config, make_topic, tmp_path, monkeypatch):
    config = config.model_copy(update={"a2a_secret": SecretStr(SECRET)})
    names = await make_topic("NORMAL")
    hangs = asyncio.Event()

    async def verify(token):
        if token == "slow":
            hangs.set()
            await asyncio.sleep(LIMIT)
        if not token.startswith("user:"):
            raise Unauthenticated("Not one of ours.")
        return token.removeprefix("user:")

    monkeypatch.setattr("agentscope_rocketmq.gateway.app._VERIFY_SECONDS", 0.5)
    card = card_for(config, names.topic)
    async with (
        server_for(Counter(Ledger(tmp_path / "ledger")), config, names.topic, card=card),
        gateway_for(config, card, verify=verify) as served,
        client(served.url) as http,
    ):
        answers = {}
        slow = asyncio.create_task(http.post("/", json=message("x 1"), headers={"Authorization": "Bearer slow"}))
        await hangs.wait()
        for token in ("user:carol", "user:", "user:anonymous", "carol"):
            response = await http.post(
                "/", json=message("x 1", stream=False), headers={"Authorization": f"Bearer {token}"}
            )
            answers[token] = response.status_code
        assert answers == {"user:carol": 200, "user:": 401, "user:anonymous": 401, "carol": 401}
        assert (await slow).status_code == 503


def test_a_verifier_needs_a_secret(config):
    with pytest.raises(ConfigurationError, match="ROCKETMQ_A2A_SECRET"):
        create_gateway(config, ["http://127.0.0.1:1"], verify=TokenVerifier(SECRET))
    with pytest.raises(ConfigurationError, match="nothing to do"):
        create_gateway(config, [])


async def test_a_server_without_the_secret_serves_no_owner(config, make_topic, tmp_path):
    names = await make_topic("NORMAL")
    card = card_for(config, names.topic)
    ledger = Ledger(tmp_path / "ledger")
    verifying = config.model_copy(update={"a2a_secret": SecretStr(SECRET)})
    async with (
        server_for(Counter(ledger), config, names.topic, card=card),
        gateway_for(verifying, card, verify=TokenVerifier(SECRET)) as served,
        client(served.url, token=TOKENS["alice"]) as http,
    ):
        response = await http.post("/", json=message("x 1", stream=False))
    assert response.status_code == 403
    assert "ROCKETMQ_A2A_SECRET" in response.json()["error"]["message"]
    assert ledger.count("begin", "x") == 0
