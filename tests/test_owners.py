"""Bearer tokens and owner assertions: what is good for whom, and what a server does with those that are not."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import string
import time

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from agentscope_rocketmq.asgi import OwnerGuard, Receive
from agentscope_rocketmq.errors import ConfigurationError, Unauthenticated
from agentscope_rocketmq.owners import (
    ANONYMOUS,
    CONTEXT_HEADER,
    OWNER_HEADER,
    TokenVerifier,
    make_assertion,
    make_token,
    read_assertion,
)
from tests.faults import Counter, Ledger
from tests.services import calling, request, server_for

SECRET = "the secret of this deployment"
OWNERS = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=256).filter(lambda x: x != ANONYMOUS)


def assertion(owner="alice", *, secret=SECRET, audience="Weather", request_id="r1", body="{}", lifetime=60.0):
    return make_assertion(
        owner,
        secret=secret,
        audience=audience,
        request_id=request_id,
        body=body,
        reply="Reply s",
        lifetime=lifetime,
    )


def read(text, *, secret=SECRET, audiences=("Weather",), request_id="r1", body="{}", reply="Reply s"):
    return read_assertion(
        text,
        secret=secret,
        audiences=audiences,
        request_id=request_id,
        body_sha256=hashlib.sha256(body.encode()).hexdigest(),
        reply=reply,
    )


@given(owner=OWNERS, body=st.text(string.printable))
async def test_tokens_and_assertions_name_their_owner(owner, body):
    assert await TokenVerifier(SECRET)(make_token(owner, secret=SECRET)) == owner
    assert read(assertion(owner, body=body), body=body) == owner


async def test_a_token_is_good_with_its_secret_only_and_for_its_time():
    with pytest.raises(Unauthenticated, match="another secret"):
        await TokenVerifier("another")(make_token("alice", secret=SECRET))
    old = jwt.encode({"sub": "alice", "exp": time.time() - 60}, TokenVerifier(SECRET)._key, algorithm="HS256")
    with pytest.raises(Unauthenticated, match="expired"):
        await TokenVerifier(SECRET)(old)
    for lifetime in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError):
            make_token("alice", secret=SECRET, lifetime=lifetime)


@pytest.mark.parametrize("owner", ["", ANONYMOUS, "x" * 257, "a\nb", None, 7])
async def test_what_is_no_owners_name_gets_no_token_and_is_none_in_one(owner):
    with pytest.raises(ConfigurationError, match="no owner's name"):
        make_token(owner, secret=SECRET)
    key = TokenVerifier(SECRET)._key
    with pytest.raises(Unauthenticated):
        await TokenVerifier(SECRET)(jwt.encode({"sub": owner, "exp": time.time() + 60}, key, algorithm="HS256"))


@pytest.mark.parametrize("alg", ["none", "HS512", "RS256"])
async def test_a_token_cannot_choose_how_it_is_verified(alg):
    head, claims, mac = make_token("alice", secret=SECRET).split(".")
    head = base64.urlsafe_b64encode(json.dumps({"alg": alg, "typ": "JWT"}).encode()).decode().rstrip("=")
    for forged in (f"{head}.{claims}.{mac}", f"{head}.{claims}."):
        with pytest.raises(Unauthenticated):
            await TokenVerifier(SECRET)(forged)


@given(st.integers(0, 400), st.sampled_from(string.ascii_letters + string.digits + "-_."))
async def test_no_changed_token_names_another_owner(position, letter):
    token = make_token("alice", secret=SECRET)
    position %= len(token)
    try:
        owner = await TokenVerifier(SECRET)(token[:position] + letter + token[position + 1 :])
    except Unauthenticated:
        return
    assert owner == "alice"  # unused bits of the last letter


def test_an_assertion_is_good_for_its_request_its_agent_and_its_time_only():
    for options in (
        {"request_id": "r2"},
        {"body": "{ }"},
        {"audiences": ("Travel",)},
        {"reply": "Reply another"},
        {"secret": "another"},
    ):
        with pytest.raises(Unauthenticated):
            read(assertion(), **options)
    with pytest.raises(Unauthenticated, match="expired"):
        read(assertion(lifetime=-60.0))
    assert read(assertion(), audiences=("Travel", "Weather")) == "alice"


async def test_neither_kind_is_good_as_the_other():
    with pytest.raises(Unauthenticated):
        await TokenVerifier(SECRET)(assertion())
    with pytest.raises(Unauthenticated):
        read(make_token("alice", secret=SECRET))


async def guarded(headers, *, body='{"id": 7}', secret=SECRET):
    """What an app behind the guard sees, and what is answered."""
    seen, answers = [], []

    async def app(scope, receive, send):
        seen.append((scope.get("user"), scope["headers"], (await receive())["body"].decode()))

    receive = Receive(body.encode(), asyncio.Event(), rpc_id=7)

    async def send(message):
        answers.append(message)

    guard = OwnerGuard(app, secret=secret, audiences=["Weather"])
    scope = {
        "type": "http",
        "headers": headers,
        "rocketmq": {"request_id": "r1", "reply_topic": "Reply", "lite_topic": "s"},
    }
    await guard(scope, receive, send)
    return seen, answers


async def test_the_guard_makes_the_owner_the_user_and_takes_the_assertion_off():
    other = (b"x-other", b"1")
    value = assertion(body='{"id": 7}').encode()
    [(user, headers, body)], answers = await guarded([other, (OWNER_HEADER.encode(), value)])
    assert (user.display_name, headers, body, answers) == ("alice", [other], '{"id": 7}', [])
    [(user, headers, body)], answers = await guarded([other])
    assert (user, headers, body, answers) == (None, [other], '{"id": 7}', [])


@pytest.mark.parametrize(
    ("value", "secret"),
    [("forged", SECRET), (assertion(body="{}"), SECRET), (assertion(body='{"id": 7}'), None), ("é", SECRET)],
)
async def test_the_guard_lets_no_assertion_pass_that_it_cannot_verify(value, secret):
    seen, [start, body] = await guarded([(OWNER_HEADER.encode(), value.encode("latin-1"))], secret=secret)
    assert (seen, start["status"]) == ([], 403)
    answer = json.loads(body["body"])
    assert (answer["id"], answer["error"]["code"]) == (7, -32600)


async def test_a_server_refuses_a_forged_assertion_that_comes_over_rocketmq(config, make_topic, tmp_path):
    names = await make_topic("NORMAL")
    config = config.model_copy(update={"a2a_secret": SecretStr(SECRET)})
    ledger = Ledger(tmp_path / "ledger")
    forged = {OWNER_HEADER: assertion("alice", audience=names.topic, request_id="of another request")}
    async with server_for(Counter(ledger), config, names.topic) as server, calling(config, server, headers=forged) as c:
        with pytest.raises(Exception, match="403"):
            _ = [event async for event in c.send_message(request("run 1"))]
    assert ledger.count("begin", "run") == 0


@pytest.mark.parametrize("version", ["1.0", "0.3"])
async def test_a_message_without_a_context_gets_the_one_of_the_header(config, make_topic, tmp_path, version):
    names = await make_topic("NORMAL")
    headers = {CONTEXT_HEADER: "given-context"}
    async with (
        server_for(Counter(Ledger(tmp_path / "ledger")), config, names.topic) as server,
        calling(config, server, version=version, headers=headers) as client,
    ):
        contexts = []
        for context_id in ("", "its-own"):
            events = [event async for event in client.send_message(request("run 1", context_id=context_id))]
            contexts.append(next(event.task.context_id for event in events if event.HasField("task")))
    assert contexts == ["given-context", "its-own"]
