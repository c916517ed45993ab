"""Events that a session gets twice, because two of its requests listen to one task. No I/O.

Who resubscribes to a task at a Java server gets what comes from then on, beside the stream that began the task,
which goes on. Both answer into one session. `Taps` tells the copies, whichever of two comes first.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from agentscope_rocketmq.jsonrpc import Progress, read_json, task_progress

__all__ = ["Taps"]

# Tasks, and events of one, that are remembered; the oldest are let go first, and their copies would be heard.
_TASKS = 1024
_EVENTS = 4096


@dataclass(slots=True)
class _Task:
    """One task: its events in order, without the oldest, and where each open request may be in them.

    Like events can't be told apart, so a request that begins to listen may be at any that is like its first one.
    """

    events: list[bytes] = field(default_factory=list)
    dropped: int = 0
    places: dict[str, set[int]] = field(default_factory=dict)
    ended: bool = False

    def is_repeat(self, request_id: str, event: bytes, *, midway: bool) -> bool:
        if not (self.places or self.ended):
            # The task goes on with a new message: what is said now is new, even where it was said before. But of a
            # request that came to listen at the last moment, the last event may be still on its way.
            self._forget(len(self.events) - 1)
        places = self.places.setdefault(request_id, set())
        new = not places
        end = self.dropped + len(self.events)
        candidates = range(self.dropped, end) if new else sorted(place for place in places if place < end)
        found = {place + 1 for place in candidates if self._at(place) == event}
        if not (found or new):
            later = (place + 1 for place in range(min(places), end) if self._at(place) == event)
            found = set(itertools.islice(later, 1))
        if found:
            self.places[request_id] = found
            return True
        if self.ended or not (midway or request_id == next(iter(self.places))):
            # The request that the task was begun with has brought it, or will.
            return True
        self.events.append(event)
        # It may be behind with what it brought before, which others have overtaken.
        self.places[request_id] = {*candidates, end + 1}
        if len(self.events) > 2 * _EVENTS:
            self._forget(_EVENTS)
        return False

    def _at(self, place: int) -> bytes | None:
        return self.events[place - self.dropped] if place >= self.dropped else None

    def _forget(self, count: int) -> None:
        del self.events[: max(count, 0)]
        self.dropped += max(count, 0)


class Taps:
    """Tells which events of a session came already, by another request.

    Args:
        midway: Whether reading begins in the middle: the request that is heard first of a task may then be one that
            listens to another's, which still has earlier events to bring.
    """

    def __init__(self, *, midway: bool = False) -> None:
        self._midway = midway
        self._tasks: OrderedDict[str, _Task] = OrderedDict()
        self._tasks_of: dict[str, set[str]] = {}

    def is_repeat(self, request_id: str, raw: str) -> bool:
        """Take an event; whether another request has brought it already.

        Args:
            request_id: Id of the request that brings it.
            raw: The event, a JSON-RPC response of A2A 0.3; nothing else is ever a repeat.
        """
        found = _event(raw)
        if found is None:
            return False
        task_id, event = found
        digest = hashlib.sha256(json.dumps(event, sort_keys=True).encode("utf-8", "replace")).digest()
        task = self._tasks.setdefault(task_id, _Task())
        self._tasks.move_to_end(task_id)
        self._tasks_of.setdefault(request_id, set()).add(task_id)
        if len(self._tasks) > _TASKS:
            self._tasks.popitem(last=False)
        repeat = task.is_repeat(request_id, digest, midway=self._midway)
        # By its state: `final` is said of a question as well, and the task goes on.
        task.ended = task.ended or (not repeat and task_progress(event) is Progress.ENDED)
        return repeat

    def close(self, request_id: str) -> None:
        """That request brings no more."""
        for task_id in self._tasks_of.pop(request_id, ()):
            if task_id in self._tasks:
                self._tasks[task_id].places.pop(request_id, None)


def _event(raw: str) -> tuple[str, dict[str, Any]] | None:
    """The id of an event's task, and the event."""
    try:
        response = read_json(raw)
    except ValueError:
        return None
    result = response.get("result") if isinstance(response, dict) else None
    if not isinstance(result, dict) or result.get("kind") not in ("task", "status-update", "artifact-update"):
        return None
    task_id = result.get("id" if result["kind"] == "task" else "taskId")
    if not isinstance(task_id, str):
        return None
    return task_id, result
