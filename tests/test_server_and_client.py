"""A2AServer and RocketMQ, the two ends that people type: cards, doors, choices, starts and stops."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys

import httpx
import pytest
from a2a.client import ClientConfig, ClientFactory
from agentscope.message import UserMsg

from agentscope_rocketmq import A2AServer, AgentScopeExecutor, RocketMQ
from agentscope_rocketmq.app import A2AApp, BoundedTaskStore
from agentscope_rocketmq.card import JSONRPC, ROCKETMQ, complete_card, parse_card
from agentscope_rocketmq.dev.ports import Ports
from agentscope_rocketmq.errors import (
    BrokerUnreachable,
    CardError,
    ClosedError,
    ConfigurationError,
    GroupNotBound,
    GroupNotFound,
    TopicNotFound,
)
from agentscope_rocketmq.events import AGENT_EVENTS_EXTENSION
from agentscope_rocketmq.httpserver import listen
from agentscope_rocketmq.session import lite_topic_name
from tests.agents import make_adding_agent, make_echo_agent, scripted
from tests.services import calling, card_for, reply, request, server_for
from tests.waiting import LIMIT, closed_port, until


async def test_the_published_card_lists_both_interfaces_in_both_versions(config, topic):
    async with server_for(make_echo_agent, config, topic) as server, httpx.AsyncClient() as http:
        answer = await http.get(f"{server.url}/.well-known/agent-card.json")
        published = answer.json()
        head = await http.head(f"{server.url}/.well-known/agent-card.json")
        url = server.url
    assert answer.headers["content-type"] == "application/json"
    assert (head.status_code, head.content) == (200, b"")
    rocketmq_url = f"http://{config.endpoint}//{topic}"
    assert [(e["protocolBinding"], e["protocolVersion"], e["url"]) for e in published["supportedInterfaces"]] == [
        ("JSONRPC", "1.0", f"{url}/"),
        ("RocketMQ", "1.0", rocketmq_url),
        ("JSONRPC", "0.3", f"{url}/"),
        ("RocketMQ", "0.3", rocketmq_url),
    ]
    # What A2A 0.3 readers and the Java reference look at.
    assert {"transport": "RocketMQ", "url": rocketmq_url} in published["additionalInterfaces"]
    assert (published["url"], published["preferredTransport"]) == (f"{url}/", "JSONRPC")
    assert AGENT_EVENTS_EXTENSION in [entry["uri"] for entry in published["capabilities"]["extensions"]]


@pytest.mark.parametrize(
    ("listed", "public_url", "published"),
    [
        ("http://127.0.0.1:10001/a2a", None, "{served}/a2a"),
        ("https://agents.example.com/weather", None, "https://agents.example.com/weather"),
        (None, "https://agents.example.com/", "https://agents.example.com/"),
    ],
    ids=["this machine: the port really served", "another machine: as listed", "given"],
)
async def test_the_http_address_in_the_card_is_one_that_callers_reach(config, topic, listed, public_url, published):
    card = card_for(config, topic)
    if listed is not None:
        card["supportedInterfaces"].append({"url": listed, "protocolBinding": "JSONRPC", "protocolVersion": "1.0"})
    async with server_for(make_echo_agent, config, topic, card=card, public_url=public_url) as server:
        urls = {e.url for e in server.card.supported_interfaces if e.protocol_binding == JSONRPC}
        assert urls == {published.format(served=server.url)}
        async with calling(config, server) as client:
            assert await reply(client, "hello") == "echo:hello"
        if listed is not None and published.startswith("{served}"):
            async with calling(config, server, binding=JSONRPC) as client:
                assert await reply(client, "hello") == "echo:hello"


async def test_any_a2a_app_is_served_untouched(config, topic):
    card = complete_card(parse_card(card_for(config, topic)), jsonrpc_url="http://127.0.0.1:1/rpc")
    app = A2AApp(
        AgentScopeExecutor(make_echo_agent), card, path="/rpc", task_store=BoundedTaskStore(most=10), on_task=print
    )
    try:
        async with (
            A2AServer.from_app(app, card=card, config=config) as server,
            calling(config, server) as client,
            calling(config, server, binding=JSONRPC) as plain,
        ):
            assert await reply(client, "over RocketMQ") == "echo:over RocketMQ"
            assert await reply(plain, "over HTTP") == "echo:over HTTP"
    finally:
        await app.aclose()


async def test_a_card_without_a_rocketmq_interface_is_refused_with_an_example(config):
    card = card_for(config, "T")
    card["supportedInterfaces"] = [{"url": "http://x", "protocolBinding": "JSONRPC", "protocolVersion": "1.0"}]
    with pytest.raises(CardError, match=r"no RocketMQ interface.*http://127\.0\.0\.1:8081//WeatherAgentTask"):
        server_for(make_echo_agent, config, "T", card=card)


async def test_what_is_wrong_on_the_broker_fails_the_start_and_leaves_nothing_running(config, topic, make_topic):
    other = await make_topic("LITE")
    before = asyncio.all_tasks()
    for options, error in (
        ({"config": config, "topic": "NoSuchTopic", "group": f"{topic}ConsumerGroup"}, TopicNotFound),
        ({"config": config, "topic": topic, "group": "NoSuchGroup"}, GroupNotFound),
        ({"config": config.model_copy(update={"state_group": other.group}), "topic": topic}, GroupNotBound),
    ):
        server = server_for(make_echo_agent, options.pop("config"), options.pop("topic"), **options)
        with pytest.raises(error):
            await server.start()
        with pytest.raises(ClosedError):
            _ = server.url
    await until(lambda: asyncio.all_tasks() <= before)


async def test_nobody_at_the_endpoint_fails_start_and_client_within_the_time_given(config):
    timeouts = config.timeouts.model_copy(update={"connect": 1.0})
    config = config.model_copy(update={"endpoint": f"127.0.0.1:{closed_port()}", "timeouts": timeouts})
    async with asyncio.timeout(LIMIT):
        with pytest.raises(BrokerUnreachable, match=config.endpoint):
            await server_for(make_echo_agent, config, "T").start()
        async with RocketMQ(config, card_cache=None) as rocketmq:
            with pytest.raises(BrokerUnreachable, match=config.endpoint):
                await rocketmq.client(card_for(config, "T"))


async def test_a_wrong_reply_group_fails_the_client(config, topic, make_topic):
    other = await make_topic("LITE")
    async with RocketMQ(config.model_copy(update={"reply_group": other.group}), card_cache=None) as rocketmq:
        with pytest.raises(GroupNotBound, match=config.reply_topic):
            await rocketmq.client(card_for(config, topic))


async def test_a_port_in_use_is_a_clear_error(config, topic):
    async with server_for(make_echo_agent, config, topic) as server:
        port = int(server.url.rsplit(":", 1)[1])
        with pytest.raises(ConfigurationError, match=rf"{port}.*Choose another port"):
            await server_for(make_echo_agent, config, topic, port=port).start()


async def test_serve_ends_cleanly_at_sigterm_with_exit_code_zero(config, topic, tmp_path):
    (tmp_path / "card.json").write_text(json.dumps(card_for(config, topic)))
    code = (
        "import asyncio\n"
        "from agentscope_rocketmq import A2AServer\n"
        "from tests.agents import make_echo_agent\n"
        "server = A2AServer(make_echo_agent, card='card.json')\n"
        "asyncio.run(server.serve(port=0))\n"
    )
    environ = os.environ | {
        "PYTHONPATH": os.getcwd(),  # noqa: PTH109
        "ROCKETMQ_ENDPOINT": config.endpoint,
        "ROCKETMQ_REPLY_TOPIC": config.reply_topic,
        "ROCKETMQ_STATE_TOPIC": config.state_topic,
        "ROCKETMQ_STATE_GROUP": config.state_group,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=tmp_path, env=environ, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(2 * LIMIT), RocketMQ(config, card_cache=None) as rocketmq:
        client = await rocketmq.client(card_for(config, topic))
        assert await reply(client, "up?") == "echo:up?"
        process.send_signal(signal.SIGTERM)
        _, errors = await process.communicate()
    assert (process.returncode, errors.decode()) == (0, "")


@pytest.fixture
def ports():
    with contextlib.closing(Ports()) as held:
        yield held


async def test_the_kept_card_reaches_an_agent_whose_processes_are_all_down(config, topic, tmp_path, ports):
    # Held: when its server is gone, nobody else's gets it.
    port = ports.choose()
    async with server_for(make_echo_agent, config, topic, port=port) as server:
        url = server.url
        async with RocketMQ(config, card_cache=tmp_path) as rocketmq:
            await rocketmq.card(url)
    async with RocketMQ(config, card_cache=tmp_path) as rocketmq:
        client = await rocketmq.client(url)
        call = asyncio.create_task(reply(client, "anybody?"))
        async with server_for(make_echo_agent, config, topic), asyncio.timeout(LIMIT):
            assert await call == "echo:anybody?"
    async with RocketMQ(config, card_cache=None) as rocketmq:
        with pytest.raises(CardError, match="does not answer"):
            await rocketmq.client(url)


async def test_json_rpc_is_taken_only_when_asked_for_and_the_choice_is_told(config, topic):
    async with server_for(make_echo_agent, config, topic) as server, RocketMQ(config, card_cache=None) as rocketmq:
        async with await rocketmq.client(server.url, allow_jsonrpc=True) as client:
            assert rocketmq.choice(client).binding == ROCKETMQ
        plain = parse_card(server.card)
        kept = [entry for entry in plain.supported_interfaces if entry.protocol_binding == JSONRPC]
        del plain.supported_interfaces[:]
        plain.supported_interfaces.extend(kept)
        with pytest.raises(CardError, match="allow JSON-RPC"):
            await rocketmq.client(plain)
        async with await rocketmq.agent(plain, allow_jsonrpc=True) as agent:
            assert rocketmq.choice(agent).binding == JSONRPC
            answer = await agent.reply(UserMsg(name="user", content="hello"))
            assert answer.get_text_content() == "echo:hello"


async def test_ones_own_client_factory_learns_rocketmq(config, topic):
    async with server_for(make_echo_agent, config, topic) as server, RocketMQ(config, card_cache=None) as rocketmq:
        factory = ClientFactory(rocketmq.client_config())
        rocketmq.register(factory)
        client = factory.create(server.card)
        assert await reply(client, "hello") == "echo:hello"
        await until(lambda: server.bridges[0].counters.answered == 1)
        await client.close()
        with pytest.raises(ConfigurationError, match="client_config"):
            rocketmq.register(ClientFactory(ClientConfig()))


async def test_a_session_is_the_context_of_messages_that_name_none(config, topic):
    async with server_for(make_echo_agent, config, topic), RocketMQ(config, card_cache=None) as rocketmq:
        client = await rocketmq.client(card_for(config, topic), session="trip-42")
        events = [event async for event in client.send_message(request("a"))]
        assert {event.status_update.context_id for event in events if event.HasField("status_update")} == {"trip-42"}
        events = [event async for event in client.send_message(request("b", context_id="other"))]
        assert events[-1].status_update.context_id == "other"
        assert await reply(client, "c") == "echo:a | c"


async def test_a_caller_that_asks_for_agent_events_gets_them(config, topic):
    from agentscope_rocketmq import agent_events

    async with server_for(make_adding_agent, config, topic), RocketMQ(config, card_cache=None) as rocketmq:
        client = await rocketmq.client(card_for(config, topic), extensions=[AGENT_EVENTS_EXTENSION])
        seen = [agent_events(event) async for event in client.send_message(request("1+2"))]
        assert {"TOOL_CALL_START", "TOOL_RESULT_END"} <= {event.type for event in seen if event is not None}
        plain = await rocketmq.client(card_for(config, topic))
        assert [e async for e in plain.send_message(request("1+2")) if agent_events(e) is not None] == []


async def test_closing_ends_waiting_calls_and_everything_that_was_started(config, topic):
    before = asyncio.all_tasks()
    rocketmq = RocketMQ(config, card_cache=None)
    client = await rocketmq.client(card_for(config, topic))
    call = asyncio.create_task(reply(client, "to nobody"))
    await until(lambda: rocketmq._carriers[next(iter(rocketmq._carriers))][1].replies._by_call)
    await rocketmq.aclose()
    await rocketmq.aclose()
    with pytest.raises(Exception, match="closed"):
        await asyncio.wait_for(call, LIMIT)
    with pytest.raises(ClosedError):
        await rocketmq.client(card_for(config, topic))
    await client.close()
    await until(lambda: asyncio.all_tasks() <= before)


@pytest.mark.parametrize(
    ("session", "name"),
    [
        ("trip-42", "trip-42"),
        ("A" * 64, "A" * 64),
        ("A" * 65, "h-"),
        ("杭州", "h-"),
        ("h-fake", "h-"),
        ("s-fake", "h-"),
        ("a b", "h-"),
    ],
)
def test_sessions_have_legal_lite_topic_names_of_their_own(session, name):
    assert lite_topic_name(session).startswith(name)
    assert len(lite_topic_name(session)) <= 64
    assert lite_topic_name(session) == lite_topic_name(session)


def test_with_a_secret_names_are_unguessable_and_owners_apart():
    names = {
        lite_topic_name("trip", owner=owner, secret=secret) for owner in ("ann", "bob") for secret in ("one", "two")
    }
    assert len(names) == 4
    assert all(name.startswith("s-") for name in names)
    # (owner, session) pairs that run together to the same text.
    assert lite_topic_name("bc", owner="a", secret="x") != lite_topic_name("c", owner="ab", secret="x")
    with pytest.raises(ValueError, match="name"):
        lite_topic_name("")


def test_names_that_are_too_long_are_refused():
    assert lite_topic_name("x" * 1024, owner="o" * 1024, secret="s")
    for session, owner in (("x" * 1025, "o"), ("x", "o" * 1025)):
        with pytest.raises(ValueError, match="1025 characters"):
            lite_topic_name(session, owner=owner)


async def test_closing_a_client_ends_its_waiting_call(config, topic):
    async with RocketMQ(config, card_cache=None) as rocketmq:
        client = await rocketmq.client(card_for(config, topic))
        call = asyncio.create_task(reply(client, "to nobody"))
        await until(lambda: rocketmq._carriers[next(iter(rocketmq._carriers))][1].replies._by_call)
        await client.close()
        with pytest.raises(Exception, match="closed"):
            await asyncio.wait_for(call, LIMIT)


async def test_a_call_after_the_close_says_so_at_once(config, topic):
    rocketmq = RocketMQ(config, card_cache=None)
    client = await rocketmq.client(card_for(config, topic))
    await rocketmq.aclose()
    async with asyncio.timeout(5):
        with pytest.raises(Exception, match="closed"):
            await reply(client, "too late")


async def test_later_messages_of_conversations_keep_to_the_limit_too(config, topic):
    at_work, most = 0, 0

    def make(_session_id):
        async def script(messages):
            nonlocal at_work, most
            at_work += 1
            most = max(most, at_work)
            yield "working "
            await asyncio.sleep(0.05)
            at_work -= 1

        return scripted(script)

    config = config.model_copy(update={"limits": config.limits.model_copy(update={"concurrency": 2})})
    async with server_for(make, config, topic), RocketMQ(config, card_cache=None) as rocketmq:
        clients = [await rocketmq.client(card_for(config, topic), session=f"s{number}") for number in range(8)]
        await asyncio.gather(*(reply(client, "first") for client in clients))
        most = 0
        await asyncio.gather(*(reply(client, "second") for client in clients))
    assert most == 2


def test_answers_over_http_do_not_wait_for_acknowledgements():
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        listening.setblocking(True)
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
