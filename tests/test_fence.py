"""A task store that servers share: the task of a worker that died, and what that one says when it was only cut off."""

# An executor need not use all that it is given.

from __future__ import annotations

import asyncio
import logging

import pytest
from a2a.auth.user import UnauthenticatedUser
from a2a.server.agent_execution import AgentExecutor
from a2a.server.cluster.task_store import ConcurrentTaskModificationError
from a2a.server.context import ServerCallContext
from a2a.server.tasks import InMemoryTaskStore, TaskUpdater
from a2a.types import CancelTaskRequest, GetTaskRequest, ListTasksRequest, Part, Task, TaskState, TaskStatus

from agentscope_rocketmq.config import Timeouts
from agentscope_rocketmq.ends import CARRIED
from agentscope_rocketmq.fence import FencedTaskStore
from tests.faults import Wire
from tests.services import Keeper, card_for, request, server_for
from tests.waiting import until

WORKING, WAITS = TaskState.TASK_STATE_WORKING, TaskState.TASK_STATE_INPUT_REQUIRED
COMPLETED, CANCELED, FAILED = (
    TaskState.TASK_STATE_COMPLETED,
    TaskState.TASK_STATE_CANCELED,
    TaskState.TASK_STATE_FAILED,
)


def run_of(request_id, attempt):
    carried = {"request_id": request_id, "attempt": attempt}
    return ServerCallContext(user=UnauthenticatedUser(), state={CARRIED: carried})


OVER_HTTP = ServerCallContext(user=UnauthenticatedUser(), state={CARRIED: None})


def task(state, text=""):
    made = Task(id="t", context_id="c", status=TaskStatus(state=state))
    made.artifacts.add(artifact_id="a").parts.add(text=text)
    return made


def text_of(task):
    return "".join(part.text for artifact in task.artifacts for part in artifact.parts)


async def stored(store):
    found = await store.get("t", OVER_HTTP)
    return found.status.state, text_of(found)


async def test_of_the_runs_of_a_request_the_latest_one_alone_saves():
    shared = InMemoryTaskStore()
    first, second = FencedTaskStore(shared), FencedTaskStore(shared)
    await first.save(task(WORKING, "half"), run_of("r", 0))
    await second.save(task(WORKING, "anew"), run_of("r", 1))
    for state in (WORKING, FAILED):
        with pytest.raises(ConcurrentTaskModificationError):
            await first.save(task(state, "half"), run_of("r", 0))
    assert await stored(first) == (WORKING, "anew")
    # The next message of the task is a request of its own, and what was taken over stays so.
    asked = await second.get("t", OVER_HTTP)
    assert asked is not None
    asked.status.state = WAITS
    await second.save(asked, run_of("r2", 0))
    with pytest.raises(ConcurrentTaskModificationError):
        await first.save(task(WORKING, "half"), run_of("r", 0))
    # Its request came to the first one again after the second one's run.
    first.note(run_of("r", 2))
    await first.save(task(COMPLETED, "half and half"), run_of("r", 0))
    assert await stored(second) == (COMPLETED, "half and half")


@pytest.mark.parametrize("state", [COMPLETED, CANCELED, FAILED, TaskState.TASK_STATE_REJECTED])
async def test_a_task_that_has_ended_does_not_change(state):
    store = FencedTaskStore(InMemoryTaskStore())
    await store.save(task(state), OVER_HTTP)
    await store.save(task(state), OVER_HTTP)  # as it is
    for other in {WORKING, WAITS, COMPLETED, CANCELED, FAILED} - {state}:
        for context in (OVER_HTTP, run_of("r", 3)):
            with pytest.raises(ConcurrentTaskModificationError):
                await store.save(task(other), context)
    assert await stored(store) == (state, "")
    listed = await store.list(ListTasksRequest(), OVER_HTTP)
    assert [each.status.state for each in listed.tasks] == [state]
    await store.delete("t", OVER_HTTP)
    assert await store.get("t", OVER_HTTP) is None


async def test_what_runs_over_http_or_once_is_stored_as_it_is():
    store = FencedTaskStore(InMemoryTaskStore())
    for context in (OVER_HTTP, run_of("r", 0)):
        await store.save(task(WORKING), context)
        assert await store.get("t", context) == task(WORKING)


