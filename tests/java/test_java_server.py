"""Our client calls the Java reference's server: every method, each several times, none wrong."""

from __future__ import annotations

import asyncio
import re
import uuid
from pathlib import Path

import pytest
import pytest_asyncio
from a2a.client.errors import A2AClientError
from a2a.types import (
    CancelTaskRequest,
    DeleteTaskPushNotificationConfigRequest,
    GetExtendedAgentCardRequest,
    GetTaskPushNotificationConfigRequest,
    GetTaskRequest,
    ListTaskPushNotificationConfigsRequest,
    SubscribeToTaskRequest,
    TaskPushNotificationConfig,
    TaskState,
)
from a2a.utils.errors import A2AError, TaskNotCancelableError, TaskNotFoundError

from agentscope_rocketmq import RocketMQ
from agentscope_rocketmq.card import card_to_dict, parse_card
from tests.java.peers import PROJECT, JavaServer
from tests.services import request
from tests.waiting import LIMIT

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("java server")]

COMPLETED = TaskState.TASK_STATE_COMPLETED
CANCELED = TaskState.TASK_STATE_CANCELED
FAILED = TaskState.TASK_STATE_FAILED
INPUT_REQUIRED = TaskState.TASK_STATE_INPUT_REQUIRED


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(module_config, module_topic):
    async with JavaServer(module_config, module_topic) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rocketmq(module_config):
    async with RocketMQ(module_config, card_cache=None) as rocketmq:
        yield rocketmq


@pytest.fixture
def session():
    return f"trip-{uuid.uuid4().hex[:8]}"


@pytest_asyncio.fixture(loop_scope="module")
async def client(server, rocketmq, session):
    """A client made from the Java server's own card, in a session of its own."""
    async with await rocketmq.client(server.url, session=session) as client:
        yield client


@pytest.fixture
def unary(client):
    """The same without streams."""
    client._config.streaming = False
    return client


async def events_of(client, text, **fields):
    async with asyncio.timeout(LIMIT):
        return [event async for event in client.send_message(request(text, **fields))]


async def task_of(client, text, **fields):
    [event] = await events_of(client, text, **fields)
    return event.task


async def started(client, gate):
    """Start a task that waits at a gate; return its id and the rest of its stream."""
    stream = client.send_message(request(f"wait {gate}"))
    async with asyncio.timeout(LIMIT):
        async for event in stream:
            if event.HasField("artifact_update"):
                return event.artifact_update.task_id, stream
    raise AssertionError("the task did not start")


def text_of(events):
    return "".join(chunk(event) for event in events)


def chunk(event):
    return "".join(part.text for part in event.artifact_update.artifact.parts)


async def test_it_is_started_as_the_docs_say(server):
    page = Path(__file__).parents[2].joinpath("docs", "java.md").read_text(encoding="utf-8")
    settings = {name for name in server.properties if not name.startswith("peer.")}
    assert set(re.findall(r"-D(\w+)=", page)) == settings
    for line in PROJECT.joinpath("src/main/resources/application.properties").read_text().splitlines():
        assert line in page or not line.startswith("quarkus.index-dependency")


async def test_its_card_leads_to_rocketmq_and_a2a_0_3(client, rocketmq, module_topic, module_config, repetition):
    choice = rocketmq.choice(client)
    assert (choice.binding, choice.version) == ("RocketMQ", "0.3.0")
    assert choice.url == f"http://{module_config.endpoint}//{module_topic.topic}"


@pytest.mark.parametrize("listed", ["preferred", "additional"])
async def test_a_card_may_list_it_as_preferred_or_as_additional_only(server, rocketmq, listed, repetition):
    # As Java programs write them: without a word of what A2A 1.0 has in their places.
    card = card_to_dict(await rocketmq.card(server.url))
    del card["supportedInterfaces"]
    if listed == "preferred":
        assert card["preferredTransport"] == "RocketMQ"
        card["additionalInterfaces"] = []
    else:
        card |= {"preferredTransport": "JSONRPC", "url": server.url}
    async with await rocketmq.client(card) as client:
        assert rocketmq.choice(client).version.startswith("0.3")
        assert text_of(await events_of(client, "count 2")) == "0,1,"


async def test_a_stream_comes_whole_and_in_order(client, repetition):
    events = await events_of(client, "count 50")
    assert text_of(events) == "".join(f"{number}," for number in range(50))
    assert events[-1].status_update.status.state == COMPLETED
    assert len(events) == 53


async def test_send_gives_the_completed_task(unary, repetition):
    task = await task_of(unary, "count 5")
    assert task.status.state == COMPLETED
    assert "".join(part.text for part in task.artifacts[0].parts) == "0,1,2,3,4,"


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_bare_message_is_an_answer_too(client, streaming, repetition):
    client._config.streaming = streaming
    [event] = await events_of(client, "message 杭州 \U0001f600")
    assert event.message.parts[0].text == "杭州 \U0001f600"


async def test_get_asks_the_instance_that_its_receipt_names(unary, server, module_config, repetition):
    task = await task_of(unary, "count 2")
    transport = unary._transport.httpx_client._transport
    topic, instance = transport._carrier.routes._instances[transport.address.topic, f"task:{task.id}"]
    assert (topic, len(instance)) == (module_config.state_topic, 36)
    got = await unary.get_task(GetTaskRequest(id=task.id))
    assert (got.id, got.status.state, len(got.history)) == (task.id, COMPLETED, 1)


