"""AgentScope agents behind the real a2a-sdk server, over real HTTP, driven by the SDK's client and by A2AAgent."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
from uuid import uuid4

import pytest
from a2a.client import A2AClientError, Client
from a2a.helpers.proto_helpers import get_message_text, new_data_part
from a2a.server.agent_execution import RequestContext
from a2a.server.context import ServerCallContext
from a2a.server.tasks import InMemoryTaskStore
from a2a.types import (
    CancelTaskRequest,
    GetTaskRequest,
    Part,
    SendMessageConfiguration,
    SendMessageRequest,
    Task,
    TaskStatus,
)
from a2a.utils.errors import InvalidParamsError, UnsupportedOperationError
from agentscope.agent import Agent
from agentscope.event import (
    AgentEvent,
    EventType,
    ModelCallEndEvent,
    ReplyEndEvent,
)
from agentscope.message import Base64Source, Msg, ToolCallBlock, UserMsg
from agentscope.types import ReplyFinishedReason

from agentscope_rocketmq import executor as executor_module
from agentscope_rocketmq.errors import ConfigurationError
from agentscope_rocketmq.events import agent_events
from agentscope_rocketmq.executor import AgentScopeExecutor
from tests import agents
from tests.a2a_service import (
    CANCELED,
    COMPLETED,
    FAILED,
    LIMIT,
    SUBMITTED,
    WORKING,
    ask,
    both_versions,
    events_of,
    message,
    serve,
    states,
    status_text,
    stream,
    text_of,
    until_task,
)
from tests.agents import Gate

# --- What comes out -------------------------------------------------------------------------------------------------


@both_versions
async def test_a_reply_is_a_task_then_working_then_chunks_then_completed(version: str):
    async with serve(agents.make_streaming_agent(3)) as service, service.client(version) as client:
        sent = message("hello", context_id="trip")
        events = await events_of(client, sent)
    first = events[0].task
    assert first.context_id == "trip"
    assert [entry.message_id for entry in first.history] == [sent.message_id]
    assert states(events) == [SUBMITTED, WORKING, COMPLETED]
    assert events[-1].status_update.status.state == COMPLETED
    chunks = [event.artifact_update for event in events[2:-1]]
    assert [chunk.artifact.parts[0].text for chunk in chunks] == ["chunk 0 ", "chunk 1 ", "chunk 2 ", ""]
    assert [chunk.append for chunk in chunks] == [False, True, True, True]
    assert [chunk.last_chunk for chunk in chunks] == [False, False, False, True]
    assert len({chunk.artifact.artifact_id for chunk in chunks}) == 1


async def test_a_delta_arrives_while_the_agent_still_works():
    gate = Gate()
    async with serve(agents.make_blocked_agent(gate)) as service, service.client() as client:
        events = stream(client, message("hello"))
        async for event in events:
            if event.HasField("artifact_update"):
                assert event.artifact_update.artifact.parts[0].text == "begin "
                break
        assert not gate.open.is_set()
        gate.open.set()
        assert [event async for event in events][-1].status_update.status.state == COMPLETED


@both_versions
async def test_the_stored_task_and_a_blocking_caller_have_the_whole_answer(version: str):
    async with serve(agents.make_streaming_agent(3)) as service, service.client(version, streaming=False) as client:
        [answer] = await events_of(client, message("hello"))
        stored = await client.get_task(GetTaskRequest(id=answer.task.id))
    for task in (answer.task, stored):
        assert task.status.state == COMPLETED
        [artifact] = task.artifacts
        assert "".join(part.text for part in artifact.parts) == "chunk 0 chunk 1 chunk 2 "


@both_versions
async def test_a2a_agent_gets_one_unsplit_text_block(version: str):
    async with serve(agents.make_streaming_agent(200)) as service, service.agent(version) as agent:
        reply = await agent.reply(UserMsg("user", "hello"))
    assert len(reply.content) == 1
    assert reply.get_text_content() == "".join(f"chunk {number} " for number in range(200))
    assert reply.finished_reason == "completed"


@both_versions
async def test_a2a_agent_gets_only_the_text_of_an_agent_that_thinks_and_calls_tools(version: str):
    async with serve(agents.make_adding_agent) as service, service.agent(version) as agent:
        reply = await agent.reply(UserMsg("user", "1 + 2"))
    assert len(reply.content) == 1
    assert reply.get_text_content() == "it is 3"


async def test_an_agent_that_says_nothing_completes():
    async with serve(agents.make_silent_agent) as service, service.client() as client, service.agent() as agent:
        events = await events_of(client, message("hello"))
        reply = await agent.reply(UserMsg("user", "hello"))
    assert states(events) == [SUBMITTED, WORKING, COMPLETED]
    assert len(events) == 3
    assert reply.get_content_blocks() == []


async def test_a_file_of_several_megabytes_arrives_whole_and_as_one_file():
    content = random.Random(1).randbytes(5_000_000)
    make_agent = agents.make_data_agent(content, media_type="application/zip", pieces=7)
    async with serve(make_agent) as service, service.client() as client, service.agent() as agent:
        events = await events_of(client, message("hello"))
        reply = await agent.reply(UserMsg("user", "hello"))
    [part] = [
        part
        for event in events
        if event.HasField("artifact_update")
        for part in event.artifact_update.artifact.parts
        if part.HasField("raw")
    ]
    assert part.raw == content
    assert part.media_type == "application/zip"
    assert [block.type for block in reply.content] == ["text", "data"]
    [block] = reply.get_content_blocks("data")
    assert isinstance(block.source, Base64Source)
    assert block.source.media_type == "application/zip"
    assert base64.b64decode(block.source.data) == content


async def test_a_loop_without_end_completes_and_says_that_it_was_stopped():
    def make_agent(session_id: str) -> Agent:
        async def noop() -> str:
            """Do nothing."""
            return "nothing"

        async def script(messages):
            yield ToolCallBlock(id=uuid4().hex, name="noop", input="{}")

        return agents.scripted(script, agents.allowed(noop), max_iters=2)

    async with serve(make_agent) as service, service.client() as client:
        events = await events_of(client, message("go"))
    assert states(events)[-1] == COMPLETED
    assert "limit of reasoning steps" in status_text(events)


# --- The extension --------------------------------------------------------------------------------------------------


@both_versions
async def test_agent_events_travel_to_callers_that_ask_for_them(version: str):
    emitted: list[AgentEvent | Msg] = []

    class Recording(Agent):
        async def reply_stream(self, *arguments, **options):
            async for event in super().reply_stream(*arguments, **options):
                emitted.append(event)
                yield event

    def make_agent(session_id: str) -> Agent:
        agent = agents.make_adding_agent(session_id)
        agent.__class__ = Recording
        return agent

    async with serve(make_agent) as service, service.client(version) as client:
        events = await events_of(client, message("1 + 2"), extension=True)
    received = [found for event in events if (found := agent_events(event)) is not None]
    left_out = ("TEXT_", "REPLY_")
    assert received == [
        event for event in emitted if not isinstance(event, Msg) and not event.type.startswith(left_out)
    ]
    assert {event.type for event in received} > {
        EventType.THINKING_BLOCK_DELTA,
        EventType.TOOL_CALL_DELTA,
        EventType.TOOL_RESULT_TEXT_DELTA,
    }
    assert [event.input_tokens for event in received if isinstance(event, ModelCallEndEvent)] == [11, 11]
    assert text_of(events) == "it is 3"
    assert set(states(events)[1:-1]) == {WORKING}


async def test_agent_events_stay_away_from_callers_that_do_not_ask():
    async with serve(agents.make_adding_agent) as service, service.client() as client:
        events = await events_of(client, message("1 + 2"))
    assert states(events) == [SUBMITTED, WORKING, COMPLETED]
    assert [agent_events(event) for event in events] == [None] * len(events)


async def test_hints_of_the_agent_to_its_model_are_never_forwarded():
    def make_agent(session_id: str) -> Agent:
        agent = agents.make_echo_agent(session_id)
        agent.injection_config.inject_runtime_state = True
        agent.injection_config.extra_fields = {"secret": "hint"}
        return agent

    async with serve(make_agent) as service, service.client() as client:
        events = await events_of(client, message("hello"), extension=True)
        agent = service.only_agent
    assert any(block.type == "hint" for entry in agent.state.context for block in entry.content)
    assert all(b"secret" not in event.SerializeToString() for event in events)
    assert states(events)[-1] == COMPLETED


# --- What goes in ---------------------------------------------------------------------------------------------------


@both_versions
async def test_parts_of_all_kinds_reach_the_agent(version: str):
    parts = [
        Part(text="look"),
        Part(raw=b"12345", media_type="image/png", filename="a.png"),
        Part(url="https://example.com/b.png", media_type="image/png", filename="b.png"),
        new_data_part({"count": 3, "ratio": 0.5, "where": "杭州"}),
    ]
    async with serve(agents.make_describing_agent) as service, service.client(version) as client:
        told = await ask(client, message(*parts))
    assert told == (
        "text:look data:image/png:5:a.png url:image/png:https://example.com/b.png:b.png "
        'text:{"count": 3, "ratio": 0.5, "where": "杭州"}'
    )


@pytest.mark.parametrize("part", [Part(text=" \n"), Part(media_type="text/plain"), Part(url="nowhere")])
async def test_a_message_without_usable_content_is_refused_as_invalid(part: Part):
    async with serve(agents.make_echo_agent) as service, service.client() as client:
        with pytest.raises((InvalidParamsError, A2AClientError)) as refused:
            await events_of(client, message(part))
        assert "empty" in str(refused.value) or "not a URL" in str(refused.value)
        assert await ask(client, message("hello")) == "echo:hello"


# --- Conversations --------------------------------------------------------------------------------------------------


async def test_interleaved_conversations_never_mix_and_each_keeps_its_order():
    shuffle = random.Random(7)
    contexts = [f"context-{number}" for number in range(6)]

    async def converse(client: Client, context_id: str) -> None:
        said: list[str] = []
        for turn in range(6):
            said.append(f"{context_id} says {turn}")
            for _ in range(shuffle.randrange(5)):
                await asyncio.sleep(0)
            answer = await ask(client, message(said[-1], context_id=context_id))
            assert answer == "echo:" + " | ".join(said)

    async with serve(agents.make_echo_agent) as service, service.client() as client, asyncio.TaskGroup() as callers:
        for context_id in contexts:
            callers.create_task(converse(client, context_id))


async def test_equal_context_ids_of_two_users_have_an_agent_each():
    async with serve(agents.make_echo_agent) as service, service.client() as client:
        assert await ask(client, message("a", context_id="same"), user="alice") == "echo:a"
        assert await ask(client, message("b", context_id="same"), user="bob") == "echo:b"
        assert await ask(client, message("c", context_id="same")) == "echo:c"
        assert await ask(client, message("d", context_id="same"), user="alice") == "echo:a | d"


async def test_requests_of_one_conversation_run_one_after_the_other():
    gate = Gate()
    running = 0
    most = 0

    def make_agent(session_id: str) -> Agent:
        async def script(messages):
            nonlocal running, most
            running += 1
            most = max(most, running)
            gate.arrived.set()
            await gate.open.wait()
            running -= 1
            yield " | ".join(agents.user_texts(messages))

        return agents.scripted(script)

    async with serve(make_agent) as service, service.client() as client:
        first = stream(client, message("one", context_id="same"))
        await until_task(first)
        await gate.arrived.wait()
        later = [stream(client, message(text, context_id="same")) for text in ("two", "three")]
        for events in later:
            assert (await until_task(events)).status.state == SUBMITTED
        other = stream(client, message("elsewhere", context_id="other"))
        await until_task(other)
        gate.open.set()
        answers = [text_of([event async for event in events]) for events in (first, *later, other)]
    assert answers == ["one", "one | two", "one | two | three", "elsewhere"]
    assert most <= 2  # one of each conversation


async def test_the_conversation_idle_longest_is_let_go_and_that_is_logged_once(caplog: pytest.LogCaptureFixture):
    async with serve(agents.make_echo_agent, max_contexts=2) as service, service.client() as client:
        for context_id in ("a", "b", "a", "c", "d"):  # c pushes b out, d pushes a out
            await ask(client, message("first", context_id=context_id))
        assert await ask(client, message("more", context_id="d")) == "echo:first | more"
        assert await ask(client, message("more", context_id="c")) == "echo:first | more"
        assert await ask(client, message("more", context_id="b")) == "echo:more"
        assert len(service.executor._conversations) == 2
    assert [record.levelname for record in caplog.records if "max_contexts" in record.message] == ["WARNING"]


async def test_a_busy_conversation_is_not_let_go():
    gate = Gate()

    def make_agent(session_id: str) -> Agent:
        return (
            agents.make_blocked_agent(gate)(session_id) if session_id == "busy" else agents.make_echo_agent(session_id)
        )

    async with serve(make_agent, max_contexts=1) as service, service.client() as client:
        busy = stream(client, message("hello", context_id="busy"))
        await until_task(busy)
        await gate.arrived.wait()
        for context_id in ("a", "b"):
            await ask(client, message("first", context_id=context_id))
        gate.open.set()
        assert text_of([event async for event in busy]) == "begin end"
        assert "begin end" in await ask(client, message("again", context_id="busy"))


async def test_the_factory_may_be_async():
    async def make_agent(session_id: str) -> Agent:
        await asyncio.sleep(0)
        return agents.make_echo_agent(session_id)

    async with serve(make_agent) as service, service.client() as client:
        assert await ask(client, message("hello")) == "echo:hello"


async def test_a_factory_that_shares_an_agent_between_conversations_is_found_out(caplog: pytest.LogCaptureFixture):
    shared = agents.make_echo_agent("shared")
    async with serve(lambda _: shared) as service, service.client() as client:
        assert await ask(client, message("a", context_id="one")) == "echo:a"
        events = await events_of(client, message("b", context_id="two"))
        assert states(events)[-1] == FAILED
        assert await ask(client, message("c", context_id="one")) == "echo:a | c"
    assert "ConfigurationError" in caplog.text


def test_max_contexts_must_be_positive():
    with pytest.raises(ConfigurationError, match="max_contexts"):
        AgentScopeExecutor(agents.make_echo_agent, max_contexts=0)


# --- Failure --------------------------------------------------------------------------------------------------------


@both_versions
async def test_a_failing_agent_fails_its_task_without_telling_secrets(version: str, caplog: pytest.LogCaptureFixture):
    async with serve(agents.make_failing_agent) as service, service.client(version) as client:
        events = await events_of(client, message("fail", context_id="same"))
        task_id = events[0].task.id
        stored = await client.get_task(GetTaskRequest(id=task_id))
        assert await ask(client, message("go on", context_id="same")) == "so far so good"
    assert states(events) == [SUBMITTED, WORKING, FAILED]
    assert (
        status_text(events)
        == f"The agent failed: ConnectionError. The server's log has the details under task {task_id}."
    )
    assert events[-2].artifact_update.last_chunk
    assert all(b"hunter2" not in event.SerializeToString() for event in events)
    assert stored.status.state == FAILED
    [record] = [record for record in caplog.records if record.name == "agentscope_rocketmq.executor"]
    assert task_id in record.getMessage()
    assert record.exc_info is not None
    assert "hunter2" in str(record.exc_info[1])


async def test_a_blocking_caller_gets_the_failed_task():
    async with serve(agents.make_failing_agent) as service, service.client(streaming=False) as client:
        [answer] = await events_of(client, message("fail"))
    assert answer.task.status.state == FAILED
    assert "ConnectionError" in get_message_text(answer.task.status.message)


async def test_a_factory_that_fails_fails_the_task():
    def make_agent(session_id: str) -> Agent:
        raise LookupError("secret")

    async with serve(make_agent) as service, service.client() as client, service.agent() as agent:
        events = await events_of(client, message("hello"))
        reply = await agent.reply(UserMsg("user", "hello"))
    assert states(events) == [SUBMITTED, WORKING, FAILED]
    assert "LookupError" in status_text(events)
    assert "secret" not in status_text(events)
    assert reply.finished_reason == "error"


async def test_an_agent_that_reports_an_error_fails_its_task():
    class Reporting(Agent):
        async def reply_stream(self, *_arguments, **_options):
            yield ReplyEndEvent(session_id="s", reply_id="r", finished_reason=ReplyFinishedReason.ERROR)

    def make_agent(session_id: str) -> Agent:
        agent = agents.make_echo_agent(session_id)
        agent.__class__ = Reporting
        return agent

    async with serve(make_agent) as service, service.client() as client:
        events = await events_of(client, message("hello"))
    assert states(events)[-1] == FAILED
    assert status_text(events).startswith("The agent failed: it reported an error.")


async def test_a_message_into_an_ended_task_is_refused():
    executor = AgentScopeExecutor(agents.make_echo_agent)
    ended = Task(id="t", context_id="c", status=TaskStatus(state=COMPLETED))
    request = SendMessageRequest(message=message("more", task_id="t", context_id="c"))
    context = RequestContext(ServerCallContext(), request, task_id="t", context_id="c", task=ended)
    with pytest.raises(UnsupportedOperationError, match="has ended"):
        await executor.execute(context, None)  # type: ignore[arg-type]


# --- Cancel ---------------------------------------------------------------------------------------------------------


@both_versions
@pytest.mark.parametrize("options", [{}, {"interruption_raise_cancelled_error": True}])
async def test_cancel_in_mid_stream_ends_the_task_once_and_keeps_the_partial_text(
    version: str, options: dict[str, bool]
):
    gate = Gate()
    make_agent = agents.make_blocked_agent(gate, **options)
    async with serve(make_agent) as service, service.client(version) as client:
        events = stream(client, message("hello", context_id="same"))
        task = await until_task(events)
        await gate.arrived.wait()
        canceled = await client.cancel_task(CancelTaskRequest(id=task.id))
        rest = [event async for event in events]
        stored = await client.get_task(GetTaskRequest(id=task.id))
        remembered = await ask(client, message("again", context_id="same"))
    assert canceled.status.state == CANCELED
    assert states(rest) == [WORKING, CANCELED]
    assert text_of(rest) == "begin "
    assert rest[-2].artifact_update.last_chunk
    assert rest[-1].status_update.status.state == CANCELED
    assert stored.status.state == CANCELED
    assert remembered == "hello | begin  | again"


async def test_cancel_wins_over_an_agent_that_finishes_all_the_same():
    gate = Gate()

    def make_agent(session_id: str) -> Agent:
        async def script(messages):
            gate.arrived.set()
            with contextlib.suppress(asyncio.CancelledError):
                await gate.open.wait()
            yield "finished anyway"

        return agents.scripted(script)

    async with serve(make_agent) as service, service.client() as client:
        events = stream(client, message("hello"))
        task = await until_task(events)
        await gate.arrived.wait()
        canceled = await client.cancel_task(CancelTaskRequest(id=task.id))
        rest = [event async for event in events]
    assert canceled.status.state == CANCELED
    assert states(rest) == [WORKING, CANCELED]
    assert text_of(rest) == "finished anyway"


async def test_cancel_closes_the_tool_call_that_ran():
    gate = Gate()
    closed: list[str] = []
    async with serve(agents.make_blocked_tool_agent(gate, closed)) as service, service.client() as client:
        events = stream(client, message("hello", context_id="same"))
        task = await until_task(events)
        await gate.arrived.wait()
        await client.cancel_task(CancelTaskRequest(id=task.id))
        assert states([event async for event in events])[-1] == CANCELED
        assert await ask(client, message("again", context_id="same")) == "again"
    [result] = closed
    assert "interrupted" in result


async def test_cancel_of_a_task_that_waits_for_its_turn_leaves_the_running_one_alone():
    gate = Gate()
    async with serve(agents.make_blocked_agent(gate)) as service, service.client() as client:
        first = stream(client, message("one", context_id="same"))
        await until_task(first)
        await gate.arrived.wait()
        second = stream(client, message("two", context_id="same"))
        waiting = await until_task(second)
        canceled = await client.cancel_task(CancelTaskRequest(id=waiting.id))
        assert canceled.status.state == CANCELED
        assert states([event async for event in second]) == [CANCELED]
        gate.open.set()
        assert text_of([event async for event in first]) == "begin end"


class _GatedStore(InMemoryTaskStore):
    """Holds up every save once it has seen an artifact, until the gate opens: the slowest of all stores."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    async def save(self, task: Task, context: ServerCallContext) -> None:
        if task.artifacts:
            self._gate.arrived.set()
            await self._gate.open.wait()
        await super().save(task, context)


