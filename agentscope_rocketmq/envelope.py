"""The two envelopes of the wire, encoded and decoded, nothing else.

They are those of the Java reference implementation (`org.apache.rocketmq:rocketmq-a2a` 1.0.9): JSON in UTF-8, nulls
left out, unknown fields ignored. `seq`, `attempt`, `run`, `status` and `headers` of a response are ours and go only to
callers that announce in the request, by the header `BATCH_HEADER`, that they read them. So are parts: a body that is
too large for one message travels as it is, not as text within JSON, over several. Such a message is one line of JSON,
which begins with the field `part`, a line feed, and a part of the body. Where both share a
blob store, the body may be there instead, and the field says where; this goes only to those who announce that store.

Whoever may write to a topic may write anything into it: decoding checks each type, name and size, and turns whatever
is wrong into an EnvelopeError.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentscope_rocketmq.errors import EnvelopeError
from agentscope_rocketmq.fields import REQUEST_ID, Fields, encode_fields

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ACK_TIMEOUT_HEADER",
    "BATCH_HEADER",
    "BLOBS_HEADER",
    "IDLE_TIMEOUT_HEADER",
    "MIN_PART_BYTES",
    "TOTAL_TIMEOUT_HEADER",
    "BodyPart",
    "BodyReference",
    "Claim",
    "ClaimedBody",
    "Part",
    "ReplyAddress",
    "RequestEnvelope",
    "ResponseEnvelope",
    "encoded_size",
    "is_carried_header",
    "read_seconds",
]

BATCH_HEADER = "x-rocketmq-a2a"
"""Request header that says, with the value `1`: this caller reads batches and what is ours of a response."""

BLOBS_HEADER = "x-rocketmq-blobs"
"""Request header that names the blob store in which the caller finds large answers and events."""

ACK_TIMEOUT_HEADER = "x-rocketmq-ack-timeout"
"""Request header, in seconds: how long the caller waits for a worker to take it, from its sending."""

IDLE_TIMEOUT_HEADER = "x-rocketmq-idle-timeout"
"""Request header, in seconds: how long the caller waits between two signs of life; where it names no ack time, for the
first one from its sending."""

TOTAL_TIMEOUT_HEADER = "x-rocketmq-total-timeout"
"""Request header, in seconds: how long the caller waits for the whole response, from its sending."""

MIN_PART_BYTES = 16 * 1024
"""Fewest bytes that a part of a body has, but for the last one."""

_MAX_ID = 1024
_TOPIC = re.compile(r"[%|A-Za-z0-9_-]{1,127}")
_STORE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"p-[0-9a-f]{32}")
_PART_TOPIC = re.compile(r"p-[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FRAME = b'{"part":'
_RUN = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LITE_TOPIC = re.compile(r"[A-Za-z0-9_-]{1,64}")


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
            fields = Fields.parse(data)
            body = fields.any("requestBody")
            return cls(
                request_id=fields.text("requestId", REQUEST_ID),
                reply_topic=fields.text("workAgentResponseTopic", _TOPIC),
                lite_topic=fields.text("liteTopic", _LITE_TOPIC),
                body=body if isinstance(body, str) else "",
            )
        except EnvelopeError:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Where a body is in a blob store.

    Attributes:
        store: Name of the store.
        key: What it has there as its name; nobody can guess it.
    """

    store: str
    key: str

    @classmethod
    def _read(cls, fields: Fields) -> Claim | None:
        if not fields.has("store"):
            return None
        return cls(store=fields.text("store", _STORE), key=fields.text("key", _KEY))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which part of a body a message brings.

    Attributes:
        index: Its number, from 0.
        data: Its bytes.
        size: Bytes of the whole body, in its last part; None in all others.
        sha256: SHA-256 of the whole body in hexadecimal, in its last part; None in all others.
        claim: Where the whole body is, of which this is the only part then, without bytes; None for one that has them.
    """

    index: int
    data: bytes
    size: int | None = None
    sha256: str | None = None
    claim: Claim | None = None

    @property
    def is_last(self) -> bool:
        """Whether the body ends with it."""
        return self.sha256 is not None

    def encode(self, **fields: object) -> bytes:
        """Write a message body: these fields of an envelope, and the part."""
        about: dict[str, object] = {"index": self.index}
        if self.claim is not None:
            # Without an index, so that readers that know no claims refuse it.
            about = {"store": self.claim.store, "key": self.claim.key}
        about |= {"size": self.size, "sha256": self.sha256}
        present = {name: value for name, value in about.items() if value is not None}
        return b"".join((encode_fields(part=present, **fields), b"\n", self.data))

    @classmethod
    def split(cls, data: bytes) -> tuple[Fields, Part | None]:
        """The envelope's fields in a message, and the part that it brings, None for one that brings none.

        Raises:
            EnvelopeError: It is neither.
        """
        if not data.startswith(_FRAME):
            return Fields.parse(data), None
        head, _, rest = data.partition(b"\n")
        fields = Fields.parse(head)
        about = fields.inner("part")
        claim = Claim._read(about)  # noqa: SLF001
        index, size = about.number("index") if claim is None else 0, about.number("size")
        sha256 = about.optional_text("sha256", _SHA256)
        if index is None or (size is None) != (sha256 is None) or bool(rest) == bool(claim) or (claim and not size):
            raise fields.error("part", f"index, size or SHA-256 is missing, or it has {len(rest)} bytes")
        return fields, cls(index=index, data=rest, size=size, sha256=sha256, claim=claim)


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
        if part is None or part.claim is not None:
            raise EnvelopeError("The message is no part of a request's body.")
        return cls(request_id=fields.text("requestId", REQUEST_ID), part=part)


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
    def _read(cls, fields: Fields) -> BodyReference:
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
            request_id=fields.text("requestId", REQUEST_ID),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedBody:
    """Where the body of a large request is, when it is in a blob store.

    Attributes:
        claim: The store, and where in it.
        size: Bytes of the body.
        sha256: Its SHA-256, in hexadecimal.
    """

    claim: Claim
    size: int
    sha256: str

    def _fields(self) -> dict[str, object]:
        return {"store": self.claim.store, "key": self.claim.key, "size": self.size, "sha256": self.sha256}


def _large_body(fields: Fields) -> BodyReference | ClaimedBody:
    claim = Claim._read(fields)  # noqa: SLF001
    if claim is None:
        return BodyReference._read(fields)  # noqa: SLF001
    size = fields.number("size", low=1)
    if size is None:
        raise fields.error("size", "it is missing")
    return ClaimedBody(claim=claim, size=size, sha256=fields.text("sha256", _SHA256))


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
    large: BodyReference | ClaimedBody | None = None

    @property
    def reads_batches(self) -> bool:
        """Whether the caller announces our additions to the Java format."""
        return (self.header(BATCH_HEADER) or "").strip() == "1"

    def header(self, name: str) -> str | None:
        """The value of a header; None where it is not there.

        Args:
            name: Its name, in lower case.
        """
        return next((value for known, value in self.headers.items() if known.lower() == name), None)

    def seconds(self, header: str) -> float | None:
        """The seconds that a header names; None where it is not there, or no number above 0."""
        text = self.header(header)
        return None if text is None else read_seconds(text)

    def encode(self) -> bytes:
        """Write the message body."""
        return encode_fields(
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
        fields = Fields.parse(data)
        return cls(
            request_id=fields.text("requestId", REQUEST_ID),
            body=fields.text("requestBody"),
            headers=fields.headers("requestHeader") or {},
            dest_topic=fields.optional_text("destAgentTopic", _TOPIC),
            reply_topic=fields.text("workAgentResponseTopic", _TOPIC),
            lite_topic=fields.text("liteTopic", _LITE_TOPIC),
            large=_large_body(fields.inner("largeBody")) if fields.has("largeBody") else None,
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
        write = encode_fields if self.part is None else self.part.encode
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
            request_id=fields.text("requestId", REQUEST_ID),
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


def is_carried_header(name: str) -> bool:
    """Whether a response header (in lower case) means something beyond its own connection."""
    return name == "content-type" or name.startswith(("a2a-", "x-"))
