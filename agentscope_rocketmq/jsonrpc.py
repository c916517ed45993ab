"""JSON-RPC texts as they pass by: what the carrier must know about them, read without trusting them.

The carrier moves A2A's JSON-RPC requests and responses as text. It looks inside for three things only: what a
request is and which task or context it names, whether an event is the last one of its task, and whether an error
carries what no caller should see. Everything here works on text and never raises anything but ValueError.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "INTERNAL_ERROR",
    "INVALID_REQUEST",
    "SEND_METHODS",
    "STREAM_METHODS",
    "Progress",
    "Repeating",
    "RpcError",
    "RpcId",
    "RpcRequest",
    "encoded",
    "error_response",
    "excerpt",
    "plain_error",
    "progress",
    "read_json",
    "response_progress",
    "task_progress",
]

RpcId: TypeAlias = str | int | float | None

INTERNAL_ERROR = -32603
"""JSON-RPC's code for a failure of the answering side."""

INVALID_REQUEST = -32600
"""JSON-RPC's code for a request that is none, or that is refused before its method is looked at."""

STREAM_METHODS = frozenset({"SendStreamingMessage", "SubscribeToTask", "message/stream", "tasks/resubscribe"})
"""The A2A methods that are answered with a stream of events, by their names in 1.0 and 0.3."""

_LONGEST_ID = 1024  # characters; an error must fit into a message with the id it repeats
_ENDED_STATES = frozenset({"completed", "failed", "canceled", "rejected"})
_INTERRUPTED_STATES = frozenset({"input-required", "auth-required"})

SEND_METHODS = frozenset({"SendMessage", "SendStreamingMessage", "message/send", "message/stream"})
"""The A2A methods that give an agent work, by their names in 1.0 and 0.3."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class Repeating(dict[str, Any]):
    """An object that gives a member twice: which one counts, its readers may not agree on (RFC 8259, section 4)."""


def _marked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    return members if len(members) == len(pairs) else Repeating(members)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_MARKING_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_marked)


def read_json(text: str, *, mark_repeating: bool = False) -> Any:
    """Parse a JSON text that comes from outside. Of members of one name the last one counts.

    Args:
        text: The text.
        mark_repeating: Whether an object with such members is a `Repeating`.

    Raises:
        ValueError: Not JSON (NaN and Infinity included), nested too deeply, or a number of absurd length.
    """
    try:
        return (_MARKING_DECODER if mark_repeating else _DECODER).decode(text)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcError:
    """The error of a JSON-RPC response.

    Attributes:
        code: Its code.
        message: What it says.
        data: What else it carries; None for nothing.
    """

    code: int
    message: str
    data: Any = None

    @classmethod
    def of(cls, response: Mapping[str, Any]) -> RpcError | None:
        """Read it from a response; None when there is none."""
        error = response.get("error")
        if error is None:
            return None
        fields = error if isinstance(error, dict) else {}
        code, message = fields.get("code"), fields.get("message")
        return cls(
            code=code if isinstance(code, int) else INTERNAL_ERROR,
            message=message if isinstance(message, str) else "The agent's server answered with an error.",
            data=fields.get("data"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcRequest:
    """What the carrier needs to know of a JSON-RPC request.

    Attributes:
        id: Its id, to be repeated in an answer; None where there is none or it can't be read.
        method: Its method; None where it can't be read.
        params: Its parameters; empty where they can't be read.
    """

    id: RpcId = None
    method: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def wants_stream(self) -> bool:
        """Whether its answer is a stream of events."""
        return self.method in STREAM_METHODS

    @property
    def runs_agent(self) -> bool:
        """Whether it gives the agent work, rather than asking about work or ending it."""
        return self.method in SEND_METHODS

    @property
    def returns_at_once(self) -> bool:
        """Whether it is answered before the agent has done its work."""
        asked = self.params.get("configuration")
        return (
            isinstance(asked, dict)
            and not self.wants_stream
            and (
                asked.get("blocking") is False
                or asked.get("returnImmediately") is True
                or asked.get("return_immediately") is True
            )
        )

    @classmethod
    def read(cls, body: str) -> RpcRequest:
        """Read a request body; what can't be read is None or empty, nothing is raised."""
        try:
            request = read_json(body)
        except ValueError:
            return cls()
        return cls.of(request) if isinstance(request, dict) else cls()

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> RpcRequest:
        """The same of a request that was parsed already."""
        rpc_id, method, params = request.get("id"), request.get("method"), request.get("params")
        return cls(
            id=rpc_id if _is_id(rpc_id) else None,
            method=method if isinstance(method, str) else None,
            params=params if isinstance(params, dict) else {},
        )


_LONGEST_QUOTED = 4096
_QUOTE, _BACKSLASH = b'"', ord("\\")
# Of a JSON string, whole characters and escapes. Possessive: nothing is remembered to go back to.
_INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_STRIDE = 64 * 1024


# What `excerpt` looks at, at any depth: whatever has another name is let go as soon as it is read.
_LOOKED_AT = frozenset(
    {
        "blocking",
        "configuration",
        "contextId",
        "id",
        "message",
        "method",
        "params",
        "returnImmediately",
        "return_immediately",
        "taskId",
    }
)


def _looked_at(pairs: list[tuple[str, Any]]) -> dict[str, Any] | None:
    return {name: value for name, value in pairs if name in _LOOKED_AT} or None


_EXCERPTING_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_looked_at)


