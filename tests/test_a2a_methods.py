"""Every A2A method gives over RocketMQ what it gives over HTTP, in A2A 1.0 and 0.3."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest
import pytest_asyncio
from a2a.client import ClientCallContext
from a2a.client.errors import A2AClientTimeoutError
from a2a.types import (
    CancelTaskRequest,
    DeleteTaskPushNotificationConfigRequest,
    GetExtendedAgentCardRequest,
    GetTaskPushNotificationConfigRequest,
    GetTaskRequest,
    ListTaskPushNotificationConfigsRequest,
    ListTasksRequest,
    SubscribeToTaskRequest,
    TaskPushNotificationConfig,
    TaskState,
)
from a2a.utils.errors import (
    TaskNotCancelableError,
    TaskNotFoundError,
    UnsupportedOperationError,
)

from agentscope_rocketmq import call_context
from agentscope_rocketmq.card import parse_card
from agentscope_rocketmq.transport import RocketMQTransport
from tests.commanded import Commanded
from tests.services import calling, card_for, reply, request, server_for
from tests.waiting import LIMIT, root_cause

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKING = TaskState.TASK_STATE_WORKING
COMPLETED = TaskState.TASK_STATE_COMPLETED
CANCELED = TaskState.TASK_STATE_CANCELED
FAILED = TaskState.TASK_STATE_FAILED
INPUT_REQUIRED = TaskState.TASK_STATE_INPUT_REQUIRED


@pytest.fixture(scope="module")
def executor():
    return Commanded()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(module_config, module_topic, executor):
    card = card_for(module_config, module_topic.topic)
    card["capabilities"]["extendedAgentCard"] = True
    extended = parse_card({**card, "description": "For those who may know more."})
    extended.supported_interfaces[0].protocol_version = "1.0"
    twin = extended.supported_interfaces.add()
    twin.CopyFrom(extended.supported_interfaces[0])
    twin.protocol_version = "0.3"

    async def any_url(_url: str) -> bool:
        return True

    async with server_for(
        executor, module_config, module_topic.topic, card=card, extended_card=extended, push_url_validator=any_url
    ) as server:
        yield server


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["RocketMQ 1.0", "RocketMQ 0.3", "JSONRPC 1.0", "JSONRPC 0.3"]
)
async def client(request, module_config, server):
    binding, version = request.param.split()
    async with calling(module_config, server, binding=binding, version=version) as client:
        yield client


@pytest.fixture(params=["streamed", "unary"])
def sending(request, client):
    """The same client, streaming or not."""
    client._config.streaming = request.param == "streamed"
    yield client
    client._config.streaming = True


async def started(client, text, **fields):
    """Start a task that goes on; return its id and the rest of its stream."""
    stream = client.send_message(request(text, **fields))
    async with asyncio.timeout(LIMIT):
        async for event in stream:
            if event.HasField("status_update") and event.status_update.status.state == WORKING:
                return event.status_update.task_id, stream
    raise AssertionError("the task did not start")


async def test_send_returns_the_completed_task_with_its_artifact(sending):
    assert await reply(sending, "count 5") == "0,1,2,3,4,"


async def test_a_bare_message_is_an_answer_too(sending):
    [event] = [event async for event in sending.send_message(request("message 你好"))]
    assert event.message.parts[0].text == "你好"


async def test_unicode_survives_both_ways(sending):
    text = "杭州 \U0001f600 é \\n \n"
    assert await reply(sending, f"say {text}") == f"said say {text}"


async def test_line_separators_inside_a_text_do_not_tear_a_stream_apart(module_config, server):
    # They do over plain HTTP: the a2a-sdk 1.3 writes them raw into server-sent events, and httpx splits lines at them.
    text = "one\u2028two\u2029three\x85four"
    async with calling(module_config, server) as client:
        assert await reply(client, f"say {text}") == f"said say {text}"


async def test_a_request_without_a_json_rpc_id_is_answered_as_over_http(module_config, server):
    # Of the Java reference it is taken (tests/wire); of peers of this package requests go to the app as they are.
    body = {"jsonrpc": "2.0", "method": "tasks/get", "params": {"id": "no-such-task"}}
    answers = []
    for binding in ("RocketMQ", "JSONRPC"):
        async with calling(module_config, server, binding=binding, version="0.3") as client:
            transport: Any = client._transport  # type: ignore[attr-defined]
            answers.append((await transport.httpx_client.post(transport.url, json=body)).json())
    assert answers[0] == answers[1]
    assert "error" in answers[0]


async def test_a_thousand_events_arrive_in_order(client):
    events = [event async for event in client.send_message(request("count 1000"))]
    numbers = [event.artifact_update.artifact.parts[0].text for event in events if event.HasField("artifact_update")]
    assert numbers == [f"{number}," for number in range(1000)]
    assert events[-1].status_update.status.state == COMPLETED


async def test_get_task_knows_state_history_and_artifacts(client):
    events = [event async for event in client.send_message(request("count 2"))]
    task = await client.get_task(GetTaskRequest(id=events[-1].status_update.task_id, history_length=10))
    assert task.status.state == COMPLETED
    assert "".join(part.text for part in task.artifacts[0].parts) == "0,1,"
    assert task.history[0].parts[0].text == "count 2"


async def test_an_unknown_task_is_the_sdks_typed_error(client):
    for call in (
        client.get_task(GetTaskRequest(id="no-such-task")),
        client.cancel_task(CancelTaskRequest(id="no-such-task")),
    ):
        with pytest.raises(TaskNotFoundError):
            await call


async def test_cancel_ends_a_running_task_and_its_stream(client):
    task_id, stream = await started(client, "wait cancelled")
    task = await client.cancel_task(CancelTaskRequest(id=task_id))
    assert task.status.state == CANCELED
    rest = [event async for event in stream]
    assert [e.status_update.status.state for e in rest if e.HasField("status_update")] == [CANCELED]
    with pytest.raises(TaskNotCancelableError):
        await client.cancel_task(CancelTaskRequest(id=task_id))


async def test_subscribe_taps_a_running_task(client, executor):
    gate = uuid.uuid4().hex
    task_id, stream = await started(client, f"wait {gate}")
    events = client.subscribe(SubscribeToTaskRequest(id=task_id))
    async with asyncio.timeout(LIMIT):
        first = await anext(events)
        assert first.task.id == task_id
        executor.gates[gate].set()
        rest = [event async for event in events]
    assert rest[-1].status_update.status.state == COMPLETED
    assert [e.artifact_update.artifact.parts[0].text for e in rest if e.HasField("artifact_update")] == ["waited"]
    assert [event async for event in stream][-1].status_update.status.state == COMPLETED


async def test_a_task_that_asks_goes_on_with_the_answer(client):
    events = [event async for event in client.send_message(request("ask"))]
    asked = events[-1].status_update
    assert asked.status.state == INPUT_REQUIRED
    # Without the context id: the SDK would invent one and fail the task for it.
    answered = [event async for event in client.send_message(request("count 1", task_id=asked.task_id))]
    assert answered[-1].status_update.status.state == COMPLETED
    assert answered[-1].status_update.context_id == asked.context_id


async def test_a_message_into_a_task_at_work_is_refused(client, executor):
    gate = uuid.uuid4().hex
    task_id, stream = await started(client, f"wait {gate}")
    with pytest.raises(UnsupportedOperationError, match="at work"):
        await reply(client, "count 1", task_id=task_id)
    executor.gates[gate].set()
    assert [event async for event in stream][-1].status_update.status.state == COMPLETED


async def test_list_tasks_finds_those_of_a_context(client):
    if "Compat" in type(client._transport).__name__:
        pytest.xfail("A2A 0.3 has no such method")
    context_id = uuid.uuid4().hex
    for _ in range(3):
        await reply(client, "count 1", context_id=context_id)
    listed = await client.list_tasks(ListTasksRequest(context_id=context_id))
    assert len(listed.tasks) == 3


async def test_push_notification_configs_are_made_read_listed_and_deleted(client):
    events = [event async for event in client.send_message(request("count 1"))]
    task_id = events[-1].status_update.task_id
    made = await client.create_task_push_notification_config(
        TaskPushNotificationConfig(task_id=task_id, id="mine", url="http://127.0.0.1:9/push", token="secret")
    )
    assert made.url == "http://127.0.0.1:9/push"
    got = await client.get_task_push_notification_config(
        GetTaskPushNotificationConfigRequest(task_id=task_id, id="mine")
    )
    assert got.url == made.url
    listed = await client.list_task_push_notification_configs(ListTaskPushNotificationConfigsRequest(task_id=task_id))
    assert [config.id for config in listed.configs] == ["mine"]
    await client.delete_task_push_notification_config(
        DeleteTaskPushNotificationConfigRequest(task_id=task_id, id="mine")
    )
    listed = await client.list_task_push_notification_configs(ListTaskPushNotificationConfigsRequest(task_id=task_id))
    assert not listed.configs


async def test_the_extended_card_is_served(client):
    before = parse_card(client._card)
    card = await client.get_extended_agent_card(GetExtendedAgentCardRequest())
    client._card = before  # the SDK replaces it
    assert card.description == "For those who may know more."


async def test_an_executor_that_raises_is_a_failed_task_for_its_caller_only(client):
    events = [event async for event in client.send_message(request("raise sorry"))]
    status = events[-1].status_update.status
    assert status.state == FAILED
    assert "ValueError" in status.message.parts[0].text
    assert "sorry" not in str(status)
    assert await reply(client, "count 1") == "0,"


async def test_headers_and_extensions_reach_the_agent(client):
    parameters = {"authorization": "Bearer token", "A2A-Extensions": "urn:x", "x-custom": "ü"}
    context = ClientCallContext(service_parameters={**parameters, "x-custom": "value"})
    for name, expected in (("authorization", "Bearer token"), ("a2a-extensions", "urn:x"), ("x-custom", "value")):
        events = [e async for e in client.send_message(request(f"headers {name}"), context=context)]
        texts = [e.artifact_update.artifact.parts[0].text for e in events if e.HasField("artifact_update")]
        assert texts == [expected]


async def test_idle_and_total_time_run_out_apart(client, executor):
    gate = uuid.uuid4().hex
    over_rocketmq = isinstance(client._transport.httpx_client._transport, RocketMQTransport)
    # A silent agent's worker gives signs of life over RocketMQ: it is the total time that runs out there.
    context = call_context(idle=2.0, total=5.0) if over_rocketmq else call_context(idle=0.5)
    with pytest.raises(A2AClientTimeoutError) as caught:
        await reply_with(client, f"wait {gate}", context)
    if over_rocketmq:
        assert root_cause(caught.value).which == "total"
    # It did not cancel the agent.
    executor.open(gate)


async def reply_with(client, text, context):
    return [event async for event in client.send_message(request(text), context=context)]


async def test_closing_the_stream_does_not_cancel_the_agent(client, executor):
    gate = uuid.uuid4().hex
    task_id, stream = await started(client, f"wait {gate}")
    await stream.aclose()
    executor.gates[gate].set()
    async with asyncio.timeout(LIMIT):
        while (await client.get_task(GetTaskRequest(id=task_id))).status.state != COMPLETED:
            await asyncio.sleep(0.05)


async def test_two_hundred_calls_at_once_all_get_their_own_answer(client):
    answers = await asyncio.gather(*(reply(client, f"say {number}") for number in range(200)))
    assert answers == [f"said say {number}" for number in range(200)]
