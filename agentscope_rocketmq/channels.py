"""Reply channels: the LiteTopics of sessions as this process reads them, one reader for each.

`ReplyChannels` reads all of them with one consumer. It gives each message to the call it belongs to and to whoever
listens to its session, and decides when it is acked: the group's committed offset is where the application stands.

- A message is acked when somebody took the last of what it brought: its call's reader, or a listener.
- Where a listener goes on from that very position (`Session.events` without a start), it alone decides.
- Elsewhere nobody waits for somebody else's reader: what is left untaken while another call of the session waits is
  acked when there is room for it, within bounds. So are messages that belong to nobody.

Who leaves too much untaken for too long is cut off, and the session goes on without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Self

from agentscope_rocketmq.channel import UNREAD_GRACE, Channel, Taker, Unacked
from agentscope_rocketmq.claims import Claims
from agentscope_rocketmq.errors import AgentScopeRocketMQError, ClosedError, EnvelopeError
from agentscope_rocketmq.exchange import Exchange
from agentscope_rocketmq.listening import Listener, Start, taken_over
from agentscope_rocketmq.pending import PendingResponse
from agentscope_rocketmq.reading import Reading
from agentscope_rocketmq.replay import EventReader, SessionRecord
from agentscope_rocketmq.rocketmq.lifecycle import Closing
from agentscope_rocketmq.rocketmq.lite import LiteLost, Position
from agentscope_rocketmq.spool import Spools
from agentscope_rocketmq.survey import Look

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agentscope_rocketmq.blobs import BlobStore
    from agentscope_rocketmq.config import Limits, Timeouts
    from agentscope_rocketmq.exchange import Call
    from agentscope_rocketmq.replay import SessionEvent
    from agentscope_rocketmq.rocketmq.lite import LiteBatch
    from agentscope_rocketmq.rocketmq.litepool import LitePool
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage

__all__ = ["ReplyChannels"]

logger = logging.getLogger(__name__)

# Acking what was read, dropping the subscriptions and taking leave: 3 s each at most, where nobody answers.
CLOSE_SECONDS = 15.0
# Acking what was read of a session that is left, where nobody answers.
LEAVE_SECONDS = 3.0
# So many messages before a cursor are read again, to know which runs of which requests were heard there.
LOOK_BACK = 8
# Requests of which it is known which agent was asked.
_AGENTS = 10_000


class ReplyChannels:
    """All reply channels of this process on one LITE topic, in one group.

    Args:
        consumer: Reads that topic; started and closed by this object.
        timeouts: `stall` and `parts` count here.
        limits: `stream_buffer`, `stream_buffer_bytes`, `listener_buffer` and those of bodies in parts count here.
        blobs: Where large answers and events may be; None for nowhere.
    """

    def __init__(
        self, consumer: LitePool, *, timeouts: Timeouts, limits: Limits, blobs: BlobStore | None = None
    ) -> None:
        self._consumer = consumer
        self._timeouts = timeouts
        self._limits = limits
        self._exchange = Exchange(spools=Spools.of(limits, most=limits.response_bytes))
        self._claims = Claims(blobs, spools=self._exchange.spools, patience=timeouts.parts)
        self._channels: dict[str, Channel] = {}
        self._by_call: dict[Call, PendingResponse] = {}
        self._agents: OrderedDict[str, str] = OrderedDict()
        self._reading = Reading(consumer, self._channels)
        self._settled: list[ReceivedMessage] = []
        self._to_ack = asyncio.Event()
        self._acking = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._fetching: set[asyncio.Task[None]] = set()
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
        loops = {
            "read": self._read_loop(),
            "ack": self._ack_loop(),
            "stall": self._stall_loop(),
            "unblock": self._reading.unblock(),
        }
        for name, loop in loops.items():
            task = asyncio.create_task(loop, name=f"replies[{self.topic}].{name}")
            task.add_done_callback(self._loop_ended)
            self._tasks.append(task)

    async def open(self, session: str, *, fresh: bool) -> None:
        """Use a session's LiteTopic, for calls.

        Another reader that uses it (another process, or another object of this one) is told, and its calls and
        listeners end with `SessionTakenOver`.

        Args:
            session: The LiteTopic.
            fresh: Whether nobody can have used it before; otherwise reading goes on where the application stopped.

        Raises:
            BrokerError: The subscription was refused.
        """
        channel = self._enter(session)
        try:
            async with channel.opened:
                if not channel.subscribed:
                    await self._subscribe(session, channel, Position.last() if fresh else None)
        except BaseException:
            await self.close(session)
            raise

    async def close(self, session: str) -> None:
        """One user less; the last one leaves the LiteTopic, with what is not acked."""
        channel = self._channels[session]
        channel.users -= 1
        if channel.users > 0:
            return
        async with channel.opened:
            if channel.users == 0:
                self._channels.pop(session, None)
                if channel.timer is not None:
                    channel.timer.cancel()
                if channel.subscribed and not self._closed:
                    channel.subscribed = False
                    await self._ack_settled(timeout=LEAVE_SECONDS)
                    await self._consumer.unsubscribe([session])

    def expect(
        self,
        session: str,
        request_id: str,
        *,
        idle: float | None,
        total: float | None,
        agent: str,
        ack: float | None = None,
    ) -> PendingResponse:
        """Register a call, before its request is sent.

        Args:
            session: LiteTopic of an open session.
            request_id: Id of the request envelope.
            idle: Seconds without a message after which it times out; None for no such limit.
            total: Seconds after which it times out; None for no such limit.
            agent: Topic of the agent that is asked, for those who listen to the session.
            ack: Seconds until a server must have taken the request; None counts `idle` from now.

        Raises:
            SessionTakenOver: Another reader has the session now.
            ClosedError: The session is not open here.
        """
        channel = self._usable(session)
        now = asyncio.get_running_loop().time()
        call = self._exchange.open(request_id, idle=idle, total=total, ack=ack, now=now)
        pending = PendingResponse(
            call, session=session, limits=self._limits, on_taken=functools.partial(self._settle, channel)
        )
        self._by_call[call] = pending
        channel.pending.add(pending)
        self._agents[request_id] = agent
        if len(self._agents) > _AGENTS:
            self._agents.popitem(last=False)
        # What lies un-acked before its answer must not hold it up.
        self._settle(channel)
        return pending

    def forget(self, pending: PendingResponse) -> None:
        """The caller no longer waits; what still comes for this call belongs to whoever listens. The agent goes on."""
        self._exchange.close(pending.call)
        self._by_call.pop(pending.call, None)
        channel = self._channels.get(pending.session)
        if channel is not None:
            channel.pending.discard(pending)
        pending.fail(ClosedError(f"The response of request {pending.call.request_id} was closed by its reader."))

    @contextlib.asynccontextmanager
    async def listen(self, session: str, start: Start) -> AsyncIterator[Listener]:
        """Listen to a session from some place on, while the context lasts.

        Args:
            session: The LiteTopic.
            start: From where. Reading it anew is a seek of this process's one reader: others skip what they had.

        Raises:
            BrokerError: The subscription was refused.
        """
        channel = self._enter(session)
        listener = Listener(session, start, limits=self._limits, on_taken=functools.partial(self._settle, channel))
        try:
            async with channel.opened:
                await self._join(session, channel, listener)
            # What lies un-acked before what it wants must not hold it up.
            self._settle(channel)
            yield listener
        finally:
            channel.listeners.discard(listener)
            if not channel.listeners:
                channel.reader = None
            self._settle(channel)
            await self.close(session)

    @contextlib.asynccontextmanager
    async def look(self, session: str) -> AsyncIterator[Look]:
        """Look into a session without listening to it; listeners of this object wait meanwhile.

        Raises:
            SessionTakenOver: While looking: another reader of this group has it now.
        """
        channel = self._enter(session)
        try:
            async with channel.opened:
                channel.survey, due = asyncio.Queue(), channel.due
                try:
                    yield Look(session, channel.survey, functools.partial(self._subscribe, session, channel), self._ack)
                finally:
                    channel.survey = None
                    if channel.listeners:
                        await self._subscribe(session, channel, Position.offset(due or 0))
        finally:
            await self.close(session)

    async def aclose(self) -> None:
        """End all calls and listeners, and leave. Repeated calls are safe."""
        self._closed = True
        for pending in list(self._by_call.values()):
            pending.fail(ClosedError(f"The RocketMQ client was closed during request {pending.call.request_id}."))
        for session, channel in self._channels.items():
            for listener in channel.listeners:
                listener.fail(ClosedError(f"The RocketMQ client was closed while session {session!r} was listened to."))
        await self._closing(self._aclose)

    async def _aclose(self) -> None:
        try:
            if self._settled:
                await self._ack_settled(timeout=1.0)
        finally:
            tasks = [*self._tasks, *self._fetching]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._consumer.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _enter(self, session: str) -> Channel:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise ClosedError(f"Session {session!r} can't be opened: the RocketMQ client is closed.")
        channel = self._channels.setdefault(session, Channel())
        channel.users += 1
        return channel

    def _usable(self, session: str) -> Channel:
        if self._failure is not None:
            raise self._failure
        channel = self._channels.get(session)
        if channel is None or self._closed:
            raise ClosedError(f"Session {session!r} is not open here: open a client for it first.")
        if channel.taken_over:
            raise taken_over(session)
        return channel

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
        for channel in self._channels.values():
            for listener in channel.listeners:
                listener.fail(error)

    # Where reading begins

    async def _subscribe(self, session: str, channel: Channel, at: Position | None) -> None:
        if channel.listeners:
            channel.reader = EventReader(agents=self._agents, spools=self._exchange.spools)
        await self._reading.begin(session, channel, at)

    async def _join(self, session: str, channel: Channel, listener: Listener) -> None:
        start = listener.start
        if start.after is not None:
            at: int | None = max(0, start.after.offset - LOOK_BACK)
        elif start.offset is not None:
            at = start.offset
        else:
            at = channel.first_untaken()
            channel.untaken = None
        if channel.subscribed and at and channel.is_waited_for:
            # Going forward would pass over what others wait for.
            at = min(at, await channel.find_place())
        channel.listeners.add(listener)
        if not channel.subscribed or at not in (None, channel.due):
            await self._subscribe(session, channel, None if at is None else Position.offset(at))
        elif channel.reader is None:
            channel.reader = EventReader(agents=self._agents, spools=self._exchange.spools)

    # What comes in

    async def _read_loop(self) -> None:
        async for item in self._consumer.batches():
            channel = self._channels.get(item.lite_topic)
            if channel is None or item.reading != channel.reading:
                continue
            if isinstance(item, LiteLost):
                channel.lose(item.lite_topic)
                continue
            bodies = [_body_of(message) for message in item.messages]
            if channel.fetching is not None or any(map(self._claims.is_claim, bodies)):
                # Only its own session waits for a store.
                fetching = self._fetch_and_read(channel, item, bodies, channel.fetching)
                channel.fetching = asyncio.create_task(fetching, name=f"replies[{self.topic}].fetch")
                self._fetching.add(channel.fetching)
                channel.fetching.add_done_callback(self._fetch_ended)
                continue
            for message, body in zip(item.messages, bodies, strict=True):
                self._read(channel, message, body)
            self._settle(channel)

    async def _fetch_and_read(
        self, channel: Channel, item: LiteBatch, bodies: list[bytes], before: asyncio.Task[None] | None
    ) -> None:
        if before is not None:
            await asyncio.wait([before])
        for message, body in zip(item.messages, bodies, strict=True):
            async with self._claims.held(body):
                if channel.subscribed and item.reading == channel.reading:
                    self._read(channel, message, body)
                    self._settle(channel)
        if channel.fetching is asyncio.current_task():
            channel.fetching = None

    def _fetch_ended(self, task: asyncio.Task[None]) -> None:
        self._fetching.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._loop_ended(task)

    def _read(self, channel: Channel, message: ReceivedMessage, body: bytes) -> None:
        channel.heard.set()
        if channel.survey is not None:
            channel.survey.put_nowait(message)
            return
        channel.notice(message)
        if channel.reader is not None:
            channel.reader.begin(message.offset)
        # Offset 0 may be shown once too often: whether it was taken can't be told.
        taken_before = channel.resumes and message.offset > 0
        channel.resumes = False
        marks = channel.carried.pop(message.offset, [])
        record = SessionRecord.decode(body)
        if record is None:
            marks += self._feed_call(message, body)
            events = self._events(channel, message, body)
        else:
            events = []
        for listener in [] if taken_before else channel.listeners:
            mark = listener.hear(message, events)
            if record is not None:
                listener.read_record(record)
            elif mark is not None:
                marks.append((listener, mark))
        if taken_before or record is not None:
            self._ack(message)
        else:
            channel.unacked.append(Unacked(message, marks))

    def _feed_call(self, message: ReceivedMessage, body: bytes) -> list[tuple[Taker, int]]:
        try:
            fed = self._exchange.feed(body, asyncio.get_running_loop().time())
        except EnvelopeError as error:
            logger.warning("Set aside on LiteTopic %s: %s", message.lite_topic, error)
            return []
        except AgentScopeRocketMQError as error:
            self._fail_call(error)
            return []
        if fed is None:
            return []
        call, texts = fed
        pending = self._by_call[call]
        pending.take(texts, message)
        return [(pending, pending.given)]

    def _fail_call(self, error: AgentScopeRocketMQError) -> None:
        request_id = getattr(error, "request_id", None)
        for pending in self._by_call.values():
            if pending.call.request_id == request_id:
                pending.fail(error)

    def _events(self, channel: Channel, message: ReceivedMessage, body: bytes) -> list[SessionEvent]:
        if channel.reader is None or not channel.listeners:
            return []
        events = channel.reader.feed(
            body, offset=message.offset, message_id=message.message_id, store_time=message.store_time
        )
        if channel.reader.headless:
            channel.reader.headless = False
            for listener in channel.listeners:
                listener.miss_parts(message)
        if channel.reader.lost is not None:
            for listener in channel.listeners:
                listener.miss_blob(message, channel.reader.lost)
        return events

    # What is taken

    def _settle(self, channel: Channel) -> None:
        """Ack what may be acked by now."""
        if not channel.unacked:
            return
        loop = asyncio.get_running_loop()
        for message in channel.settle(loop.time()):
            self._ack(message)
        if channel.unacked and channel.timer is None and channel.is_held_up:
            channel.timer = loop.call_later(UNREAD_GRACE, self._settle_later, channel)

    def _settle_later(self, channel: Channel) -> None:
        channel.timer = None
        self._settle(channel)

    def _ack(self, message: ReceivedMessage) -> None:
        self._settled.append(message)
        self._to_ack.set()

    async def _ack_loop(self) -> None:
        while True:
            await self._to_ack.wait()
            self._to_ack.clear()
            await self._ack_settled()

    async def _ack_settled(self, *, timeout: float = 30.0) -> None:  # noqa: ASYNC109
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                await self._acking.acquire()
        except TimeoutError:
            return  # no answer to earlier ones; what is not acked is delivered again
        try:
            settled, self._settled = self._settled, []
            if settled:
                await self._consumer.ack(settled, timeout=max(0.0, deadline - loop.time()))
        finally:
            self._acking.release()

    async def _stall_loop(self) -> None:
        stall = self._timeouts.stall
        while True:
            await asyncio.sleep(min(1.0, stall / 4))
            self._exchange.spools.expire(self._timeouts.parts)
            now = asyncio.get_running_loop().time()
            for pending in list(self._by_call.values()):
                if pending.stalled_since is not None and now - pending.stalled_since > stall:
                    pending.cut_off(stall)
            for channel in list(self._channels.values()):
                if not any(pending.waits and pending.untaken_since is None for pending in channel.pending):
                    continue
                for listener in channel.listeners:
                    if listener.untaken_since is not None and now - listener.untaken_since > stall:
                        listener.cut_off(f"it took nothing for {stall:g} s while a call of the session waited")
                self._settle(channel)


def _body_of(message: ReceivedMessage) -> bytes:
    try:
        return message.body()
    except EnvelopeError as error:
        logger.warning("Set aside on LiteTopic %s: %s", message.lite_topic, error)
        return b""
