"""What all that goes to one cluster shares: one producer, one set of reply channels, and who runs which task."""

from __future__ import annotations

import asyncio
import codecs
import dataclasses
import logging
from typing import TYPE_CHECKING

from agentscope_rocketmq.bodies import PART_OVERHEAD, send_body
from agentscope_rocketmq.claims import put_body
from agentscope_rocketmq.envelope import BATCH_HEADER, BLOBS_HEADER
from agentscope_rocketmq.errors import BrokerError, CallTimeout, ClosedError, IllegalRequest, MessageTooLarge
from agentscope_rocketmq.jsonrpc import RpcRequest, excerpt
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.routes import INSTANCE_HEADER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from agentscope_rocketmq.blobs import BlobStore
    from agentscope_rocketmq.card import LargeBodies
    from agentscope_rocketmq.channels import ReplyChannels
    from agentscope_rocketmq.config import Limits
    from agentscope_rocketmq.envelope import BodyReference, ClaimedBody, RequestEnvelope
    from agentscope_rocketmq.pending import PendingResponse
    from agentscope_rocketmq.rocketmq.producer import Producer
    from agentscope_rocketmq.routes import InstanceRoutes
    from agentscope_rocketmq.times import CallTimes

__all__ = ["INSTANCE_TIMEOUT", "Carrier"]

logger = logging.getLogger(__name__)

INSTANCE_TIMEOUT = 3.0
"""Seconds within which the instance that runs a task must take a request for it; then any worker gets it."""

_CHECKED_AT_ONCE = 1024 * 1024


