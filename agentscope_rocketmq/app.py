"""The A2A app of a server: the a2a-sdk's routes around an executor, with the traps of its request handler closed."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import OrderedDict
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import httpx
from a2a.server.agent_execution import SimpleRequestContextBuilder
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.routes import DefaultServerCallContextBuilder, create_jsonrpc_routes
from a2a.server.tasks import (
    BasePushNotificationSender,
    InMemoryPushNotificationConfigStore,
    InMemoryTaskStore,
)
from a2a.types import ListTasksResponse, SubscribeToTaskRequest, Task, TaskState, TaskStatus
from a2a.utils.errors import InvalidParamsError, TaskNotCancelableError, UnsupportedOperationError
from a2a.utils.push_url_validator import validate_push_notification_url
from starlette.applications import Starlette

from agentscope_rocketmq.ends import CARRIED, OneEnd, has_ended, is_end
from agentscope_rocketmq.fence import FencedTaskStore
from agentscope_rocketmq.owners import CONTEXT_HEADER
from agentscope_rocketmq.routes import new_task_id

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator

    from a2a.server.agent_execution import AgentExecutor, RequestContext
    from a2a.server.context import ServerCallContext
    from a2a.server.tasks import TaskStore
    from a2a.types import (
        AgentCard,
        CancelTaskRequest,
        ListTasksRequest,
        Message,
        SendMessageRequest,
        TaskPushNotificationConfig,
    )
    from starlette.requests import Request

__all__ = ["A2AApp", "BoundedPushConfigStore", "BoundedTaskStore"]

logger = logging.getLogger(__name__)

_AT_WORK = (TaskState.TASK_STATE_SUBMITTED, TaskState.TASK_STATE_WORKING)
_ENDED = (
    TaskState.TASK_STATE_COMPLETED,
    TaskState.TASK_STATE_CANCELED,
    TaskState.TASK_STATE_FAILED,
    TaskState.TASK_STATE_REJECTED,
)
# A task that waits for input is kept in the store; what the SDK holds beside it (queues, tasks of the loop) is let go
# after this many seconds, and made anew by the next message.
_INTERRUPTED_SECONDS = 600.0
# Of ended tasks, and as much of waiting ones.
_MOST_BYTES = 128 * 2**20
# What a part takes in memory beside its content (protobuf in C: 82 bytes with 11 of text).
_PART_BYTES = 80
_PUSH_SECONDS = 10.0
# Of what the bridge says of a request: the task that goes on when its answer (`return_immediately`) is given.
_GOES_ON = "goes_on"
_CLOSE_SECONDS = 10.0


class _Kept:
    """Tasks that ended, or those that wait: in which order they go, and how large they are."""

    def __init__(self, *, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._bytes = 0
        self._tasks: OrderedDict[tuple[str, str], tuple[ServerCallContext, TaskStatus, int]] = OrderedDict()

    def put(self, key: tuple[str, str], task: Task, context: ServerCallContext) -> None:
        """Make a task the last one to go."""
        _, status, size = self._tasks.get(key, (context, None, 0))
        # Measured once for each status: a task may be saved with every event, and each time that is all of it.
        if status != task.status:
            status = TaskStatus()
            status.CopyFrom(task.status)
            size = _memory(task)
        self.drop(key)
        self._tasks[key] = context, status, size
        self._bytes += size

    def drop(self, key: tuple[str, str]) -> None:
        """Let one go that may not be here."""
        _, _, size = self._tasks.pop(key, (None, None, 0))
        self._bytes -= size

    def too_many(self) -> Iterator[tuple[str, ServerCallContext]]:
        """Let the oldest go until the rest is within bounds, or the last one; their ids and whose they are."""
        while len(self._tasks) > self._most or (self._bytes > self._most_bytes and len(self._tasks) > 1):
            (_, task_id), (context, _, size) = self._tasks.popitem(last=False)
            self._bytes -= size
            yield task_id, context


class BoundedTaskStore(InMemoryTaskStore):
    """Tasks in memory, as the a2a-sdk keeps them, but not for ever.

    Args:
        most: Ended tasks to keep, and as many that wait for input or authentication; beyond that the one that ended
            first, or has waited longest, is forgotten. Tasks at work always stay.
        most_bytes: Memory that the ended ones may take, and as much for those that wait; the last one always stays.
    """

    def __init__(self, *, most: int, most_bytes: int = _MOST_BYTES) -> None:
        # The SDK saves the whole task with every event of a stream: a copy each time costs a long answer the square of
        # its length. What is read is copied instead, so that no reader sees a task change under its hands.
        super().__init__(use_copying=False)
        self._ended = _Kept(most=most, most_bytes=most_bytes)
        self._waiting = _Kept(most=most, most_bytes=most_bytes)

    async def save(self, task: Task, context: ServerCallContext) -> None:
        """Save a task; see `TaskStore.save`."""
        await super().save(task, context)
        key = context.user.user_name, task.id
        waits = task.status.state not in _AT_WORK + _ENDED
        if not waits:
            self._waiting.drop(key)
        if task.status.state in _AT_WORK:
            return
        kept = self._waiting if waits else self._ended
        kept.put(key, task, context)
        for task_id, owner in kept.too_many():
            await super().delete(task_id, owner)

    async def get(self, task_id: str, context: ServerCallContext) -> Task | None:
        """Read a task; see `TaskStore.get`."""
        task = await super().get(task_id, context)
        return None if task is None else _copy(task)

    async def list(self, params: ListTasksRequest, context: ServerCallContext) -> ListTasksResponse:
        """Read many; see `TaskStore.list`."""
        listed = await super().list(params, context)
        copied = ListTasksResponse()
        copied.CopyFrom(listed)
        return copied


class BoundedPushConfigStore(InMemoryPushNotificationConfigStore):
    """Push notification configurations in memory, as the a2a-sdk keeps them, but not for ever.

    Args:
        most: Tasks to keep configurations of; beyond that those of the task that got its first one longest ago go.
        most_a_task: Configurations of one task; another one is refused.
    """

    def __init__(self, *, most: int, most_a_task: int = 16) -> None:
        super().__init__()
        self._most = most
        self._most_a_task = most_a_task
        self._order: OrderedDict[tuple[str, str], ServerCallContext] = OrderedDict()

    async def set_info(
        self, task_id: str, notification_config: TaskPushNotificationConfig, context: ServerCallContext
    ) -> TaskPushNotificationConfig:
        """Set one; see `PushNotificationConfigStore.set_info`."""
        known = await self.get_info(task_id, context)
        if len(known) >= self._most_a_task and notification_config.id not in {config.id for config in known}:
            raise InvalidParamsError(
                f"Task {task_id} has {len(known)} push notification configurations: delete one before adding another."
            )
        stored: TaskPushNotificationConfig = await super().set_info(task_id, notification_config, context)
        self._order.setdefault((self.owner_resolver(context), task_id), context)
        while len(self._order) > self._most:
            (_, oldest), owner = self._order.popitem(last=False)
            await super().delete_info(oldest, owner)
        return stored

    async def delete_info(self, task_id: str, context: ServerCallContext, config_id: str | None = None) -> None:
        """Delete one, or all of a task; see `PushNotificationConfigStore.delete_info`."""
        await super().delete_info(task_id, context, config_id)
        if not await self.get_info(task_id, context):
            self._order.pop((self.owner_resolver(context), task_id), None)


class _RequestHandler(DefaultRequestHandler):
    """The SDK's handler, with checks that its behaviour at the edges asks for (measured on a2a-sdk 1.3)."""

    def __init__(self, executor: AgentExecutor, task_store: TaskStore, card: AgentCard, **options: Any) -> None:
        super().__init__(executor, task_store, card, **options)
        self._tasks = task_store

    async def on_message_send(self, params: SendMessageRequest, context: ServerCallContext) -> Message | Task:
        await self._check_task(params, context)
        begun = await self._begun(params, context)
        answer: Message | Task
        if begun is None:
            answer = await super().on_message_send(params, context)
        elif params.configuration.return_immediately:
            answer = begun
        else:
            async for _ in self._follow(begun, context):
                pass
            answer = await self._tasks.get(begun.id, context) or begun
        carried = context.state.get(CARRIED)
        if carried and isinstance(answer, Task) and not has_ended(answer):
            carried[_GOES_ON] = answer.id
        return answer

    async def on_message_send_stream(
        self, params: SendMessageRequest, context: ServerCallContext
    ) -> AsyncGenerator[Any, None]:
        await self._check_task(params, context)
        begun = await self._begun(params, context)
        events = super().on_message_send_stream(params, context) if begun is None else self._follow(begun, context)
        async with aclosing(events):
            async for event in events:
                yield event
                if is_end(event):
                    # An executor that goes on has nothing more to say.
                    return

    async def on_cancel_task(self, params: CancelTaskRequest, context: ServerCallContext) -> Task | None:
        task: Task | None = await super().on_cancel_task(params, context)
        if task is not None and task.status.state != TaskState.TASK_STATE_CANCELED:
            # It ended while it was being cancelled.
            raise TaskNotCancelableError
        return task

    async def _begun(self, params: SendMessageRequest, context: ServerCallContext) -> Task | None:
        """The task of a request that was given back and came again: it was begun here, and is not begun twice."""
        carried = context.state.get(CARRIED)
        if params.message.task_id or not carried:
            return None
        task = await self._tasks.get(carried["task_id"], context)
        if task is not None and task.status.state in _AT_WORK and not await self._runs_here(task.id):
            # In a store that is shared, the task of a worker that died: this run says all of it anew.
            if carried["attempt"]:
                await self._tasks.delete(task.id, context)
            return None
        if isinstance(self._tasks, FencedTaskStore):
            self._tasks.note(context)
        return task

    async def _runs_here(self, task_id: str) -> bool:
        return await self._active_task_registry.get(task_id) is not None

    async def _follow(self, task: Task, context: ServerCallContext) -> AsyncGenerator[Any, None]:
        """What is there of a task, and what comes until it ends or waits."""
        if task.status.state not in _AT_WORK:
            yield task
            return
        try:
            async for event in self.on_subscribe_to_task(SubscribeToTaskRequest(id=task.id), context):
                yield event
        except UnsupportedOperationError:
            # It ended meanwhile.
            yield await self._tasks.get(task.id, context) or task

    async def _check_task(self, params: SendMessageRequest, context: ServerCallContext) -> None:
        """Refuse what the SDK would run twice or lose, and fill in what it would invent."""
        message = params.message
        if not message.task_id:
            # A gateway that had to name the session says which context it gave it.
            message.context_id = message.context_id or context.state.get("headers", {}).get(CONTEXT_HEADER, "")
            return
        task = await self._tasks.get(message.task_id, context)
        if task is None:
            return
        carried = context.state.get(CARRIED)
        taken_over = carried and carried["attempt"] and not await self._runs_here(task.id)
        if task.status.state in _AT_WORK and not taken_over:
            # The SDK would drop the message, or run it beside or after the run that the task is in.
            raise UnsupportedOperationError(
                f"Task {task.id} is at work and takes no message now: wait for its end, cancel it, "
                "or send the message without a task id."
            )
        if not message.context_id:
            # The SDK would make up a new context and, after a restart, fail the task for the difference.
            message.context_id = task.context_id


