"""How a parked agent's questions are put, and how answers to them are read."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from a2a.helpers.proto_helpers import new_data_part
from a2a.types import (
    CancelTaskRequest,
    GetTaskRequest,
    Message,
    Part,
    Role,
    StreamResponse,
    Task,
)
from agentscope.agent import Agent
from agentscope.event import (
    ExternalExecutionResultEvent,
    RequireExternalExecutionEvent,
    RequireUserConfirmEvent,
    UserConfirmResultEvent,
    UserInterruptEvent,
)
from agentscope.message import ToolCallBlock, UserMsg

from agentscope_rocketmq import executor as executor_module
from agentscope_rocketmq.confirmation import Question, UnclearAnswer, pending_question, question_text, read_answer
from agentscope_rocketmq.events import agent_events
from tests import agents
from tests.a2a_service import (
    CANCELED,
    COMPLETED,
    FAILED,
    INPUT_REQUIRED,
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

if TYPE_CHECKING:
    from a2a.client import Client


async def parked(agent: Agent, text: str) -> Question:
    async for _ in agent.reply_stream(UserMsg("user", text)):
        pass
    question = pending_question(agent)
    assert question is not None
    return question


async def verdict(text: str) -> bool:
    agent = agents.make_confirming_agent([], "/a")("session")
    answer = await read_answer(agent, await parked(agent, "delete"), Message(parts=[Part(text=text)]))
    assert isinstance(answer, UserConfirmResultEvent)
    [result] = answer.confirm_results
    return result.confirmed


YES = [
    "yes",
    "Yes!",
    " OK ",
    "y",
    "yes, please",
    "Go ahead.",
    "是",
    "是的。",
    "好",
    "好的！",
    "可以",
    "确认",
    "同意",
    "ＯＫ",
]
NO = ["no", "No.", "NO!", "cancel", "don't", "Don’t!", "no, thanks", "不", "否", "取消", "拒绝。", "不可以", "不同意"]
UNCLEAR = ["", "?", "yes no", "yes but not /a", "not yes", "不是不可以", "可以吗?", "好不好", "noted", "okay then what"]


@pytest.mark.parametrize("text", YES)
async def test_a_clear_yes(text: str):
    assert await verdict(text) is True


@pytest.mark.parametrize("text", NO)
async def test_a_clear_no(text: str):
    assert await verdict(text) is False


@pytest.mark.parametrize("text", UNCLEAR)
async def test_anything_else_is_unclear(text: str):
    with pytest.raises(UnclearAnswer):
        await verdict(text)


async def test_an_agent_that_is_not_parked_has_no_question():
    assert pending_question(agents.make_echo_agent("session")) is None


async def test_a_caller_can_not_change_what_is_called():
    agent = agents.make_confirming_agent([], "/a")("session")
    question = await parked(agent, "delete")
    forged = {"confirmed": [{"id": "call-1", "confirmed": True, "input": '{"path": "/etc"}'}]}
    with pytest.raises(UnclearAnswer, match="confirmed"):
        await read_answer(agent, question, Message(parts=[new_data_part(forged)]))


async def test_two_data_parts_are_unclear():
    agent = agents.make_confirming_agent([], "/a")("session")
    question = await parked(agent, "delete")
    parts = [new_data_part({"confirmed": True}), new_data_part({"confirmed": False})]
    with pytest.raises(UnclearAnswer, match="more than one"):
        await read_answer(agent, question, Message(parts=parts))


async def test_a_result_reaches_the_agent_as_it_was_sent():
    agent = agents.make_external_agent("session")
    question = await parked(agent, "how warm?")
    assert '{"results": [{"id": "call-1", "output": "…"}]}' in question_text(question)
    sent = {"results": [{"id": "call-1", "output": "21 °C", "metadata": {"celsius": 21}}]}
    answer = await read_answer(agent, question, Message(parts=[new_data_part(sent)]))
    assert isinstance(answer, ExternalExecutionResultEvent)
    [result] = answer.execution_results
    assert (result.id, result.name, result.output) == ("call-1", "measure", "21 °C")
    assert (result.state, result.metadata) == ("success", {"celsius": 21})


# --- Over a real server ---------------------------------------------------------------------------------------------


async def park(client: Client, text: str = "delete") -> tuple[Task, list[StreamResponse]]:
    events = await events_of(client, message(text, context_id="same"))
    assert states(events) == [SUBMITTED, WORKING, INPUT_REQUIRED]
    return events[0].task, events


@both_versions
async def test_a_permission_is_asked_for_in_words_and_as_an_event(version: str):
    deleted: list[str] = []
    async with serve(agents.make_confirming_agent(deleted, "/a", "/b")) as service, service.client(version) as client:
        task, events = await park(client)
        stored = await client.get_task(GetTaskRequest(id=task.id))
    assert status_text(events) == (
        'The agent asks for permission to call:\n- delete({"path": "/a"})\n- delete({"path": "/b"})\nAnswer yes or no.'
    )
    for source in (events[-1], stored):
        question = agent_events(source)
        assert isinstance(question, RequireUserConfirmEvent)
        assert [(call.id, call.name, call.input) for call in question.tool_calls] == [
            ("call-1", "delete", '{"path": "/a"}'),
            ("call-2", "delete", '{"path": "/b"}'),
        ]
    assert deleted == []


DENIED = '<system-reminder>The execution of tool "delete" is denied by user!</system-reminder>'


@both_versions
@pytest.mark.parametrize(
    ("answer", "deleted", "text"),
    [
        ("Yes.", ["/a", "/b"], "deleted /a; deleted /b"),
        ("好的！", ["/a", "/b"], "deleted /a; deleted /b"),
        ("no", [], f"{DENIED}; {DENIED}"),
        ("拒绝", [], f"{DENIED}; {DENIED}"),
        (new_data_part({"confirmed": True}), ["/a", "/b"], "deleted /a; deleted /b"),
        (new_data_part({"confirmed": False}), [], f"{DENIED}; {DENIED}"),
        (
            new_data_part({"confirmed": [{"id": "call-2", "confirmed": True}, {"id": "call-1", "confirmed": False}]}),
            ["/b"],
            f"{DENIED}; deleted /b",
        ),
    ],
)
async def test_the_next_message_answers(version: str, answer: str | Part, deleted: list[str], text: str):
    done: list[str] = []
    async with serve(agents.make_confirming_agent(done, "/a", "/b")) as service, service.client(version) as client:
        task, _ = await park(client)
        events = await events_of(client, message(answer, task_id=task.id, context_id="same"))
        stored = await client.get_task(GetTaskRequest(id=task.id))
    assert states(events) == [WORKING, COMPLETED]
    assert sorted(text_of(events).split("; ")) == sorted(text.split("; "))
    assert done == deleted
    assert stored.status.state == COMPLETED
    assert [entry.role for entry in stored.history] == [Role.ROLE_USER, Role.ROLE_AGENT, Role.ROLE_USER]


@pytest.mark.parametrize(
    "answer",
    [
        "maybe",
        "yes, but only the first",
        "确认一下再说",
        Part(raw=b"yes", media_type="text/plain"),
        new_data_part({"confirmed": "yes"}),
        new_data_part({"confirmed": 1}),
        new_data_part({"confirmed": []}),
        new_data_part({"confirmed": [{"id": "call-9", "confirmed": True}]}),
        new_data_part({"confirmed": [{"id": "call-1", "confirmed": True}, {"id": "call-1", "confirmed": False}]}),
        new_data_part({"confirmed": True, "tool_calls": [{"name": "format_disk"}]}),
        new_data_part([True]),
    ],
)
async def test_an_unclear_answer_is_asked_again(answer: str | Part):
    done: list[str] = []
    async with serve(agents.make_confirming_agent(done, "/a")) as service, service.client() as client:
        task, asked = await park(client)
        events = await events_of(client, message(answer, task_id=task.id, context_id="same"))
        assert states(events) == [WORKING, INPUT_REQUIRED]
        assert status_text(events).startswith("The answer ")
        assert status_text(events).endswith(status_text(asked))
        assert done == []
        assert await ask(client, message("yes", task_id=task.id, context_id="same")) == "deleted /a"


async def test_calls_left_out_of_an_answer_are_asked_again():
    done: list[str] = []
    async with serve(agents.make_confirming_agent(done, "/a", "/b")) as service, service.client() as client:
        task, _ = await park(client)
        answer = new_data_part({"confirmed": [{"id": "call-2", "confirmed": True}]})
        events = await events_of(client, message(answer, task_id=task.id, context_id="same"))
        assert states(events) == [WORKING, INPUT_REQUIRED]
        question = agent_events(events[-1])
        assert isinstance(question, RequireUserConfirmEvent)
        assert [call.id for call in question.tool_calls] == ["call-1"]
        await ask(client, message("ok", task_id=task.id, context_id="same"))
    assert done == ["/b", "/a"]


async def test_an_answer_may_name_the_task_alone():
    done: list[str] = []
    async with serve(agents.make_confirming_agent(done, "/a")) as service, service.client() as client:
        task, _ = await park(client)
        events = await events_of(client, message("yes", task_id=task.id))
    assert {event.status_update.context_id for event in events if event.HasField("status_update")} == {"same"}
    assert done == ["/a"]


@both_versions
async def test_a2a_agent_can_answer(version: str):
    done: list[str] = []
    async with serve(agents.make_confirming_agent(done, "/a")) as service, service.agent(version) as agent:
        question = await agent.reply(UserMsg("user", "delete"))
        answer = await agent.reply(UserMsg("user", "可以"))
    assert 'delete({"path": "/a"})' in (question.get_text_content() or "")
    assert answer.get_text_content() == "deleted /a"
    assert done == ["/a"]


@both_versions
async def test_cancel_of_a_parked_task_closes_the_question(version: str):
    done: list[str] = []
    async with serve(agents.make_confirming_agent(done, "/a")) as service, service.client(version) as client:
        task, _ = await park(client)
        canceled = await client.cancel_task(CancelTaskRequest(id=task.id))
        assert canceled.status.state == CANCELED
        agent = service.only_agent
        assert agent.state.get_unfinished_tool_calls(agent.name) == []
        assert await ask(client, message("what else?", context_id="same")) == "something else"
        stored = await client.get_task(GetTaskRequest(id=task.id))
    assert stored.status.state == CANCELED
    assert agent_events(stored) is None
    assert done == []


async def test_cancel_of_a_parked_task_does_not_wait_for_a_busy_conversation():
    gate = Gate()

    def make_agent(session_id: str) -> Agent:
        async def script(messages):
            if agents.user_texts(messages)[-1] == "delete":
                yield ToolCallBlock(id="call-1", name="delete", input="{}")
            else:
                gate.arrived.set()
                await gate.open.wait()
                yield "done"

        async def delete() -> None:
            """Delete everything."""

        return agents.scripted(script, agents.AskingTool(delete))

    async with serve(make_agent) as service, service.client() as client:
        parked_task, _ = await park(client)
        running = stream(client, message("something slow", context_id="same"))
        await until_task(running)
        await gate.arrived.wait()
        canceled = await client.cancel_task(CancelTaskRequest(id=parked_task.id))
        assert canceled.status.state == CANCELED
        assert not gate.open.is_set()
        gate.open.set()
        assert text_of([event async for event in running]) == "done"


async def test_cancel_gives_up_on_an_agent_that_does_not_close_its_question(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(executor_module, "STOP_GRACE", 0.05)

    class Stubborn(Agent):
        async def reply_stream(self, inputs, **options):  # type: ignore[override]
            if isinstance(inputs, UserInterruptEvent):
                await asyncio.Event().wait()
            async for event in super().reply_stream(inputs, **options):
                yield event

    def make_agent(session_id: str) -> Agent:
        agent = agents.make_confirming_agent([], "/a")(session_id)
        agent.__class__ = Stubborn
        return agent

    async with serve(make_agent) as service, service.client() as client:
        task, _ = await park(client)
        canceled = await client.cancel_task(CancelTaskRequest(id=task.id))
    assert canceled.status.state == CANCELED
    assert "has not closed its question" in caplog.text


async def test_a_new_task_withdraws_the_question_and_a_late_answer_fails():
    done: list[str] = []
    async with serve(agents.make_confirming_agent(done, "/a")) as service, service.client() as client:
        old, _ = await park(client)
        assert await ask(client, message("never mind", context_id="same")) == "something else"
        events = await events_of(client, message("yes", task_id=old.id, context_id="same"))
        assert states(events) == [WORKING, FAILED]
        assert "no longer waits" in status_text(events)
    assert done == []


async def test_an_answer_is_never_taken_for_another_tasks_question():
    done: list[str] = []

    def make_agent(session_id: str) -> Agent:
        async def delete(path: str) -> str:
            """Delete a file."""
            done.append(path)
            return f"deleted {path}"

        async def script(messages):
            if messages[-1].role == "user":
                path = agents.user_texts(messages)[-1]
                yield ToolCallBlock(id=uuid4().hex, name="delete", input=f'{{"path": "{path}"}}')
            else:
                yield agents.tool_results(messages)[-1]

        return agents.scripted(script, agents.AskingTool(delete))

    async with serve(make_agent) as service, service.client() as client:
        old, _ = await park(client, "/old")
        new, _ = await park(client, "/new")
        events = await events_of(client, message("yes", task_id=old.id, context_id="same"))
        assert states(events)[-1] == FAILED
        assert done == []
        canceled = await client.cancel_task(CancelTaskRequest(id=new.id))
        assert canceled.status.state == CANCELED
    assert done == []


async def test_an_answer_to_a_conversation_that_was_let_go_fails():
    done: list[str] = []
    make_agent = agents.make_confirming_agent(done, "/a")
    async with serve(make_agent, max_contexts=1) as service, service.client() as client:
        task, _ = await park(client)
        await ask(client, message("hello", context_id="other"))
        events = await events_of(client, message("yes", task_id=task.id, context_id="same"))
    assert states(events) == [WORKING, FAILED]
    assert done == []


@both_versions
async def test_results_of_external_tools_come_as_data(version: str):
    async with serve(agents.make_external_agent) as service, service.client(version) as client:
        task, events = await park(client, "how warm?")
        question = agent_events(events[-1])
        assert isinstance(question, RequireExternalExecutionEvent)
        assert [call.name for call in question.tool_calls] == ["measure"]
        assert 'measure({"place": "杭州"})' in status_text(events)
        unclear: dict[str, str | Part] = {
            "The answer has no data part.": "21 degrees",
            "The metadata of result 'call-1' is not what the tool needs": new_data_part(
                {"results": [{"id": "call-1", "output": "21 degrees"}]}
            ),
            "The answer must name each call once": new_data_part(
                {"results": [{"id": "call-2", "output": "21 degrees"}]}
            ),
            "The answer can't be read: results.0.output": new_data_part({"results": [{"id": "call-1"}]}),
        }
        for complaint, answer in unclear.items():
            events = await events_of(client, message(answer, task_id=task.id, context_id="same"))
            assert states(events) == [WORKING, INPUT_REQUIRED]
            assert status_text(events).startswith(complaint)
        answer = new_data_part({"results": [{"id": "call-1", "output": {"degrees": 21}, "metadata": {"celsius": 21}}]})
        assert await ask(client, message(answer, task_id=task.id, context_id="same")) == 'measured: {"degrees": 21}'


async def test_a_failed_external_call_is_told_to_the_agent():
    async with serve(agents.make_external_agent) as service, service.client() as client:
        task, _ = await park(client, "how warm?")
        answer = new_data_part({"results": [{"id": "call-1", "output": "no sensor", "state": "error"}]})
        assert await ask(client, message(answer, task_id=task.id, context_id="same")) == "measured: no sensor"
        agent = service.only_agent
    [result] = agent.state.context[-1].get_content_blocks("tool_result")
    assert result.state == "error"


async def test_cancel_of_a_task_that_waits_for_an_external_result():
    async with serve(agents.make_external_agent) as service, service.client() as client:
        task, _ = await park(client, "how warm?")
        await client.cancel_task(CancelTaskRequest(id=task.id))
        agent = service.only_agent
        assert agent.state.get_awaiting_tool_calls(agent.name) == []
