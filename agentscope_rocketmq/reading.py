"""Where the reading of sessions begins: subscribing many at once, and freeing those that a dead reader left blocked."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from agentscope_rocketmq.errors import BrokerError
from agentscope_rocketmq.rocketmq.lite import Position

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentscope_rocketmq.channel import Channel
    from agentscope_rocketmq.rocketmq.litepool import LitePool

__all__ = ["Reading"]

logger = logging.getLogger(__name__)

# When nothing comes for this long from where reading begins, a dead reader may hold what should.
SILENCE = 1.0
# Going where nothing was ever acked means to begin anew: first it is made sure that this is so.
RESUME_TRIES = 1
# How long the broker needs to apply a seek (rocketmq-facts.md: a poll in flight does).
SEEK_APPLIES = 0.3


@dataclass(slots=True, eq=False)
class _Beginning:
    """Sessions that begin to be read together.

    Attributes:
        number: Number of their subscription.
        sessions: The sessions.
        done: Ends when they are read.
    """

    number: int
    sessions: dict[str, Channel] = field(default_factory=dict)
    done: asyncio.Task[None] = field(init=False)


class _Silence(NamedTuple):
    """Sessions of which something should come until some time; where from, and how often to count back once more."""

    until: float
    sessions: list[str]
    reading: int
    at: Position | None
    tries: int


class Reading:
    """Subscribes sessions for `ReplyChannels`.

    Args:
        consumer: Reads.
        channels: The sessions that are open, by LiteTopic; looked into, not changed.
    """

    def __init__(self, consumer: LitePool, channels: Mapping[str, Channel]) -> None:
        self._consumer = consumer
        self._channels = channels
        self._numbers = itertools.count(1)
        self._silent: list[_Silence] = []
        self._beginnings: dict[Position | None, _Beginning] = {}
        self._to_unblock = asyncio.Event()

    async def begin(self, session: str, channel: Channel, at: Position | None) -> None:
        """Read a session from there; None takes up where the application stopped.

        Those that begin at the same moment, from the same kind of place, share a call.

        Raises:
            BrokerError: The subscription was refused.
        """
        channel.read_anew(0, due=None if at is None else at.start, resumes=at is None)
        beginning = self._beginnings.get(at)
        if beginning is None:
            beginning = self._beginnings[at] = _Beginning(next(self._numbers))
            beginning.done = asyncio.create_task(self._begin(at, beginning), name="sessions.begin")
            # Whoever waits for it may be cancelled.
            beginning.done.add_done_callback(lambda task: task.cancelled() or task.exception())
        beginning.sessions[session] = channel
        try:
            await asyncio.shield(beginning.done)
        except BaseException:
            channel.subscribed = False
            raise

    async def _begin(self, at: Position | None, beginning: _Beginning) -> None:
        await asyncio.sleep(0)  # until all that are ready to run have said what they want
        del self._beginnings[at]
        for channel in beginning.sessions.values():
            channel.reading = beginning.number
        names = list(beginning.sessions)
        # The last message that was taken comes again, and shows where the application stands.
        position = Position.tail(1) if at is None else at
        await self._consumer.subscribe(names, at=position, reading=beginning.number)
        # Whoever waited for it may be gone.
        await self._consumer.unsubscribe([name for name in names if name not in self._channels])
        if at != Position.last():
            self._watch(names, beginning.number, at, tries=RESUME_TRIES if at is None else 0)

    def _watch(self, sessions: list[str], reading: int, at: Position | None, *, tries: int) -> None:
        until = asyncio.get_running_loop().time() + (SILENCE if at is not None or tries else 2 * SILENCE)
        self._silent.append(_Silence(until, sessions, reading, at, tries))
        self._to_unblock.set()

    async def unblock(self) -> None:
        """Free sessions that a dead reader left blocked; runs until it is cancelled.

        A seek to the very offset where the group is does nothing, not even end the block of a batch that is out; and
        where nothing was ever acked, neither does one that counts back from there. Going elsewhere and back does.
        """
        loop = asyncio.get_running_loop()
        while True:
            self._to_unblock.clear()
            if not self._silent:
                await self._to_unblock.wait()
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(silence.until for silence in self._silent)):
                    await self._to_unblock.wait()
            over = [silence for silence in self._silent if silence.until <= loop.time()]
            self._silent = [silence for silence in self._silent if silence not in over]
            for silence in over:
                sessions = [session for session in silence.sessions if self._is_silent(session, silence.reading)]
                if sessions and silence.tries:
                    await self._resume_again(sessions, silence.tries - 1)
                elif sessions:
                    await self._go_and_return(sessions, silence.at or Position.offset(0))

    def _is_silent(self, session: str, reading: int) -> bool:
        channel = self._channels.get(session)
        return channel is not None and not channel.heard.is_set() and channel.subscribed and channel.reading == reading

    async def _resume_again(self, sessions: list[str], tries: int) -> None:
        """Count back once more from the committed offset: that is elsewhere now, unless nothing was ever acked."""
        number = next(self._numbers)
        for session in sessions:
            self._channels[session].reading = number
        try:
            await self._consumer.subscribe(sessions, at=Position.tail(1), reading=number)
        except BrokerError as error:
            logger.warning("%s What a dead reader held comes when its time is over.", error)
        self._watch(sessions, number, None, tries=tries)

    async def _go_and_return(self, sessions: list[str], at: Position) -> None:
        away, back = next(self._numbers), next(self._numbers)
        for session in sessions:
            self._channels[session].reading = away  # what comes there comes again
        try:
            # As near as can be: whoever is killed just then has lost no more of its place.
            await self._consumer.subscribe(sessions, at=Position.offset(at.value + 1))
            await asyncio.sleep(SEEK_APPLIES)
            here = [session for session in sessions if session in self._channels]
            # Somebody may have gone elsewhere meanwhile, or left.
            still = [s for s in here if self._channels[s].reading == away and self._channels[s].subscribed]
            for session in still:
                self._channels[session].read_anew(back, due=at.value, resumes=False)
            await self._consumer.subscribe(still, at=at, reading=back)
            await self._consumer.unsubscribe([session for session in sessions if session not in self._channels])
        except BrokerError as error:
            logger.warning("%s What a dead reader held comes when its time is over.", error)