async def test_cancel_reaches_an_agent_that_is_held_up_by_a_slow_store():
    gate, stuck = Gate(), asyncio.Event()
    interrupted = asyncio.Event()

    def make_agent(session_id: str) -> Agent:
        async def script(messages):
            if agents.user_texts(messages)[-1] == "again":
                yield str(len(messages[-2].get_text_content()))
                return
            for number in range(2200):
                if number == 2000:  # a little less than the SDK's queues hold
                    stuck.set()
                yield "x"
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                interrupted.set()
                raise

        return agents.scripted(script)

    async with serve(make_agent, store=_GatedStore(gate)) as service, service.client() as client:
        events = stream(client, message("hello", context_id="same"))
        task = await until_task(events)
        await asyncio.gather(gate.arrived.wait(), stuck.wait())
        [run] = service.executor._runs.values()
        cancel = asyncio.create_task(client.cancel_task(CancelTaskRequest(id=task.id)))
        while not run.canceled:
            await asyncio.sleep(0)
        gate.open.set()
        assert (await cancel).status.state == CANCELED
        await events.aclose()
        stored = await client.get_task(GetTaskRequest(id=task.id))
        remembered = await ask(client, message("again", context_id="same"))
    assert interrupted.is_set()
    published = sum(len(part.text) for artifact in stored.artifacts for part in artifact.parts)
    assert published == int(remembered) == 2200


