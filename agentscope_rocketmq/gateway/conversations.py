"""The sessions that a gateway has in use: whose they are, where they stand, and when it lets go of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentscope_rocketmq.errors import AgentScopeRocketMQError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from agentscope_rocketmq.session import Session

__all__ = ["Conversation", "Conversations"]

logger = logging.getLogger(__name__)

LINGER_SECONDS = 60.0
"""Seconds for which a session stays open after its last call: the next one finds it ready."""

_SWEEP_SECONDS = 5.0
# Sessions that are known and not in use; to know one again costs a look into it.
_MOST = 20_000


@dataclass(slots=True, eq=False)
class Conversation:
    """A session as this gateway knows it.

    Attributes:
        session: The session, for its owner.
        name: Its name.
        owner: Its owner.
        position: Cursor of the last event that is known of it; empty for its very start, None where nothing is known.
        users: Calls that use it now.
        opened: Whether it is kept open for further calls.
        idle_since: When its last call ended.
    """

    session: Session
    name: str
    owner: str
    position: str | None = None
    users: int = 0
    opened: bool = False
    idle_since: float = 0.0


class Conversations:
    """All of them, by owner and name.

    Args:
        make: Name and owner -> session.
        linger: Seconds for which one stays open after its last call.
    """

    def __init__(self, make: Callable[[str, str], Session], *, linger: float = LINGER_SECONDS) -> None:
        self._make = make
        self._linger = linger
        self._known: OrderedDict[tuple[str, str], Conversation] = OrderedDict()
        self._sweeping: asyncio.Task[None] | None = None

    def of(self, name: str, owner: str) -> Conversation:
        """The conversation of that name and owner; nothing is checked yet."""
        known = self._known.get((owner, name))
        if known is None:
            known = self._known[owner, name] = Conversation(self._make(name, owner), name, owner)
            for key in [key for key, entry in self._surplus() if not entry.users and not entry.opened]:
                del self._known[key]
        self._known.move_to_end((owner, name))
        return known

    def _surplus(self) -> list[tuple[tuple[str, str], Conversation]]:
        return [item for _, item in zip(range(len(self._known) - _MOST), self._known.items(), strict=False)]

    @contextlib.asynccontextmanager
    async def calling(self, conversation: Conversation) -> AsyncIterator[None]:
        """Have a conversation open for a call.

        Raises:
            WrongOwner: The session is another owner's.
            BrokerError: RocketMQ can't be reached, or refuses.
        """
        conversation.users += 1
        try:
            # The record first: then there is something to read, and whose it is can be told at once.
            await conversation.session.announce()
            # Again for each call: another gateway may have taken it over meanwhile.
            await conversation.session.open()
            if conversation.opened:
                await conversation.session.close()
            conversation.opened = True
            yield
        finally:
            conversation.users -= 1
            conversation.idle_since = asyncio.get_running_loop().time()

    def start(self) -> None:
        """Begin to let go of what is not used."""
        self._sweeping = asyncio.create_task(self._sweep(), name="gateway.conversations")

    async def aclose(self) -> None:
        """Stop that; the sessions end with their connection."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, self._linger))
            idle = [
                entry
                for entry in self._known.values()
                if entry.opened and not entry.users and loop.time() - entry.idle_since >= self._linger
            ]
            for entry in idle:
                if entry.users:
                    continue
                entry.opened = False
                try:
                    await entry.session.close()
                except AgentScopeRocketMQError as error:
                    logger.info("Session %s could not be let go of: %s", entry.session.lite_topic, error)
