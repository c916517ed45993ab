"""Sessions: a conversation by its name, its events from any place on, and who may hear them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import hmac
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from agentscope_rocketmq.cursor import Cursor
from agentscope_rocketmq.errors import (
    AgentScopeRocketMQError,
    BrokerUnreachable,
    ConfigurationError,
    ReplayGapError,
    SessionTakenOver,
)
from agentscope_rocketmq.listening import Start, wrong_owner
from agentscope_rocketmq.replay import SessionRecord
from agentscope_rocketmq.rocketmq.message import LITE_TOPIC_NAME, Message
from agentscope_rocketmq.survey import end_of, oldest_of, owner_of, place_of_tail, place_of_time

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
    from datetime import datetime

    from agentscope_rocketmq.channels import ReplyChannels
    from agentscope_rocketmq.listening import Listener
    from agentscope_rocketmq.replay import SessionEvent
    from agentscope_rocketmq.rocketmq.producer import Producer
    from agentscope_rocketmq.survey import Look

__all__ = ["Session", "SessionCarrier", "lite_topic_name"]

_T = TypeVar("_T")

ANONYMOUS = "anonymous"
"""Owner of what nobody authenticated asked for."""

# When nothing came for this long from a place where something must be, it is asked whether anything is there: after
# what may hold it up there has been tried (channels.SILENCE).
DOUBT = 2.0
# Where nothing is, nothing comes within this.
NOTHING = 2.0
# Finding a place takes a few reads; beyond this the broker is the matter.
PATIENCE = 30.0
# Observers of one session take it from each other; who only looks has done soon.
LOOKS = 5


# Whatever writes a session's name (its record, cursors, URLs) can hold this much.
_LONGEST_NAME = 1024
_OWNED = "s-"


def lite_topic_name(session: str, *, owner: str = "anonymous", secret: str | None = None) -> str:
    """The LiteTopic of a session.

    Args:
        session: The caller's name for the conversation, any text of 1-1024 characters.
        owner: Whose it is; counts only with a secret.
        secret: Secret of the deployment. With it, names can't be guessed and two owners' equal names differ.

    Returns:
        The session itself where that is a legal LiteTopic name (1-64 letters, digits, '_', '-'), else `h-` and its
        SHA-256; with a secret `s-` and an HMAC-SHA256 of owner and session. The same input gives the same name always.

    Raises:
        ConfigurationError: Session or owner is empty, no text, too long, or can't be written as UTF-8.
    """
    if not isinstance(session, str) or not session:
        raise ConfigurationError(f"{session!r} is no session's name: give any non-empty text, or None for a fresh one.")
    if not isinstance(owner, str) or not owner:
        raise ConfigurationError(f"{owner!r} is no owner's name: give any non-empty text, or None for nobody.")
    for what, name in (("Session", session), ("Owner", owner)):
        if len(name) > _LONGEST_NAME:
            raise ConfigurationError(
                f"{what} {name[:32]!r}… has {len(name)} characters: a name has {_LONGEST_NAME} at most."
            )
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ConfigurationError(
                f"{what} {name!r} can't be written as UTF-8 ({name.encode(errors='replace')!r}): give real text."
            ) from None
    if secret is not None:
        # The length keeps (owner, session) pairs apart that would run together to the same text.
        text = f"{len(owner)}:{owner}{session}".encode()
        return _OWNED + _base64url(hmac.new(secret.encode(), text, hashlib.sha256).digest())
    # Names that look like mapped ones are mapped too, so that no session can take another's mapped name.
    if LITE_TOPIC_NAME.fullmatch(session) and not session.startswith(("h-", _OWNED)):
        return session
    return "h-" + _base64url(hashlib.sha256(session.encode()).digest())


def _base64url(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


class SessionCarrier(Protocol):
    """What a session needs of a connection to a cluster."""

    @property
    def producer(self) -> Producer:
        """Sends."""

    @property
    def replies(self) -> ReplyChannels:
        """The live readers of this process."""

    async def start(self) -> None:
        """Connect, once."""

    async def observers(self) -> ReplyChannels:
        """Readers that disturb no live one; connected on first use."""


class Session:
    """A conversation, by name; made by `RocketMQ.session`. It connects when it is first used.

    Args:
        lite_topic: Its LiteTopic.
        carrier: Reads and sends.
        name: Its name; None for one that nobody else can know.
        owner: Who uses it; None where nobody is authenticated, and nothing is checked.

    Attributes:
        lite_topic: The same.
        name: The same.
        owner: The same.
    """

    def __init__(self, lite_topic: str, *, carrier: SessionCarrier, name: str | None, owner: str | None) -> None:
        self.lite_topic = lite_topic
        self.name = name
        self.owner = owner
        self._carrier = carrier
        self._cursor: Cursor | None = None
        self._allowed = owner is None
        self._recorded = name is None
        # Made from its owner's name with a secret: it can't be another's, whatever is kept of it.
        self._is_owners = lite_topic.startswith(_OWNED)

    def __repr__(self) -> str:
        return f"Session({self.lite_topic!r})"

    @property
    def cursor(self) -> Cursor | None:
        """The last event that `events()` of this object gave out and saw taken; None before the first."""
        return self._cursor

    def events(
        self,
        *,
        after: Cursor | str | None = None,
        since: datetime | None = None,
        from_start: bool = False,
        tail: int | None = None,
        follow: bool = True,
        observe: bool = False,
        on_listening: Callable[[], None] | None = None,
    ) -> AsyncGenerator[SessionEvent]:
        """What happens in this session: what was there, from some place on, then what comes, without seam or double.

        Without a start it goes on behind the last event that the application took: an event counts as taken when the
        next one is asked for. A process that was killed repeats the events of the one message it had in hand, and of
        those whose acks were on their way; they have the cursors they had. While such a listener is there it decides
        the pace of the whole session: when it takes nothing for `Timeouts.stall` although a call of the session
        waits, it is cut off. A listener with a start of its own keeps its own place, and is cut off when others wait
        and it is more than `Limits.listener_buffer` events behind.

        Args:
            after: Go on behind this cursor.
            since: Begin with the first event stored at that time or later; with a time zone.
            from_start: Begin with the session's first event.
            tail: Begin with the last so many events.
            follow: Go on for ever; False ends with what is there when it begins.
            observe: Read beside the live reader instead of in its stead: nobody is disturbed, no position moves but
                that of observers. One observer of a session at a time.
            on_listening: Called once, when the session is listened to and its start is known to be there: what comes
                from now on is not missed, and there is no gap. That may be long before the first event, which has to
                be waited for all the same. None for nobody.

        Returns:
            An async iterator. Close it (`contextlib.aclosing`) where a loop over it may be left early.

        Raises:
            ConfigurationError: More than one start, a time without a zone, a negative number.
            ReplayGapError: What was asked for is not there; the error says what is.
            ResyncRequired: It did not keep up.
            SessionTakenOver: Another reader opened the session.
            WrongOwner: The session is another owner's.
            BrokerError: RocketMQ can't be reached, or refuses.
        """
        starts = [after is not None, since is not None, from_start, tail is not None]
        if sum(starts) > 1:
            raise ConfigurationError("Give one start to events(): after, since, from_start or tail.")
        if since is not None and since.tzinfo is None:
            raise ConfigurationError(f"events(since={since!r}) has no time zone: give one, as in datetime.now(UTC).")
        if tail is not None and (not isinstance(tail, int) or isinstance(tail, bool) or tail < 0):
            raise ConfigurationError(f"events(tail={tail!r}) is no number of events.")
        cursor = None if after is None else Cursor.parse(after)
        find_start = functools.partial(self._start, cursor, since, tail, from_start=from_start)
        return self._events(find_start, follow=follow, observe=observe, on_listening=on_listening)

    async def open(self) -> None:
        """Read its LiteTopic, for calls, until `close`. What an earlier process did not take comes first.

        Raises:
            WrongOwner: The session is another owner's.
            BrokerError: RocketMQ can't be reached, or refuses.
        """
        await self._carrier.start()
        await self._check_owner()
        await self._carrier.replies.open(self.lite_topic, fresh=self.name is None)

    async def announce(self) -> None:
        """Record it in its LiteTopic, before the first call: name, owner, time. The first record says whose it is.

        Once from each object; a session that nobody else can know has none.

        Raises:
            BrokerError: RocketMQ can't be reached, or refuses.
        """
        if not self._recorded:
            await self._carrier.start()
            await self._write(uuid.uuid4().hex, mark=False)
            self._recorded = True

    async def recorded(self) -> bool:
        """Whether its owner ever used it. That nobody did takes 2 s to find out.

        Raises:
            WrongOwner: The session is another owner's.
            BrokerError: RocketMQ can't be reached, or refuses.
        """
        await self._carrier.start()
        await self._check_owner()
        if self._is_owners and not self._allowed:
            # Its record may be gone with the oldest messages.
            self._allowed = await self._look(lambda look: oldest_of(look, seconds=NOTHING)) is not None
        return self._allowed

    def trust(self) -> None:
        """Its owner was proven right by other means than a look into it, which is saved then."""
        self._allowed = True

    async def close(self) -> None:
        """One `open` less."""
        await self._carrier.replies.close(self.lite_topic)

    async def _events(
        self,
        find_start: Callable[[], Awaitable[Start]],
        *,
        follow: bool,
        observe: bool,
        on_listening: Callable[[], None] | None,
    ) -> AsyncGenerator[SessionEvent]:
        await self._carrier.start()
        channels = await self._carrier.observers() if observe else self._carrier.replies
        await self._check_owner()
        start = replace(
            await find_start(),
            until=None if follow else uuid.uuid4().hex,
            # Whose it is may turn out only now, when it is used for the first time.
            owner=None if self._allowed else self.owner,
        )
        try:
            async with channels.listen(self.lite_topic, start) as listener, self._certainty(listener):
                if not listener.found:
                    listener.on_found = on_listening
                elif on_listening is not None:
                    on_listening()
                while (event := await listener.next()) is not None:
                    yield event
                    listener.took(event)
                    self._cursor = event.cursor
        except ReplayGapError as gap:
            raise await self._with_what_is_there(gap) from None

    async def _start(
        self, after: Cursor | None, since: datetime | None, tail: int | None, *, from_start: bool
    ) -> Start:
        if after is not None:
            return Start(offset=after.offset, after=after, wanted=after)
        if from_start:
            return Start(offset=0, whole=True)
        if since is not None:
            return await self._look(lambda look: self._start_at_time(look, since))
        if tail is not None:
            return await self._look(lambda look: self._start_at_tail(look, tail))
        return Start()

    async def _start_at_time(self, look: Look, since: datetime) -> Start:
        oldest, offset = await place_of_time(look, since, await end_of(look, self._mark))
        if oldest.offset > 0 and oldest.store_time > since:
            raise ReplayGapError(
                f"Session {self.lite_topic!r} can't be replayed from {since}: what is kept of it begins at "
                f"{oldest.store_time}.",
                wanted=since,
                session=self.lite_topic,
            )
        return Start(offset=offset, since=since, wanted=since)

    async def _start_at_tail(self, look: Look, tail: int) -> Start:
        end = await end_of(look, self._mark)
        before = await place_of_tail(look, tail, end)
        if before is None:
            return Start(offset=0)
        return Start(offset=before.offset, after=before, wanted=before)

    @contextlib.asynccontextmanager
    async def _certainty(self, listener: Listener) -> AsyncIterator[None]:
        """Meanwhile, write the mark at which listening ends, or after which what was asked for can't come any more."""
        task = asyncio.create_task(self._write_marks(listener), name=f"session[{self.lite_topic}].marks")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _write_marks(self, listener: Listener) -> None:
        try:
            if listener.start.until is not None:
                await self._mark(listener.start.until)
            while not listener.found:
                await asyncio.sleep(DOUBT)
                if not listener.found:
                    listener.doubt = await self._mark(listener.doubt)
        except AgentScopeRocketMQError as error:
            listener.fail(error)

    async def _with_what_is_there(self, gap: ReplayGapError) -> ReplayGapError:
        oldest = await self._look(lambda look: oldest_of(look, seconds=NOTHING))
        if oldest is None:
            return ReplayGapError(f"{gap} Nothing is kept of it.", wanted=gap.wanted, session=self.lite_topic)
        cursor = Cursor.of(oldest.offset, -1, oldest.message_id)
        return ReplayGapError(
            f"{gap} What is there begins at {cursor}, stored at {oldest.store_time}: events(after=error.oldest).",
            wanted=gap.wanted,
            oldest=cursor,
            session=self.lite_topic,
        )

    async def _check_owner(self) -> None:
        if self._allowed or self._is_owners:
            return
        owner = await self._look(lambda look: owner_of(look, seconds=NOTHING))
        if owner not in (None, self.owner):
            raise wrong_owner(self.lite_topic)
        self._allowed = owner is not None

    async def _look(self, work: Callable[[Look], Awaitable[_T]]) -> _T:
        observers = await self._carrier.observers()
        for _ in range(LOOKS):
            try:
                async with asyncio.timeout(PATIENCE), observers.look(self.lite_topic) as look:
                    return await work(look)
            except SessionTakenOver:
                # Another observer: it has taken the place that was being looked from.
                continue
            except TimeoutError:
                break
        raise BrokerUnreachable(
            f"Looking into session {self.lite_topic!r} took longer than {PATIENCE:g} s, or other observers of it do so "
            "all the time. Check that the RocketMQ proxy and brokers run.",
            transient=True,
        )

    async def _mark(self, mark_id: str | None = None) -> str:
        mark_id = uuid.uuid4().hex if mark_id is None else mark_id
        await self._write(mark_id, mark=True)
        return mark_id

    async def _write(self, record_id: str, *, mark: bool) -> None:
        record = SessionRecord(
            id=record_id,
            name=self.name or self.lite_topic,
            owner=self.owner or ANONYMOUS,
            time=time.time(),
            mark=mark,
        )
        message = Message(topic=self._carrier.replies.topic, lite_topic=self.lite_topic, body=record.encode())
        await self._carrier.producer.send(message)