async def test_cancel_gives_up_on_an_agent_that_does_not_stop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(executor_module, "STOP_GRACE", 0.05)
    gate = Gate()

    def make_agent(session_id: str) -> Agent:
        async def stubborn() -> str:
            """Never give up."""
            gate.arrived.set()
            while not gate.open.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await gate.open.wait()
            return "done at last"

        async def script(messages):
            if agents.user_texts(messages)[-1] == "hello" and not agents.tool_results(messages):
                yield ToolCallBlock(id="call-1", name="stubborn", input="{}")
            else:
                yield "fine"

        return agents.scripted(script, agents.allowed(stubborn))

    async with serve(make_agent) as service, service.client() as client:
        events = stream(client, message("hello", context_id="same"))
        task = await until_task(events)
        await gate.arrived.wait()
        canceled = await client.cancel_task(CancelTaskRequest(id=task.id))
        assert canceled.status.state == CANCELED
        assert states([event async for event in events]) == [WORKING, CANCELED]
        assert "has not stopped" in caplog.text
        later = stream(client, message("still there?", context_id="same"))
        assert (await until_task(later)).status.state == SUBMITTED
        gate.open.set()
        assert text_of([event async for event in later]) == "fine"
        assert (await client.get_task(GetTaskRequest(id=task.id))).status.state == CANCELED