class Halves(AgentExecutor):
    """Gives half an answer, and the other one when it may; with "ask" it has a question first."""

    def __init__(self, name, end):
        self.name = name
        self.end = end
        self.began_with = []
        self.task_id = ""
        self.arrived = asyncio.Event()
        self.open = asyncio.Event()

    async def execute(self, context, event_queue):
        self.began_with.append(context.current_task)
        self.task_id = context.task_id
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        if context.current_task is None:
            begun = Task(id=context.task_id, context_id=context.context_id, history=[context.message])
            begun.status.state = TaskState.TASK_STATE_SUBMITTED
            await event_queue.enqueue_event(begun)
            if context.get_user_input() == "ask":
                await updater.requires_input()
                return
        await updater.start_work()
        await updater.add_artifact([Part(text=f"half of {self.name},")])
        self.arrived.set()
        await self.open.wait()
        await updater.add_artifact([Part(text=f"half of {self.name}")])
        await updater.update_status(self.end)

    async def cancel(self, context, event_queue):
        await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()


@pytest.fixture
async def halves(request, config, make_topic):
    """Two workers with one store, of which the first one is behind a wire that can be cut, and a client.

    Its parameter is the lease, in seconds.
    """
    topic = (await make_topic("NORMAL")).topic
    config = config.model_copy(update={"timeouts": Timeouts(lease=getattr(request, "param", 10), drain=0.1)})
    cut_off, successor = Halves("A", FAILED), Halves("B", COMPLETED)
    successor.open.set()
    store = InMemoryTaskStore()
    async with Wire(config.endpoint) as wire, Keeper(config, card_cache=None) as rocketmq:
        behind = config.model_copy(update={"endpoint": wire.endpoint})
        async with server_for(cut_off, behind, topic, task_store=store):
            client = await rocketmq.client(card_for(config, topic))
            try:
                yield cut_off, successor, wire, server_for(successor, config, topic, task_store=store), client
            finally:
                cut_off.open.set()
                await wire.mend()


async def answer_of(client, asked):
    return [event async for event in client.send_message(asked)]


async def test_a_run_that_takes_over_begins_anew_and_the_other_one_can_not_undo_it(halves, caplog):
    cut_off, successor, wire, server, client = halves
    caplog.set_level(logging.INFO, "agentscope_rocketmq.fence")
    client._config.streaming = False
    calling = asyncio.create_task(answer_of(client, request("go")))
    await cut_off.arrived.wait()
    wire.cut()
    async with server:
        (answer,) = await calling
        assert answer.task.status.state == COMPLETED
        assert text_of(answer.task) == "half of B,half of B"
        assert successor.began_with == [None]
        cut_off.open.set()
        await until(lambda: "is not saved" in caplog.text)
        found = await client.get_task(GetTaskRequest(id=answer.task.id))
        assert found.status.state == COMPLETED
        assert text_of(found) == "half of B,half of B"


async def test_a_later_message_whose_worker_is_cut_off_is_taken_over_as_well(halves, caplog):
    cut_off, successor, wire, server, client = halves
    caplog.set_level(logging.INFO, "agentscope_rocketmq.fence")
    client._config.streaming = False
    (asked,) = await answer_of(client, request("ask"))
    assert asked.task.status.state == WAITS
    calling = asyncio.create_task(answer_of(client, request("go on", task_id=asked.task.id)))
    await cut_off.arrived.wait()
    wire.cut()
    async with server:
        (answer,) = await calling
        assert answer.task.status.state == COMPLETED
        assert [known.id for known in successor.began_with] == [asked.task.id]
        cut_off.open.set()
        await until(lambda: "is not saved" in caplog.text)
        assert (await client.get_task(GetTaskRequest(id=asked.task.id))).status.state == COMPLETED


@pytest.mark.parametrize("halves", [30], indirect=True)  # the cancel has to come before it is over
async def test_a_cancel_between_a_worker_s_death_and_the_run_that_takes_over_holds(halves, config):
    cut_off, successor, wire, server, client = halves
    client._config.streaming = False
    calling = asyncio.create_task(answer_of(client, request("go")))
    await cut_off.arrived.wait()
    async with server, Keeper(config, card_cache=None) as another:
        stranger = await another.client(server.card)
        wire.cut()
        cancelled = await stranger.cancel_task(CancelTaskRequest(id=cut_off.task_id))
        assert cancelled.status.state == CANCELED
        (answer,) = await calling
        assert answer.task.status.state == CANCELED
        assert successor.began_with == []
