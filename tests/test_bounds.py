"""What is kept in memory has an end: tasks, push notification configurations, responses that nobody reads."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpx
import pytest
from a2a.auth.user import UnauthenticatedUser
from a2a.server.context import ServerCallContext
from a2a.types import Artifact, Part, Task, TaskPushNotificationConfig, TaskState, TaskStatus
from a2a.utils.errors import InvalidParamsError

from agentscope_rocketmq import RocketMQ, app
from agentscope_rocketmq.app import BoundedPushConfigStore, BoundedTaskStore
from agentscope_rocketmq.card import jsonrpc_url, parse_card
from agentscope_rocketmq.config import Limits, Timeouts
from agentscope_rocketmq.fetch import CardFetcher
from agentscope_rocketmq.pending import PendingResponse
from tests.agents import make_echo_agent
from tests.services import card_for, reply, server_for

CONTEXT = ServerCallContext(user=UnauthenticatedUser())


def task(number, state):
    return Task(id=str(number), context_id="c", status=TaskStatus(state=state))


async def known(store, count):
    return [number for number in range(count) if await store.get(str(number), CONTEXT) is not None]


@pytest.mark.parametrize(
    "state",
    [TaskState.TASK_STATE_COMPLETED, TaskState.TASK_STATE_INPUT_REQUIRED, TaskState.TASK_STATE_AUTH_REQUIRED],
)
async def test_the_oldest_tasks_that_ended_or_wait_are_forgotten(state):
    store = BoundedTaskStore(most=3)
    for number in range(10):
        await store.save(task(number, TaskState.TASK_STATE_WORKING), CONTEXT)
    for number in range(8):
        await store.save(task(number, state), CONTEXT)
    assert await known(store, 10) == [5, 6, 7, 8, 9]


async def test_a_waiting_task_that_goes_on_is_not_forgotten():
    store = BoundedTaskStore(most=2)
    await store.save(task(0, TaskState.TASK_STATE_INPUT_REQUIRED), CONTEXT)
    await store.save(task(0, TaskState.TASK_STATE_WORKING), CONTEXT)
    for number in range(1, 5):
        await store.save(task(number, TaskState.TASK_STATE_INPUT_REQUIRED), CONTEXT)
    assert await known(store, 5) == [0, 3, 4]
    # Whoever waits anew has waited least.
    await store.save(task(3, TaskState.TASK_STATE_INPUT_REQUIRED), CONTEXT)
    await store.save(task(0, TaskState.TASK_STATE_INPUT_REQUIRED), CONTEXT)
    assert await known(store, 5) == [0, 3]


@pytest.mark.parametrize("state", [TaskState.TASK_STATE_COMPLETED, TaskState.TASK_STATE_INPUT_REQUIRED])
async def test_tasks_that_ended_or_wait_are_bounded_by_bytes(state):
    store = BoundedTaskStore(most=100, most_bytes=10_000)

    async def put(number, state, *texts):
        artifact = Artifact(artifact_id="a", parts=[Part(text=text) for text in texts])
        saved = task(number, state)
        saved.artifacts.append(artifact)
        await store.save(saved, CONTEXT)

    await put(0, TaskState.TASK_STATE_WORKING, "x" * 20_000)
    for number in range(1, 6):
        await put(number, state, "x" * 4000)
    assert await known(store, 6) == [0, 4, 5]
    await put(4, state, "x" * 4000)  # again: it takes no more
    assert await known(store, 6) == [0, 4, 5]
    await put(6, state, "x" * 20_000)
    assert await known(store, 7) == [0, 6]  # one may be larger than all that may be kept
    await put(7, state, *["x"] * 80)
    assert await known(store, 8) == [0, 7]
    await put(8, state, *["x"] * 80)  # small parts take more than their text
    assert await known(store, 9) == [0, 8]
    await put(9, state, "x" * 6000)
    await put(9, TaskState.TASK_STATE_COMPLETED, "x" * 6000)  # it waits no more
    await put(10, state, "x" * 6000)
    await put(11, state, "x" * 3000)
    assert (await known(store, 12))[-2:] == [10, 11]


async def test_a_task_is_measured_once_for_each_status(monkeypatch):
    measured = []

    def memory(measuring):
        measured.append(len(measuring.artifacts))
        return 1

    monkeypatch.setattr(app, "_memory", memory)
    store = BoundedTaskStore(most=100)
    saved = task(0, TaskState.TASK_STATE_WORKING)
    for state in (TaskState.TASK_STATE_WORKING, TaskState.TASK_STATE_INPUT_REQUIRED, TaskState.TASK_STATE_COMPLETED):
        saved.status.state = state
        for _ in range(5):
            saved.artifacts.add()
            await store.save(saved, CONTEXT)
    assert measured == [6, 11]


async def test_push_notification_configurations_are_bounded_by_task_and_in_each():
    store = BoundedPushConfigStore(most=2, most_a_task=2)

    async def put(task_id, config_id):
        await store.set_info(task_id, TaskPushNotificationConfig(id=config_id, url="https://example.com"), CONTEXT)

    await put("0", "a")
    await put("0", "b")
    await put("0", "b")  # again
    with pytest.raises(InvalidParamsError, match="delete one"):
        await put("0", "c")
    await store.delete_info("0", CONTEXT, "a")
    await put("0", "c")
    await put("1", "a")
    await put("2", "a")
    counts = [len(await store.get_info(str(number), CONTEXT)) for number in range(3)]
    assert counts == [0, 1, 1]
    await store.delete_info("1", CONTEXT)
    await put("3", "a")
    assert len(await store.get_info("2", CONTEXT)) == 1


async def test_a_reader_that_does_not_read_is_held_to_bytes_as_well():
    limits = Limits(stream_buffer_bytes=1024)
    pending = PendingResponse(None, session="s", limits=limits, on_taken=lambda: None)  # type: ignore[arg-type]
    message: Any = object()
    pending.take(["x" * 5000], message)
    assert pending.has_room  # one may be larger than all that may be held
    pending.take(["é" * 100], message)
    assert not pending.has_room
    texts = pending.texts()
    await anext(texts)
    assert pending.has_room
    for _ in range(4):
        pending.take(["é" * 100], message)
    assert pending.has_room  # 5 of 200 bytes fit
    pending.take(["é" * 100], message)
    assert not pending.has_room
    assert (pending.given, pending.taken) == (7, 0)  # what was given out is in its reader's hand
    await anext(texts)
    assert (pending.given, pending.taken) == (7, 1)
    await texts.aclose()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_the_card_of_a_server_on_every_address_names_one_that_can_be_reached(config, make_topic, host):
    topic = (await make_topic("NORMAL")).topic
    async with server_for(make_echo_agent, config, topic, host=host) as server:
        published = httpx.URL(jsonrpc_url(parse_card(server.card)) or "")
        assert published.host in {socket.gethostname().lower(), "127.0.0.1"}
        assert server.url == f"http://127.0.0.1:{published.port}"
        async with httpx.AsyncClient() as http:
            for url in (server.url, f"http://{published.host}:{published.port}"):
                assert (await http.get(f"{url}/.well-known/agent-card.json")).json()["name"] == "agent"
    async with server:  # on another port
        assert httpx.URL(jsonrpc_url(parse_card(server.card)) or "").port == httpx.URL(server.url).port
    given = server_for(make_echo_agent, config, topic, host=host, public_url="https://agents.example/weather")
    async with given as server:
        assert jsonrpc_url(parse_card(server.card)) == "https://agents.example/weather"


async def test_a_card_that_can_not_be_kept_leaves_nothing_behind(config, make_topic, tmp_path, caplog, monkeypatch):
    topic = (await make_topic("NORMAL")).topic
    async with server_for(make_echo_agent, config, topic) as server:
        fetcher = CardFetcher(tmp_path)

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("agentscope_rocketmq.fetch.json.dump", full)
            card = await fetcher.fetch(server.url)
        assert card.name == "agent"
        assert "could not be kept" in caplog.text
        assert list(tmp_path.iterdir()) == []
        await CardFetcher(tmp_path).fetch(server.url)
        assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
        assert (await CardFetcher(tmp_path).fetch(server.url)).name == "agent"


async def test_an_agent_that_does_not_mind_being_cancelled_does_not_keep_a_server_from_closing(config, make_topic):
    from a2a.server.agent_execution import AgentExecutor

    enough = asyncio.Event()

    class Stubborn(AgentExecutor):
        async def execute(self, _context, _event_queue):
            while not enough.is_set():
                try:
                    await enough.wait()
                except asyncio.CancelledError:
                    continue

        async def cancel(self, _context, _event_queue):
            raise NotImplementedError

    topic = (await make_topic("NORMAL")).topic
    config = config.model_copy(update={"timeouts": Timeouts(drain=1)})
    server = server_for(Stubborn(), config, topic)
    await server.start()
    async with RocketMQ(config, card_cache=None) as rocketmq, await rocketmq.client(card_for(config, topic)) as client:
        call = asyncio.create_task(reply(client, "hello"))
        await asyncio.sleep(1)  # until the agent has it
        try:
            async with asyncio.timeout(1 + 10 + 10 + 15):
                await server.aclose()
        finally:
            enough.set()
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
