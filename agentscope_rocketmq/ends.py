"""One end for each task, whatever an executor does.

An executor may ignore a cancel, swallow it and complete, fail without a word, or go on after it has said that it is
done. The a2a-sdk passes all of that on: a task that was canceled becomes completed, or works for ever. Here the first
final state is the task's end and nothing passes after it; a cancel ends the task within `STOP_GRACE` whether or not
the executor obeys; a run that says nothing ends as failed; and so does, without being run, what kills its workers.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, cast

from a2a.compat.v0_3.conversions import to_compat_task
from a2a.server.agent_execution import AgentExecutor
from a2a.server.events import EventQueue
from a2a.types import (
    Message,
    Part,
    Role,
    SendMessageResponse,
    Task,
    TaskState,
    TaskStatus,
    TaskStatusUpdateEvent,
)
from a2a.utils.errors import A2AError, InternalError
from google.protobuf.json_format import MessageToDict

from agentscope_rocketmq.asgi import cancelled

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from a2a.server.agent_execution import RequestContext
    from a2a.server.events import Event

__all__ = ["CARRIED", "STOP_GRACE", "OneEnd", "failed_result", "has_ended", "is_end"]

logger = logging.getLogger(__name__)

CARRIED = "rocketmq"
"""Key in a call's state: what the bridge says of a request, None for one that came over HTTP."""

STOP_GRACE = 15.0
"""Seconds that a cancelled executor gets to end its task and itself; then the task ends without it."""

_ENDED = frozenset(
    {
        TaskState.TASK_STATE_COMPLETED,
        TaskState.TASK_STATE_CANCELED,
        TaskState.TASK_STATE_FAILED,
        TaskState.TASK_STATE_REJECTED,
    }
)
_WAITING = frozenset({TaskState.TASK_STATE_INPUT_REQUIRED, TaskState.TASK_STATE_AUTH_REQUIRED})


def is_end(event: Event) -> bool:
    """Whether an event is the last one of its stream: a final state, or a bare message."""
    return isinstance(event, Message) or _state(event) in _ENDED


def has_ended(task: Task) -> bool:
    """Whether the state of a task is final."""
    return task.status.state in _ENDED


def failed_result(task_id: str, context_id: str, why: str, *, legacy: bool) -> dict[str, Any]:
    """A failed task as the result of a JSON-RPC response, for a request that reached no executor.

    Args:
        task_id: Id of the task.
        context_id: Id of its context.
        why: For the caller's eyes.
        legacy: Whether the caller speaks A2A 0.3.
    """
    update = _status(task_id, context_id, TaskState.TASK_STATE_FAILED, why)
    response = SendMessageResponse(task=Task(id=task_id, context_id=context_id, status=update.status))
    result: dict[str, Any] = MessageToDict(response)
    if legacy:
        result = to_compat_task(response.task).model_dump(mode="json", by_alias=True, exclude_none=True)
    return result


class _Progress:
    """What was said of one task in the runs under way, by whoever said it.

    Attributes:
        users: Executions and cancels at work on it.
        said: Whether anything was said.
        waits: Whether the last state said is one that waits for the caller.
        ended: Whether its end was said.
        over: Set when nobody is at work on it any more.
    """

    def __init__(self) -> None:
        self.users = 0
        self.said = False
        self.waits = False
        self.ended = False
        self.over = asyncio.Event()


class _Gate(EventQueue):
    """The a2a-sdk's queue, closed after the end."""

    def __init__(self, queue: EventQueue, progress: _Progress) -> None:
        self._queue = queue
        self._progress = progress

    async def enqueue_event(self, event: Event) -> None:
        if self._progress.ended:
            logger.info("An executor went on after the end of its task: %s is dropped", type(event).__name__)
            return
        self._progress.said = True
        self._progress.ended = is_end(event)
        if (state := _state(event)) is not None:
            self._progress.waits = state in _WAITING
        await self._queue.enqueue_event(event)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


