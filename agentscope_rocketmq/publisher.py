"""Sends responses to their callers' LiteTopics, message by message, whatever the broker does meanwhile."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from typing import TYPE_CHECKING

from agentscope_rocketmq.asgi import request_name
from agentscope_rocketmq.claims import new_key, store_failed
from agentscope_rocketmq.envelope import BLOBS_HEADER, IDLE_TIMEOUT_HEADER, Claim, ReplyAddress
from agentscope_rocketmq.errors import BrokerError, TopicNotFound
from agentscope_rocketmq.jsonrpc import INTERNAL_ERROR, INVALID_REQUEST, RpcRequest
from agentscope_rocketmq.reply import ReplyEncoder, error_envelope
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.routes import new_context_id, new_task_id
from agentscope_rocketmq.sse import render_event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from agentscope_rocketmq.asgi import Response
    from agentscope_rocketmq.blobs import BlobStore
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
# What a blob store is given at a time.
_CHUNK = 1024 * 1024


class _Body:
    """A body on its way to the blob store."""

    def __init__(self, response: Response) -> None:
        self._response = response
        self._given_at: float | None = asyncio.get_running_loop().time()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Its bytes as they come."""
        response = self._response
        while response.encoder.storing:
            chunk = response.encoder.take_chunk(_CHUNK)
            if chunk is None:
                response.changed.clear()
                response.drained.set()
                await response.changed.wait()
                continue
            self._given_at = asyncio.get_running_loop().time()
            if not chunk:
                return
            yield chunk
            self._given_at = None
        raise EOFError("the answer ended with an error")

    def check(self, seconds: float) -> None:
        """Raise TimeoutError when the store has been at one chunk, or at the end of all, for so long."""
        if self._given_at is not None and asyncio.get_running_loop().time() - self._given_at > seconds:
            raise TimeoutError


class Publisher:
    """Publishes the responses of one bridge.

    Args:
        producer: Sends them; not closed by this object.
        timeout: Seconds that a message may take to be accepted by the broker; at least five minutes are given.
        blobs: Where large answers and events go for callers that share it; None for nowhere.
        store_above: Bytes that are large.
    """

    def __init__(
        self, producer: Producer, *, timeout: float, blobs: BlobStore | None = None, store_above: int = 0
    ) -> None:
        self._producer = producer
        self._timeout = max(timeout, _REPLY_SECONDS)
        self._blobs = blobs
        self._store_above = store_above

    def store_above(self, envelope: RequestEnvelope) -> int | None:
        """Bytes above which a body of the answer goes to the blob store; None where the caller does not share it."""
        shared = self._blobs is not None and envelope.header(BLOBS_HEADER) == self._blobs.name
        return self._store_above if shared else None

    async def publish(self, envelope: RequestEnvelope, response: Response, *, within: float | None = None) -> bool:
        """Send a response's messages one after the other; what piles up meanwhile rides in the next.

        While the app says nothing, callers that read batches get a sign of life, three of them in their idle time.

        Args:
            envelope: The request.
            response: Its response.
            within: Seconds within which the caller must hear that it is taken; None for no such limit.

        Returns:
            Whether the request is done with: all is on the broker, or no worker could put it there.
        """
        encoder = response.encoder
        idle = envelope.seconds(IDLE_TIMEOUT_HEADER)
        rest = _BEAT if idle is None else min(_BEAT, max(_LEAST_BEAT, idle / 3))
        # That it is taken is said soon, that it is still worked on for as long as nothing else is to be said.
        patience = min(_FIRST_BEAT, rest, *(() if within is None else (within / 3,)))
        while not encoder.finished:
            reply = encoder.take()
            if reply is None and not encoder.storing:
                response.changed.clear()
                response.drained.set()
                try:
                    async with asyncio.timeout(patience):
                        await response.changed.wait()
                except TimeoutError:
                    encoder.begin()
                continue
            try:
                if reply is None and (reply := await self._store(envelope, response, beat=rest)) is None:
                    continue  # an error is there to be sent instead
                await self._send(envelope.reply_topic, envelope.lite_topic, reply)
                patience = rest
            except BrokerError as error:
                # The agent goes on: its task can be asked for. A worker that could reach the broker may answer
                # better; where the reply topic itself is refused, none could.
                logger.error("The response to request %s is not published: %s", envelope.request_id, error)  # noqa: TRY400
                response.unpublished = True
                return not error.transient
        return True

    async def _store(self, envelope: RequestEnvelope, response: Response, *, beat: float) -> ResponseEnvelope | None:
        """Put a body into the blob store while it comes; the message that tells of it, None when that failed."""
        store, encoder = self._blobs, response.encoder
        assert store is not None  # noqa: S101  (nothing is for the store otherwise)
        key = new_key()
        body = _Body(response)
        storing = asyncio.create_task(store.put(key, body.chunks()), name=f"publish[{envelope.request_id}].store")
        try:
            while not (await asyncio.wait({storing}, timeout=beat))[0]:
                body.check(self._timeout)
                encoder.begin()
                if (sign := encoder.take()) is not None:
                    await self._send(envelope.reply_topic, envelope.lite_topic, sign)
            await storing
        except BrokerError:
            raise
        except Exception as error:  # noqa: BLE001  (whatever a store raises)
            if encoder.storing:
                limit = f"{self._timeout:g} s for a piece (Timeouts.send, or more)"
                failure = store_failed(store, f"keep the answer to request {envelope.request_id}", error, limit=limit)
                logger.error("%s", failure)  # noqa: TRY400
                encoder.fail(INTERNAL_ERROR, str(failure))
            return None
        finally:
            storing.cancel()
            await asyncio.gather(storing, return_exceptions=True)
        return encoder.stored(Claim(store=store.name, key=key))

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
        """Tell the caller of a request that no worker will serve it: by a failed task, where it asked for work.

        Args:
            envelope: The request.
            request: What its body says.
            why: For the caller's eyes.
            attempt: Which delivery of the request this is, from 0.
        """
        if request.runs_agent:
            for reply in _failed_task(envelope, request, why, attempt=attempt, room=self._producer.max_body_size):
                await self._answer(envelope, reply)
            return
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


def _failed_task(
    envelope: RequestEnvelope, request: RpcRequest, why: str, *, attempt: int, room: int
) -> Iterator[ResponseEnvelope]:
    """The response that an agent's application would give, were it to say that the task of a request has failed."""
    from agentscope_rocketmq.ends import failed_result  # noqa: PLC0415  (the a2a-sdk's server takes a second)

    given = request.params.get("message")
    given = given if isinstance(given, dict) else {}
    name = request_name(envelope)
    result = failed_result(
        str(given.get("taskId") or new_task_id(name)),
        str(given.get("contextId") or new_context_id(name)),
        why,
        legacy="/" in (request.method or ""),
    )
    text = json.dumps({"jsonrpc": "2.0", "id": request.id, "result": result}, ensure_ascii=False)
    encoder = ReplyEncoder(
        envelope.request_id,
        peer_reads_batches=envelope.reads_batches,
        sticky=None,
        attempt=attempt,
        run=uuid.uuid4().hex[:16],
        max_message_bytes=room,
        wants_stream=request.wants_stream,
        rpc_id=request.id,
    )
    encoder.start(200, [(b"content-type", b"text/event-stream" if request.wants_stream else b"application/json")])
    encoder.feed((render_event(text) if request.wants_stream else text).encode("utf-8", "replace"))
    encoder.finish()
    while (reply := encoder.take()) is not None:
        yield reply
