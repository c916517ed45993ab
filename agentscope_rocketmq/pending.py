"""A call whose response is coming in: what its reader has not taken yet, and what the broker may be told of it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from agentscope_rocketmq.cursor import Cursor, with_cursor
from agentscope_rocketmq.errors import CallTimeout, ResponseTooSlow
from agentscope_rocketmq.rerun import places
from agentscope_rocketmq.sse import Event, render_event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from agentscope_rocketmq.config import Limits
    from agentscope_rocketmq.errors import AgentScopeRocketMQError
    from agentscope_rocketmq.exchange import Call, ResponseHead
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage

__all__ = ["PendingResponse", "Piece"]


class Piece(NamedTuple):
    """A piece of a response's body.

    Attributes:
        text: One server-sent event with its closing blank line, or the JSON document.
        cursor: Its place in the session.
    """

    text: str
    cursor: Cursor


class _Text(NamedTuple):
    """A text that can be read, the message that made it so, and its size in bytes."""

    text: str
    message: ReceivedMessage
    size: int


class PendingResponse:
    """The response of one call while it comes in; made by `ReplyChannels.expect`, to be closed.

    Args:
        call: Puts it together.
        session: Its LiteTopic.
        limits: `stream_buffer` and `stream_buffer_bytes` count here.
        on_taken: Called when its reader has taken something, or when there is nothing more to take.

    Attributes:
        call: The same.
        session: The same.
        given: How many texts were given to it.
        taken: How many of them its reader has taken.
        newest: The last message that came for it; None before the first.
        stalled_since: Since when it has had no room; None while it has.
        untaken_since: Since when its reader has not asked for more, although there is something; None while nothing is.
    """

    def __init__(self, call: Call, *, session: str, limits: Limits, on_taken: Callable[[], None]) -> None:
        self.call = call
        self.session = session
        self.given = 0
        self.taken = 0
        self.stalled_since: float | None = None
        self.untaken_since: float | None = None
        self._limits = limits
        self._on_taken = on_taken
        self._buffer: deque[_Text] = deque()
        self._buffered_bytes = 0
        self.newest: ReceivedMessage | None = None
        self._error: AgentScopeRocketMQError | None = None
        self._changed = asyncio.Event()

    @property
    def has_room(self) -> bool:
        """Whether it may be given more."""
        return self.stalled_since is None

    @property
    def waits(self) -> bool:
        """Whether it still waits for something that is not here."""
        return self._error is None and not self.call.finished

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

        What was given out counts as taken when the next is asked for.

        Raises:
            CallTimeout: Idle or total time ran out.
            ResponseTooSlow: This reader left its buffer full for too long.
            SessionTakenOver, ResponseCorrupt: As the class says.
        """
        while await self._is_more():
            # Not in a variable: it may be large, and its reader makes something else of it.
            yield self._take().text
            self._note_taken()

    async def pieces(self, *, marked: bool = False) -> AsyncIterator[Piece]:
        """The same event by event, each with its cursor. Read either these or `texts`.

        Args:
            marked: Whether the cursor is also put into the event's metadata (`CURSOR_EXTENSION`).

        Raises:
            CallTimeout, ResponseTooSlow, SessionTakenOver, ResponseCorrupt: As `texts`.
        """
        message: ReceivedMessage | None = None
        before = 0
        while await self._is_more():
            item = self._take()
            if item.message is not message:
                message, before = item.message, 0
            stream = self.call.head is not None and self.call.head.stream
            found = list(places([item.text])) if stream else [(0, Event(data=item.text))]
            for index, event in found:
                cursor = Cursor.of(item.message.offset, before + index, item.message.message_id)
                data = with_cursor(event.data, cursor) if marked else event.data
                yield Piece(render_event(data, name=event.name, event_id=event.id) if stream else data, cursor)
            before += found[-1][0] + 1 if found else 0
            self._note_taken()

    async def _is_more(self) -> bool:
        """Wait for a text; False at the end of the response."""
        while not self._buffer:
            if self._error is None and self.call.finished:
                return False
            await self._wait()
        return True

    def _take(self) -> _Text:
        item = self._buffer.popleft()
        self._buffered_bytes -= item.size
        self._measure()
        return item

    def _note_taken(self) -> None:
        self.taken += 1
        self.untaken_since = None
        self._measure()
        self._on_taken()

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
            self._buffer_texts(self.call.check(loop.time()), self.newest)

    def take(self, texts: list[str], message: ReceivedMessage) -> None:
        """Texts that became readable with that message."""
        self.newest = message
        self._buffer_texts(texts, message)

    def _buffer_texts(self, texts: list[str], message: ReceivedMessage | None) -> None:
        if message is not None and self._error is None:
            for text in texts:
                size = len(text) if text.isascii() else len(text.encode())
                self._buffer.append(_Text(text, message, size))
                self._buffered_bytes += size
                self.given += 1
        self._measure()
        self._changed.set()

    def fail(self, error: AgentScopeRocketMQError) -> None:
        """End the call with that error; its messages no longer hold up the session."""
        self._error = error
        self._buffer.clear()
        self._buffered_bytes = 0
        self.taken = self.given
        self._measure()
        self._changed.set()
        self._on_taken()

    def cut_off(self, seconds: float) -> None:
        """Its reader left it full for so long: end it, so that its session goes on."""
        limits = self._limits
        self.fail(
            ResponseTooSlow(
                f"The response of request {self.call.request_id} was cut off: its reader left {limits.stream_buffer} "
                f"messages or {limits.stream_buffer_bytes} bytes unread for {seconds:g} s and held up its session. "
                "Read faster, or raise Limits.stream_buffer, Limits.stream_buffer_bytes or Timeouts.stall.",
                request_id=self.call.request_id,
            )
        )

    def _measure(self) -> None:
        now = asyncio.get_running_loop().time()
        limits = self._limits
        # One text may be larger than all that may be held.
        fits = len(self._buffer) <= 1 or self._buffered_bytes <= limits.stream_buffer_bytes
        if fits and len(self._buffer) <= limits.stream_buffer:
            self.stalled_since = None
        elif self.stalled_since is None:
            self.stalled_since = now
        if self.taken == self.given:
            self.untaken_since = None
        elif self.untaken_since is None:
            self.untaken_since = now
