"""The Java reference's client calls our server: every method, each several times, none wrong."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from a2a.client import A2ACardResolver, ClientConfig, ClientFactory

from agentscope_rocketmq import RocketMQ
from agentscope_rocketmq.card import parse_card
from agentscope_rocketmq.routes import is_instance
from tests.commanded import Commanded
from tests.java.peers import JavaCaller, JavaCallError
from tests.services import card_for, reply, server_for
from tests.waiting import LIMIT

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("java client")]


@pytest.fixture(scope="module")
def executor():
    return Commanded()


@pytest.fixture(scope="module")
def servers():
    """Those that answer."""
    return []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(module_config, module_topic, executor, servers):
    card = card_for(module_config, module_topic.topic)
    card["capabilities"]["extendedAgentCard"] = True
    extended = parse_card({**card, "description": "For those who may know more."})
    extended.supported_interfaces[0].protocol_version = "0.3"

    async def any_url(_url: str) -> bool:
        return True

    async with server_for(
        executor, module_config, module_topic.topic, card=card, extended_card=extended, push_url_validator=any_url
    ) as server:
        servers.append(server)
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def java(server, servers, java_replies):
    """The Java client, connected by our well-known card."""

    def answered() -> int:
        return sum(bridge.counters.answered for server in servers for bridge in server.bridges)

    async with JavaCaller(answered) as java:
        await java.connect(server.url, java_replies)
        yield java


async def streamed(java, executor, text, **message):
    """The events of a stream that says nothing before the client listens: a quicker one may lose its first events."""
    name = uuid.uuid4().hex
    await java.call("stream", name=name, text=f"held {name} {text}", **message)
    executor.open(name)
    return await java.call("events", name=name)


def text_of(task):
    return "".join(part["text"] for artifact in task["artifacts"] for part in artifact["parts"])


def chunks_of(events):
    return "".join(part["text"] for event in events if "artifact" in event for part in event["artifact"]["parts"])


async def test_it_reads_our_card(java, server, java_replies, repetition):
    card = parse_card(server.card)
    read = await java.connect(server.url, java_replies)
    assert (read["name"], read["preferredTransport"]) == (card.name, "JSONRPC")
    assert read["additionalInterfaces"] == [{"transport": "RocketMQ", "url": card.supported_interfaces[1].url}]


@pytest.fixture(scope="module")
def old_sdk(tmp_path_factory):
    """Where the a2a-sdk 0.3 is."""
    folder = tmp_path_factory.mktemp("a2a-sdk-0.3")
    uv = Path(sys.executable).with_name("uv")
    install = [str(uv), "pip", "install", "--quiet", "--target", str(folder), "a2a-sdk[http-server]==0.3.*"]
    subprocess.run(install, check=True, timeout=300)
    return folder


async def test_one_card_serves_every_client(java, java_replies, server, module_config, old_sdk):
    async with httpx.AsyncClient() as http:
        published = (await http.get(f"{server.url}/.well-known/agent-card.json")).json()
        # The Java reference, over RocketMQ.
        await java.connect(published, java_replies)
        assert text_of(await java.ask("send", text="say java")) == "said say java"
        # The a2a-sdk 0.3, over HTTP.
        program = Path(__file__).parents[1] / "old_sdk_caller.py"
        old = await asyncio.create_subprocess_exec(
            *(sys.executable, str(program), server.url, "say old"),
            env={**os.environ, "PYTHONPATH": str(old_sdk)},
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(LIMIT):
            assert ((await old.communicate())[0], old.returncode) == (b"said say old\n", 0)
        # The a2a-sdk 1.0, over HTTP.
        card = await A2ACardResolver(http, server.url).get_agent_card()
        async with ClientFactory(ClientConfig(streaming=True, httpx_client=http)).create(card) as client:
            assert await reply(client, "say new") == "said say new"
    async with RocketMQ(module_config, card_cache=None) as rocketmq:
        # The same one over RocketMQ, with our transport in its factory; and our own client.
        factory = ClientFactory(rocketmq.client_config(streaming=True))
        rocketmq.register(factory)
        async with factory.create(card) as client:
            assert await reply(client, "say registered") == "said say registered"
        async with await rocketmq.client(published) as client:
            assert rocketmq.choice(client).binding == "RocketMQ"
            assert await reply(client, "say ours") == "said say ours"


async def test_send_gives_the_completed_task(java, repetition):
    task = await java.ask("send", text="count 5")
    assert (task["status"]["state"], text_of(task)) == ("completed", "0,1,2,3,4,")
    assert [part["text"] for part in task["history"][0]["parts"]] == ["count 5"]


async def test_send_gives_a_bare_message(java, repetition):
    message = await java.ask("send", text="message 杭州 \U0001f600")
    assert (message["kind"], message["parts"][0]["text"]) == ("message", "杭州 \U0001f600")


async def test_a_context_of_the_caller_is_kept_and_its_answers_come_on_a_litetopic_of_that_name(
    java, executor, repetition
):
    context = f"trip-{uuid.uuid4().hex}"
    tasks = [await java.ask("send", text="count 1", contextId=context) for _ in range(2)]
    assert executor.requests[-1].call_context.state["rocketmq"]["lite_topic"] == context
    assert [task["contextId"] for task in tasks] == [context, context]
    assert len({task["id"] for task in tasks}) == 2


async def test_a_stream_comes_whole_and_in_order(java, executor, repetition):
    events = await streamed(java, executor, "count 30")
    assert chunks_of(events) == "".join(f"{number}," for number in range(30))
    assert (events[0]["kind"], events[-1]["status"]["state"]) == ("task", "completed")
    assert len(events) == 32


async def test_a_task_that_asks_goes_on_with_the_answer(java, executor, repetition):
    task = await java.ask("send", text="ask")
    assert task["status"]["state"] == "input-required"
    answered = await streamed(java, executor, "count 1", taskId=task["id"], contextId=task["contextId"])
    assert (answered[-1]["taskId"], answered[-1]["status"]["state"]) == (task["id"], "completed")


async def test_get_goes_where_the_receipt_says(java, module_config, repetition):
    task = await java.ask("send", text="count 2")
    receipt = await java.call("receipt", id=task["id"], kept=True)
    assert receipt["serverWorkAgentResponseTopic"] == module_config.state_topic
    assert is_instance(receipt["serverLiteTopic"])
    assert text_of(await java.ask("get", id=task["id"])) == "0,1,"
    assert await java.call("receipt", id=task["id"], kept=False) is None
    assert text_of(await java.ask("get", id=task["id"])) == "0,1,"


async def test_a_history_length_of_none_is_no_limit(java, executor, repetition):
    asked = await java.ask("send", text="ask")
    await streamed(java, executor, "count 1", taskId=asked["id"], contextId=asked["contextId"])
    # The Java client sends a history length always: 0 where its caller gave none.
    whole = await java.ask("get", id=asked["id"], historyLength=0)
    assert [message["parts"][0]["text"].split()[-1] for message in whole["history"]] == ["ask", "1"]
    last = await java.ask("get", id=asked["id"], historyLength=1)
    assert [message["parts"][0]["text"].split()[-1] for message in last["history"]] == ["1"]


async def canceled(java, task_id):
    try:
        return await java.ask("cancel", id=task_id)
    except JavaCallError as error:
        # The client missed the answer and asked again, of a task that is canceled by then.
        if error.type != "TaskNotCancelableError":
            raise
        return await java.ask("get", id=task_id)


async def test_cancel_ends_a_running_task_and_its_stream(java, executor, repetition):
    name = uuid.uuid4().hex
    await java.call("stream", name=name, text=f"held {name} wait for ever")
    executor.open(name)
    begun = await java.call("events", name=name, until="working")
    task = await canceled(java, begun[0]["id"])
    assert task["status"]["state"] == "canceled"
    rest = await java.call("events", name=name)
    assert rest[-1]["status"]["state"] == "canceled"
    with pytest.raises(JavaCallError) as caught:
        await java.ask("cancel", id=task["id"])
    assert (caught.value.type, caught.value.code) == ("TaskNotCancelableError", -32002)


async def test_an_unknown_task_is_the_typed_error(java, repetition):
    for op in ("get", "cancel"):
        with pytest.raises(JavaCallError) as caught:
            await java.ask(op, id="no-such-task")
        assert (caught.value.type, caught.value.code) == ("TaskNotFoundError", -32001)


async def test_an_executor_that_raises_is_a_failed_task_of_send_and_of_a_stream(java, executor, repetition):
    task = await java.ask("send", text="raise sorry")
    events = await streamed(java, executor, "raise sorry")
    for status in (task["status"], events[-1]["status"]):
        assert status["state"] == "failed"
        assert "ValueError" in status["message"]["parts"][0]["text"]
        assert "sorry" not in str(status)


async def test_an_error_found_before_the_agent_runs_ends_a_stream_too(java, repetition):
    # Nothing can hold this answer back, so the client may miss it: then it is sent again.
    events = await java.ask("streamed", name=uuid.uuid4().hex, text="count 1", taskId="no-such-task")
    assert [event["error"]["code"] for event in events] == [-32001]


async def test_push_notification_configs_are_made_read_listed_and_deleted(java, repetition):
    task = await java.ask("send", text="count 1")
    config = {"taskId": task["id"], "pushNotificationConfig": {"url": "http://127.0.0.1:9/push", "id": "mine"}}
    assert await java.ask("pushSet", id=task["id"], config="mine", url="http://127.0.0.1:9/push") == config
    assert await java.ask("pushGet", id=task["id"], config="mine") == config
    assert await java.ask("pushList", id=task["id"]) == [config]
    await java.ask("pushDelete", id=task["id"], config="mine")
    assert await java.ask("pushList", id=task["id"]) == []


async def test_the_extended_card_is_served(java, repetition):
    assert (await java.ask("extendedCard"))["description"] == "For those who may know more."


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def second(module_config, module_topic, servers):
    """Another server in the same group."""
    async with server_for(Commanded(), module_config, module_topic.topic) as second:
        servers.append(second)
        yield second


async def test_of_two_servers_the_one_with_the_task_is_asked(java, server, second, repetition):
    tasks: list = []
    owners: set[str] = set()
    while len(owners) < 2:
        tasks.append(await java.ask("send", text=f"say {len(tasks)}"))
        owners.add((await java.call("receipt", id=tasks[-1]["id"], kept=True))["serverLiteTopic"])
    before = [bridge.counters.handed_over for bridge in (*server.bridges, *second.bridges)]
    for number, task in enumerate(tasks):
        got = await java.ask("get", id=task["id"])
        assert (got["id"], text_of(got)) == (task["id"], f"said say {number}")
    assert [bridge.counters.handed_over for bridge in (*server.bridges, *second.bridges)] == before