async def test_cancel_ends_a_running_task_and_its_stream(client, repetition):
    task_id, stream = await started(client, uuid.uuid4().hex)
    task = await client.cancel_task(CancelTaskRequest(id=task_id))
    assert task.status.state == CANCELED
    async with asyncio.timeout(LIMIT):
        rest = [event async for event in stream]
    assert rest[-1].status_update.status.state == CANCELED
    with pytest.raises(TaskNotCancelableError):
        await client.cancel_task(CancelTaskRequest(id=task_id))


async def test_resubscribing_taps_a_stream_that_runs_and_its_session_holds_each_event_once(
    client, rocketmq, session, repetition
):
    gate = uuid.uuid4().hex
    stream = client.send_message(request(f"tick {gate}"))
    async with asyncio.timeout(LIMIT):
        begun = [await anext(stream)]
        tap = client.subscribe(SubscribeToTaskRequest(id=begun[0].status_update.task_id))
        tapped = [await anext(tap)]
        # It listens now: let the task come to its end.
        await events_of(client, f"open {gate}")
        streamed, tapped = begun + [event async for event in stream], tapped + [event async for event in tap]
    assert streamed[-len(tapped) :] == tapped
    assert len(tapped) < len(streamed)
    assert streamed[-1].status_update.status.state == COMPLETED
    listening = rocketmq.session(session).events(from_start=True, follow=False)
    async with asyncio.timeout(LIMIT):
        payloads = [event.payload async for event in listening]
    task_id = begun[0].status_update.task_id
    of_task = [
        payload for payload in payloads if task_id in (payload.artifact_update.task_id, payload.status_update.task_id)
    ]
    assert of_task == streamed


async def test_an_unknown_task_is_the_typed_error(client, repetition):
    for call in (
        client.get_task(GetTaskRequest(id="no-such-task")),
        client.cancel_task(CancelTaskRequest(id="no-such-task")),
        anext(client.subscribe(SubscribeToTaskRequest(id="no-such-task"))),
    ):
        with pytest.raises(TaskNotFoundError):
            await call


@pytest.mark.parametrize("streaming", [True, False])
async def test_an_executor_that_raises_is_an_error_without_its_stack(client, streaming, repetition):
    client._config.streaming = streaming
    with pytest.raises((A2AError, A2AClientError)) as caught:
        await events_of(client, "raise sorry")
    # Where the task's first events came before the error, a blocking send says only which task it was
    # (DefaultRequestHandler.onMessageSend of the a2a-java-sdk), and a stream says nothing: it ends (EventConsumer).
    assert "sorry" in str(caught.value) or ("too early" if streaming else "execution") in str(caught.value)
    assert "\tat " not in str(caught.value)


async def test_a_task_that_fails_says_why(client, repetition):
    events = await events_of(client, "fail sorry")
    status = events[-1].status_update.status
    assert (status.state, status.message.parts[0].text) == (FAILED, "sorry")


async def test_a_task_that_asks_goes_on_with_the_answer(client, rocketmq, session, repetition):
    asked = (await events_of(client, "ask"))[-1].status_update
    assert asked.status.state == INPUT_REQUIRED
    answered = await events_of(client, "count 1", task_id=asked.task_id, context_id=asked.context_id)
    assert answered[-1].status_update.task_id == asked.task_id
    assert (text_of(answered), answered[-1].status_update.status.state) == ("0,", COMPLETED)
    # That the question ended its stream does not end its task: the session goes on with it.
    listening = rocketmq.session(session).events(from_start=True, follow=False)
    async with asyncio.timeout(LIMIT):
        payloads = [event.payload async for event in listening]
    assert payloads[-len(answered) :] == answered


async def test_push_notification_configs_are_made_read_listed_and_deleted(unary, repetition):
    task = await task_of(unary, "count 1")
    wanted = TaskPushNotificationConfig(task_id=task.id, id="mine", url="http://127.0.0.1:9/push")
    assert await unary.create_task_push_notification_config(wanted) == wanted
    asked = GetTaskPushNotificationConfigRequest(task_id=task.id, id="mine")
    assert await unary.get_task_push_notification_config(asked) == wanted
    every = ListTaskPushNotificationConfigsRequest(task_id=task.id)
    assert list((await unary.list_task_push_notification_configs(every)).configs) == [wanted]
    await unary.delete_task_push_notification_config(
        DeleteTaskPushNotificationConfigRequest(task_id=task.id, id="mine")
    )
    assert not (await unary.list_task_push_notification_configs(every)).configs


async def test_the_extended_card_is_served(client, repetition):
    card = await client.get_extended_agent_card(GetExtendedAgentCardRequest())
    assert card.description == "For those who may know more."
    assert parse_card(card) == card


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def second(module_config, module_topic):
    """Another server in the same group, which knows nothing of the first one's tasks."""
    async with JavaServer(module_config, module_topic) as second:
        yield second


@pytest.mark.usefixtures("second")
async def test_of_two_servers_the_one_with_the_task_is_asked(unary, repetition):
    transport = unary._transport.httpx_client._transport
    tasks = []
    owners: set[tuple[str, str]] = set()
    async with asyncio.timeout(LIMIT):
        while len(owners) < 2:
            tasks.append(await task_of(unary, "count 1"))
            owners.add(transport._carrier.routes._instances[transport.address.topic, f"task:{tasks[-1].id}"])
    for task in tasks:
        for _ in range(3):  # where servers take turns, another one's turn comes
            assert (await unary.get_task(GetTaskRequest(id=task.id))).id == task.id
