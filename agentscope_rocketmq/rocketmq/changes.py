"""Who may change the set of LiteTopics that a client reads."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

__all__ = ["Changes"]

# Calls in flight: enough to hide their round trips, few enough that a stampede does not make each of them time out.
_AT_ONCE = 16


class Changes:
    """Lets changes of different LiteTopics go on side by side, and a refresh of the whole set alone.

    A refresh that crossed a change on the way would undo it, and two changes of one LiteTopic must arrive in order.
    Everything else may overlap: hundreds of sessions that are taken over at once would wait for each other's round
    trips otherwise.
    """

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._changed = asyncio.Event()
        self._busy: set[str] = set()
        self._waiting_for_all = 0
        self._all = False

    @property
    def refreshing(self) -> bool:
        """Whether somebody is alone with the whole set."""
        return self._all

    @contextlib.asynccontextmanager
    async def of(self, names: Collection[str]) -> AsyncIterator[None]:
        """Alone with these LiteTopics."""
        mine = set(names)
        async with self._slots:
            # A refresh that waits goes first: it would never find the set at rest otherwise.
            while self._all or self._waiting_for_all or mine & self._busy:
                await self._changed.wait()
            self._busy |= mine
            try:
                yield
            finally:
                self._busy -= mine
                self._tell()

    @contextlib.asynccontextmanager
    async def of_all(self) -> AsyncIterator[None]:
        """Alone with the whole set."""
        self._waiting_for_all += 1
        try:
            while self._all or self._busy:
                await self._changed.wait()
            self._all = True
        finally:
            self._waiting_for_all -= 1
            self._tell()
        try:
            yield
        finally:
            self._all = False
            self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
