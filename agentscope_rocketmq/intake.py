"""Which messages of a topic are requests that may be served; what is none is set aside, and its sender told."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from agentscope_rocketmq.deadletters import bury
from agentscope_rocketmq.envelope import RequestEnvelope
from agentscope_rocketmq.errors import EnvelopeError

if TYPE_CHECKING:
    from agentscope_rocketmq.publisher import Publisher
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage
    from agentscope_rocketmq.rocketmq.producer import Producer
    from agentscope_rocketmq.runs import BridgeCounters

__all__ = ["MOST_MESSAGE_BYTES", "Intake"]

logger = logging.getLogger(__name__)

MOST_MESSAGE_BYTES = 16 * 1024 * 1024
"""Decompressed, a message may have this much. What is larger comes in parts."""


class Intake:
    """Reads the messages of one bridge.

    Args:
        producer: Sends dead letters.
        publisher: Answers those who sent what can't be read.
        counters: Of the bridge; `refused` is counted here.
        topic: The agent's topic.
        state_topic: LITE topic of the dead letters.
        reply_topics: LITE topics that responses may go to.
        timeout: Seconds within which the broker must accept a dead letter.
    """

    def __init__(
        self,
        producer: Producer,
        publisher: Publisher,
        counters: BridgeCounters,
        *,
        topic: str,
        state_topic: str,
        reply_topics: frozenset[str],
        timeout: float,
    ) -> None:
        self._producer = producer
        self._publisher = publisher
        self._counters = counters
        self._topic = topic
        self._state_topic = state_topic
        self._reply_topics = reply_topics
        self._timeout = timeout

    async def read(self, message: ReceivedMessage) -> RequestEnvelope | None:
        """The request in a message; None for one that is set aside.

        Raises:
            BrokerError: It could not be set aside.
        """
        body = b""
        try:
            body = message.body(limit=MOST_MESSAGE_BYTES)
            envelope = RequestEnvelope.decode(body)
        except EnvelopeError as error:
            await self.set_aside(message, str(error))
            await self._publisher.answer_unreadable(body, error, allowed=self._reply_topics)
            return None
        if envelope.reply_topic in self._reply_topics:
            return envelope
        await self.set_aside(
            message,
            f"Request {envelope.request_id} wants its answer on topic {envelope.reply_topic!r}, which this server does "
            "not write to. Allow it with RocketMQConfig.allowed_reply_topics (ROCKETMQ_ALLOWED_REPLY_TOPICS) if it is "
            "right.",
        )
        return None

    async def set_aside(self, message: ReceivedMessage, reason: str) -> None:
        """Put a message among the agent's dead letters.

        Raises:
            BrokerError: The broker did not take it.
        """
        self._counters.refused += 1
        logger.warning("Message %s of topic %r is set aside: %s", message.message_id, message.topic, reason)
        await bury(self._producer, self._state_topic, message, reason, agent=self._topic, timeout=self._timeout)
