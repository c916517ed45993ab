"""The two envelopes of the wire, encoded and decoded, nothing else.

They are those of the Java reference implementation (`org.apache.rocketmq:rocketmq-a2a` 1.0.9): JSON in UTF-8, nulls
left out, unknown fields ignored. `seq`, `attempt`, `run`, `status` and `headers` of a response are ours and go only to
callers that announce in the request, by the header `BATCH_HEADER`, that they read them. So are parts: a body that is
too large for one message travels as it is, not as text within JSON, over several. Such a message is one line of JSON,
which begins with the field `part`, a line feed, and a part of the body.

Whoever may write to a topic may write anything into it: decoding checks each type, name and size, and turns whatever
is wrong into an EnvelopeError.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.errors import EnvelopeError
from agentscope_rocketmq.jsonrpc import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "BATCH_HEADER",
    "IDLE_TIMEOUT_HEADER",
    "MAX_HEADERS",
    "MAX_HEADER_BYTES",
    "MIN_PART_BYTES",
    "TOTAL_TIMEOUT_HEADER",
    "BodyPart",
    "BodyReference",
    "Part",
    "ReplyAddress",
    "RequestEnvelope",
    "ResponseEnvelope",
    "encoded_size",
    "is_carried_header",
    "is_header",
    "read_seconds",
]

BATCH_HEADER = "x-rocketmq-a2a"
"""Request header that says, with the value `1`: this caller reads batches and what is ours of a response."""

IDLE_TIMEOUT_HEADER = "x-rocketmq-idle-timeout"
"""Request header, in seconds: how long the caller waits between two signs of life."""

TOTAL_TIMEOUT_HEADER = "x-rocketmq-total-timeout"
"""Request header, in seconds: how long the caller waits for the whole response, from its sending."""

MAX_HEADERS = 128
"""Most headers that an envelope may carry."""

MAX_HEADER_BYTES = 64 * 1024
"""Most bytes that names and values of an envelope's headers may have together."""

MIN_PART_BYTES = 16 * 1024
"""Fewest bytes that a part of a body has, but for the last one."""

