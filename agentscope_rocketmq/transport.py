"""RocketMQ as a carrier of HTTP: an httpx transport beneath the a2a-sdk's own JSON-RPC transports.

A request is put into an envelope and sent to the agent's topic; its response comes back, message by message, on the
LiteTopic of the session. So every A2A method, version, header, extension and error is the a2a-sdk's own.
"""

from __future__ import annotations

import contextlib
import uuid
from typing import TYPE_CHECKING

import httpx

from agentscope_rocketmq.cursor import CURSOR_EXTENSION
from agentscope_rocketmq.envelope import (
    ACK_TIMEOUT_HEADER,
    BLOBS_HEADER,
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
from agentscope_rocketmq.priority import PRIORITY_HEADER, Tier
from agentscope_rocketmq.times import CallTimes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from agentscope_rocketmq.card import Address, LargeBodies
    from agentscope_rocketmq.carrier import Carrier
    from agentscope_rocketmq.config import Timeouts
    from agentscope_rocketmq.pending import PendingResponse
    from agentscope_rocketmq.session import Session

__all__ = ["EXTENSIONS_HEADER", "RocketMQTransport"]

EXTENSIONS_HEADER = "A2A-Extensions"
"""Request header that lists the A2A extensions that a caller asks for."""

# Headers that describe the connection to an HTTP server that there is none of.
_CHUNK = 256 * 1024  # characters
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
        BLOBS_HEADER,
        IDLE_TIMEOUT_HEADER,
        TOTAL_TIMEOUT_HEADER,
    }
)


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
        tiers: Mapping[Tier, str] | None = None,
        large: LargeBodies | None = None,
    ) -> None:
        self.address = address
        self._tiers = tiers or {}
        self._large = large
        self.session = session
        self._carrier = carrier
        self._timeouts = timeouts
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
        text, large, times = await self._carrier.put(
            request_id, body, self._large, each=self._timeouts.send, times=self._times(request)
        )
        envelope = RequestEnvelope(
            request_id=request_id,
            body=text,
            large=large,
            headers={name: value for name, value in request.headers.items() if name not in _NOT_CARRIED}
            | self._carrier.abilities
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

    def _times(self, request: httpx.Request) -> CallTimes:
        given = request.extensions.get("timeout") or {}
        return CallTimes(
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
                # In chunks, as from a socket: what reads them copies each more than once.
                start = 0
                while start + _CHUNK < len(text):
                    yield text[start : start + _CHUNK].encode()
                    start += _CHUNK
                last = text[start:].encode()
                del text  # with the last chunk they have it all
                yield last

    def _texts(self) -> AsyncIterator[str]:
        # Only for those who ask, since it changes what the agent sent; and it takes time to look into each event.
        asked = self._request.headers.get_list(EXTENSIONS_HEADER, split_commas=True)
        return self._marked() if CURSOR_EXTENSION in asked else self._pending.texts()

    async def _marked(self) -> AsyncIterator[str]:
        async for piece in self._pending.pieces(marked=True):
            yield piece.text

    async def aclose(self) -> None:
        self._transport.forget(self._pending)


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
