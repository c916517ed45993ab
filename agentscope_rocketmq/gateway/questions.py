"""JSON-RPC requests as they come to a gateway: read for routing and owner checks, and never changed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.fields import MAX_HEADER_BYTES, MAX_HEADERS, is_header
from agentscope_rocketmq.gateway.refusal import PARSE_ERROR, Refusal
from agentscope_rocketmq.jsonrpc import INVALID_REQUEST, Repeating, RpcRequest, read_json

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["RESUME_METHODS", "Question", "carried_headers"]

RESUME_METHODS = frozenset({"SubscribeToTask", "tasks/resubscribe"})
"""The methods that go on with a task's events, by their names in 1.0 and 0.3."""

_INVALID_PARAMS = -32602
# Of the connection to the gateway, or meant for it alone.
_NOT_CARRIED = frozenset(
    {
        "accept-encoding",
        "authorization",
        "connection",
        "content-length",
        "cookie",
        "forwarded",
        "host",
        "keep-alive",
        "last-event-id",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "user-agent",
    }
)
_OURS = ("x-rocketmq-", "x-forwarded-")
# Bytes of headers that are left for what the gateway and the carrier add.
_ROOM = 8 * 1024
_ROOM_HEADERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A JSON-RPC request.

    Attributes:
        body: The text as it came.
        rpc: What it is.
        context_id: A2A context that its message names; empty for none.
        task_id: Task that its message, or the call, names; empty for none.
    """

    body: str
    rpc: RpcRequest
    context_id: str
    task_id: str

    @property
    def old(self) -> bool:
        """Whether it is in the words of A2A 0.3."""
        return "/" in (self.rpc.method or "")

    @classmethod
    def read(cls, raw: bytes) -> Question:
        """Read a request body.

        What can be read two ways is refused: the agent must not see another context or task than the one checked here.

        Raises:
            Refusal: In words of JSON-RPC: no JSON, no request, or ambiguous.
        """
        try:
            body = raw.decode()
            fields = read_json(body, mark_repeating=True)
        except UnicodeDecodeError:
            raise Refusal(200, "parse-error", "The request is not UTF-8 text.", code=PARSE_ERROR) from None
        except ValueError as error:
            raise Refusal(200, "parse-error", str(error), code=PARSE_ERROR) from None
        if not isinstance(fields, dict):
            what = "Batch requests are not supported" if isinstance(fields, list) else "Request payload is no object"
            raise Refusal(200, "invalid-request", what, code=INVALID_REQUEST)
        rpc = RpcRequest.of(fields)
        message = rpc.params.get("message")
        if any(isinstance(place, Repeating) for place in (fields, rpc.params, message)):
            raise Refusal(200, "invalid-request", "A member is given twice: give it once.", code=INVALID_REQUEST)
        place = message if rpc.runs_agent and isinstance(message, dict) else rpc.params
        context_id, task_id = _one(place, "contextId", "context_id"), _one(place, "taskId", "task_id")
        return cls(body=body, rpc=rpc, context_id=context_id, task_id=task_id or _text(rpc.params.get("id")))

    def about(self, task_id: str) -> str:
        """A request for a task, in the words of this one."""
        method = "tasks/get" if self.old else "GetTask"
        return json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": {"id": task_id}})


def _one(place: Any, name: str, other: str) -> str:
    """A field that may be written in two ways, as protobuf's and pydantic's JSON readers take it."""
    if name in place and other in place:
        raise Refusal(200, "invalid-params", f"{name} and {other} are one field: give it once.", code=_INVALID_PARAMS)
    return _text(place.get(name, place.get(other)))


def _text(value: object) -> str:
    # Anything else the agent refuses.
    return value if isinstance(value, str) else ""


def carried_headers(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The headers of a request that go on to the agent.

    Credentials stay behind: whoever may read the agent's topic could use them. So does whatever this package means
    something by: nobody outside speaks for a gateway.

    Raises:
        Refusal: 431, they are too many or too long.
    """
    carried: dict[str, str] = {}
    for name, value in headers:
        if name in _NOT_CARRIED or name.startswith(_OURS) or not is_header(name, value):
            continue
        carried[name] = f"{carried[name]}, {value}" if name in carried else value
    size = sum(len(name) + len(value.encode()) for name, value in carried.items())
    if len(carried) > MAX_HEADERS - _ROOM_HEADERS or size > MAX_HEADER_BYTES - _ROOM:
        raise Refusal(431, "headers-too-large", "The request's headers are too many or too long.")
    return carried
