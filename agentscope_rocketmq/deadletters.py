"""Requests that no worker can serve: kept where nobody takes them for work, to be looked at and tried again.

Each agent topic has a LiteTopic for them on the agent's state topic. It needs no provisioning, can be read as often as
one likes, and keeps what is in it for as long as the state topic keeps LiteTopics. RocketMQ's own dead-letter queue is
never reached: it takes a message after 16 deliveries, in silence, and `Limits.attempts` is less.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import json
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.envelope import RequestEnvelope
from agentscope_rocketmq.errors import (
    BrokerUnreachable,
    ConfigurationError,
    EnvelopeError,
    MessageTooLarge,
    SessionTakenOver,
)
from agentscope_rocketmq.jsonrpc import read_json
from agentscope_rocketmq.owners import OWNER_HEADER
from agentscope_rocketmq.rocketmq.lite import LiteBatch, Position
from agentscope_rocketmq.rocketmq.message import LITE_TOPIC_NAME, Message

if TYPE_CHECKING:
    from agentscope_rocketmq.rocketmq.lite import LiteConsumer
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage
    from agentscope_rocketmq.rocketmq.producer import Producer

__all__ = ["DeadLetter", "DeadLetters", "bury", "dead_letter_topic"]

_MOST_REASON = 2000
_READ_SECONDS = 30.0


def dead_letter_topic(topic: str) -> str:
    """The LiteTopic of an agent topic's dead letters: `d-` and the topic, or the SHA-256 of one that doesn't fit."""
    name = f"d-{topic}"
    if LITE_TOPIC_NAME.fullmatch(name):
        return name
    return "d-" + base64.urlsafe_b64encode(hashlib.sha256(topic.encode()).digest()).rstrip(b"=").decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A request that was given up.

    Attributes:
        id: Its number among the dead letters of its topic.
        reason: Why.
        time: When it was given up, UTC.
        topic: The topic it was taken from.
        message_id: Id of its message there.
        attempts: How often it was delivered.
        body: The message as it was; empty where it was too large to be kept.
        retried: Whether it was put back already.
    """

    id: int
    reason: str
    time: datetime
    topic: str
    message_id: str
    attempts: int
    body: bytes
    retried: bool = False

    @property
    def request(self) -> RequestEnvelope | None:
        """The request in it; None when it is none."""
        try:
            return RequestEnvelope.decode(self.body)
        except EnvelopeError:
            return None

    @classmethod
    def read(cls, message: ReceivedMessage) -> DeadLetter | int | str | None:
        """Read a message of the LiteTopic: a letter, the id of one that was put back, a mark, or None."""
        try:
            head, _, body = message.body().partition(b"\n")
            about = read_json(head.decode())
            if isinstance(about, dict) and isinstance(about.get("retried"), int):
                return int(about["retried"])
            if isinstance(about, dict) and isinstance(about.get("mark"), str):
                return str(about["mark"])
            return cls(
                id=message.offset,
                reason=str(about["reason"]),
                time=message.store_time.astimezone(UTC),
                topic=str(about["topic"]),
                message_id=str(about["messageId"]),
                attempts=int(about["attempts"]),
                body=body,
            )
        except (EnvelopeError, ValueError, TypeError, KeyError):
            return None


async def bury(
    producer: Producer,
    state_topic: str,
    message: ReceivedMessage,
    reason: str,
    *,
    agent: str,
    timeout: float,  # noqa: ASYNC109
) -> None:
    """Put a message among the dead letters of an agent. At least once: what is there twice is one for who reads.

    Args:
        producer: Sends it.
        state_topic: LITE topic of the agent's servers.
        message: The message.
        reason: Why nobody can serve it.
        agent: The agent's topic.
        timeout: Seconds within which the broker must accept it.

    Raises:
        BrokerError: The broker did not take it.
    """
    try:
        body = message.body()
    except EnvelopeError:
        body = message.raw_body
    about = {
        "reason": reason[:_MOST_REASON],
        "topic": message.topic,
        "messageId": message.message_id,
        "attempts": message.attempt,
    }
    try:
        await _put(producer, state_topic, agent, about, body, timeout=timeout)
    except MessageTooLarge:
        await _put(producer, state_topic, agent, about, b"", timeout=timeout)