def _memory(task: Task) -> int:
    """Bytes that a task takes in memory, about."""
    size: int = task.ByteSize()
    return size + _PART_BYTES * sum(len(artifact.parts) for artifact in task.artifacts)


def _copy(task: Task) -> Task:
    copied = Task()
    copied.CopyFrom(task)
    return copied


class _CallContexts(DefaultServerCallContextBuilder):
    """What the SDK knows of a request, and how it came over RocketMQ."""

    def build(self, request: Request) -> ServerCallContext:
        context = super().build(request)
        context.state[CARRIED] = request.scope.get("rocketmq")
        return context


class _RequestContexts(SimpleRequestContextBuilder):
    """Gives new tasks ids that are the same in every run of their request, and says of each task that it lives here."""

    def __init__(self, on_task: Callable[[str], None]) -> None:
        super().__init__()
        self._on_task = on_task

    async def build(
        self,
        context: ServerCallContext,
        params: SendMessageRequest | None = None,
        task_id: str | None = None,
        context_id: str | None = None,
        task: Task | None = None,
    ) -> RequestContext:
        if params is not None:
            carried = context.state.get(CARRIED) or {}
            task_id = task_id or carried.get("task_id") or new_task_id(uuid.uuid4().hex)
            context_id = context_id or carried.get("context_id")
        built = await super().build(context, params, task_id, context_id, task)
        if built.task_id is not None:
            self._on_task(built.task_id)
        return built


