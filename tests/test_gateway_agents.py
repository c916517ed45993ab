"""The agents of a gateway: their cards, whatever their servers do, and where they are found."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import httpx
import pytest
from a2a.client import ClientConfig, ClientFactory
from a2a.client.card_resolver import A2ACardResolver
from starlette.applications import Starlette
from starlette.routing import Mount
from typer.testing import CliRunner

from agentscope_rocketmq import RocketMQConfig
from agentscope_rocketmq.cli import app
from agentscope_rocketmq.errors import CardError, ConfigurationError
from agentscope_rocketmq.gateway import create_gateway
from agentscope_rocketmq.gateway.agents import path_name
from agentscope_rocketmq.owners import TokenVerifier
from tests.faults import Counter, Ledger
from tests.gateways import client, events, gateway_for, message, numbers
from tests.services import card_for, reply, server_for
from tests.waiting import LIMIT, closed_port, until

CARD = "/.well-known/agent-card.json"


@contextlib.asynccontextmanager
async def serving(answer):
    """An HTTP server that answers each request as a function says: bytes, or a coroutine that writes."""
    asked: list[str] = []
    answering_now: set[Any] = set()

    async def serve(reader, writer):
        answering_now.add(asyncio.current_task())
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
                await answer(writer)
                await writer.drain()
        finally:
            answering_now.discard(asyncio.current_task())
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    hanging = list(answering_now)
    for task in hanging:
        task.cancel()
    await asyncio.gather(*hanging, return_exceptions=True)


def answering(card):
    async def answer(writer):
        body = json.dumps(card).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n" + body)

    return answer


async def test_a_plain_client_of_either_version_finds_the_agent_by_the_card_of_the_gateway(
    config, make_topic, tmp_path
):
    names = await make_topic("NORMAL")
    counter = Counter(Ledger(tmp_path / "ledger"))
    async with (
        server_for(counter, config, names.topic, card=card_for(config, names.topic, name="Count, please!")) as server,
        gateway_for(config, server.url) as served,
        httpx.AsyncClient(timeout=LIMIT) as http,
    ):
        for base in (served.url, f"{served.url}/count-please"):
            raw = (await http.get(base + CARD)).json()
            url = f"{served.url}/count-please"
            assert raw["url"] == url
            assert raw["preferredTransport"] == "JSONRPC"
            assert {entry["url"] for entry in raw["supportedInterfaces"]} == {url}
            assert "RocketMQ" not in json.dumps(raw)
            card = await A2ACardResolver(http, base).get_agent_card()
            for version in ("1.0", "0.3"):
                kept = [e for e in card.supported_interfaces if e.protocol_version == version]
                del card.supported_interfaces[:]
                card.supported_interfaces.extend(kept)
                async with httpx.AsyncClient(timeout=LIMIT, headers={"A2A-Version": version}) as theirs:
                    caller = ClientFactory(ClientConfig(httpx_client=theirs)).create(card)
                    assert await reply(caller, "x 3") == "012"
                card = await A2ACardResolver(http, base).get_agent_card()


async def test_a_card_is_fetched_again_and_kept_while_its_agent_is_down(config, make_topic, monkeypatch):
    monkeypatch.setattr("agentscope_rocketmq.gateway.agents.REFRESH_SECONDS", 0.1)
    monkeypatch.setattr("agentscope_rocketmq.fetch.FRESH_SECONDS", 0.0)
    names = await make_topic("NORMAL")
    card = card_for(config, names.topic, name="agent")
    mood = {"answer": answering(card)}

    async def as_it_is_now(writer):
        await mood["answer"](writer)

    async with (
        serving(as_it_is_now) as (url, asked),
        gateway_for(config, url) as served,
        client(served.url) as http,
    ):
        mood["answer"] = answering(card | {"description": "Changed."})
        await _described(http, "Changed.")

        async def endless(writer):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n[")
            while not writer.is_closing():
                writer.write(b"1," * 32 * 1024)
                await writer.drain()

        async def down(writer):
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")

        for bad in (endless, down, answering({"no": "card"}), answering([])):
            mood["answer"] = bad
            count = len(asked)
            await until(lambda count=count: len(asked) > count + 1)
            assert (await http.get(CARD)).json()["description"] == "Changed."
        mood["answer"] = answering(card | {"description": "Again."})
        await _described(http, "Again.")


async def test_an_agent_that_gets_another_name_is_found_by_it(config, make_topic, monkeypatch):
    monkeypatch.setattr("agentscope_rocketmq.gateway.agents.REFRESH_SECONDS", 0.1)
    monkeypatch.setattr("agentscope_rocketmq.fetch.FRESH_SECONDS", 0.0)
    card = card_for(config, (await make_topic("NORMAL")).topic, name="Weather")
    mood = {"answer": answering(card)}

    async def as_it_is_now(writer):
        await mood["answer"](writer)

    async with (
        serving(as_it_is_now) as (url, _),
        gateway_for(config, url) as served,
        client(served.url) as http,
    ):
        assert (await http.get(f"/weather{CARD}")).status_code == 200
        mood["answer"] = answering(card | {"name": "Weather Service", "description": "Renamed."})
        await _described(http, "Renamed.")
        assert (await http.get(f"/weather-service{CARD}")).status_code == 200
        assert (await http.get(f"/weather{CARD}")).status_code == 404
        assert (await http.get("/readyz")).status_code == 200


async def test_the_card_of_a_gateway_that_is_mounted_somewhere_says_where():
    away = RocketMQConfig(endpoint=f"127.0.0.1:{closed_port()}")
    async with create_gateway(away, [card_for(away, "Topic", name="agent")]) as gateway:
        transport = httpx.ASGITransport(Starlette(routes=[Mount("/gw", app=gateway)]))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            served = (await http.get(f"/gw/agent{CARD}")).json()
            assert served["url"] == "http://here/gw/agent"


async def test_a_client_that_leaves_before_its_request_is_whole_is_no_error(config, make_topic):
    names = await make_topic("NORMAL")
    came = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"{", "more_body": True}]
    sent = []

    async def receive():
        return came.pop() if came else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    async with gateway_for(config, card_for(config, names.topic)) as served:
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
        await served.gateway(scope, receive, send)
    assert sent[0]["status"] == 499


async def _described(http, description):
    async with asyncio.timeout(LIMIT):
        while (await http.get(CARD)).json()["description"] != description:
            await asyncio.sleep(0.05)


async def test_a_source_of_cards_that_hangs_slows_nobody(config, make_topic, tmp_path, monkeypatch):
    monkeypatch.setattr("agentscope_rocketmq.gateway.agents._START_SECONDS", 1.0)
    names = await make_topic("NORMAL")
    hanging = asyncio.Event()

    async def hang(writer):
        hanging.set()
        await asyncio.sleep(LIMIT)

    card = card_for(config, names.topic, name="counter")
    counter = Counter(Ledger(tmp_path / "ledger"))
    gateway = None
    async with serving(hang) as (url, _), server_for(counter, config, names.topic, card=card):
        gateway = create_gateway(config, [card, url])
        async with gateway:
            transport = httpx.ASGITransport(gateway)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=LIMIT) as http:
                async with asyncio.timeout(LIMIT):
                    await hanging.wait()
                assert (await http.get("/counter" + CARD)).json()["name"] == "counter"
                ready = await http.get("/readyz")
                assert (ready.status_code, ready.json()["checks"]["cards"]) == (503, False)
                assert (await http.get("/other" + CARD)).status_code == 503
                await until(lambda: gateway._calls is not None)
                answer = await http.post("/counter", json=message("x 2", stream=False), headers={"A2A-Version": "1.0"})
                assert answer.json()["result"]["task"]["status"]["state"] == "TASK_STATE_COMPLETED"


async def test_each_agent_has_its_path(config, make_topic, tmp_path):
    topics = [await make_topic("NORMAL") for _ in range(2)]
    cards = [card_for(config, names.topic, name=f"Agent {number}") for number, names in enumerate(topics)]
    counters = [Counter(Ledger(tmp_path / f"ledger-{number}")) for number in range(2)]
    async with (
        server_for(counters[0], config, topics[0].topic, card=cards[0]),
        server_for(counters[1], config, topics[1].topic, card=cards[1]),
        gateway_for(config, *cards, public_url="https://agents.example/") as served,
        client(served.url) as http,
    ):
        for number, counter in enumerate(counters):
            assert (await http.get(f"/agent-{number}{CARD}")).json()["url"] == f"https://agents.example/agent-{number}"
            assert numbers(await events(http, f"/agent-{number}", message("x 1", contextId="talk"))) == [0]
            assert counter.ledger.count("begin", "x") == 1
        # One session, whichever agent was asked in it.
        assert len(await events(http, "/sessions/talk/events?from_start=1&follow=0")) == 6
        for path in ("/", "/nobody"):
            refused = await http.post(path, json=message("x 1"))
            assert (refused.status_code, refused.json()["error"]["data"]["reason"]) == (404, "no-such-agent")


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"supportedInterfaces": []}, CardError, "none that can be used"),
        ({"name": "第一"}, ConfigurationError, "makes no path"),
        ({"name": "Sessions"}, ConfigurationError, "makes no path"),
        (
            {
                "supportedInterfaces": [
                    {"url": "http://10.0.0.1:8081//T", "protocolBinding": "RocketMQ", "protocolVersion": "1.0"}
                ]
            },
            CardError,
            "another cluster",
        ),
    ],
)
async def test_a_card_that_cannot_be_served_is_refused_at_the_start(config, change, error, reason):
    gateway = create_gateway(config, [card_for(config, "Topic") | change])
    try:
        with pytest.raises(error, match=reason):
            await gateway.start()
    finally:
        await gateway.aclose()


async def test_two_agents_of_one_path_are_refused(config):
    gateway = create_gateway(config, [card_for(config, "One"), card_for(config, "Two")])
    try:
        with pytest.raises(ConfigurationError, match="Two agents"):
            await gateway.start()
    finally:
        await gateway.aclose()
    for name in ("No Path", "sessions", ""):
        with pytest.raises(ConfigurationError, match="can't be an agent's path"):
            create_gateway(config, {name: card_for(config, "One")})


async def test_a_gateway_is_alive_and_not_ready_while_rocketmq_is_away(config):
    away = config.model_copy(update={"endpoint": f"127.0.0.1:{closed_port()}"})
    async with create_gateway(away, [card_for(away, "Topic")]) as gateway:
        transport = httpx.ASGITransport(gateway)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            assert (await http.get("/healthz")).status_code == 200
            assert (await http.get("/readyz")).status_code == 503
            assert (await http.get(CARD)).status_code == 200
            refused = await http.post("/", json=message("x"))
            assert (refused.status_code, refused.json()["error"]["data"]["reason"]) == (503, "unreachable")


async def test_requests_that_are_too_large_are_refused(config, make_topic, tmp_path):
    limits = config.limits.model_copy(update={"request_bytes": 2000})
    config = config.model_copy(update={"limits": limits})
    names = await make_topic("NORMAL")
    async with gateway_for(config, card_for(config, names.topic)) as served, client(served.url) as http:
        assert (await http.post("/", json=message("x" * 3000))).status_code == 413
        many = {f"x-{number}": "1" for number in range(130)}
        assert (await http.post("/", json=message("x"), headers=many)).status_code in (400, 431)


def test_names_make_paths():
    assert [path_name(name) for name in ("Weather Agent", "  A--b_c  ", "Ünïcode", "天气")] == [
        "weather-agent",
        "a-b-c",
        "n-code",
        "",
    ]


def test_the_command_line_makes_tokens_and_says_what_is_wrong(monkeypatch):
    monkeypatch.setenv("ROCKETMQ_A2A_SECRET", "a secret")
    made = CliRunner().invoke(app, ["token", "alice", "--hours", "1"])
    assert made.exit_code == 0
    assert asyncio.run(TokenVerifier("a secret")(made.stdout.strip())) == "alice"
    monkeypatch.delenv("ROCKETMQ_A2A_SECRET")
    for arguments in (["token", "alice"], ["gateway", "--agent", "x.json", "--auth", "token"]):
        refused = CliRunner().invoke(app, arguments)
        assert isinstance(refused.exception, ConfigurationError)
        assert "ROCKETMQ_A2A_SECRET" in str(refused.exception)
    mixed = CliRunner().invoke(app, ["gateway", "--agent", "a=x.json", "--agent", "y.json"])
    assert isinstance(mixed.exception, ConfigurationError)
