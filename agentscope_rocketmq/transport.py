"""RocketMQ as a carrier of HTTP: an httpx transport beneath the a2a-sdk's own JSON-RPC transports.

A request is put into an envelope and sent to the agent's topic; its response comes back, message by message, on the
LiteTopic of the session. So every A2A method, version, header, extension and error is the a2a-sdk's own.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import dataclasses
import logging
import uuid
from typing import TYPE_CHECKING, NamedTuple

import httpx

from agentscope_rocketmq.bodies import PART_OVERHEAD, send_body
from agentscope_rocketmq.cursor import CURSOR_EXTENSION
from agentscope_rocketmq.envelope import (
    BATCH_HEADER,
    IDLE_TIMEOUT_HEADER,
    TOTAL_TIMEOUT_HEADER,
    RequestEnvelope,
    read_seconds,
)
from agentscope_rocketmq.errors import (
    AgentScopeRocketMQError,
    BrokerError,
    CallTimeout,
    ClosedError,
    EnvelopeError,
    IllegalRequest,
    MessageTooLarge,
    ResponseCorrupt,
)
from agentscope_rocketmq.jsonrpc import RpcRequest, excerpt
from agentscope_rocketmq.priority import PRIORITY_HEADER, Tier
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.routes import INSTANCE_HEADER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from agentscope_rocketmq.card import Address, LargeBodies
    from agentscope_rocketmq.channels import ReplyChannels
    from agentscope_rocketmq.config import Limits, Timeouts
    from agentscope_rocketmq.envelope import BodyReference
    from agentscope_rocketmq.pending import PendingResponse
    from agentscope_rocketmq.rocketmq.producer import Producer
    from agentscope_rocketmq.routes import InstanceRoutes
    from agentscope_rocketmq.session import Session

__all__ = ["ACK_TIMEOUT_HEADER", "EXTENSIONS_HEADER", "Carrier", "RocketMQTransport"]

logger = logging.getLogger(__name__)

ACK_TIMEOUT_HEADER = "x-rocketmq-ack-timeout"
"""Request header, in seconds: how long one call waits for a worker to take it. It is not sent on."""

EXTENSIONS_HEADER = "A2A-Extensions"
"""Request header that lists the A2A extensions that a caller asks for."""

INSTANCE_TIMEOUT = 3.0
"""Seconds within which the instance that runs a task must take a request for it; then any worker gets it."""

_CHECKED_AT_ONCE = 1024 * 1024

# Headers that describe the connection to an HTTP server that there is none of.
_NOT_CARRIED = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-length",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "user-agent",
        ACK_TIMEOUT_HEADER,
        IDLE_TIMEOUT_HEADER,
        TOTAL_TIMEOUT_HEADER,
    }
)


class Carrier:
    """What all transports of a process to one cluster share: a producer, the reply channels, and who runs what.

    Args:
        make: Makes producer and reply channels, not started. Called again when a start failed.
        make_observers: Makes reply channels of the observer group, not started.
        routes: What is known of the agents' instances.

    Attributes:
        routes: The same.
    """

    def __init__(
        self,
        make: Callable[[], tuple[Producer, ReplyChannels]],
        make_observers: Callable[[], ReplyChannels],
        routes: InstanceRoutes,
    ) -> None:
        self.routes = routes
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

    async def put(
        self, request_id: str, body: bytes, large_bodies: LargeBodies | None, *, each: float, total: float | None
    ) -> tuple[str, BodyReference | None]:
        """What an envelope says of its body: all of it, or an excerpt and where it is, when it has been sent there."""
        if large_bodies is None or len(body) <= self.producer.max_body_size - PART_OVERHEAD:
            return _text(body), None
        text = await asyncio.to_thread(_excerpt, body)
        try:
            async with asyncio.timeout(total):
                large = await send_body(self.producer, large_bodies.topic, request_id, body, timeout=each)
        except TimeoutError:
            raise CallTimeout(
                f"The {len(body)} bytes of request {request_id} could not be sent within {total:g} s (total time "
                "limit). Raise it, or send less.",
                request_id=request_id,
                which="total",
                seconds=total or 0.0,
            ) from None
        return text, large

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


class RocketMQTransport(httpx.AsyncBaseTransport):
    """Sends HTTP requests to an agent's topic and streams the responses back.

    Delivery is at least once: a request reaches one worker, and another one when that worker dies before its response
    is complete. Closing a response, or cancelling a call, ends the waiting here; the agent goes on.

    Timeouts: httpx's `read` timeout is the idle timeout (seconds between two messages of a response); the request
    header `x-rocketmq-total-timeout` bounds the whole call, `x-rocketmq-ack-timeout` the wait for a worker to take it.
    Without them those of `timeouts` count. httpx's other
    timeouts have no meaning here.

    Args:
        address: The agent's topic.
        session: Where the answers come; opened by the first request, left by `aclose`.
        carrier: Sends requests and receives answers; started by the first request, not closed by this object.
        timeouts: Defaults of a call.
        limits: `request_bytes` counts here.
        tiers: The agent's further topics, for requests whose header `x-rocketmq-priority` names the tier. A tier that
            the agent does not have goes to its own topic.
        large: How the agent's servers read large requests; None when its card does not say that they do.
    """

    def __init__(
        self,
        address: Address,
        *,
        session: Session,
        carrier: Carrier,
        timeouts: Timeouts,
        limits: Limits,
        tiers: Mapping[Tier, str] | None = None,
        large: LargeBodies | None = None,
    ) -> None:
        self.address = address
        self._tiers = tiers or {}
        self._large = large
        self.session = session
        self._carrier = carrier
        self._timeouts = timeouts
        self._limits = limits
        self._pending: set[PendingResponse] = set()
        self._opened = False
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Carry one request (httpx's transport interface).

        Raises:
            httpx.RequestError: A subclass, with this package's error as its cause: `ReadTimeout` (idle or total time
                ran out), `ConnectError` (broker unreachable, topic unknown, not authorised, …), `LocalProtocolError`
                (the request can't be sent: too large, not UTF-8), `ReadError` (session taken over, reader too slow),
                `RemoteProtocolError` (the response can't be put together).
        """
        with _as_httpx_errors(request):
            body = await request.aread()
            _check_size(body, self._limits.request_bytes, self._large)
            await self._open()
            envelope, pending = await self._ask(request, body)
            try:
                head = await pending.head()
            except BaseException:
                self.forget(pending)
                raise
        return httpx.Response(
            status_code=head.status,
            # As bytes: whatever a server puts into a header, it is not this side that fails at it.
            headers=[(name.encode(), value.encode()) for name, value in head.headers.items()],
            stream=_ResponseStream(self, pending, envelope, request),
            request=request,
            extensions={"rocketmq": {"request_id": pending.call.request_id, "topic": self.address.topic}},
        )

    async def _open(self) -> None:
        if self._closed:
            raise ClosedError(f"The RocketMQ transport to topic {self.address.topic!r} is closed.")
        await self._carrier.start()
        if not self._opened:
            # Two first requests at once: the channel counts its users, so give the second one back.
            # Announced before: then there is something to read, and whose it is can be told at once.
            await self.session.announce()
            await self.session.open()
            if self._opened or self._closed:
                await self.session.close()
            self._opened = True

    async def _ask(self, request: httpx.Request, body: bytes) -> tuple[RequestEnvelope, PendingResponse]:
        request_id = uuid.uuid4().hex
        times = self._times(request)
        began = asyncio.get_running_loop().time()
        text, large = await self._carrier.put(
            request_id, body, self._large, each=self._timeouts.send, total=times.total
        )
        if times.total is not None:
            times = times._replace(total=times.total - (asyncio.get_running_loop().time() - began))
        envelope = RequestEnvelope(
            request_id=request_id,
            body=text,
            large=large,
            headers={name: value for name, value in request.headers.items() if name not in _NOT_CARRIED}
            | {BATCH_HEADER: "1"}
            | times.headers(),
            dest_topic=self.address.topic,
            reply_topic=self._carrier.replies.topic,
            lite_topic=self.session.lite_topic,
        )
        tier = Tier.parse(request.headers.get(PRIORITY_HEADER, Tier.NORMAL))
        pending = self._carrier.replies.expect(
            self.session.lite_topic, envelope.request_id, **times._asdict(), agent=self.address.topic
        )
        self._pending.add(pending)
        timeout = self._timeouts.send if times.total is None else min(self._timeouts.send, times.total)
        try:
            await self._carrier.request(envelope, pending, timeout=timeout, topic=self._tiers.get(tier))
        except BaseException:
            self.forget(pending)
            raise
        return envelope, pending

    def _times(self, request: httpx.Request) -> _Times:
        given = request.extensions.get("timeout") or {}
        return _Times(
            ack=_seconds(request, ACK_TIMEOUT_HEADER, self._timeouts.ack),
            idle=given.get("read", self._timeouts.idle),
            total=_seconds(request, TOTAL_TIMEOUT_HEADER, self._timeouts.total),
        )

    def note(self, envelope: RequestEnvelope, pending: PendingResponse, text: str) -> None:
        """Take notice of the first piece of a run's response."""
        self._carrier.note(envelope, pending, text)

    def forget(self, pending: PendingResponse) -> None:
        """A response was read to its end, or closed before."""
        self._pending.discard(pending)
        with contextlib.suppress(ClosedError):  # all calls ended with the client
            self._carrier.replies.forget(pending)

    async def aclose(self) -> None:
        """Leave the session's LiteTopic; calls that still wait end. Repeated calls are safe."""
        if self._closed:
            return
        self._closed = True
        for pending in list(self._pending):
            self.forget(pending)
        if self._opened:
            # The broker forgets the subscription of a client that is gone; an error here helps nobody.
            with contextlib.suppress(BrokerError, ClosedError):
                await self.session.close()