class A2AApp:
    """An ASGI app that serves an executor by A2A's JSON-RPC, 1.0 and 0.3.

    Args:
        executor: Does the work.
        card: The agent's card, complete.
        path: Path of the JSON-RPC endpoint.
        task_store: Where tasks are kept.
        on_task: Called with the id of each task that this instance begins, or goes on with.
        extended_card: What authenticated callers get as extended card; None for none.
        push_url_validator: Says of a URL whether notifications may be sent there; None takes the a2a-sdk's rule,
            which refuses addresses of private networks.
        most_push_configs: Tasks whose push notification configurations are kept, up to 16 each.
    """

    def __init__(
        self,
        executor: AgentExecutor,
        card: AgentCard,
        *,
        path: str,
        task_store: TaskStore,
        on_task: Callable[[str], None],
        extended_card: AgentCard | None = None,
        push_url_validator: Callable[[str], Awaitable[bool]] | None = None,
        most_push_configs: int = 10_000,
    ) -> None:
        validator = push_url_validator or validate_push_notification_url
        self._http = httpx.AsyncClient(timeout=_PUSH_SECONDS)
        push_configs = BoundedPushConfigStore(most=most_push_configs)
        self._executor = OneEnd(executor)
        self._handler = _RequestHandler(
            self._executor,
            task_store,
            card,
            request_context_builder=_RequestContexts(on_task),
            push_config_store=push_configs,
            push_sender=BasePushNotificationSender(self._http, push_configs, push_url_validator=validator),
            push_url_validator=validator,
            extended_agent_card=extended_card,
            interrupted_task_timeout=_INTERRUPTED_SECONDS,
        )
        routes = create_jsonrpc_routes(self._handler, path, context_builder=_CallContexts(), enable_v0_3_compat=True)
        self._app = Starlette(routes=routes)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one ASGI connection; of a request that came over RocketMQ, until the agent is done with it.

        Its answer may be given long before: as long as this call lasts its lease is kept, and its place.
        """
        await self._app(scope, receive, send)
        if task_id := (scope.get("rocketmq") or {}).get(_GOES_ON):
            await self._executor.wait(task_id)

    async def aclose(self) -> None:
        """End the runs still at work, within 10 s; their tasks stay as they are."""
        # Not a timeout around it: it waits even then for an agent that does not mind being cancelled.
        ending = asyncio.create_task(self._handler.aclose(), name="a2a-app.close")
        try:
            done, _ = await asyncio.wait({ending}, timeout=_CLOSE_SECONDS)
        finally:
            ending.cancel()
            await self._http.aclose()
        if not done:
            logger.warning("An agent did not end within %g s of its cancellation and is left behind", _CLOSE_SECONDS)
