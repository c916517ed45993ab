"""Who may work next in a server that is full: places, shared by tiers and callers.

A request takes a place while its agent works on it. When all are taken, the next free one goes to the tiers in
proportion to their weights and, within a tier, to whoever came first and has not its caller's share already. Who waits
for something else than work, its turn in a conversation, steps aside meanwhile and takes a place anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter, deque
from contextvars import ContextVar
from typing import TYPE_CHECKING

from agentscope_rocketmq.priority import Tier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

__all__ = ["Slot", "Slots"]

# Of 21 places that become free while all tiers wait, so many go to each: urgent work overtakes, none starves.
WEIGHTS = {Tier.HIGH: 16, Tier.NORMAL: 4, Tier.LOW: 1}


class Slots:
    """The places of one server.

    Args:
        concurrency: How many there are.
        caller_share: Largest part of them, above 0 and up to 1, that one caller may have at a time; one at least.
    """

    def __init__(self, concurrency: int, *, caller_share: float = 1.0) -> None:
        self._free = concurrency
        self._most_a_caller = max(1, math.ceil(concurrency * caller_share))
        self._of_caller: Counter[str] = Counter()
        self._waiting: dict[Tier, deque[tuple[asyncio.Future[None], str]]] = {tier: deque() for tier in Tier}
        # Stride scheduling: the tier that has had least, by its weight, is next.
        self._had = dict.fromkeys(Tier, 0.0)

    @contextlib.asynccontextmanager
    async def slot(self, tier: Tier, caller: str, *, on_aside: Callable[[], None]) -> AsyncIterator[Slot]:
        """Have a place, waiting for one to become free.

        Args:
            tier: The request's tier.
            caller: Whose it is.
            on_aside: Called when the request steps aside, or has to wait for others of its caller, for the first time.
        """
        slot = Slot(self, tier, caller, on_aside)
        if self._of_caller.get(caller, 0) >= self._most_a_caller:
            slot.step_aside()
        await slot.enter()
        token = _current.set(slot)
        try:
            yield slot
        finally:
            _current.reset(token)
            slot.close()

    async def take(self, tier: Tier, caller: str) -> None:
        """Take a place, waiting for one to become free; `give_back` it."""
        waiting = self._waiting[tier]
        if not waiting:
            # A tier that had nothing to do has not saved up for now.
            busy = [self._had[other] for other in Tier if self._waiting[other]]
            self._had[tier] = max(self._had[tier], min(busy, default=max(self._had.values())))
        future = asyncio.get_running_loop().create_future()
        waiting.append((future, caller))
        self._hand_out()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give_back(caller)
            else:
                waiting.remove((future, caller))
                self._hand_out()
            raise

    def give_back(self, caller: str) -> None:
        """Give a place to whoever is next."""
        self._free += 1
        self._of_caller[caller] -= 1
        if not self._of_caller[caller]:
            del self._of_caller[caller]
        self._hand_out()

    def _hand_out(self) -> None:
        while self._free and (chosen := self._next()) is not None:
            tier, entry = chosen
            self._waiting[tier].remove(entry)
            self._had[tier] += 1 / WEIGHTS[tier]
            self._free -= 1
            self._of_caller[entry[1]] += 1
            entry[0].set_result(None)

    def _next(self) -> tuple[Tier, tuple[asyncio.Future[None], str]] | None:
        for tier in sorted(Tier, key=self._had.__getitem__):
            for entry in self._waiting[tier]:
                if self._of_caller[entry[1]] < self._most_a_caller and not entry[0].done():
                    return tier, entry
        return None


class Slot:
    """The place of one request; see `Slots.slot`."""

    def __init__(self, slots: Slots, tier: Tier, caller: str, on_aside: Callable[[], None]) -> None:
        self._slots = slots
        self._tier = tier
        self._caller = caller
        self._on_aside: Callable[[], None] | None = on_aside
        self._held = False
        self._closed = False

    @staticmethod
    def current() -> Slot | None:
        """That of the request that is being worked on; None where none has one."""
        return _current.get()

    def leave(self) -> None:
        """Step aside: let others work."""
        if self._held:
            self._held = False
            self._slots.give_back(self._caller)
            self.step_aside()

    def step_aside(self) -> None:
        """It is not for want of places that this request waits."""
        if self._on_aside is not None:
            self._on_aside()
            self._on_aside = None

    async def enter(self) -> None:
        """Take a place anew, waiting for one; at once where the request is over and its agent goes on by itself."""
        if self._held or self._closed:
            return
        await self._slots.take(self._tier, self._caller)
        if self._closed:
            self._slots.give_back(self._caller)
        else:
            self._held = True

    def close(self) -> None:
        """The request is over."""
        self._closed = True
        self._on_aside = None
        self.leave()


_current: ContextVar[Slot | None] = ContextVar("slot", default=None)
