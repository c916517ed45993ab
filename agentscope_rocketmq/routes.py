"""Which server instance runs a task: learnt from responses, used for requests about the same task or context.

Workers of one topic share nothing but the topic. A response names the LiteTopic of the instance that answered
(sticky routing, as in the Java reference); whatever concerns the same task or conversation is sent there first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from agentscope_rocketmq.jsonrpc import read_json
from agentscope_rocketmq.sse import parse_events

__all__ = ["TAKE_WITHIN_HEADER", "InstanceRoutes"]

TAKE_WITHIN_HEADER = "x-rocketmq-take-within"
"""Header of a request to one instance, in seconds: taken later, its caller has turned to another worker already."""

_MOST = 10_000


class InstanceRoutes:
    """Task and context ids, and the instances that know them.

    Args:
        most: Ids to remember; the one not used longest is let go first, and its requests go to any worker.
    """

    def __init__(self, *, most: int = _MOST) -> None:
        self._most = most
        self._instances: OrderedDict[str, tuple[str, str]] = OrderedDict()

    def find(self, request_body: str) -> tuple[str, str] | None:
        """The instance to ask, as (LITE topic, LiteTopic); None when any worker will do."""
        if not self._instances:
            return None
        for reference in _references(_params(request_body)):
            instance = self._instances.get(reference)
            if instance is not None:
                self._instances.move_to_end(reference)
                return instance
        return None

    def note(self, instance: tuple[str, str], request_body: str, text: str) -> None:
        """Learn from the first piece of a response, JSON document or events, who answered for which ids."""
        events = [event.data for event in parse_events(text)] or [text]
        references = set(_references(_params(request_body)))
        for event in events[:1]:
            references.update(_references(_result(event)))
        for reference in references:
            self._instances[reference] = instance
            self._instances.move_to_end(reference)
        while len(self._instances) > self._most:
            self._instances.popitem(last=False)

    def forget(self, instance: tuple[str, str]) -> None:
        """That instance is gone."""
        for reference in [key for key, value in self._instances.items() if value == instance]:
            del self._instances[reference]


def _params(body: str) -> dict[str, Any]:
    request = _object(body)
    params = request.get("params")
    return params if isinstance(params, dict) else {}


def _result(body: str) -> dict[str, Any]:
    result = _object(body).get("result")
    return result if isinstance(result, dict) else {}


def _object(text: str) -> dict[str, Any]:
    try:
        value = read_json(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _references(params: dict[str, Any]) -> list[str]:
    """Task ids, then context ids, in the places where A2A 1.0 and 0.3 put them."""
    places = [
        params,
        *(params[name] for name in ("message", "task", "statusUpdate", "artifactUpdate") if name in params),
    ]
    places = [place for place in places if isinstance(place, dict)]
    # `id` is a task's in get, cancel, subscribe and in tasks; a message has `messageId` instead.
    tasks = [f"task:{place[name]}" for place in places for name in ("taskId", "id") if place.get(name)]
    contexts = [f"context:{place['contextId']}" for place in places if place.get("contextId")]
    return tasks + contexts