class _Times(NamedTuple):
    """How long a call waits for what, in seconds."""

    ack: float | None
    idle: float | None
    total: float | None

    def headers(self) -> dict[str, str]:
        """What a worker must know of them."""
        given = {IDLE_TIMEOUT_HEADER: self.idle, TOTAL_TIMEOUT_HEADER: self.total}
        return {name: f"{seconds:.3f}" for name, seconds in given.items() if seconds is not None}


def _seconds(request: httpx.Request, header: str, default: float | None) -> float | None:
    if (text := request.headers.get(header)) is None:
        return default
    if (seconds := read_seconds(text)) is None:
        raise IllegalRequest(f"{header}: {text!r} is not a number of seconds above 0.")
    return seconds


class _ResponseStream(httpx.AsyncByteStream):
    """The body of a response as it comes in."""

    def __init__(
        self, transport: RocketMQTransport, pending: PendingResponse, envelope: RequestEnvelope, request: httpx.Request
    ) -> None:
        self._transport = transport
        self._pending = pending
        self._envelope = envelope
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx_errors(self._request):
            noted = None
            async for text in self._texts():
                # A run that takes over is another instance's.
                if (sticky := self._pending.call.sticky) != noted:
                    self._transport.note(self._envelope, self._pending, text)
                    noted = sticky
                yield text.encode()

    def _texts(self) -> AsyncIterator[str]:
        # Only for those who ask, since it changes what the agent sent; and it takes time to look into each event.
        asked = self._request.headers.get_list(EXTENSIONS_HEADER, split_commas=True)
        return self._marked() if CURSOR_EXTENSION in asked else self._pending.texts()

    async def _marked(self) -> AsyncIterator[str]:
        async for piece in self._pending.pieces(marked=True):
            yield piece.text

    async def aclose(self) -> None:
        self._transport.forget(self._pending)


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


@contextlib.contextmanager
def _as_httpx_errors(request: httpx.Request) -> Iterator[None]:
    """The one edge where this package's errors become httpx's, which are the ones the a2a-sdk understands."""
    try:
        yield
    except CallTimeout as error:
        raise httpx.ReadTimeout(str(error), request=request) from error
    except (MessageTooLarge, IllegalRequest) as error:
        raise httpx.LocalProtocolError(str(error), request=request) from error
    except BrokerError as error:
        raise httpx.ConnectError(str(error), request=request) from error
    except (ResponseCorrupt, EnvelopeError) as error:
        raise httpx.RemoteProtocolError(str(error), request=request) from error
    except AgentScopeRocketMQError as error:
        raise httpx.ReadError(str(error), request=request) from error