async def _put(
    producer: Producer,
    state_topic: str,
    topic: str,
    about: dict[str, Any],
    body: bytes = b"",
    *,
    timeout: float,  # noqa: ASYNC109
) -> None:
    data = json.dumps(about, ensure_ascii=False).encode("utf-8", "replace") + b"\n" + body
    await producer.send(Message(topic=state_topic, lite_topic=dead_letter_topic(topic), body=data), timeout=timeout)


class DeadLetters:
    """The dead letters of one agent topic. One reader at a time: a second one takes over.

    Args:
        producer: Started; not closed by this object.
        consumer: Of the state group, started; not closed by this object.
        topic: The agent topic.
    """

    def __init__(self, producer: Producer, consumer: LiteConsumer, topic: str) -> None:
        self._producer = producer
        self._consumer = consumer
        self._topic = topic

    async def list(self) -> list[DeadLetter]:
        """All there are, the oldest first.

        Raises:
            BrokerError: They can't be read.
            SessionTakenOver: Somebody else reads them now.
        """
        # The end of a LiteTopic can't be asked for: what is read up to is put there.
        mark = uuid.uuid4().hex
        await _put(self._producer, self._consumer.topic, self._topic, {"mark": mark}, timeout=_READ_SECONDS)
        lite_topic = dead_letter_topic(self._topic)
        letters: dict[int, DeadLetter] = {}
        first: dict[str, int] = {}
        await self._consumer.subscribe([lite_topic], at=Position.offset(0))
        try:
            async with asyncio.timeout(_READ_SECONDS):
                async for item in self._consumer.batches():
                    if not isinstance(item, LiteBatch):
                        raise SessionTakenOver(
                            f"The dead letters of {self._topic!r} are read by somebody else now. Try again.",
                            session=lite_topic,
                        )
                    await self._consumer.ack(item.messages)
                    for message in item.messages:
                        found = DeadLetter.read(message)
                        if isinstance(found, DeadLetter):
                            # A message that is delivered again after it was given up is the same letter.
                            letter_id = first.setdefault(found.message_id, found.id)
                            before = letters.get(letter_id, found)
                            letters[letter_id] = dataclasses.replace(before, attempts=found.attempts)
                        elif isinstance(found, int) and found in letters:
                            letters[found] = dataclasses.replace(letters[found], retried=True)
                        elif found == mark:
                            return list(letters.values())
        except TimeoutError:
            raise BrokerUnreachable(
                f"The dead letters of {self._topic!r} did not come within {_READ_SECONDS:g} s. Try again.",
                transient=True,
            ) from None
        finally:
            await self._consumer.unsubscribe([lite_topic])
        return list(letters.values())

    async def find(self, letter_id: int) -> DeadLetter:
        """One of them.

        Raises:
            ConfigurationError: There is none with that id.
            BrokerError, SessionTakenOver: As `list`.
        """
        for letter in await self.list():
            if letter.id == letter_id:
                return letter
        raise ConfigurationError(f"Topic {self._topic!r} has no dead letter {letter_id}: list them.")

    async def retry(self, letter_id: int) -> str:
        """Put a request back on its topic, once, under a new id: workers know the old one as done with.

        Its answer goes to the session of its caller, who has the error already and may read it there.

        Returns:
            The new id of the request.

        Raises:
            ConfigurationError: There is no such letter, it was put back before, is no request, or was made for an
                owner whose assertion is good for the old id only.
            BrokerError, SessionTakenOver: As `list`. When the broker fails between the two writes, it is put back and
                not noted as such.
        """
        letter = await self.find(letter_id)
        request = letter.request
        problem = None
        if letter.retried:
            problem = "was put back before"
        elif request is None:
            problem = "is no request: there is nothing to try again"
        elif any(name.lower() == OWNER_HEADER for name in request.headers):
            problem = "was asked by a gateway for its owner: ask again through the gateway"
        if problem is not None or request is None:
            raise ConfigurationError(f"Dead letter {letter_id} of topic {self._topic!r} {problem}.")
        again = dataclasses.replace(request, request_id=uuid.uuid4().hex)
        message = Message(topic=self._topic, body=again.encode(), keys=(again.request_id,))
        await self._producer.send(message, timeout=_READ_SECONDS)
        await _put(self._producer, self._consumer.topic, self._topic, {"retried": letter_id}, timeout=_READ_SECONDS)
        return again.request_id