class Carrier:
    """What all transports of a process to one cluster share: a producer, the reply channels, and who runs what.

    Args:
        make: Makes producer and reply channels, not started. Called again when a start failed.
        make_observers: Makes reply channels of the observer group, not started.
        routes: What is known of the agents' instances.
        limits: `request_bytes` and `blob_bytes` count here.
        blobs: Where large bodies go, to agents that share it; None for nowhere.

    Attributes:
        routes: The same.
    """

    def __init__(
        self,
        make: Callable[[], tuple[Producer, ReplyChannels]],
        make_observers: Callable[[], ReplyChannels],
        routes: InstanceRoutes,
        *,
        limits: Limits,
        blobs: BlobStore | None = None,
    ) -> None:
        self.routes = routes
        self._blobs = blobs
        self._limits = limits
        self._make = make
        self._make_observers = make_observers
        self._observers: ReplyChannels | None = None
        self._starting = asyncio.Lock()
        self._closed = False
        self._started: tuple[Producer, ReplyChannels] | None = None

    @property
    def producer(self) -> Producer:
        """Sends requests."""
        return self._parts[0]

    @property
    def replies(self) -> ReplyChannels:
        """Receives answers."""
        return self._parts[1]

    @property
    def _parts(self) -> tuple[Producer, ReplyChannels]:
        if self._started is None:
            raise ClosedError("This RocketMQ client is closed, or was never started.")
        return self._started

    async def start(self) -> None:
        """Connect, once; further calls do nothing.

        Raises:
            BrokerError: Nobody answers, or reply topic, reply group or credentials are refused.
        """
        async with self._starting:
            if self._closed:
                raise ClosedError("This RocketMQ object is closed: make a new one.")
            if self._started is not None:
                return
            producer, replies = self._make()
            await producer.start()
            try:
                await replies.start()
            except BaseException:
                await producer.aclose()
                raise
            self._started = producer, replies

    @property
    def abilities(self) -> dict[str, str]:
        """Headers of a request that say which additions to the Java format are read here."""
        return {BATCH_HEADER: "1"} | ({BLOBS_HEADER: self._blobs.name} if self._blobs else {})

    async def put(
        self, request_id: str, body: bytes, large_bodies: LargeBodies | None, *, each: float, times: CallTimes
    ) -> tuple[str, BodyReference | ClaimedBody | None, CallTimes]:
        """Send the body of a request ahead, where it is too large for its envelope.

        Args:
            request_id: Id of the request.
            body: Its body.
            large_bodies: How the agent's servers read large requests; None when its card does not say that they do.
            each: Seconds for one message, or one chunk, to be accepted.
            times: How long its call waits for what.

        Returns:
            What its envelope says of the body: all of it, or an excerpt and where it is; and what is left of the times.

        Raises:
            MessageTooLarge: It is over the limit here, or of the agent's servers: nothing was sent.
            IllegalRequest: It is not UTF-8.
            CallTimeout: The total time ran out.
            BrokerError, BlobStoreError: It was not accepted.
        """
        _check_size(body, self._limits.request_bytes, large_bodies)
        blobs = self._blobs if large_bodies is not None and len(body) > self._limits.blob_bytes else None
        if blobs is not None and large_bodies is not None and large_bodies.blob_store != blobs.name:
            blobs = None
        if large_bodies is None or (blobs is None and len(body) <= self.producer.max_body_size - PART_OVERHEAD):
            return _text(body), None, times
        loop = asyncio.get_running_loop()
        began = loop.time()
        text = await asyncio.to_thread(_excerpt, body)
        try:
            async with asyncio.timeout(times.total):
                large: BodyReference | ClaimedBody
                if blobs is not None:
                    large = await put_body(blobs, request_id, body, timeout=each)
                else:
                    large = await send_body(self.producer, large_bodies.topic, request_id, body, timeout=each)
        except TimeoutError:
            raise CallTimeout(
                f"The {len(body)} bytes of request {request_id} could not be sent within {times.total:g} s (total time "
                "limit). Raise it, or send less.",
                request_id=request_id,
                which="total",
                seconds=times.total or 0.0,
            ) from None
        return text, large, times.after(loop.time() - began)

    async def request(
        self,
        envelope: RequestEnvelope,
        pending: PendingResponse,
        *,
        timeout: float,  # noqa: ASYNC109
        topic: str | None = None,
    ) -> None:
        """Send a request, to the instance that knows its task where one does.

        Args:
            envelope: The request; `dest_topic` names the agent.
            pending: Its response, registered before.
            timeout: Seconds within which the broker must accept it.
            topic: Where to send it; None for the agent's topic.

        Raises:
            BrokerError: It was not accepted.
        """
        agent = envelope.dest_topic or ""
        rpc = RpcRequest.read(envelope.body)
        instance = self.routes.find(agent, rpc)
        if instance is not None and rpc.runs_agent:
            # Work is leased from the topic. Whichever worker takes it hands it over to the one that knows more.
            envelope = dataclasses.replace(envelope, headers={**envelope.headers, INSTANCE_HEADER: instance[1]})
        elif instance is not None and await self._ask_instance(envelope, instance, pending, timeout):
            return
        await self._send(envelope, topic or agent, None, timeout=timeout)

    def note(self, envelope: RequestEnvelope, pending: PendingResponse, text: str) -> None:
        """Remember which instance runs the task that this first piece of a run's response tells of."""
        if pending.call.sticky is not None:
            rpc = RpcRequest.read(envelope.body)
            self.routes.note(envelope.dest_topic or "", pending.call.sticky, rpc, text)

    async def _ask_instance(
        self,
        envelope: RequestEnvelope,
        instance: tuple[str, str],
        pending: PendingResponse,
        timeout: float,  # noqa: ASYNC109
    ) -> bool:
        """Ask the instance that runs a task, however busy it is; whether it answers."""
        try:
            await self._send(envelope, *instance, timeout=timeout)
        except BrokerError as error:
            logger.info("Instance %s can't be asked: %s", instance[1], error)
            return False
        # It says at once that it takes a request; one that is gone says nothing.
        if await pending.begins_within(INSTANCE_TIMEOUT):
            return True
        logger.info("Instance %s does not answer; any worker of %s may", instance[1], envelope.dest_topic)
        self.routes.forget(instance)
        return False

    async def _send(self, envelope: RequestEnvelope, topic: str, lite_topic: str | None, *, timeout: float) -> None:  # noqa: ASYNC109
        message = Message(
            topic=topic,
            lite_topic=lite_topic,
            body=envelope.encode(),
            keys=(envelope.request_id,),
            properties=_trace_context(envelope.headers),
        )
        await self.producer.send(message, timeout=timeout)

    async def observers(self) -> ReplyChannels:
        """Reply channels that disturb no live reader; connected once, when first asked for.

        Raises:
            BrokerError: Nobody answers, or the observer group (the reply group's name + `_OBSERVER`) is refused.
        """
        async with self._starting:
            if self._closed:
                raise ClosedError("This RocketMQ object is closed: make a new one.")
            if self._observers is None:
                observers = self._make_observers()
                await observers.start()
                self._observers = observers
            return self._observers

    async def aclose(self) -> None:
        """End all calls and leave. Repeated calls are safe."""
        self._closed = True
        observers, self._observers = self._observers, None
        if observers is not None:
            await observers.aclose()
        if self._started is not None:
            producer, replies = self._started
            await replies.aclose()
            await producer.aclose()
            self._started = None


def _check_size(body: bytes, own: int, large: LargeBodies | None) -> None:
    limit = own if large is None else min(own, large.request_bytes)
    if len(body) > limit:
        where = "here and on the server" if limit == own else "of the agent's server, whose card names it"
        raise MessageTooLarge(
            f"The request has {len(body)} bytes and was not sent: the limit is {limit}. Send less, or raise "
            f"Limits.request_bytes {where}."
        )


def _text(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise IllegalRequest(f"The request's body is not UTF-8 text ({error.reason}): A2A sends JSON.") from None


def _excerpt(body: bytes) -> str:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(body), _CHECKED_AT_ONCE):
            decoder.decode(body[start : start + _CHECKED_AT_ONCE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise IllegalRequest(f"The request's body is not UTF-8 text ({error.reason}): A2A sends JSON.") from None
    return excerpt(body)


def _trace_context(headers: Mapping[str, str]) -> dict[str, str]:
    # As message properties too, where broker-side traces find them.
    return {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
