"""A task store that several servers share: of all runs of a request, the latest one alone writes its task.

A worker that is paused or cut off for longer than its lease goes on with what another one has taken over, and the
a2a-sdk saves whole tasks: each would undo what the other one says. Here a run that has been taken over can't save any
more, nor can anybody change a task that has ended. The a2a-sdk stops a run that it may not save.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING

from a2a.server.cluster.task_store import ConcurrentTaskModificationError
from a2a.server.tasks import TaskStore

from agentscope_rocketmq.ends import CARRIED, has_ended

if TYPE_CHECKING:
    from a2a.server.context import ServerCallContext
    from a2a.types import ListTasksRequest, ListTasksResponse, Task

__all__ = ["RUNS_KEY", "FencedTaskStore"]

logger = logging.getLogger(__name__)

RUNS_KEY = "urn:agentscope-rocketmq:runs"
"""Key in the metadata of a task that was taken over: request id -> number of its latest run, from 1."""

_REMEMBERED = 10_000


class FencedTaskStore(TaskStore):
    """Around a task store: keeps runs that were taken over from saving. It reads a task before each save.

    Between that read and the save another server may save: the store itself compares nothing.

    Args:
        store: Keeps the tasks.
    """

    def __init__(self, store: TaskStore) -> None:
        self._store = store
        # A run may get its request anew, and so be the latest one again.
        self._attempts: OrderedDict[str, int] = OrderedDict()

    def note(self, context: ServerCallContext) -> None:
        """A request that runs here was delivered here again."""
        request_id, attempt = _run(context)
        if attempt:
            self._attempts[request_id] = attempt
            while len(self._attempts) > _REMEMBERED:
                self._attempts.popitem(last=False)

    async def save(self, task: Task, context: ServerCallContext) -> None:
        """Save a task; see `TaskStore.save`.

        Raises:
            ConcurrentTaskModificationError: It has ended, or the run that saves it was taken over.
        """
        request_id, attempt = _run(context)
        attempt = max(attempt, self._attempts.get(request_id, 0))
        stored = await self._store.get(task.id, context)
        if stored is not None:
            if has_ended(stored) and stored.status != task.status:
                logger.info("Task %s has ended: what another run of it says is not saved", task.id)
                raise ConcurrentTaskModificationError(task.id)
            if _runs(stored).get(request_id, 0) > attempt:
                logger.info("Task %s was taken over: what run %d of it says is not saved", task.id, attempt)
                raise ConcurrentTaskModificationError(task.id)
        if attempt:
            task.metadata[RUNS_KEY] = {**_runs(task), request_id: attempt}
        await self._store.save(task, context)

    async def get(self, task_id: str, context: ServerCallContext) -> Task | None:
        """Read a task; see `TaskStore.get`."""
        return await self._store.get(task_id, context)

    async def list(self, params: ListTasksRequest, context: ServerCallContext) -> ListTasksResponse:
        """Read many; see `TaskStore.list`."""
        return await self._store.list(params, context)

    async def delete(self, task_id: str, context: ServerCallContext) -> None:
        """Delete a task; see `TaskStore.delete`."""
        await self._store.delete(task_id, context)


def _run(context: ServerCallContext) -> tuple[str, int]:
    """Which request a task is saved for, and which run of it this is, from 0; over HTTP there is one alone."""
    carried = context.state.get(CARRIED)
    return (carried["request_id"], carried["attempt"]) if carried else ("", 0)


def _runs(task: Task) -> dict[str, float]:
    runs = task.metadata.fields[RUNS_KEY].struct_value.fields if RUNS_KEY in task.metadata else {}
    return {request_id: attempt.number_value for request_id, attempt in runs.items()}