_MAX_ID = 1024
_MAX_NUMBER = 2**53 - 1  # JSON's safe integers
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TOPIC = re.compile(r"[%|A-Za-z0-9_-]{1,127}")
_PART_TOPIC = re.compile(r"p-[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FRAME = b'{"part":'
_RUN = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LITE_TOPIC = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")
_HEADER_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyAddress:
    """Where the answer to a request belongs.

    Attributes:
        request_id: Id of the request.
        reply_topic: LITE topic of the caller.
        lite_topic: LiteTopic of the caller's session on it.
        body: The JSON-RPC request; empty where it can't be found.
    """

    request_id: str
    reply_topic: str
    lite_topic: str
    body: str = ""

    @classmethod
    def find(cls, data: bytes) -> ReplyAddress | None:
        """Find it in a message that may not be a valid request; None when it can't be found.

        A request that is set aside for another reason can so still be answered with an error. Whether the topic
        may be written to is for the server to decide.
        """
        try:
            fields = _Fields.parse(data)
            body = fields.any("requestBody")
            return cls(
                request_id=fields.text("requestId", _REQUEST_ID),
                reply_topic=fields.text("workAgentResponseTopic", _TOPIC),
                lite_topic=fields.text("liteTopic", _LITE_TOPIC),
                body=body if isinstance(body, str) else "",
            )
        except EnvelopeError:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which part of a body a message brings.

    Attributes:
        index: Its number, from 0.
        data: Its bytes.
        size: Bytes of the whole body, in its last part; None in all others.
        sha256: SHA-256 of the whole body in hexadecimal, in its last part; None in all others.
    """

    index: int
    data: bytes
    size: int | None = None
    sha256: str | None = None

    @property
    def is_last(self) -> bool:
        """Whether the body ends with it."""
        return self.sha256 is not None

    def encode(self, **fields: object) -> bytes:
        """Write a message body: these fields of an envelope, and the part."""
        about = {"index": self.index, "size": self.size, "sha256": self.sha256}
        present = {name: value for name, value in about.items() if value is not None}
        return b"".join((_encode(part=present, **fields), b"\n", self.data))

    @classmethod
    def split(cls, data: bytes) -> tuple[_Fields, Part | None]:
        """The envelope's fields in a message, and the part that it brings, None for one that brings none.

        Raises:
            EnvelopeError: It is neither.
        """
        if not data.startswith(_FRAME):
            return _Fields.parse(data), None
        head, _, rest = data.partition(b"\n")
        fields = _Fields.parse(head)
        about = fields.inner("part")
        index, size = about.number("index"), about.number("size")
        sha256 = about.optional_text("sha256", _SHA256)
        if index is None or (size is None) != (sha256 is None) or not rest:
            raise EnvelopeError(f"The message is not an envelope: its part says {about} and has {len(rest)} bytes.")
        return fields, cls(index=index, data=rest, size=size, sha256=sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyPart:
    """A part of the body of a large request, on a LiteTopic of its own.

    Attributes:
        request_id: Id of the request.
        part: The part.
    """

    request_id: str
    part: Part

    def encode(self) -> bytes:
        """Write the message body."""
        return self.part.encode(requestId=self.request_id)

    @classmethod
    def decode(cls, data: bytes) -> BodyPart:
        """Read a message body.

        Raises:
            EnvelopeError: It is no part of a request's body.
        """
        fields, part = Part.split(data)
        if part is None:
            raise EnvelopeError("The message is no part of a request's body.")
        return cls(request_id=fields.text("requestId", _REQUEST_ID), part=part)


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyReference:
    """Where the body of a large request is.

    Attributes:
        lite_topic: LiteTopic of its parts, on the LITE topic that the agent's card names; nobody can guess it.
        parts: How many there are.
        size: Bytes of the body.
        sha256: Its SHA-256, in hexadecimal.
        request_id: Id of the request that it was sent for; one that is tried again has another one.
    """

    lite_topic: str
    parts: int
    size: int
    sha256: str
    request_id: str

    def _fields(self) -> dict[str, object]:
        about: dict[str, object] = {"parts": self.parts, "size": self.size, "sha256": self.sha256}
        return {"requestId": self.request_id, "liteTopic": self.lite_topic, **about}

    @classmethod
    def _read(cls, fields: _Fields) -> BodyReference:
        size = fields.number("size", low=1)
        # Parts of a byte each would cost more than they bring.
        parts = fields.number("parts", low=1, high=1 + (size or 0) // MIN_PART_BYTES)
        if size is None or parts is None:
            raise EnvelopeError("The envelope names the body of its request without its size or its parts.")
        return cls(
            lite_topic=fields.text("liteTopic", _PART_TOPIC),
            parts=parts,
            size=size,
            sha256=fields.text("sha256", _SHA256),
            request_id=fields.text("requestId", _REQUEST_ID),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnvelope:
    """A request on its way to an agent's topic.

    Attributes:
        request_id: Id of this request, unlike the JSON-RPC id unique: 32 hex characters.
        body: The JSON-RPC request; of one whose body is elsewhere, an excerpt (`jsonrpc.excerpt`).
        headers: HTTP headers of the request, as the caller wrote their names.
        dest_topic: Topic of the agent; None where the caller left it out.
        reply_topic: LITE topic on which the caller reads the answer.
        lite_topic: LiteTopic of the caller's session on it.
        large: Where the whole body is; None when `body` is it.
    """

    request_id: str
    body: str
    headers: Mapping[str, str] = field(default_factory=dict)
    dest_topic: str | None
    reply_topic: str
    lite_topic: str
    large: BodyReference | None = None

    @property
    def reads_batches(self) -> bool:
        """Whether the caller announces our additions to the Java format."""
        return any(name.lower() == BATCH_HEADER and value.strip() == "1" for name, value in self.headers.items())

    def seconds(self, header: str) -> float | None:
        """The seconds that a header names; None where it is not there, or no number above 0."""
        text = next((value for name, value in self.headers.items() if name.lower() == header), None)
        return None if text is None else read_seconds(text)

    def encode(self) -> bytes:
        """Write the message body."""
        return _encode(
            requestId=self.request_id,
            requestBody=self.body,
            requestHeader=dict(self.headers) or None,
            destAgentTopic=self.dest_topic,
            workAgentResponseTopic=self.reply_topic,
            liteTopic=self.lite_topic,
            largeBody=None if self.large is None else self.large._fields(),
        )

    @classmethod
    def decode(cls, data: bytes) -> RequestEnvelope:
        """Read a message body.

        Raises:
            EnvelopeError: It is not a request envelope, or lacks a reply address.
        """
        fields = _Fields.parse(data)
        return cls(
            request_id=fields.text("requestId", _REQUEST_ID),
            body=fields.text("requestBody"),
            headers=fields.headers("requestHeader") or {},
            dest_topic=fields.optional_text("destAgentTopic", _TOPIC),
            reply_topic=fields.text("workAgentResponseTopic", _TOPIC),
            lite_topic=fields.text("liteTopic", _LITE_TOPIC),
            large=BodyReference._read(fields.inner("largeBody")) if fields.has("largeBody") else None,  # noqa: SLF001
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseEnvelope:
    """One message of a response on its way to the caller's LiteTopic.

    Attributes:
        request_id: Id of the request it answers.
        body: Server-sent events, or the JSON-RPC response; None in a bare end marker, and where `part` is.
        stream: Whether the response is a stream of events.
        end: Whether this is its last message.
        server_reply_topic: LITE topic on which the answering instance takes further requests for its task.
        server_lite_topic: LiteTopic of that instance on it.
        context_id: A2A context; None where the server does not say.
        task_id: A2A task; None where the server does not say.
        seq: Number of this message in the response, from 0. None from a server that does not number them.
        attempt: Which delivery of the request this answers, from 0; a redelivered request runs with a higher one.
        run: Id of the run: two workers may each have got a copy of one request, with the same attempt.
        status: HTTP status of the response, in its first message.
        headers: HTTP headers of the response, in its first message.
        part: A part of one event, or of the JSON-RPC response, that is too large for a message.
    """

    request_id: str
    body: str | None
    stream: bool
    end: bool
    server_reply_topic: str | None = None
    server_lite_topic: str | None = None
    context_id: str | None = None
    task_id: str | None = None
    seq: int | None = None
    attempt: int | None = None
    run: str | None = None
    status: int | None = None
    headers: Mapping[str, str] | None = None
    part: Part | None = None

    def encode(self) -> bytes:
        """Write the message body."""
        write = _encode if self.part is None else self.part.encode
        return write(
            requestId=self.request_id,
            responseBody=self.body,
            stream=self.stream,
            end=self.end,
            serverWorkAgentResponseTopic=self.server_reply_topic,
            serverLiteTopic=self.server_lite_topic,
            contextId=self.context_id,
            taskId=self.task_id,
            seq=self.seq,
            attempt=self.attempt,
            run=self.run,
            status=self.status,
            headers=None if self.headers is None else dict(self.headers),
        )

    @classmethod
    def decode(cls, data: bytes) -> ResponseEnvelope:
        """Read a message body.

        Raises:
            EnvelopeError: It is not a response envelope.
        """
        fields, part = Part.split(data)
        return cls(
            request_id=fields.text("requestId", _REQUEST_ID),
            body=fields.optional_text("responseBody"),
            stream=fields.flag("stream"),
            end=fields.flag("end"),
            server_reply_topic=fields.optional_text("serverWorkAgentResponseTopic", _TOPIC),
            server_lite_topic=fields.optional_text("serverLiteTopic", _LITE_TOPIC),
            context_id=fields.optional_text("contextId", limit=_MAX_ID),
            task_id=fields.optional_text("taskId", limit=_MAX_ID),
            seq=fields.number("seq"),
            attempt=fields.number("attempt"),
            run=fields.optional_text("run", _RUN),
            status=fields.number("status", low=100, high=599),
            headers=fields.headers("headers"),
            part=part,
        )


def encoded_size(text: str) -> int:
    """Bytes that a text takes up inside an envelope, its escapes counted, its quotes not."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")) - 2


