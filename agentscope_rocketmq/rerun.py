"""Where a second run of a request joins what its reader had of the first. No I/O.

A worker that dies in mid-stream leaves its caller with half an answer, and the run that takes over begins from the
start. At the seam between the two, a reader gets a status event that says so, and every artifact of the cut run once
more, empty and not to be appended to: whoever puts artifacts together as A2A says ends with those of the new run
alone. Task ids are the same in all runs, so that it stays one task.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Self

from agentscope_rocketmq.jsonrpc import Progress, read_json, response_progress
from agentscope_rocketmq.sse import parse_events, render_event

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from agentscope_rocketmq.sse import Event

__all__ = ["RESTART_EXTENSION", "Seam", "Text", "places"]

RESTART_EXTENSION = "urn:agentscope-rocketmq:extension:restart:v1"
"""Key in the metadata of the status event at a seam; its value has `attempt`, the number of the new run, from 0."""

# A chunk that is appended belongs to an artifact that is known already. In a text, quotes would be escaped.
_APPENDED = re.compile(r'"append"\s*:\s*true\b')
_MOST_ARTIFACTS = 10_000


class Text(str):
    """A piece of a stream: whole server-sent events, in order.

    Attributes:
        head: How many of its first events stand for the first one that the server sent.
    """

    __slots__ = ("head",)
    head: int

    def __new__(cls, text: str, head: int = 1) -> Self:
        """Make one."""
        made = super().__new__(cls, text)
        made.head = head
        return made


def places(texts: Iterable[str]) -> Iterator[tuple[int, Event]]:
    """Number the events that came with one message, in a way that does not depend on what its reader knew before.

    What was added at a seam has the number before that of the event it was added to, and -1 where there is none.
    """
    first = 0
    for text in texts:
        events = parse_events(text)
        added = (text.head if isinstance(text, Text) else 1) - 1
        for index, event in enumerate(events):
            yield first + max(index - added, -1), event
        first += len(events) - added


class Seam:
    """Follows one stream of JSON-RPC responses, A2A 1.0 or 0.3, over all runs of its request.

    Args:
        attempt: The run that its reader knows.

    Attributes:
        ended: Whether the end of the task was given out: a run that begins after that has nothing to add.
    """

    def __init__(self, attempt: int = 0) -> None:
        self.ended = False
        self._attempt = attempt
        self._task: tuple[str, str] | None = None  # task and context id
        self._artifacts: dict[str, None] = {}

    def take(self, text: str, attempt: int) -> str:
        """What the reader is to be given for a piece of the stream.

        Args:
            text: Whole server-sent events, in order.
            attempt: The run they are of, from 0.
        """
        if attempt > self._attempt:
            self._attempt = attempt
            return self._join(text)
        self._note(text)
        return text

    def _join(self, text: str) -> str:
        """The first piece of a later run."""
        first, *rest = parse_events(text)
        response = _object(first.data)
        subject, ids = _subject(_object(response.get("result")))
        if ids is None:
            return text  # an error, or a bare message: there is nothing to be joined
        is_open = response_progress(response) is Progress.OPEN
        is_task = "id" in subject
        seam = [self._restarted(ids, subject, response)] if is_open else []
        only_fails = is_task and not subject.get("artifacts") and _state(subject) == "failed"
        if only_fails and self._task is not None:
            ids = self._task  # whoever says so may not know what cut runs called it
        if self._task == ids:
            seam += [_emptied(ids, artifact, response) for artifact in self._artifacts]
            if not is_task or subject.get("artifacts"):
                seam.append(first.data)
            elif not is_open:
                seam.append(_update(ids, subject, response))
            # That the task begins is no news.
        else:
            # The reader knows of nothing yet, or the application names its tasks anew and the reader has two.
            seam.insert(0 if is_task else len(seam), first.data)
        self._artifacts.clear()
        tail = "".join(render_event(event.data, name=event.name, event_id=event.id) for event in rest)
        self._note(render_event(first.data) + tail)
        return Text("".join(render_event(event) for event in seam) + tail, head=len(seam))

    def _note(self, text: str) -> None:
        if text.count("data: ") == 1 and _APPENDED.search(text):
            return
        for event in parse_events(text):
            response = _object(event.data)  # once: it may be large
            self.ended = self.ended or response_progress(response) is Progress.ENDED
            subject, ids = _subject(_object(response.get("result")))
            self._task = ids or self._task
            artifacts = subject.get("artifacts")
            self._add(subject.get("artifact"), *(artifacts if isinstance(artifacts, list) else ()))

    def _add(self, *artifacts: Any) -> None:
        for artifact in artifacts:
            name = artifact.get("artifactId") if isinstance(artifact, dict) else None
            if isinstance(name, str) and len(self._artifacts) < _MOST_ARTIFACTS:
                self._artifacts[name] = None

    def _restarted(self, ids: tuple[str, str], subject: Mapping[str, Any], response: Mapping[str, Any]) -> str:
        legacy = "kind" in subject
        status: dict[str, Any] = {"state": "working" if legacy else "TASK_STATE_WORKING"}
        if isinstance(when := _object(subject.get("status")).get("timestamp"), str):
            status["timestamp"] = when
        metadata = {RESTART_EXTENSION: {"attempt": self._attempt}}
        update = {"taskId": ids[0], "contextId": ids[1], "status": status, "metadata": metadata}
        if legacy:
            return _response(response, {"kind": "status-update", "final": False, **update})
        return _response(response, {"statusUpdate": update})


def _state(subject: Mapping[str, Any]) -> str:
    """The state of a task in A2A 0.3's words."""
    return str(_object(subject.get("status")).get("state")).removeprefix("TASK_STATE_").lower()


def _update(ids: tuple[str, str], task: Mapping[str, Any], response: Mapping[str, Any]) -> str:
    """The state that a task is in, for a reader who knows the task."""
    update = {"taskId": ids[0], "contextId": ids[1], "status": task.get("status")}
    if "kind" in task:
        return _response(response, {"kind": "status-update", "final": True, **update})
    return _response(response, {"statusUpdate": update})


def _emptied(ids: tuple[str, str], artifact: str, response: Mapping[str, Any]) -> str:
    legacy = "kind" in _object(response.get("result"))
    part = {"kind": "text", "text": ""} if legacy else {"text": ""}
    update = {
        "taskId": ids[0],
        "contextId": ids[1],
        "artifact": {"artifactId": artifact, "parts": [part]},
        "append": False,
        "lastChunk": True,
    }
    return _response(response, {"kind": "artifact-update", **update} if legacy else {"artifactUpdate": update})


def _response(like: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    return json.dumps({"jsonrpc": "2.0", "id": like.get("id"), "result": result}, ensure_ascii=False)


def _subject(result: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[str, str] | None]:
    """The task, or the update of one, that a result is, and the ids of task and context."""
    if result.get("kind") in ("task", "status-update", "artifact-update"):
        subject = result
    else:
        subject = _object(result.get("task") or result.get("statusUpdate") or result.get("artifactUpdate"))
    task, context = subject.get("id") or subject.get("taskId"), subject.get("contextId")
    return (subject, (task, context)) if isinstance(task, str) and isinstance(context, str) else (subject, None)


def _object(value: Any) -> dict[str, Any]:
    """A JSON object, or one that is in a text; empty for anything else."""
    if isinstance(value, str):
        try:
            value = read_json(value)
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}
