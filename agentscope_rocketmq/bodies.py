"""Large requests: their bodies travel in parts, or lie in a blob store, beside the topic that workers share.

The parts of one request must reach one worker, and the next one when that dies. On the agent's topic they would be
spread over all workers. So each large body has a LiteTopic of its own on the LITE topic that the agent's card
names, with a name that nobody can guess; the envelope on the agent's topic only refers to it. Whichever worker takes
the envelope reads the LiteTopic from its start, and takes it over from one that died.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import uuid
from collections import deque
from typing import TYPE_CHECKING

from agentscope_rocketmq.claims import Claims
from agentscope_rocketmq.envelope import BodyPart, BodyReference, ClaimedBody, Part
from agentscope_rocketmq.errors import BrokerError, ClosedError, EnvelopeError, SessionTakenOver
from agentscope_rocketmq.jsonrpc import excerpt
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteLost, Position
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.slots import Slot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agentscope_rocketmq.blobs import BlobStore
    from agentscope_rocketmq.envelope import RequestEnvelope
    from agentscope_rocketmq.rocketmq.lite import LiteConsumer
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage
    from agentscope_rocketmq.rocketmq.producer import Producer
    from agentscope_rocketmq.spool import Spool, Spools

__all__ = ["PART_OVERHEAD", "BodyReceiver", "send_body"]

logger = logging.getLogger(__name__)

PART_OVERHEAD = 16 * 1024
"""Bytes of a message beside a part: its line of JSON, properties, and what the broker adds."""

# When a LiteTopic brings nothing for this long, a reader that died may have left it blocked before anything was acked.
_SILENCE = 1.0
# How long the broker needs to apply a seek to the end before the seek back: a poll in flight does.
_SEEK_APPLIES = 0.3
# Parts on their way to the broker at one time: 100 MB take 0.4 s instead of 0.7 s, and more than three no less. They
# may arrive in any order, which costs their reader as much memory.
_AT_ONCE = 3


async def send_body(producer: Producer, topic: str, request_id: str, body: bytes, *, timeout: float) -> BodyReference:  # noqa: ASYNC109
    """Put the body of a request where its worker finds it, in parts.

    Delivery is at least once: a part may be there twice, or before one that it follows. What a sender that dies leaves
    on the broker nobody reads; it goes when its LiteTopic expires.

    Args:
        producer: Sends them.
        topic: LITE topic that the agent's card names.
        request_id: Id of the request.
        body: Its body.
        timeout: Seconds within which the broker must accept each part.

    Raises:
        BrokerError: A part was not accepted.
    """
    lite_topic = f"p-{uuid.uuid4().hex}"
    step = producer.max_body_size - PART_OVERHEAD
    sha256 = hashlib.sha256()
    whole = memoryview(body)
    count = 0
    sent: deque[asyncio.Task[object]] = deque()
    try:
        async with asyncio.TaskGroup() as sending:
            for start in range(0, len(body), step):
                data = bytes(whole[start : start + step])
                sha256.update(data)
                last = start + step >= len(body)
                part = Part(
                    index=count,
                    data=data,
                    size=len(body) if last else None,
                    sha256=sha256.hexdigest() if last else None,
                )
                encoded = BodyPart(request_id=request_id, part=part).encode()
                message = Message(topic=topic, lite_topic=lite_topic, body=encoded, keys=(request_id,))
                if len(sent) == _AT_ONCE:
                    await sent.popleft()
                task = sending.create_task(producer.send(message, timeout=timeout), name=f"body[{request_id}].{count}")
                sent.append(task)
                count += 1
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the others are of the same broker
    return BodyReference(
        lite_topic=lite_topic, parts=count, size=len(body), sha256=sha256.hexdigest(), request_id=request_id
    )


class BodyReceiver:
    """Fetches the bodies of large requests, for one worker.

    Args:
        consumer: Reads the LITE topic that the agent's card names; its owner passes on to `hear` what comes.
        spools: Where bodies are put together.
        patience: Seconds to wait for the next part.
        blobs: Where bodies may be that do not come in parts; None for nowhere.
    """

    def __init__(
        self, consumer: LiteConsumer, *, spools: Spools, patience: float, blobs: BlobStore | None = None
    ) -> None:
        self._consumer = consumer
        self._spools = spools
        self._patience = patience
        self._claims = Claims(blobs, spools=spools, patience=patience)
        self._reading: dict[str, asyncio.Queue[ReceivedMessage | None]] = {}
        self._reserved = 0
        self._freed = asyncio.Event()

    def hear(self, item: LiteBatch | LiteLost) -> bool:
        """Take what the consumer brought; whether it was part of a body."""
        if not item.lite_topic.startswith("p-"):
            return False
        queue = self._reading.get(item.lite_topic)
        if queue is not None:
            # The broker sends no more of a LiteTopic before these are acked, so this is bounded.
            for message in item.messages if isinstance(item, LiteBatch) else (None,):
                queue.put_nowait(message)
        return True

    @contextlib.asynccontextmanager
    async def fetch(self, envelope: RequestEnvelope) -> AsyncIterator[Spool]:
        """The body of a large request, until it is closed, or the context ends.

        Who has to wait for room leaves its place to others meanwhile.

        Raises:
            EnvelopeError: It never came, or is not what the envelope says, or more than may be taken.
            SessionTakenOver: Another worker has it now.
            BrokerError, BlobStoreError: It can't be read.
        """
        large = envelope.large
        assert large is not None  # noqa: S101  (asked for large requests only)
        if large.size > self._spools.most:
            raise EnvelopeError(
                f"The request has {large.size} bytes; this agent takes {self._spools.most}. Send less, or raise "
                "Limits.request_bytes of its server."
            )
        with await self._room(large.size) as spool:
            if isinstance(large, ClaimedBody):
                await self._claim(envelope.request_id, large, spool)
            else:
                await self._collect(envelope.request_id, large, spool)
            if await asyncio.to_thread(lambda: excerpt(spool.read())) != envelope.body:
                raise EnvelopeError(f"Request {envelope.request_id} is not the one that its envelope tells of.")
            yield spool

    async def forget(self, envelope: RequestEnvelope) -> None:
        """A request is done with: what a blob store has of it is deleted."""
        if isinstance(envelope.large, ClaimedBody):
            await self._claims.delete(envelope.large.claim)

    async def _claim(self, request_id: str, large: ClaimedBody, spool: Spool) -> None:
        try:
            await self._claims.fetch(large.claim, spool, size=large.size, sha256=large.sha256)
        except EnvelopeError as error:
            raise EnvelopeError(f"The body of request {request_id} can't be had: {error}. Send it again.") from None

    async def _collect(self, request_id: str, large: BodyReference, spool: Spool) -> None:
        if large.lite_topic in self._reading:
            raise EnvelopeError(f"The body of request {request_id} is being read by another request.")
        queue = self._reading[large.lite_topic] = asyncio.Queue()
        try:
            await self._read(request_id, large, queue, spool)
        finally:
            # Acked to its end, or left to the next reader, who begins at the start.
            with contextlib.suppress(BrokerError, ClosedError):
                await self._consumer.unsubscribe([large.lite_topic])
            self._reading.pop(large.lite_topic, None)

    async def _room(self, size: int) -> Spool:
        """Where a body of so many bytes may be put together; room for it is taken until that is closed."""
        slot = Slot.current()
        while self._reserved + size > self._spools.total:
            if slot is not None:
                slot.leave()
            self._freed.clear()
            await self._freed.wait()
        self._reserved += size
        spool = self._spools.open(on_close=lambda: self._free(size))
        try:
            if slot is not None:
                await slot.enter()
        except BaseException:
            spool.close()
            raise
        return spool

    def _free(self, size: int) -> None:
        self._reserved -= size
        self._freed.set()

    async def _read(
        self,
        request_id: str,
        large: BodyReference,
        queue: asyncio.Queue[ReceivedMessage | None],
        spool: Spool,
    ) -> None:
        await self._consumer.subscribe([large.lite_topic], at=Position.offset(0))
        due = 0
        early: dict[int, Part] = {}
        heard: list[ReceivedMessage] = []
        first = True
        while due < large.parts:
            message = await self._next(request_id, large, queue, first=first)
            first = False
            part = await asyncio.to_thread(_decode, message, large.request_id)
            heard.append(message)
            if queue.empty():
                # More comes when all of these are acked. Who takes over reads from the start, acked or not.
                await self._consumer.ack(heard)
                heard.clear()
            if part.index < due or part.index in early:
                continue  # sent twice
            if part.index >= min(due + _AT_ONCE, large.parts):
                raise EnvelopeError(f"The body of request {request_id} is not what its envelope says.")
            early[part.index] = part
            while due in early:
                part = early.pop(due)
                if spool.size + len(part.data) > large.size:
                    raise EnvelopeError(f"The body of request {request_id} is not what its envelope says.")
                try:
                    await asyncio.to_thread(spool.write, part.data)
                except OverflowError as error:
                    raise EnvelopeError(f"The body of request {request_id} can't be put together: {error}.") from None
                due += 1
        await self._consumer.ack(heard)
        if (spool.size, spool.sha256) != (large.size, large.sha256):
            raise EnvelopeError(
                f"The body of request {request_id} is not what was sent: size or SHA-256 differ. Send it again."
            )

    async def _next(
        self, request_id: str, large: BodyReference, queue: asyncio.Queue[ReceivedMessage | None], *, first: bool
    ) -> ReceivedMessage:
        try:
            if first:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(_SILENCE, self._patience)):
                        return _present(await queue.get(), request_id)
                await self._unblock(large.lite_topic)
            async with asyncio.timeout(self._patience):
                return _present(await queue.get(), request_id)
        except TimeoutError:
            raise EnvelopeError(
                f"The body of request {request_id} did not come in full: its next part is not there after "
                f"{self._patience:g} s (Timeouts.parts of the agent's server). Send it again."
            ) from None

    async def _unblock(self, lite_topic: str) -> None:
        # What a reader left that never acked: a seek to where the group stands anyway does nothing, so go away first.
        await self._consumer.subscribe([lite_topic], at=Position.last())
        await asyncio.sleep(_SEEK_APPLIES)
        await self._consumer.subscribe([lite_topic], at=Position.offset(0))


def _present(message: ReceivedMessage | None, request_id: str) -> ReceivedMessage:
    if message is None:
        raise SessionTakenOver(f"The body of request {request_id} is read by another worker now.", session=request_id)
    return message


def _decode(message: ReceivedMessage, request_id: str) -> Part:
    found = BodyPart.decode(message.body())
    if found.request_id != request_id:
        raise EnvelopeError(f"The body of request {request_id} is that of another request.")
    return found.part
