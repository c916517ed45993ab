"""One session as this process reads it: who uses it, what was read, and what of that is taken. No I/O."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from agentscope_rocketmq.listening import Listener, taken_over
from agentscope_rocketmq.pending import PendingResponse

if TYPE_CHECKING:
    from agentscope_rocketmq.replay import EventReader
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage

__all__ = ["UNREAD_GRACE", "Channel", "Taker", "Unacked"]

UNREAD_GRACE = 0.1
"""What a reader has left for so many seconds it is not about to take: while another call waits, that one goes first."""

# So soon the first message comes from where the application stopped (`Reading.unblock` takes three seconds at most).
_FINDS_PLACE = 5.0

Taker: TypeAlias = "PendingResponse | Listener"


@dataclass(slots=True, eq=False)
class Unacked:
    """A message that was read and is not acked, and what each taker's count must reach for it to be taken."""

    message: ReceivedMessage
    marks: list[tuple[Taker, int]]

    @property
    def is_taken(self) -> bool:
        """Whether somebody took the last of what it brought."""
        return any(taker.taken >= mark for taker, mark in self.marks)


@dataclass(slots=True, eq=False)
class Channel:
    """One session as this process reads it.

    Attributes:
        users: Who has it open: transports, listeners, surveys.
        subscribed: Whether it is read here.
        taken_over: Whether another reader has it now.
        reading: Number of the subscription that counts; what comes of an earlier one is dropped.
        pending: The calls that wait on it.
        listeners: Those who listen to it.
        reader: Reads events for the listeners; None while there are none.
        unacked: What was read and is not acked.
        carried: Marks of calls for messages that will be read again, by offset.
        newest: The message of the highest offset that was read; None before the first.
        due: Offset that is read next; None while nothing came from where the application stopped, which is not known.
        untaken: Offset of the first message that is acked although nobody took it; None for none.
        resumes: Whether what comes first was taken already, by whoever read the session last.
        heard: Set when something came from where reading began.
        survey: Where messages go while somebody looks into the session; None otherwise.
        timer: Settles what a reader has left; None while there is nothing such.
        fetching: Reads what came last, when that has been fetched from a blob store; None while nothing is fetched.

    What of it is acked, and when, is said in `channels`.
    """

    users: int = 0
    opened: asyncio.Lock = field(default_factory=asyncio.Lock)
    subscribed: bool = False
    taken_over: bool = False
    reading: int = 0
    pending: set[PendingResponse] = field(default_factory=set)
    listeners: set[Listener] = field(default_factory=set)
    reader: EventReader | None = None
    unacked: list[Unacked] = field(default_factory=list)
    carried: dict[int, list[tuple[Taker, int]]] = field(default_factory=dict)
    newest: ReceivedMessage | None = None
    due: int | None = None
    untaken: int | None = None
    resumes: bool = False
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    survey: asyncio.Queue[ReceivedMessage | None] | None = None
    timer: asyncio.TimerHandle | None = None
    fetching: asyncio.Task[None] | None = None

    def waiting(self) -> list[PendingResponse]:
        """The calls that wait for something that is not here."""
        return [pending for pending in self.pending if pending.waits]

    @property
    def is_waited_for(self) -> bool:
        """Whether somebody waits for what is not here."""
        return bool(self.waiting()) or any(listener.waits for listener in self.listeners)

    async def find_place(self) -> int:
        """Offset that is read next, when that is known; 0, which is never too late, where nothing comes to show it."""
        if self.due is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FINDS_PLACE):
                    await self.heard.wait()
        return self.due or 0

    def passed_by(self, entry: Unacked) -> list[Listener]:
        """The listeners that want nothing of that message, but what comes behind it."""
        takers = {taker for taker, _ in entry.marks}
        return [listener for listener in self.listeners if listener.waits and listener not in takers]

    @property
    def is_held_up(self) -> bool:
        """Whether somebody waits for what comes behind the messages that are not acked."""
        several = len(self.listeners) > 1
        return bool(self.waiting()) or (several and any(self.passed_by(entry) for entry in self.unacked))

    def first_untaken(self) -> int | None:
        """Offset of the first message that nobody took; None where everything read is taken."""
        left = [entry.message.offset for entry in self.unacked if not entry.is_taken]
        return min([*left, *([] if self.untaken is None else [self.untaken])], default=None)

    def read_anew(self, reading: int, *, due: int | None, resumes: bool) -> None:
        """What comes from now on is of that subscription; what was read and is not acked comes again, or never."""
        self.reading, self.due, self.resumes = reading, due, resumes
        self.heard.clear()
        self.subscribed, self.taken_over = True, False
        for entry in self.unacked:
            calls: list[tuple[Taker, int]] = [mark for mark in entry.marks if isinstance(mark[0], PendingResponse)]
            if calls:
                self.carried[entry.message.offset] = calls
        self.unacked.clear()

    def notice(self, message: ReceivedMessage) -> None:
        """A message was read. A LiteTopic that expired counts from 0 again: newer messages at older offsets."""
        self.due = message.offset + 1
        newest = self.newest
        if newest is not None and message.offset <= newest.offset and message.store_time > newest.store_time:
            self.newest = None
            self.unacked.clear()
            for listener in self.listeners:
                listener.begin_anew()
            self.listeners.clear()
            self.reader = None
        if self.newest is None or message.offset >= self.newest.offset:
            self.newest = message

    def lose(self, session: str) -> None:
        """Another reader has the session now."""
        self.subscribed, self.taken_over = False, True
        self.unacked.clear()
        if self.survey is not None:
            self.survey.put_nowait(None)
        for pending in self.pending:
            # What a finished call has not read yet is here and complete.
            if pending.waits:
                pending.fail(taken_over(session))
        for listener in self.listeners:
            listener.fail(taken_over(session))

    def settle(self, now: float) -> list[ReceivedMessage]:
        """Take out what may be acked by now.

        Args:
            now: Time of the event loop.
        """
        waiting = self.waiting()
        settled: list[ReceivedMessage] = []
        kept = []
        for entry in self.unacked:
            if not self._may_be_acked(entry, waiting, now):
                kept.append(entry)
                continue
            settled.append(entry.message)
            if not entry.is_taken and (self.untaken is None or self.untaken > entry.message.offset):
                self.untaken = entry.message.offset
        self.unacked = kept
        return settled

    def _may_be_acked(self, entry: Unacked, waiting: list[PendingResponse], now: float) -> bool:
        here = [mark for mark in entry.marks if not isinstance(mark[0], Listener) or mark[0] in self.listeners]
        for taker, mark in here:
            if taker.has_room or taker.taken >= mark:
                continue
            if isinstance(taker, PendingResponse):
                return False  # until it is cut off
            if taker.decides:
                continue  # the session goes at its pace
            if entry.is_taken or waiting or self.passed_by(entry):
                taker.cut_off(f"it was more than {taker.bound} behind")
        deciding = [(taker, mark) for taker, mark in here if isinstance(taker, Listener) and taker.decides]
        if any(taker.waits for taker, _ in deciding):
            return any(taker.taken >= mark for taker, mark in deciding)
        if entry.is_taken:
            return True
        if not here:
            return bool(waiting or self.passed_by(entry))
        takers = {taker for taker, _ in here}
        left = all(taker.untaken_since is None or now - taker.untaken_since >= UNREAD_GRACE for taker in takers)
        return left and (bool(self.passed_by(entry)) or any(pending not in takers for pending in waiting))
