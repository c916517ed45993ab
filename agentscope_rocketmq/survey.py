"""Finding a place in a session without listening to it: its oldest message, its end, a time, the last few events.

It is done through the observer group, so that neither the live reader nor the application's position is disturbed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from agentscope_rocketmq.claims import Claims
from agentscope_rocketmq.envelope import ResponseEnvelope
from agentscope_rocketmq.errors import EnvelopeError
from agentscope_rocketmq.listening import taken_over
from agentscope_rocketmq.replay import EventReader, SessionRecord
from agentscope_rocketmq.rocketmq.lite import Position
from agentscope_rocketmq.sse import render_event

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import datetime

    from agentscope_rocketmq.cursor import Cursor
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage

__all__ = ["Look", "end_of", "oldest_of", "owner_of", "place_of_tail", "place_of_time"]


class Look:
    """What `ReplyChannels.look` gives: reads messages of one session from wherever it is told to.

    Args:
        session: The LiteTopic.
        messages: What is read; None when another reader took it over.
        subscribe: Reads from a place on.
        ack: Acks a message.
    """

    def __init__(
        self,
        session: str,
        messages: asyncio.Queue[ReceivedMessage | None],
        subscribe: Callable[[Position], Awaitable[None]],
        ack: Callable[[ReceivedMessage], None],
    ) -> None:
        self._session = session
        self._messages = messages
        self._subscribe = subscribe
        self._ack = ack

    async def seek(self, at: Position) -> None:
        """Read from there.

        Raises:
            BrokerError: The subscription was refused.
        """
        while not self._messages.empty():
            self._messages.get_nowait()
        await self._subscribe(at)

    async def next(self) -> ReceivedMessage:
        """The next message.

        Raises:
            SessionTakenOver: Another reader of the group has the session now.
        """
        message = await self._messages.get()
        if message is None:
            raise taken_over(self._session)
        self._ack(message)
        return message


async def oldest_of(look: Look, *, seconds: float) -> ReceivedMessage | None:
    """The oldest message kept, marks apart; None when none came within so many seconds: there is none."""
    try:
        async with asyncio.timeout(seconds):
            await look.seek(Position.offset(0))
            while True:
                message = await look.next()
                record = _record(message)
                if record is None or not record.mark:
                    return message
    except TimeoutError:
        return None


async def end_of(look: Look, mark: Callable[[], Awaitable[str]]) -> ReceivedMessage:
    """A mark behind everything that is there now.

    Args:
        look: Reads the session.
        mark: Writes a mark into it and returns its id.
    """
    await look.seek(Position.last())
    mark_id = await mark()
    while True:
        message = await look.next()
        record = _record(message)
        if record is not None and record.id == mark_id:
            return message


async def place_of_time(look: Look, when: datetime, end: ReceivedMessage) -> tuple[ReceivedMessage, int]:
    """Where the first message stands that was stored at that time or later.

    Args:
        look: Reads the session.
        when: The time.
        end: A message known to be there.

    Returns:
        The oldest message kept, and the offset looked for: behind `end` when even that is older.
    """
    await look.seek(Position.offset(0))
    oldest = await look.next()
    low, high = oldest.offset, end.offset + (end.store_time < when)
    while low < high:
        middle = (low + high) // 2
        await look.seek(Position.offset(middle))
        message = await look.next()
        if message.store_time < when:
            low = max(middle, message.offset) + 1
        else:
            high = middle
    return oldest, low


async def place_of_tail(look: Look, count: int, end: ReceivedMessage) -> Cursor | None:
    """The event before the last so many; None when there are no more than those.

    Args:
        look: Reads the session.
        count: How many events.
        end: A message known to be there.
    """
    # A message brings one event or more, but for records and ends.
    span = count + 1
    while True:
        start = max(0, end.offset - span)
        reader = EventReader()
        found: deque[Cursor] = deque(maxlen=count + 1)
        await look.seek(Position.offset(start))
        while (message := await look.next()).offset < end.offset:
            body = _without_claim(_body(message))
            events = reader.feed(
                body, offset=message.offset, message_id=message.message_id, store_time=message.store_time
            )
            found.extend(event.cursor for event in events)
        if len(found) > count:
            return found[0]
        if start == 0:
            return None
        span *= 2


async def owner_of(look: Look, *, seconds: float) -> str | None:
    """Whose session it is, by its first record; None when it has none, or none came within so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            await look.seek(Position.offset(0))
            while (record := _record(await look.next())) is not None:
                if not record.mark:
                    return record.owner
    except TimeoutError:
        pass
    return None


def _record(message: ReceivedMessage) -> SessionRecord | None:
    return SessionRecord.decode(_body(message))


def _without_claim(body: bytes) -> bytes:
    """The message with something in place of what it refers to in a blob store: it is one event, whatever it says."""
    if not Claims.is_claim(body):
        return body
    try:
        envelope = ResponseEnvelope.decode(body)
    except EnvelopeError:
        return body
    return replace(envelope, part=None, body=render_event("{}") if envelope.stream else "{}").encode()


def _body(message: ReceivedMessage) -> bytes:
    try:
        return message.body()
    except EnvelopeError:
        return b""
