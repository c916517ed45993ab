"""Sends responses to their callers' LiteTopics, message by message, whatever the broker does meanwhile."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from agentscope_rocketmq.envelope import IDLE_TIMEOUT_HEADER, ReplyAddress
from agentscope_rocketmq.errors import BrokerError, TopicNotFound
from agentscope_rocketmq.jsonrpc import INTERNAL_ERROR, INVALID_REQUEST, RpcRequest
from agentscope_rocketmq.reply import error_envelope
from agentscope_rocketmq.rocketmq.message import Message

if TYPE_CHECKING:
    from agentscope_rocketmq.asgi import Response
    from agentscope_rocketmq.envelope import RequestEnvelope, ResponseEnvelope
    from agentscope_rocketmq.errors import EnvelopeError
    from agentscope_rocketmq.rocketmq.producer import Producer

__all__ = ["Publisher"]

logger = logging.getLogger(__name__)

# A reply waits out a restart of the broker that takes this long, whatever the timeout for other sends is.
_REPLY_SECONDS = 300.0
# A proxy says of a topic that it was not asked about before that it does not exist, while it can't reach the broker and
# up to a minute after. The caller reads that topic, so there it is.
_MISSING_TOPIC_PAUSE = 2.0
# How often a caller hears that its request is worked on, unless it wants to hear it more often.
_FIRST_BEAT = 1.0
_BEAT = 10.0
_LEAST_BEAT = 0.3


class Publisher:
    """Publishes the responses of one bridge.

    Args:
        producer: Sends them; not closed by this object.
        timeout: Seconds that a message may take to be accepted by the broker; at least five minutes are given.
    """

    def __init__(self, producer: Producer, *, timeout: float) -> None:
        self._producer = producer
        self._timeout = max(timeout, _REPLY_SECONDS)

    async def publish(self, envelope: RequestEnvelope, response: Response) -> bool:
        """Send a response's messages one after the other; what piles up meanwhile rides in the next.

        While the app says nothing, callers that read batches get a sign of life, three of them in their idle time.

        Returns:
            Whether the request is done with: all is on the broker, or no worker could put it there.
        """
        encoder = response.encoder
        idle = envelope.seconds(IDLE_TIMEOUT_HEADER)
        rest = _BEAT if idle is None else min(_BEAT, max(_LEAST_BEAT, idle / 3))
        # That it is taken is said soon, that it is still worked on for as long as nothing else is to be said.
        patience = min(_FIRST_BEAT, rest)
        while not encoder.finished:
            reply = encoder.take()
            if reply is None:
                response.changed.clear()
                response.drained.set()
                try:
                    async with asyncio.timeout(patience):
                        await response.changed.wait()
                except TimeoutError:
                    encoder.begin()
                continue
            try:
                await self._send(envelope.reply_topic, envelope.lite_topic, reply)
                patience = rest
            except BrokerError as error:
                # The agent goes on: its task can be asked for. A worker that could reach the broker may answer
                # better; where the reply topic itself is refused, none could.
                logger.error("The response to request %s is not published: %s", reply.request_id, error)  # noqa: TRY400
                response.unpublished = True
                return not error.transient
        return True

    async def answer_unreadable(self, body: bytes, error: EnvelopeError, *, allowed: frozenset[str]) -> None:
        """Tell whoever sent what is no request, where that can be read from it.

        Args:
            body: The message.
            error: What is wrong with it.
            allowed: Topics that may be answered into.
        """
        address = ReplyAddress.find(body)
        if address is None or address.reply_topic not in allowed:
            return
        request = RpcRequest.read(address.body)
        reply = error_envelope(
            address.request_id,
            code=INVALID_REQUEST,
            message=str(error),
            rpc_id=request.id,
            wants_stream=request.wants_stream,
        )
        await self._answer(address, reply)

    async def answer_given_up(self, envelope: RequestEnvelope, request: RpcRequest, why: str, *, attempt: int) -> None:
        """Tell the caller of a request that no worker will serve it.

        Args:
            envelope: The request.
            request: What its body says.
            why: For the caller's eyes.
            attempt: Which delivery of the request this is, from 0.
        """
        reply = error_envelope(
            envelope.request_id,
            code=INTERNAL_ERROR,
            message=why,
            rpc_id=request.id,
            peer_reads_batches=envelope.reads_batches,
            wants_stream=request.wants_stream,
            attempt=attempt,
        )
        await self._answer(envelope, reply)

    async def _answer(self, to: ReplyAddress | RequestEnvelope, reply: ResponseEnvelope) -> None:
        try:
            await self._send(to.reply_topic, to.lite_topic, reply)
        except BrokerError as failure:
            logger.warning("%s", failure)

    async def _send(self, reply_topic: str, lite_topic: str, reply: ResponseEnvelope) -> None:
        message = Message(topic=reply_topic, lite_topic=lite_topic, body=reply.encode(), keys=(reply.request_id,))
        loop = asyncio.get_running_loop()
        patience = loop.time() + self._timeout
        while True:
            try:
                await self._producer.send(message, timeout=self._timeout)
            except TopicNotFound:
                if loop.time() > patience:
                    raise
                await asyncio.sleep(_MISSING_TOPIC_PAUSE)
            else:
                return
