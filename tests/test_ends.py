"""However a task is ended, and whatever its executor makes of it: one final state, and nothing after it."""

# An executor need not use all that it is given.
# ruff: noqa: ARG002

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest
from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskUpdater
from a2a.types import CancelTaskRequest, GetTaskRequest, Part, Task, TaskState, TaskStatus
from a2a.utils.errors import InternalError, TaskNotCancelableError

from agentscope_rocketmq import ends
from tests.agents import Gate, make_blocked_agent
from tests.services import Keeper, card_for, request, server_for
from tests.waiting import LIMIT, until

SUBMITTED, WORKING = TaskState.TASK_STATE_SUBMITTED, TaskState.TASK_STATE_WORKING
COMPLETED, CANCELED, FAILED = (
    TaskState.TASK_STATE_COMPLETED,
    TaskState.TASK_STATE_CANCELED,
    TaskState.TASK_STATE_FAILED,
)


class Executor(AgentExecutor):
    """Begins its task and says a word; what comes then is the subclass's."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.open = asyncio.Event()
        self.over = asyncio.Event()

    async def execute(self, context, event_queue):
        await event_queue.enqueue_event(
            Task(
                id=context.task_id,
                context_id=context.context_id,
                status=TaskStatus(state=SUBMITTED),
                history=[context.message],
            )
        )
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        await updater.start_work()
        await updater.add_artifact([Part(text="word")], artifact_id="a")
        self.arrived.set()
        try:
            await self.work(updater)
        finally:
            self.over.set()

    async def work(self, updater):
        await self.open.wait()
        await updater.complete()

    async def cancel(self, context, event_queue):
        await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()


class Swallows(Executor):
    """Takes a cancel for a reason to complete."""

    async def work(self, updater):
        with contextlib.suppress(asyncio.CancelledError):
            await self.open.wait()
        await updater.add_artifact([Part(text="more")], artifact_id="a", append=True)
        await updater.complete()


class Ignores(Executor):
    """Does not hear of a cancel at all until its gate is opened."""

    async def work(self, updater):
        while not self.open.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.open.wait()
        await updater.complete()

    async def cancel(self, context, event_queue):
        """Nothing."""


class CanNot(Ignores):
    """Refuses to cancel."""

    async def cancel(self, context, event_queue):
        raise NotImplementedError


class Hangs(Swallows):
    """Its cancel never returns."""

    async def cancel(self, context, event_queue):
        await asyncio.Event().wait()


class HangsOn(Hangs):
    """Its cancel does not mind being cancelled either, until the gate is opened."""

    async def cancel(self, context, event_queue):
        while not self.open.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.open.wait()
        raise ConnectionError


class GoesOn(Executor):
    """Goes on after its end."""

    async def work(self, updater):
        await updater.complete()
        again = TaskUpdater(updater.event_queue, updater.task_id, updater.context_id)  # this one would refuse
        await again.start_work()
        await again.failed()


class SaysNothing(Executor):
    """Ends without an end."""

    async def work(self, updater):
        """Nothing."""


class Breaks(Executor):
    """Fails in the middle."""

    async def work(self, updater):
        raise ConnectionError("the password is hunter2")


class IsCutOff(Executor):
    """What it waits for is cancelled, by nobody that wants it to end."""

    async def work(self, updater):
        waited_for = asyncio.create_task(self.open.wait())
        asyncio.get_running_loop().call_soon(waited_for.cancel)
        await waited_for


class BreaksAtOnce(Executor):
    """Fails before it has said anything."""

    async def execute(self, context, event_queue):
        raise ConnectionError("the password is hunter2")


class Reading:
    """One stream, read to its end in a task of its own."""

    def __init__(self, client):
        self.events = []
        self._task = asyncio.create_task(self._read(client))

    async def _read(self, client):
        async with asyncio.timeout(LIMIT):
            async for event in client.send_message(request("go")):
                self.events.append(event)

    async def task_id(self):
        await until(lambda: self.events or self._task.done())
        return self.events[0].task.id

    async def whole(self):
        await self._task
        return self.events


def states(events):
    return [e.status_update.status.state for e in events if e.HasField("status_update")]


def check_one_end(events, state):
    """The stream has one final state, and it is the last thing in it."""
    final = [s for s in states(events) if s in (COMPLETED, CANCELED, FAILED)]
    assert final == [state]
    assert events[-1].status_update.status.state == state


@pytest.mark.parametrize("kind", [Executor, Swallows, Ignores, CanNot, Hangs, HangsOn])
async def test_a_cancel_ends_the_task_whatever_the_executor_makes_of_it(config, topic, rocketmq, monkeypatch, kind):
    monkeypatch.setattr(ends, "STOP_GRACE", 0.5)
    executor = kind()
    try:
        async with server_for(executor, config, topic):
            client = await rocketmq.client(card_for(config, topic))
            reading = Reading(client)
            await executor.arrived.wait()
            # As another process would, which knows the id alone.
            async with Keeper(config, card_cache=None) as another:
                stranger = await another.client(card_for(config, topic))
                task_id = await reading.task_id()
                cancelled = await stranger.cancel_task(CancelTaskRequest(id=task_id))
                assert cancelled.status.state == CANCELED
                check_one_end(await reading.whole(), CANCELED)
                executor.open.set()
                await executor.over.wait()
                found = await stranger.get_task(GetTaskRequest(id=task_id))
                assert found.status.state == CANCELED
                with pytest.raises(TaskNotCancelableError):
                    await stranger.cancel_task(CancelTaskRequest(id=task_id))
    finally:
        executor.open.set()


@pytest.mark.parametrize(
    ("kind", "state"),
    [(GoesOn, COMPLETED), (SaysNothing, FAILED), (Breaks, FAILED), (IsCutOff, FAILED)],
    ids=str,
)
async def test_nothing_passes_after_the_end_and_none_is_left_without_one(config, topic, rocketmq, caplog, kind, state):
    executor = kind()
    async with server_for(executor, config, topic):
        client = await rocketmq.client(card_for(config, topic))
        events = await Reading(client).whole()
        check_one_end(events, state)
        assert "hunter2" not in str(events)
        assert (kind is not Breaks) or "hunter2" in caplog.text
        found = await client.get_task(GetTaskRequest(id=next(e.task.id for e in events if e.HasField("task"))))
        assert found.status.state == state


async def test_a_run_that_fails_before_its_task_is_an_error_without_details(config, topic, rocketmq):
    async with server_for(BreaksAtOnce(), config, topic):
        client = await rocketmq.client(card_for(config, topic))
        with pytest.raises(InternalError, match="ConnectionError") as caught:
            await Reading(client).whole()
        assert "hunter2" not in str(caught.value)


async def test_concurrent_cancels_and_a_completion_make_one_end(config, topic, rocketmq):
    """Whoever comes first; the others are told."""
    executor = Executor()
    async with server_for(executor, config, topic), Keeper(config, card_cache=None) as another:
        first, second = [await each.client(card_for(config, topic)) for each in (rocketmq, another)]
        for number in range(12):
            executor.arrived.clear()
            executor.open.clear()
            reading = Reading(first)
            await executor.arrived.wait()
            asked = CancelTaskRequest(id=await reading.task_id())
            cancels = [asyncio.create_task(caller.cancel_task(asked)) for caller in (first, second, first, second)]
            await asyncio.sleep(random.Random(number).random() * 0.06)
            executor.open.set()
            results = await asyncio.gather(*cancels, return_exceptions=True)
            events = await reading.whole()
            end = states(events)[-1]
            check_one_end(events, end)
            assert end in (COMPLETED, CANCELED)
            assert (await second.get_task(GetTaskRequest(id=asked.id))).status.state == end
            for result in results:
                if not isinstance(result, TaskNotCancelableError):
                    assert isinstance(result, Task), result
                    assert result.status.state == end == CANCELED


async def test_an_agent_that_completes_while_it_is_cancelled_has_one_end(config, topic, rocketmq):
    gates = []

    def make(session_id):
        gates.append(Gate())
        return make_blocked_agent(gates[-1])(session_id)

    async with server_for(make, config, topic):
        for number in range(6):
            client = await rocketmq.client(card_for(config, topic))
            reading = Reading(client)
            await until(lambda number=number: len(gates) > number)
            await gates[-1].arrived.wait()
            asked = CancelTaskRequest(id=await reading.task_id())
            cancel = asyncio.create_task(client.cancel_task(asked))
            await asyncio.sleep(random.Random(number).random() * 0.03)
            gates[-1].open.set()
            await asyncio.gather(cancel, return_exceptions=True)
            events = await reading.whole()
            check_one_end(events, states(events)[-1])