def read_seconds(text: str) -> float | None:
    """Read a number of seconds; None for what is none, or not above 0."""
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None


def is_header(name: str, value: str) -> bool:
    """Whether a header may stand in an envelope: a legal name, no control characters in the value."""
    return bool(_HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value))


def is_carried_header(name: str) -> bool:
    """Whether a response header (in lower case) means something beyond its own connection."""
    return name == "content-type" or name.startswith(("a2a-", "x-"))


def _encode(**fields: object) -> bytes:
    present = {name: value for name, value in fields.items() if value is not None}
    text = json.dumps(present, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


class _Fields:
    """The fields of an envelope, each checked as it is read."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    @classmethod
    def parse(cls, data: bytes) -> _Fields:
        try:
            fields = read_json(data.decode("utf-8"))
        except ValueError as error:  # UnicodeDecodeError is one
            raise EnvelopeError(f"The message is not an envelope: {error}.") from None
        if not isinstance(fields, dict):
            raise EnvelopeError("The message is not an envelope: its JSON is not an object.")
        return cls(fields)

    def any(self, name: str) -> Any:
        return self._fields.get(name)

    def has(self, name: str) -> bool:
        return self._fields.get(name) is not None

    def inner(self, name: str) -> _Fields:
        value = self._fields.get(name)
        if not isinstance(value, dict):
            raise self._error(name, "it is not a map")
        return _Fields({"requestId": self._fields.get("requestId"), **value})

    def _error(self, name: str, problem: str) -> EnvelopeError:
        request_id = self._fields.get("requestId")
        if not (isinstance(request_id, str) and _REQUEST_ID.fullmatch(request_id)):
            request_id = None
        return EnvelopeError(
            f"The envelope of request {request_id or '(unknown)'} has a bad {name}: {problem}.",
            request_id=request_id,
        )

    def optional_text(
        self, name: str, pattern: re.Pattern[str] | None = None, *, limit: int | None = None
    ) -> str | None:
        value = self._fields.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self._error(name, "it is not a string")
        if pattern is not None and not pattern.fullmatch(value):
            raise self._error(name, f"it does not match {pattern.pattern}")
        if limit is not None and len(value) > limit:
            raise self._error(name, f"it is longer than {limit} characters")
        return _without_surrogates(value)

    def text(self, name: str, pattern: re.Pattern[str] | None = None) -> str:
        value = self.optional_text(name, pattern)
        if value is None:
            raise self._error(name, "it is missing")
        return value

    def flag(self, name: str) -> bool:
        value = self._fields.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self._error(name, "it is neither true nor false")
        return value

    def number(self, name: str, *, low: int = 0, high: int = _MAX_NUMBER) -> int | None:
        value = self._fields.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._error(name, f"it is not a whole number from {low} to {high}")
        return value

    def headers(self, name: str) -> dict[str, str] | None:
        value = self._fields.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._error(name, "it is not a map")
        if len(value) > MAX_HEADERS:
            raise self._error(name, f"it has more than {MAX_HEADERS} entries")
        headers: dict[str, str] = {}
        size = 0
        for header, text in value.items():
            if text is None:
                continue
            if not isinstance(text, str) or not is_header(header, text):
                raise self._error(name, "an entry is not a legal HTTP header")
            headers[header] = _without_surrogates(text)
            size += len(header) + len(headers[header].encode())
        if size > MAX_HEADER_BYTES:
            raise self._error(name, f"it is longer than {MAX_HEADER_BYTES} bytes")
        return headers


def _without_surrogates(text: str) -> str:
    # JSON can escape half a surrogate pair; such a string could never be written as UTF-8 again.
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