class OneEnd(AgentExecutor):
    """Around an executor: sees to it that each task has exactly one end.

    Args:
        executor: Does the work.
    """

    def __init__(self, executor: AgentExecutor) -> None:
        self._executor = executor
        self._tasks: dict[str, _Progress] = {}
        # What is left behind because it does not mind being cancelled is here until it ends.
        self._at_work: set[asyncio.Task[None]] = set()

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        """See `AgentExecutor.execute`."""
        progress = self._enter(context)
        gate = _Gate(event_queue, progress)
        try:
            if (why := _given_up(context)) is None:
                await self._run(context, gate)
            else:
                await gate.enqueue_event(_failed(context, why))
        except A2AError:
            # The executor's own refusal, where it is the answer.
            if not progress.said:
                raise
            logger.exception("The executor failed on task %s", context.task_id)
            await self._fail(context, gate, "it refused to go on")
        except Exception as error:
            logger.exception("The executor failed on task %s", context.task_id)
            await self._fail(context, gate, type(error).__name__)
        else:
            if not (progress.ended or progress.waits):
                logger.error("The executor left task %s without an end", context.task_id)
                await self._fail(context, gate, "it ended without an answer")
        finally:
            self._leave(context, progress)

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        """See `AgentExecutor.cancel`."""
        progress = self._enter(context)
        gate = _Gate(event_queue, progress)
        # Not a timeout around it: that cancels once, and waits even then for whoever does not mind being cancelled.
        work = self._begin(self._executor.cancel(context, gate), f"cancel[{context.task_id}]")
        try:
            await asyncio.wait({work}, timeout=STOP_GRACE)
            if not work.done():
                logger.warning("The executor did not cancel task %s within %g s", context.task_id, STOP_GRACE)
            elif not work.cancelled() and (error := work.exception()) is not None:
                logger.error("The executor failed to cancel task %s", context.task_id, exc_info=error)
        finally:
            work.cancel()
            self._leave(context, progress)
        if not progress.ended:
            await gate.enqueue_event(_status_of(context, TaskState.TASK_STATE_CANCELED))

    async def wait(self, task_id: str) -> None:
        """Wait until nobody is at work on a task."""
        if (progress := self._tasks.get(task_id)) is not None:
            await progress.over.wait()

    async def _run(self, context: RequestContext, gate: _Gate) -> None:
        work = self._begin(self._executor.execute(context, gate), f"execute[{context.task_id}]")
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            if work.done() and not cancelled():
                # Something that the executor waited for was cancelled, and nobody asked this run to end.
                raise RuntimeError("the executor ended with a CancelledError of its own") from None
            if work.done():
                raise
            work.cancel()
            await asyncio.wait({work}, timeout=STOP_GRACE)
            if not work.done():
                logger.warning("The executor of task %s does not mind being cancelled: left behind", context.task_id)
            raise

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run something of the executor's in a task that is held until it ends, however long after its cancellation."""
        task = asyncio.create_task(work, name=name)
        self._at_work.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[None]) -> None:
        self._at_work.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, so that nobody complains

    async def _fail(self, context: RequestContext, gate: _Gate, what: str) -> None:
        text = f"The agent failed: {what}. The server's log has the details under task {context.task_id}."
        if not gate._progress.said and context.current_task is None:  # noqa: SLF001  (one room)
            raise InternalError(text)
        if not gate._progress.ended:  # noqa: SLF001
            await gate.enqueue_event(_status_of(context, TaskState.TASK_STATE_FAILED, text))

    def _enter(self, context: RequestContext) -> _Progress:
        progress = self._tasks.setdefault(cast("str", context.task_id), _Progress())
        progress.users += 1
        return progress

    def _leave(self, context: RequestContext, progress: _Progress) -> None:
        progress.users -= 1
        if not progress.users:
            self._tasks.pop(cast("str", context.task_id), None)
            progress.over.set()


def _given_up(context: RequestContext) -> str | None:
    """Why a task is to fail instead of being worked on, as the bridge says; None for work."""
    carried = context.call_context.state.get(CARRIED)
    return carried["given_up"] if carried else None


def _failed(context: RequestContext, why: str) -> Task | TaskStatusUpdateEvent:
    update = _status_of(context, TaskState.TASK_STATE_FAILED, why)
    if context.current_task is not None:
        return update
    history = [] if context.message is None else [context.message]
    return Task(id=update.task_id, context_id=update.context_id, status=update.status, history=history)


def _state(event: Event) -> TaskState | None:
    return event.status.state if isinstance(event, Task | TaskStatusUpdateEvent) else None


def _status_of(context: RequestContext, state: TaskState, text: str | None = None) -> TaskStatusUpdateEvent:
    return _status(cast("str", context.task_id), cast("str", context.context_id), state, text)


def _status(task_id: str, context_id: str, state: TaskState, text: str | None = None) -> TaskStatusUpdateEvent:
    status = TaskStatus(state=state)
    status.timestamp.GetCurrentTime()
    if text is not None:
        said = Message(message_id=f"{task_id}-end", role=Role.ROLE_AGENT, parts=[Part(text=text)])
        status.message.CopyFrom(said)
    return TaskStatusUpdateEvent(task_id=task_id, context_id=context_id, status=status)
