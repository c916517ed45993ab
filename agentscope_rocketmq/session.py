"""Reply channels: the LiteTopics on which this process receives answers, one for each session.

A session's answers come in order on its LiteTopic; many calls of a session share it. `ReplyChannels` reads all of
them with one consumer, gives each message to the call it belongs to, and acks it when the call has room for it. A call
whose reader does not keep up leaves its messages un-acked, so the broker sends no more of that session; after
`Timeouts.stall` the call is cut off, and the session goes on without it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from agentscope_rocketmq.errors import (
    AgentScopeRocketMQError,
    CallTimeout,
    ClosedError,
    ConfigurationError,
    EnvelopeError,
    ResponseTooSlow,
    SessionTakenOver,
)
from agentscope_rocketmq.exchange import Call, Exchange, ResponseHead
from agentscope_rocketmq.rocketmq.lifecycle import Closing
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer, Position
from agentscope_rocketmq.rocketmq.message import LITE_TOPIC_NAME

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from agentscope_rocketmq.config import Limits, Timeouts
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage

__all__ = ["PendingResponse", "ReplyChannels", "lite_topic_name"]

logger = logging.getLogger(__name__)

# Acking what was read, dropping the subscriptions and taking leave: 3 s each at most, where nobody answers.
CLOSE_SECONDS = 15.0


def lite_topic_name(session: str, *, owner: str = "anonymous", secret: str | None = None) -> str:
    """The LiteTopic of a session.

    Args:
        session: The caller's name for the conversation, any non-empty text.
        owner: Whose it is; counts only with a secret.
        secret: Secret of the deployment. With it, names can't be guessed and two owners' equal names differ.

    Returns:
        The session itself where that is a legal LiteTopic name (1-64 letters, digits, '_', '-'), else `h-` and its
        SHA-256; with a secret `s-` and an HMAC-SHA256 of owner and session. The same input gives the same name always.

    Raises:
        ConfigurationError: The session is empty, no text, or can't be written as UTF-8.
    """
    if not isinstance(session, str) or not session:
        raise ConfigurationError(f"{session!r} is no session's name: give any non-empty text, or None for a fresh one.")
    try:
        session.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(
            f"Session {session!r} can't be written as UTF-8 ({session.encode(errors='replace')!r}): give real text."
        ) from None
    if secret is not None:
        # The length keeps (owner, session) pairs apart that would run together to the same text.
        text = f"{len(owner)}:{owner}{session}".encode()
        return "s-" + _base64url(hmac.new(secret.encode(), text, hashlib.sha256).digest())
    # Names that look like mapped ones are mapped too, so that no session can take another's mapped name.
    if LITE_TOPIC_NAME.fullmatch(session) and not session.startswith(("h-", "s-")):
        return session
    return "h-" + _base64url(hashlib.sha256(session.encode()).digest())


def _base64url(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


class PendingResponse:
    """The response of one call while it comes in; made by `ReplyChannels.expect`, to be closed."""

    def __init__(self, call: Call, *, session: str, limits: Limits, settle: Callable[[ReceivedMessage], None]) -> None:
        self.call = call
        self.session = session
        self._limits = limits
        self._settle = settle
        # The broker sends no more of a session while one message is un-acked, so beyond the limits it holds at most
        # the rest of one batch.
        self._buffer: deque[str] = deque()
        self._buffered_bytes = 0
        self._unsettled: deque[ReceivedMessage] = deque()
        self._error: AgentScopeRocketMQError | None = None
        self._changed = asyncio.Event()
        self.stalled_since: float | None = None

    async def head(self) -> ResponseHead:
        """Wait for the first message of the response.

        Raises:
            CallTimeout: Nothing came in time.
            SessionTakenOver, ResponseCorrupt: As the class says.
        """
        while self.call.head is None:
            await self._wait()
        return self.call.head

    async def begins_within(self, seconds: float) -> bool:
        """Whether the server says within so many seconds that it has taken the request.

        Raises:
            SessionTakenOver, ResponseCorrupt: As the class says.
        """
        deadline = asyncio.get_running_loop().time() + seconds
        while not self.call.begun:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._wait()
            except CallTimeout:
                raise
            except TimeoutError:
                return False
        return True

    async def texts(self) -> AsyncIterator[str]:
        """The response's body as it comes: whole server-sent events, or the JSON document.

        Raises:
            CallTimeout: Idle or total time ran out.
            ResponseTooSlow: This reader left its buffer full for too long.
            SessionTakenOver, ResponseCorrupt: As the class says.
        """
        while True:
            while self._buffer:
                text = self._buffer.popleft()
                self._buffered_bytes -= len(text.encode())
                self._settle_what_fits()
                yield text
            if self._error is None and self.call.finished:
                return
            await self._wait()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        loop = asyncio.get_running_loop()
        self._changed.clear()
        try:
            async with asyncio.timeout_at(self.call.next_deadline()):
                await self._changed.wait()
        except TimeoutError:
            # Raises where time ran out; some deadlines only complete a stream whose end came early.
            self.take(self.call.check(loop.time()), None)

    def take(self, texts: list[str], message: ReceivedMessage | None) -> None:
        """Texts that became readable with that message."""
        self._buffer.extend(texts)
        self._buffered_bytes += sum(len(text.encode()) for text in texts)
        if message is not None:
            self._unsettled.append(message)
        self._settle_what_fits()
        self._changed.set()

    def fail(self, error: AgentScopeRocketMQError) -> None:
        """End the call with that error; its messages no longer hold up the session."""
        self._error = error
        self._buffer.clear()
        self._buffered_bytes = 0
        self._settle_what_fits()
        self._changed.set()

    def _settle_what_fits(self) -> None:
        limits = self._limits
        # One text may be larger than all that may be held.
        fits = len(self._buffer) <= 1 or self._buffered_bytes <= limits.stream_buffer_bytes
        if fits and len(self._buffer) <= limits.stream_buffer:
            self.stalled_since = None
            while self._unsettled:
                self._settle(self._unsettled.popleft())
        elif self.stalled_since is None:
            self.stalled_since = asyncio.get_running_loop().time()


@dataclass(slots=True)
class _Channel:
    """One session of this process: how many use it, and the calls that wait on it."""

    users: int = 0
    opened: asyncio.Lock = field(default_factory=asyncio.Lock)
    subscribed: bool = False
    taken_over: bool = False
    pending: set[PendingResponse] = field(default_factory=set)


class ReplyChannels:
    """All reply channels of this process on one LITE topic.

    Args:
        consumer: Reads that topic; started and closed by this object.
        timeouts: `stall` counts here.
        limits: `stream_buffer` and `stream_buffer_bytes` count here.
    """

    def __init__(self, consumer: LiteConsumer, *, timeouts: Timeouts, limits: Limits) -> None:
        self._consumer = consumer
        self._timeouts = timeouts
        self._limits = limits
        self._exchange = Exchange()
        self._channels: dict[str, _Channel] = {}
        self._by_call: dict[Call, PendingResponse] = {}
        self._settled: list[ReceivedMessage] = []
        self._to_ack = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: ClosedError | None = None
        self._closed = False
        self._closing = Closing(limit=CLOSE_SECONDS, name=f"replies[{consumer.topic}].close")

    @property
    def topic(self) -> str:
        """The LITE topic on which answers arrive."""
        return self._consumer.topic

    @property
    def exchange(self) -> Exchange:
        """Counters of messages that belonged to nobody, came twice, or could not be read."""
        return self._exchange

    async def start(self) -> None:
        """Connect.

        Raises:
            BrokerError: Nobody answers, or reply topic, reply group or credentials are refused.
        """
        await self._consumer.start()
        for loop, name in ((self._read_loop(), "read"), (self._ack_loop(), "ack"), (self._stall_loop(), "stall")):
            task = asyncio.create_task(loop, name=f"replies[{self.topic}].{name}")
            task.add_done_callback(self._loop_ended)
            self._tasks.append(task)

    async def open(self, session: str) -> None:
        """Use a session's LiteTopic, from its end: what is there already belongs to earlier calls.

        Another reader that uses it (another process, or another object of this one) is told, and its calls end with
        `SessionTakenOver`.

        Raises:
            BrokerError: The subscription was refused.
        """
        channel = self._channels.setdefault(session, _Channel())
        channel.users += 1
        try:
            async with channel.opened:
                if not channel.subscribed:
                    await self._consumer.subscribe([session], at=Position.last())
                    channel.subscribed, channel.taken_over = True, False
        except BaseException:
            await self.close(session)
            raise

    async def close(self, session: str) -> None:
        """One user less; the last one leaves the LiteTopic."""
        channel = self._channels[session]
        channel.users -= 1
        if channel.users > 0:
            return
        async with channel.opened:
            if channel.users == 0:
                self._channels.pop(session, None)
                if channel.subscribed and not self._closed:
                    channel.subscribed = False
                    await self._consumer.unsubscribe([session])

    def expect(self, session: str, request_id: str, *, idle: float | None, total: float | None) -> PendingResponse:
        """Register a call, before its request is sent.

        Args:
            session: LiteTopic of an open session.
            request_id: Id of the request envelope.
            idle: Seconds without a message after which it times out; None for no such limit.
            total: Seconds after which it times out; None for no such limit.

        Raises:
            SessionTakenOver: Another reader has the session now.
            ClosedError: The session is not open here.
        """
        if self._failure is not None:
            raise self._failure
        channel = self._channels.get(session)
        if channel is None or self._closed:
            raise ClosedError(f"Session {session!r} is not open here: open a client for it first.")
        if channel.taken_over:
            raise _taken_over(session)
        now = asyncio.get_running_loop().time()
        call = self._exchange.open(request_id, idle=idle, total=total, now=now)
        pending = PendingResponse(call, session=session, limits=self._limits, settle=self._settle)
        self._by_call[call] = pending
        channel.pending.add(pending)
        return pending

    def forget(self, pending: PendingResponse) -> None:
        """The caller no longer waits; what still comes for this call is acked and dropped. The agent goes on."""
        self._exchange.close(pending.call)
        self._by_call.pop(pending.call, None)
        pending.fail(ClosedError(f"The response of request {pending.call.request_id} was closed by its reader."))
        channel = self._channels.get(pending.session)
        if channel is not None:
            channel.pending.discard(pending)

    async def aclose(self) -> None:
        """End all calls and leave. Repeated calls are safe."""
        self._closed = True
        for pending in list(self._by_call.values()):
            pending.fail(ClosedError(f"The RocketMQ client was closed during request {pending.call.request_id}."))
        await self._closing(self._aclose)

    async def _aclose(self) -> None:
        try:
            if self._settled:
                await self._consumer.ack(self._settled, timeout=1.0)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._consumer.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._closed:
            return
        logger.critical("%s ended: no more answers are received here", task.get_name(), exc_info=task.exception())
        error = ClosedError(
            "The reader of RocketMQ answers in this process failed; its log says why. Open a new client."
        )
        self._failure = error
        for pending in list(self._by_call.values()):
            pending.fail(error)

    async def _read_loop(self) -> None:
        async for item in self._consumer.batches():
            if isinstance(item, LiteBatch):
                for message in item.messages:
                    self._feed(message)
            else:
                self._lost(item.lite_topic)

    def _feed(self, message: ReceivedMessage) -> None:
        try:
            fed = self._exchange.feed(message.body(), asyncio.get_running_loop().time())
        except EnvelopeError as error:
            logger.warning("Set aside on LiteTopic %s: %s", message.lite_topic, error)
            fed = None
        except AgentScopeRocketMQError as error:
            self._fail_call(error)
            fed = None
        if fed is None:
            self._settle(message)
            return
        call, texts = fed
        self._by_call[call].take(texts, message)

    def _fail_call(self, error: AgentScopeRocketMQError) -> None:
        request_id = getattr(error, "request_id", None)
        for pending in self._by_call.values():
            if pending.call.request_id == request_id:
                pending.fail(error)

    def _lost(self, session: str) -> None:
        channel = self._channels.get(session)
        if channel is None:
            return
        channel.subscribed, channel.taken_over = False, True
        for pending in channel.pending:
            # What a finished call has not read yet is here and complete.
            if not pending.call.finished:
                pending.fail(_taken_over(session))

    def _settle(self, message: ReceivedMessage) -> None:
        self._settled.append(message)
        self._to_ack.set()

    async def _ack_loop(self) -> None:
        while True:
            await self._to_ack.wait()
            self._to_ack.clear()
            settled, self._settled = self._settled, []
            await self._consumer.ack(settled)

    async def _stall_loop(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._timeouts.stall / 4))
            now = asyncio.get_running_loop().time()
            for pending in list(self._by_call.values()):
                if pending.stalled_since is not None and now - pending.stalled_since > self._timeouts.stall:
                    request_id = pending.call.request_id
                    pending.fail(
                        ResponseTooSlow(
                            f"The response of request {request_id} was cut off: its reader left "
                            f"{self._limits.stream_buffer} messages or {self._limits.stream_buffer_bytes} bytes unread "
                            f"for {self._timeouts.stall:g} s and held up its session. Read faster, or raise "
                            "Limits.stream_buffer, Limits.stream_buffer_bytes or Timeouts.stall.",
                            request_id=request_id,
                        )
                    )


def _taken_over(session: str) -> SessionTakenOver:
    return SessionTakenOver(
        f"Session {session!r} was opened by another reader, which receives its events now: another process, or "
        "another RocketMQ object or server of this one. Open a new client for the session to take it back.",
        session=session,
    )
