"""AgentScope agents behind the a2a-sdk: one agent and its memory for each conversation.

`execute` starts the work of a request as a task of its own, waits for it and publishes how it ended: the one place
where a task's end is written. `cancel` interrupts that work. Only a cancellation that reaches the agent inside its own
`await` lets it keep its partial text and close its tool calls, so a reply stream is never broken off from outside.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.types import Message, Task, TaskState, TaskStatus
from a2a.utils.errors import InvalidParamsError, UnsupportedOperationError
from agentscope.agent import Agent
from agentscope.event import ReplyEndEvent, UserInterruptEvent
from agentscope.types import ReplyFinishedReason

from agentscope_rocketmq.confirmation import (
    Question,
    UnclearAnswer,
    pending_question,
    question_text,
    read_answer,
)
from agentscope_rocketmq.errors import ConfigurationError
from agentscope_rocketmq.events import (
    AGENT_EVENTS_EXTENSION,
    ReplyUpdates,
    event_metadata,
    message_to_msg,
    status_update,
)
from agentscope_rocketmq.slots import Slot

if TYPE_CHECKING:
    from a2a.server.events import EventQueue
    from a2a.types import TaskArtifactUpdateEvent, TaskStatusUpdateEvent
    from agentscope.event import AgentEvent
    from agentscope.message import Msg

__all__ = ["AgentScopeExecutor", "MakeAgent"]

logger = logging.getLogger(__name__)

MakeAgent: TypeAlias = Callable[[str], Agent | Awaitable[Agent]]
"""Makes the agent of a conversation from its session id (the A2A context id)."""

STOP_GRACE = 10.0
"""Seconds that an interrupted agent gets to close its tool calls before its task ends without it."""

_ENDED = frozenset(
    {
        TaskState.TASK_STATE_COMPLETED,
        TaskState.TASK_STATE_CANCELED,
        TaskState.TASK_STATE_FAILED,
        TaskState.TASK_STATE_REJECTED,
    }
)

_Key: TypeAlias = tuple[str, str]


class AgentScopeExecutor(AgentExecutor):
    """Answers A2A requests with AgentScope agents.

    Each conversation has an agent of its own: one for each A2A context and authenticated user, so that two users who
    name equal contexts never share one. Requests of one conversation run one after the other, in the order in which
    they came; those of different conversations run at the same time.

    A reply streams as it comes, see `events.ReplyUpdates`. What the agent needs to know from a human makes the task
    input-required, see `confirmation`. A message that begins a new task in a conversation whose agent still waits for
    an answer withdraws that question (nothing is executed) and is then worked on; a later answer to the withdrawn
    question fails its task. An exception in the agent fails the task with its class and the task id, nothing else;
    the log has the rest.

    `CancelTask` interrupts the agent, which keeps its partial text and stays usable. An agent that takes longer than
    10 s to stop is left behind: its task is canceled all the same, and later requests of the conversation wait for
    it. When the server stops, running agents are interrupted in the same way, but their tasks stay as they are.

    Args:
        make_agent: Called with the session id (the A2A context id) when a conversation needs its agent. It runs on
            the event loop, so make it `async` when it has to wait for anything. It must return a new agent each time.
            Two users may use the same session id: don't look up private state by it alone.
        max_contexts: Conversations to keep in memory. Beyond that the one idle longest is let go with its agent's
            memory, and goes on with a new agent when it is used again.

    Raises:
        ConfigurationError: `max_contexts` is less than 1.
    """

    def __init__(self, make_agent: MakeAgent, *, max_contexts: int = 10_000) -> None:
        if max_contexts < 1:
            raise ConfigurationError(f"max_contexts is {max_contexts}: it must be at least 1.")
        self._make_agent = make_agent
        self._max_contexts = max_contexts
        self._conversations: OrderedDict[_Key, _Conversation] = OrderedDict()
        self._runs: dict[str, _Run] = {}
        self._told_of_eviction = False

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        """Work on one message; called by the a2a-sdk.

        Args:
            context: The request.
            event_queue: Takes the events.

        Raises:
            InvalidParamsError: The first message of a task has no content.
            UnsupportedOperationError: The task has ended meanwhile.
        """
        message, task = context.message, context.current_task
        if message is None or context.task_id is None:
            raise InvalidParamsError(message="The request has no message.")
        if task is None:
            message_to_msg(message)
            context_id = cast("str", context.context_id)
            submitted = TaskStatus(state=TaskState.TASK_STATE_SUBMITTED)
            submitted.timestamp.GetCurrentTime()
            await event_queue.enqueue_event(
                Task(id=context.task_id, context_id=context_id, status=submitted, history=[message])
            )
        elif task.status.state in _ENDED:
            raise UnsupportedOperationError(
                message=f"Task {task.id} has ended: send the message without its id to start a new task."
            )
        else:
            # The id in the request is invented when a follow-up names only its task.
            context_id = task.context_id
        with_agent_events = AGENT_EVENTS_EXTENSION in context.requested_extensions
        updates = ReplyUpdates(
            context.task_id, context_id, message_id=message.message_id, with_agent_events=with_agent_events
        )
        run = _Run(context.task_id, context_id, event_queue, updates)
        self._runs[run.task_id] = run
        work = self._work(run, _key(context, context_id), message, task)
        run.work = asyncio.create_task(work, name=f"agent-reply:{run.task_id}")
        try:
            await asyncio.wait({run.work})
            await run.end(_outcome(run))
        except asyncio.CancelledError:
            # The server stops, or another replica has ended the task.
            run.silent = True
            await _stop(run)
            raise
        finally:
            del self._runs[run.task_id]
            run.done.set()

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        """Cancel a task, whether it runs, waits for its turn or waits for input; called by the a2a-sdk.

        Args:
            context: The request; it names the task.
            event_queue: Takes the one event that ends the task.
        """
        task_id, context_id = cast("str", context.task_id), context.context_id or ""
        run = self._runs.get(task_id)
        if run is None:
            await self._withdraw_question(_key(context, context_id), task_id)
        else:
            run.canceled = True
            run.work.cancel()
            try:
                async with asyncio.timeout(STOP_GRACE):
                    await run.done.wait()
            except TimeoutError:
                logger.warning("Task %s is canceled, but its agent has not stopped within %s s.", task_id, STOP_GRACE)
                run.silent = True
            if run.ended:
                return
        canceled = status_update(task_id, context_id, TaskState.TASK_STATE_CANCELED)
        await event_queue.enqueue_event(canceled)

    async def _work(self, run: _Run, key: _Key, message: Message, task: Task | None) -> _Outcome:
        """Answer one message, when it is its turn."""
        async with self._turn(key) as conversation:
            await run.publish(status_update(run.task_id, run.context_id, TaskState.TASK_STATE_WORKING))
            agent = conversation.agent = conversation.agent or await self._new_agent(key)
            question = pending_question(agent)
            inputs: Any
            if task is None or task.status.state != TaskState.TASK_STATE_INPUT_REQUIRED:
                if question is not None:
                    await _interrupt(agent, question)
                inputs = message_to_msg(message)
            elif question is None or conversation.asking not in (run.task_id, None):
                return _Outcome(
                    TaskState.TASK_STATE_FAILED,
                    "The agent no longer waits for this answer: the conversation went on, or its server "
                    "no longer has it in memory. Start a new task.",
                )
            else:
                try:
                    inputs = await read_answer(agent, question, message)
                except UnclearAnswer as unclear:
                    return _ask(question, preface=f"{unclear}\n")
            reason = await run.forward(agent.reply_stream(inputs))
            question = None if reason else pending_question(agent)
            if question is not None:
                conversation.asking = run.task_id
                return _ask(question)
            return _finished(reason, run.task_id)

    async def _withdraw_question(self, key: _Key, task_id: str) -> None:
        """Close the parked reply of a task that will not be answered any more.

        A busy conversation needs no help: the request whose turn it is has withdrawn the question already.
        """
        known = self._conversations.get(key)
        if known is None or known.lock.locked():
            return
        try:
            async with asyncio.timeout(STOP_GRACE), self._turn(key) as conversation:
                agent = conversation.agent
                question = None if agent is None else pending_question(agent)
                if agent is not None and question is not None and conversation.asking in (task_id, None):
                    await _interrupt(agent, question)
        except TimeoutError:
            logger.warning("Task %s is canceled, but its agent has not closed its question.", task_id)

    @asynccontextmanager
    async def _turn(self, key: _Key) -> AsyncGenerator[_Conversation]:
        """Hold a conversation for one request; the others of that conversation wait, first come first served."""
        conversation = self._conversations.setdefault(key, _Conversation())
        self._conversations.move_to_end(key)
        conversation.requests += 1
        try:
            self._let_go_of_idle()
            # Whoever waits for its turn lets others work meanwhile.
            slot = Slot.current() if conversation.lock.locked() else None
            if slot is not None:
                slot.leave()
            async with conversation.lock:
                if slot is not None:
                    await slot.enter()
                yield conversation
        finally:
            conversation.requests -= 1

    def _let_go_of_idle(self) -> None:
        surplus = len(self._conversations) - self._max_contexts
        if surplus <= 0:
            return
        idle = list(islice((key for key, entry in self._conversations.items() if not entry.requests), surplus))
        for key in idle:
            del self._conversations[key]
        if idle and not self._told_of_eviction:
            self._told_of_eviction = True
            logger.warning(
                "More than %d conversations: from now on the one idle longest loses its agent's memory. "
                "Raise max_contexts to keep more.",
                self._max_contexts,
            )

    async def _new_agent(self, key: _Key) -> Agent:
        made = self._make_agent(key[1])
        agent = await made if inspect.isawaitable(made) else made
        if any(conversation.agent is agent for conversation in self._conversations.values()):
            raise ConfigurationError(
                "make_agent returned the agent of another conversation: it must make a new one each time, "
                "else conversations would read each other's memory."
            )
        return agent


@dataclass(slots=True, eq=False)
class _Conversation:
    """One A2A context of one user.

    Attributes:
        agent: Its agent, with its memory; None until the first request has its turn.
        lock: Held by the request whose turn it is.
        requests: Requests that have or await their turn; idle at 0.
        asking: The task whose question the parked agent waits for; None before it asked for the first time.
    """

    agent: Agent | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    requests: int = 0
    asking: str | None = None


@dataclass(slots=True, frozen=True)
class _Outcome:
    """The status that a request leaves its task in."""

    state: TaskState
    text: str | None = None
    metadata: dict[str, Any] | None = None


class _Run:
    """One execution of a request.

    Attributes:
        work: The task that runs the agent.
        canceled: Whether `CancelTask` asked for its end.
        silent: Whether nothing more may be published, because the task's end was written elsewhere.
        ended: Whether a final state has been published.
        done: Set when `execute` is through.
    """

    work: asyncio.Task[_Outcome]

    def __init__(self, task_id: str, context_id: str, queue: EventQueue, updates: ReplyUpdates) -> None:
        self.task_id = task_id
        self.context_id = context_id
        self.canceled = False
        self.silent = False
        self.ended = False
        self.done = asyncio.Event()
        self._queue = queue
        self._updates = updates

    async def publish(self, event: TaskArtifactUpdateEvent | TaskStatusUpdateEvent) -> None:
        if not self.silent:
            await self._queue.enqueue_event(event)

    async def forward(self, stream: AsyncGenerator[AgentEvent | Msg, None]) -> ReplyFinishedReason | None:
        """Publish a reply as it comes; return how it finished, None when it is parked."""
        reason = None
        async with aclosing(stream):
            async for event in stream:
                if isinstance(event, ReplyEndEvent):
                    reason = ReplyFinishedReason(event.finished_reason)
                for update in self._updates.of(cast("AgentEvent", event)):
                    await self._publish_for_agent(update)
        return reason

    async def end(self, outcome: _Outcome) -> None:
        for update in self._updates.close():
            await self.publish(update)
        self.ended = outcome.state in _ENDED and not self.silent
        await self.publish(
            status_update(
                self.task_id,
                self.context_id,
                outcome.state,
                text=outcome.text,
                metadata=outcome.metadata,
            )
        )

    async def _publish_for_agent(self, update: TaskArtifactUpdateEvent | TaskStatusUpdateEvent) -> None:
        try:
            await self.publish(update)
        except asyncio.CancelledError:
            # It hit us while the queue was full, but is meant for the agent: pass it on to its next await.
            await self.publish(update)
            self.work.cancel()


def _key(context: RequestContext, context_id: str) -> _Key:
    return context.call_context.user.user_name, context_id


def _ask(question: Question, *, preface: str = "") -> _Outcome:
    return _Outcome(
        TaskState.TASK_STATE_INPUT_REQUIRED,
        preface + question_text(question),
        event_metadata(question),
    )


def _finished(reason: ReplyFinishedReason | None, task_id: str) -> _Outcome:
    if reason == ReplyFinishedReason.INTERRUPTED:
        return _Outcome(TaskState.TASK_STATE_CANCELED)
    if reason == ReplyFinishedReason.ERROR:
        return _failure("it reported an error", task_id)
    if reason == ReplyFinishedReason.EXCEED_MAX_ITERS:
        return _Outcome(
            TaskState.TASK_STATE_COMPLETED,
            "The agent reached its limit of reasoning steps; the answer may be incomplete.",
        )
    return _Outcome(TaskState.TASK_STATE_COMPLETED)


def _failure(what: str, task_id: str) -> _Outcome:
    return _Outcome(
        TaskState.TASK_STATE_FAILED,
        f"The agent failed: {what}. The server's log has the details under task {task_id}.",
    )


def _outcome(run: _Run) -> _Outcome:
    """Tell how finished work ended. An explicit cancel wins over whatever the agent made of it."""
    error = None if run.work.cancelled() else run.work.exception()
    if error is not None:
        logger.error("Task %s: the agent failed.", run.task_id, exc_info=error)
    if run.canceled or run.work.cancelled():
        return _Outcome(TaskState.TASK_STATE_CANCELED)
    if error is not None:
        return _failure(type(error).__name__, run.task_id)
    return run.work.result()


async def _stop(run: _Run) -> None:
    """Interrupt the agent and let it close its tool calls, for a bounded time."""
    run.work.cancel()
    await asyncio.wait({run.work}, timeout=STOP_GRACE)
    if not run.work.done():
        logger.error("Task %s: the agent has not stopped within %s s.", run.task_id, STOP_GRACE)
    elif not run.work.cancelled() and run.work.exception() is not None:
        logger.error(
            "Task %s: the agent failed while it stopped.",
            run.task_id,
            exc_info=run.work.exception(),
        )


async def _interrupt(agent: Agent, question: Question) -> None:
    """Close a parked reply: its calls get the result that they were interrupted."""
    async for _ in agent.reply_stream(UserInterruptEvent(reply_id=question.reply_id)):
        pass
