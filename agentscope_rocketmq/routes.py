"""Which server instance knows a task or a conversation: found by task ids, learnt from responses. No I/O.

Workers of one topic share nothing but the topic, and each task and conversation lives in one of them. A response
names the LiteTopic of the instance that answered (sticky routing, as in the Java reference). The id of a task of our
servers is itself a LiteTopic, which the instance that has the task reads.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.jsonrpc import read_json
from agentscope_rocketmq.sse import parse_events

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentscope_rocketmq.jsonrpc import RpcRequest

__all__ = [
    "INSTANCE_HEADER",
    "OFFERED_BY_HEADER",
    "OFFER_ATTEMPT_HEADER",
    "OFFER_HEADER",
    "OFFER_WAITED_HEADER",
    "InstanceRoutes",
    "instance_asked_for",
    "is_instance",
    "is_routing_header",
    "is_task_channel",
    "new_context_id",
    "new_task_id",
    "same_server",
]

INSTANCE_HEADER = "x-rocketmq-instance"
"""Header of a request: LiteTopic of the instance that knows its conversation. Whoever takes it hands it over there."""

OFFER_HEADER = "x-rocketmq-offer"
"""Header of a request handed over from one instance to another: id of this offer."""

OFFERED_BY_HEADER = "x-rocketmq-offered-by"
"""The LiteTopic of the instance that offers it, and hears there how it goes."""

OFFER_ATTEMPT_HEADER = "x-rocketmq-offer-attempt"
"""Which run of the request it is to be, from 0."""

OFFER_WAITED_HEADER = "x-rocketmq-offer-waited"
"""Seconds that its caller had waited when it was offered."""

_ROUTING_HEADERS = frozenset(
    {INSTANCE_HEADER, OFFER_HEADER, OFFERED_BY_HEADER, OFFER_ATTEMPT_HEADER, OFFER_WAITED_HEADER}
)
# One for each broker that a server listens on: they differ in their endings.
_INSTANCE = re.compile(r"(i-[0-9a-f]{32})(-[0-9]{1,3})?")
_TASK_CHANNEL = re.compile(r"t-[0-9a-f]{32}")
_MOST = 10_000


def is_instance(name: str) -> bool:
    """Whether a LiteTopic is one of an instance of ours: nobody makes a server write into another one."""
    return _INSTANCE.fullmatch(name) is not None


def same_server(one: str, other: str) -> bool:
    """Whether two LiteTopics are those of one server."""
    first, second = _INSTANCE.fullmatch(one), _INSTANCE.fullmatch(other)
    return first is not None and second is not None and first[1] == second[1]


def is_routing_header(name: str) -> bool:
    """Whether a header is for the carrier, and no business of the app."""
    return name.lower() in _ROUTING_HEADERS


def is_task_channel(name: str) -> bool:
    """Whether a task id, or a LiteTopic, is one of a task of our servers."""
    return _TASK_CHANNEL.fullmatch(name) is not None


def new_task_id(request: str) -> str:
    """The id of the task that a request begins: the same whoever runs it, and however often.

    Args:
        request: What tells the request from all others.
    """
    return "t-" + hashlib.sha256(f"task {request}".encode()).hexdigest()[:32]


def new_context_id(request: str) -> str:
    """The id of the context of a request that names none; as `new_task_id`."""
    return hashlib.sha256(f"context {request}".encode()).hexdigest()[:32]


def instance_asked_for(request: RpcRequest, headers: Mapping[str, str]) -> str | None:
    """LiteTopic of the instance that a request should go to: its task's, or the header's; None when any will do."""
    for reference in _references(request.params):
        if reference.startswith("task:") and is_task_channel(task := reference.removeprefix("task:")):
            return task
    given = next((value for name, value in headers.items() if name.lower() == INSTANCE_HEADER), None)
    return given if given is not None and is_instance(given) else None


class InstanceRoutes:
    """Task and context ids, and the instances that know them; one for all callers of a process.

    Args:
        state_topic: LITE topic on which task ids are LiteTopics.
        most: Ids to remember; the one not used longest is let go first, and its requests go to any worker.
    """

    def __init__(self, state_topic: str, *, most: int = _MOST) -> None:
        self._state_topic = state_topic
        self._most = most
        self._instances: OrderedDict[tuple[str, str], tuple[str, str]] = OrderedDict()
        self._gone: OrderedDict[str, None] = OrderedDict()

    def find(self, agent: str, request: RpcRequest) -> tuple[str, str] | None:
        """The instance to ask, as (LITE topic, LiteTopic); None when any worker will do.

        Args:
            agent: Topic of the agent: two agents asked in one session share its context id.
            request: The JSON-RPC request.
        """
        # Who has a task of ours now, and not who had it when it was last heard of.
        channel = instance_asked_for(request, {})
        if channel is not None:
            return None if channel in self._gone else (self._state_topic, channel)
        for reference in _references(request.params):
            instance = self._instances.get((agent, reference))
            if instance is not None:
                self._instances.move_to_end((agent, reference))
                return instance
        return None

    def note(self, agent: str, instance: tuple[str, str], request: RpcRequest, text: str) -> None:
        """Learn from the first piece of a response, JSON document or events, who answered for which ids."""
        events = [event.data for event in parse_events(text)] or [text]
        references = set(_references(request.params))
        for event in events[:1]:
            references.update(_references(_result(event)))
        for reference in references:
            if is_task_channel(task := reference.removeprefix("task:")):
                self._gone.pop(task, None)
                continue
            self._instances[agent, reference] = instance
            self._instances.move_to_end((agent, reference))
        while len(self._instances) > self._most:
            self._instances.popitem(last=False)

    def forget(self, instance: tuple[str, str]) -> None:
        """That instance, or the channel of a task, does not answer: until it does, its requests go to any worker."""
        if is_task_channel(instance[1]):
            self._gone[instance[1]] = None
            if len(self._gone) > self._most:
                self._gone.popitem(last=False)
            return
        for reference in [key for key, value in self._instances.items() if value == instance]:
            del self._instances[reference]


def _result(text: str) -> Mapping[str, Any]:
    try:
        response = read_json(text)
    except ValueError:
        return {}
    result = response.get("result") if isinstance(response, dict) else None
    return result if isinstance(result, dict) else {}


def _references(params: Mapping[str, Any]) -> list[str]:
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