def excerpt(body: bytes) -> str:
    """What the carrier must know of a large request, as a request of its own: `RpcRequest.read` finds it there.

    Long strings are cut out before anything is parsed, and of the rest little is kept, so this takes time for a large
    body, and little memory beside the body's own.

    Args:
        body: The JSON-RPC request, UTF-8.
    """
    request = RpcRequest()
    with contextlib.suppress(ValueError, RecursionError):
        members = _EXCERPTING_DECODER.decode(_without_long_strings(body).decode("utf-8", "replace"))
        request = RpcRequest.of(members) if isinstance(members, dict) else request
    fields = {name: value for name, value in request.params.items() if name in ("id", "taskId", "contextId")}
    if request.returns_at_once:
        fields["configuration"] = {"returnImmediately": True}
    message = request.params.get("message")
    if isinstance(message, dict):
        fields["message"] = {name: value for name, value in message.items() if name in ("taskId", "contextId")}
    return json.dumps({"jsonrpc": "2.0", "id": request.id, "method": request.method, "params": fields})


def _without_long_strings(text: bytes) -> bytes:
    kept: list[bytes] = []
    copied = end = 0
    while (start := text.find(_QUOTE, end)) >= 0 and (end := _end_of_string(text, start)) > 0:
        if end - start > _LONGEST_QUOTED:
            kept += [text[copied:start], b'""']
            copied = end
    return b"".join([*kept, text[copied:]])


def _end_of_string(text: bytes, start: int) -> int:
    """Behind the quote that closes the string that opens at `start`; 0 when there is none."""
    quote = text.find(_QUOTE, start + 1)
    while quote >= 0:
        escape = quote - 1
        while text[escape] == _BACKSLASH:
            escape -= 1
        if (quote - escape) % 2:
            return quote + 1
        # Where there is one quote within a string there are many.
        found = _INSIDE.match(text, quote + 1, quote + _STRIDE)
        quote = text.find(_QUOTE, found.end() if found else quote + 1)
    return 0


def _is_id(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_ID
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def encoded(text: str) -> bytes:
    """A JSON text, or server-sent events of such, as UTF-8.

    By an escape, a string of JSON may have half of a surrogate pair in it. UTF-8 can't say that: it becomes the escape.
    """
    return text.encode("utf-8", "backslashreplace")


def error_response(rpc_id: RpcId, code: int, message: str) -> str:
    """Write a JSON-RPC error response.

    Args:
        rpc_id: Id of the request it answers; None where that is not known.
        code: Error code of JSON-RPC or A2A.
        message: What happened and what to do, for the caller's eyes.
    """
    error = {"code": code, "message": message}
    return json.dumps({"jsonrpc": "2.0", "id": rpc_id, "error": error}, ensure_ascii=False)


class Progress(Enum):
    """What an event of a stream says about the stream's further course."""

    OPEN = "open"
    """More is to come."""
    INTERRUPTED = "interrupted"
    """The task waits for input or authorisation: a stream may end here, or go on."""
    ENDED = "ended"
    """The last event of a stream: a final state, a bare message, an error."""


def progress(event: str) -> Progress:
    """Tell from an event's JSON-RPC response, 1.0 or 0.3, whether its stream goes on."""
    try:
        response = read_json(event)
    except ValueError:
        return Progress.OPEN
    return response_progress(response)


def response_progress(response: Any) -> Progress:
    """The same of a JSON-RPC response that was read already."""
    if not isinstance(response, dict):
        return Progress.OPEN
    if response.get("error") is not None:
        return Progress.ENDED
    result = response.get("result")
    if not isinstance(result, dict):
        return Progress.OPEN
    kind = result.get("kind")  # 0.3; a 1.0 result has one member named after its kind
    if result.get("final") is True or kind == "message" or isinstance(result.get("message"), dict):
        return Progress.ENDED
    carrier = result if kind in ("task", "status-update") else None
    return task_progress(carrier or result.get("statusUpdate") or result.get("task"))


def task_progress(carrier: Any) -> Progress:
    """Tell from a task or a status update, 1.0 or 0.3, whether its task goes on, which it may after its stream."""
    status = carrier.get("status") if isinstance(carrier, dict) else None
    state = status.get("state") if isinstance(status, dict) else None
    if not isinstance(state, str):
        return Progress.OPEN
    name = state.removeprefix("TASK_STATE_").lower().replace("_", "-")
    if name in _ENDED_STATES:
        return Progress.ENDED
    return Progress.INTERRUPTED if name in _INTERRUPTED_STATES else Progress.OPEN


def plain_error(body: str) -> str:
    """Bring an error of a Java server into the form of JSON-RPC.

    Errors found before a Java server's handler ran are encoded twice, and their error object is a serialised
    exception with its class and stack trace. Code and message are kept, the rest is nobody's business. Any other
    body comes back as it is.
    """
    twice = body.lstrip()[:1] == '"'
    if not twice and '"@type"' not in body and '"stackTrace"' not in body:
        return body
    try:
        inner = read_json(body)
        response = read_json(inner) if isinstance(inner, str) else inner
    except ValueError:
        return body
    if not isinstance(response, dict):
        return body
    error = response.get("error")
    # A 1.0 error may carry "@type" deeper, in its details: those are meant for the caller.
    if isinstance(error, dict) and ("@type" in error or "stackTrace" in error):
        code, message = error.get("code"), error.get("message")
        return error_response(
            response.get("id"),
            code if isinstance(code, int) else INTERNAL_ERROR,
            message if isinstance(message, str) else "The agent's server refused the request.",
        )
    return inner if isinstance(inner, str) else body