async def test_a_stopping_server_lets_agents_close_their_tool_calls():
    gate = Gate()
    closed: list[str] = []
    made: list[Agent] = []

    def make_agent(session_id: str) -> Agent:
        made.append(agents.make_blocked_tool_agent(gate, closed)(session_id))
        return made[-1]

    async with serve(make_agent) as service, service.client() as client:
        events = stream(client, message("hello"))
        task = await until_task(events)
        await gate.arrived.wait()
        [run] = service.executor._runs.values()
        await service.handler.aclose()
        assert run.work.done()
        assert run.done.is_set()
        assert not run.ended
        [agent] = made
        assert agent.state.get_unfinished_tool_calls(agent.name) == []
        assert states([event async for event in events])[-1:] in ([], [WORKING])
        assert (await client.get_task(GetTaskRequest(id=task.id))).status.state == WORKING


async def test_execute_passes_a_cancellation_from_outside_on():
    gate = Gate()

    class Queue:
        async def enqueue_event(self, event) -> None:
            pass

    executor = AgentScopeExecutor(agents.make_blocked_agent(gate))
    request = SendMessageRequest(message=message("hello"))
    context = RequestContext(ServerCallContext(), request)
    running = asyncio.create_task(executor.execute(context, Queue()))  # type: ignore[arg-type]
    async with asyncio.timeout(LIMIT):
        await gate.arrived.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert executor._runs == {}


async def test_return_immediately_gives_the_task_while_the_agent_goes_on():
    gate = Gate()
    async with serve(agents.make_blocked_agent(gate)) as service, service.client(streaming=False) as client:
        request = SendMessageRequest(
            message=message("hello"), configuration=SendMessageConfiguration(return_immediately=True)
        )
        [answer] = [event async for event in client.send_message(request)]
        assert answer.task.status.state == SUBMITTED
        await gate.arrived.wait()
        gate.open.set()
        while (await client.get_task(GetTaskRequest(id=answer.task.id))).status.state != COMPLETED:
            pass
