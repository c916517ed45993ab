"""Messages: what goes out (`Message`) and what comes in (`ReceivedMessage`)."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import re
import socket
import time
import uuid
import zlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.errors import EnvelopeError, IllegalRequest
from agentscope_rocketmq.rocketmq.protocol import definition

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LITE_TOPIC_NAME", "Message", "ReceivedMessage", "encode", "received"]

LITE_TOPIC_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

# Below this a message is sent as it is: it would save little and cost the reader a decompression.
GZIP_FROM_BYTES = 16 * 1024
# What does not become this small is not worth its time: base64 of random bytes comes to 0.76 at 40 MB/s, text to 0.45.
_GZIP_RATIO = 0.7
_SAMPLE_BYTES = 16 * 1024

_EPOCH_2021 = 1609459200
# Every official client may receive ours, so the id has their form: version, host, process, seconds, counter
# (org.apache.rocketmq.client.java.message.MessageIdCodec, version 1). A random host part keeps it unique in containers
# that share a MAC address and a process id.
_MESSAGE_ID_PREFIX = f"01{uuid.uuid4().hex[:12].upper()}{os.getpid() & 0xFFFF:04X}"
_message_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message to send.

    Attributes:
        topic: Its topic, without namespace.
        body: Its content, not empty.
        lite_topic: Makes it a LITE message for that LiteTopic of `topic`.
        priority: Makes it a PRIORITY message of that level (0 lowest).
        tag: For server-side filters; None for none.
        keys: Words to find it by in traces.
        properties: User properties, strings without control characters.
    """

    topic: str
    body: bytes
    lite_topic: str | None = None
    priority: int | None = None
    tag: str | None = None
    keys: tuple[str, ...] = ()
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def type(self) -> int:
        """The protocol's `MessageType` number."""
        if self.lite_topic is not None:
            return int(definition.MessageType.LITE)
        if self.priority is not None:
            return int(definition.MessageType.PRIORITY)
        return int(definition.MessageType.NORMAL)


@dataclass(slots=True, kw_only=True, eq=False)
class ReceivedMessage:
    """One message as a consumer got it.

    Attributes:
        message_id: Given by the sender; the same in every delivery of the message.
        topic: Its topic, without namespace.
        lite_topic: Its LiteTopic, None outside LITE topics.
        offset: Its place in its LiteTopic (0, 1, 2, …) or queue.
        store_time: When the broker stored it, UTC.
        attempt: How often it has been delivered, this time included (from 1).
        tag: Tag, None for none.
        keys: Keys.
        properties: User properties.
        receipt_handle: What to ack it with; replaced when its lease is renewed or it is delivered again.
        waited: Seconds that it had been on the broker when it was handed out, by the servers' clocks; 0 where the
            server does not say. A message that is delivered again counts from when it was given back.
        raw_body: The body as sent, perhaps compressed: use `body()`.
        encoding: The protocol's `Encoding` number of `raw_body`.
    """

    message_id: str
    topic: str
    lite_topic: str | None
    offset: int
    store_time: datetime
    attempt: int
    tag: str | None
    keys: tuple[str, ...]
    properties: dict[str, str]
    receipt_handle: str
    raw_body: bytes
    encoding: int
    waited: float = 0.0

    def body(self, *, limit: int = 64 * 1024 * 1024) -> bytes:
        """The body, decompressed.

        Args:
            limit: Largest size in bytes it may decompress to, so that a small message can't fill the memory.

        Raises:
            EnvelopeError: It is not decompressible, or larger than `limit`.
        """
        if self.encoding != definition.Encoding.GZIP:
            return self.raw_body
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(self.raw_body)) as file:
                body = file.read(limit + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise EnvelopeError(
                f"Message {self.message_id} of topic {self.topic!r} says it is gzip and is not: {error}."
            ) from error
        if len(body) > limit:
            raise EnvelopeError(
                f"Message {self.message_id} of topic {self.topic!r} decompresses to more than {limit} bytes."
            )
        return body


def encode(message: Message, resource: Any, *, room: int) -> Any:
    """The protocol's message. Compressing it may take tens of milliseconds for megabytes.

    Args:
        message: What to send.
        resource: The topic as protocol `Resource`.
        room: Bytes that a body may have, as sent: a larger one is compressed however little that brings.

    Raises:
        IllegalRequest: An empty body, or a name that RocketMQ does not accept.
    """
    if not message.body:
        raise IllegalRequest(f"A message for topic {message.topic!r} has no body: RocketMQ refuses empty ones.")
    if message.lite_topic is not None and not LITE_TOPIC_NAME.fullmatch(message.lite_topic):
        raise IllegalRequest(f"{message.lite_topic!r} is not a LiteTopic name: use 1-64 letters, digits, '_' or '-'.")
    body, encoding = message.body, definition.Encoding.IDENTITY
    if (compressed := _compressed(body, room)) is not None:
        body, encoding = compressed, definition.Encoding.GZIP
    system = definition.SystemProperties(
        keys=message.keys,
        message_id=_next_message_id(),
        body_encoding=encoding,
        body_digest=definition.Digest(type=definition.DigestType.CRC32, checksum=f"{zlib.crc32(body):08X}"),
        message_type=message.type,
        born_host=socket.gethostname(),
    )
    system.born_timestamp.FromDatetime(datetime.now(UTC))
    if message.tag is not None:
        system.tag = message.tag
    if message.lite_topic is not None:
        system.lite_topic = message.lite_topic
    if message.priority is not None:
        system.priority = message.priority
    return definition.Message(
        topic=resource, user_properties=dict(message.properties), system_properties=system, body=body
    )


def _compressed(body: bytes, room: int) -> bytes | None:
    """A body as gzip; None where that does not pay."""
    if len(body) < GZIP_FROM_BYTES:
        return None
    fits = len(body) <= room
    # Level 1: on JSON nearly as small as the default, at a third of the time.
    if fits and len(body) > 4 * _SAMPLE_BYTES:
        sample = memoryview(body)[len(body) // 2 :][:_SAMPLE_BYTES]
        if len(zlib.compress(sample, 1)) > _GZIP_RATIO * _SAMPLE_BYTES:
            return None
    compressed = gzip.compress(body, compresslevel=1, mtime=0)
    return compressed if len(compressed) <= (_GZIP_RATIO if fits else 1) * len(body) else None


def received(message: Any) -> ReceivedMessage:
    """A `ReceivedMessage` from the protocol's message."""
    system = message.system_properties
    return ReceivedMessage(
        message_id=system.message_id,
        topic=message.topic.name,
        lite_topic=system.lite_topic if system.HasField("lite_topic") else None,
        offset=system.queue_offset,
        store_time=system.store_timestamp.ToDatetime(UTC),
        attempt=max(1, system.delivery_attempt),
        tag=system.tag if system.HasField("tag") else None,
        keys=tuple(system.keys),
        properties=dict(message.user_properties),
        receipt_handle=system.receipt_handle,
        raw_body=message.body,
        encoding=int(system.body_encoding),
    )


def _next_message_id() -> str:
    seconds = (int(time.time()) - _EPOCH_2021) & 0xFFFFFFFF
    return f"{_MESSAGE_ID_PREFIX}{seconds:08X}{next(_message_numbers) & 0xFFFFFFFF:08X}"
