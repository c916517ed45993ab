"""One listener of a session: what it has not taken yet, from where it wants to hear, and how it ends."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentscope_rocketmq.cursor import Cursor
from agentscope_rocketmq.errors import ReplayGapError, ResyncRequired, SessionTakenOver, WrongOwner

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from agentscope_rocketmq.config import Limits
    from agentscope_rocketmq.errors import AgentScopeRocketMQError
    from agentscope_rocketmq.replay import SessionEvent, SessionRecord
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage

__all__ = ["Listener", "Start", "taken_over", "wrong_owner"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """From where a listener wants to hear.

    Attributes:
        offset: Offset of the first message to read; None goes on where the application stopped.
        after: The cursor to go on behind; its message must be there.
        since: Earlier events are left out.
        whole: Whether the message at `offset` must be there: what was before it is wanted too.
        wanted: What was asked for, for an error that says so.
        until: Id of a record that ends the listening; None goes on for ever.
        owner: Who listens, where the session has no owner yet: its first record says whose it is. None where it is
            known.
    """

    offset: int | None = None
    after: Cursor | None = None
    since: datetime | None = None
    whole: bool = False
    wanted: Cursor | datetime | None = None
    until: str | None = None
    owner: str | None = None


class Listener:
    """What one caller of `Session.events` is given.

    Args:
        session: Its LiteTopic.
        start: From where.
        limits: `listener_buffer` and `stream_buffer_bytes` say how far it may be behind while others go on.
        on_taken: Called when it has taken something.

    Attributes:
        start: The same.
        given: How many events it was given.
        taken: How many of them it has taken.
        untaken_since: Since when it has not asked for more, although there is something; None while nothing is.
        cursor: The last event it took.
        doubt: Id of a record after which what was asked for can't come any more; None for none.
        on_found: Called once, when what was asked for is known to be there; None for nobody.
        bound: How far it may be behind, in words.
    """

    def __init__(self, session: str, start: Start, *, limits: Limits, on_taken: Callable[[], None]) -> None:
        self.session = session
        self.start = start
        self.given = 0
        self.taken = 0
        self.untaken_since: float | None = None
        self.cursor: Cursor | None = None
        self.doubt: str | None = None
        self.on_found: Callable[[], None] | None = None
        self.bound = f"{limits.listener_buffer:,} events, or {limits.stream_buffer_bytes:,} bytes,"
        self._most = limits.listener_buffer
        self._most_bytes = limits.stream_buffer_bytes
        self._bytes = 0
        self._on_taken = on_taken
        self._checked = start.after is None and not start.whole
        self._place = (-1, -1) if start.after is None else start.after.place
        self._buffer: deque[SessionEvent] = deque()
        self._error: AgentScopeRocketMQError | None = None
        self._too_slow: str | None = None
        self._ended = False
        self._owned = False
        self._changed = asyncio.Event()

    @property
    def decides(self) -> bool:
        """Whether what it takes is what the application has taken: it goes on where the last one stopped."""
        return self.start.offset is None

    @property
    def has_room(self) -> bool:
        """Whether it may be given more."""
        return len(self._buffer) <= self._most and self._bytes <= self._most_bytes

    @property
    def waits(self) -> bool:
        """Whether it hears more."""
        return self._error is None and self._too_slow is None and not self._ended

    async def next(self) -> SessionEvent | None:
        """The next event; None when there are no more. The one before it counts as taken.

        Raises:
            SessionTakenOver, ReplayGapError, ResyncRequired, ClosedError: As the class says.
        """
        while not self._buffer:
            if self._too_slow is not None:
                raise self._cut_off(self._too_slow)
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        event = self._buffer.popleft()
        self._bytes -= len(event.raw)
        return event

    def took(self, event: SessionEvent) -> None:
        """That event is taken."""
        self.taken += 1
        self.cursor = event.cursor
        self.untaken_since = asyncio.get_running_loop().time() if self._buffer else None
        self._on_taken()

    def hear(self, message: ReceivedMessage, events: list[SessionEvent]) -> int | None:
        """A message of the session was read, and brought these events.

        Returns:
            How many events it must have taken for that message to be taken by it, whether it is given some of them now
            or was before (another listener made the session's reader go back). None where they do not concern it.
        """
        if not self.waits or not self._begins(message):
            return None
        before, given = self._place, self.given
        passed: tuple[int, int] | None = None
        for event in events:
            place = event.cursor.place
            # What was added at the seam of two runs has one place, before that of the message's first event.
            if place < before or (place == before and event.cursor.index >= 0):
                passed = place
                continue
            if self.start.since is not None and event.store_time < self.start.since:
                continue
            self._place = place
            self._buffer.append(event)
            self._bytes += len(event.raw)
            self.given += 1
        if self._buffer and self.untaken_since is None:
            self.untaken_since = asyncio.get_running_loop().time()
        self._changed.set()
        if self.given > given:
            return self.given
        if passed is None:
            return None
        if self.cursor is not None and passed <= self.cursor.place:
            return 0
        return self.given - sum(event.cursor.offset > message.offset for event in self._buffer)

    def _begins(self, message: ReceivedMessage) -> bool:
        """Whether what was asked for is there; until that is known nothing is given out."""
        if self._checked:
            return True
        due = self.start.offset if self.start.after is None else self.start.after.offset
        if due is not None and message.offset < due:
            return False
        after = self.start.after
        if message.offset != due or (after is not None and not after.is_of(message.message_id)):
            self.miss()
            return False
        self._checked = True
        if self.on_found is not None:
            self.on_found()
        return True

    @property
    def found(self) -> bool:
        """Whether what was asked for is known to be there."""
        return self._checked

    def miss(self) -> None:
        """What was asked for is not there."""
        what = "its beginning" if self.start.wanted is None else f"{self.start.wanted}"
        self.fail(
            ReplayGapError(
                f"Session {self.session!r} can't be replayed from {what}: that is not kept there. The session expired, "
                "began anew, or never had it.",
                wanted=self.start.wanted,
                session=self.session,
            )
        )

    def begin_anew(self) -> None:
        """The session expired, and what comes now is another one of that name."""
        self.fail(
            ReplayGapError(
                f"Session {self.session!r} expired while it was listened to, and began anew.",
                wanted=self.cursor,
                session=self.session,
            )
        )

    def miss_parts(self, message: ReceivedMessage) -> None:
        """The last part of an event was read whose first parts are before what is read."""
        # Before a place that was asked for, that is as it should be; elsewhere nothing may be left out in silence.
        if not self.decides or not self.waits:
            return
        self.fail(
            ReplayGapError(
                f"An event of session {self.session!r} came in parts, up to offset {message.offset}, and its reader "
                "ended before all were there. Go on from the cursor of an earlier event, or from a time before it.",
                wanted=None,
                session=self.session,
            )
        )

    def miss_blob(self, message: ReceivedMessage, why: str) -> None:
        """The event of that message is in a blob store, and can't be had."""
        cursor = Cursor.of(message.offset, 0, message.message_id)
        early = self.start.since is not None and message.store_time < self.start.since
        if early or cursor.place <= self._place or message.offset < (self.start.offset or 0):
            return
        self.fail(
            ReplayGapError(
                f"An event of session {self.session!r} can't be had. {why} "
                f"events(after={str(cursor)!r}) goes on behind it.",
                wanted=cursor,
                session=self.session,
            )
        )

    def read_record(self, record: SessionRecord) -> None:
        """A record of the session was read."""
        owner = None if record.mark or self._owned else self.start.owner
        self._owned = self._owned or not record.mark
        if owner not in (None, record.owner):
            self.fail(wrong_owner(self.session))
        elif record.id in (self.start.until, self.doubt) and not self._checked:
            self.miss()
        elif record.id == self.start.until:
            self._ended = True
            self._changed.set()

    def cut_off(self, why: str) -> None:
        """It did not keep up: what it has not taken is dropped."""
        if self.waits:
            self._too_slow = why
        self._buffer.clear()
        self._bytes = 0
        self._changed.set()

    def _cut_off(self, why: str) -> ResyncRequired:
        return ResyncRequired(
            f"A listener of session {self.session!r} was cut off: {why}. Take events faster, in a task of its own; "
            "events(after=error.cursor) goes on behind the last one taken.",
            session=self.session,
            cursor=self.cursor,
        )

    def fail(self, error: AgentScopeRocketMQError) -> None:
        """End it with that error, behind what it was given before."""
        if self.waits:
            self._error = error
        self._changed.set()


def wrong_owner(session: str) -> WrongOwner:
    """The error for whoever asks for a session that is another's."""
    return WrongOwner(
        f"Session {session!r} belongs to another owner. Ask for it as its owner, or choose another name for a session "
        "of your own.",
        session=session,
    )


def taken_over(session: str) -> SessionTakenOver:
    """The error for whoever reads a session that another reader has now."""
    return SessionTakenOver(
        f"Session {session!r} was opened by another reader, which receives its events now: another process, or "
        "another RocketMQ object or server of this one. Open a new client for the session to take it back.",
        session=session,
    )
