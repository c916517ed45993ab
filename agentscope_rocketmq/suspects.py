"""Requests that may be what kills workers: they get turns, apart from each other.

A request that kills its worker takes down what that worker has besides, and each death costs all of them a delivery.
One that was delivered for the third time is a suspect. Of those that a worker has, one at a time is begun; so an
innocent one comes to its end unless the deadly one is ahead of it in the row, and each delivery the row begins
elsewhere.

Few suspects are deadly: workers are killed for other reasons. So a turn is short at first, and twice as long each
delivery.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

__all__ = ["SUSPECT_FROM", "Suspects"]

SUSPECT_FROM = 2
"""The delivery, from 0, at which a request is a suspect."""

# Seconds of a suspect's first turn.
_FIRST_TURN = 1.0
# Leases that a dead worker had are over at about the same time: who comes first is no more likely to be innocent.
_GATHER = 1.0


@dataclass(slots=True, order=True)
class _Suspect:
    name: str
    attempt: int
    begins: asyncio.Future[None] = field(compare=False)


class Suspects:
    """The turns of one worker.

    Args:
        longest: Seconds that a turn may last: then the next one's comes although the request is still at work.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._row: list[_Suspect] = []  # sorted
        self._last: _Suspect | None = None
        self._turn: _Suspect | None = None
        self._next_turn: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def turn(self, name: str, attempt: int, *, on_wait: Callable[[], None]) -> AsyncIterator[None]:
        """Work on a request, when it is its turn; at once unless it is a suspect.

        Args:
            name: What tells it from others, the same in every delivery.
            attempt: Which delivery it is, from 0.
            on_wait: Called when it has to wait.
        """
        if attempt < SUSPECT_FROM:
            yield
            return
        on_wait()
        loop = asyncio.get_running_loop()
        suspect = _Suspect(name, attempt, loop.create_future())
        bisect.insort(self._row, suspect)
        if self._next_turn is None:
            self._next_turn = loop.call_later(_GATHER, self._go_on)
        try:
            await suspect.begins
            yield
        finally:
            if self._turn is suspect:
                self._go_on()
            elif not suspect.begins.done() or suspect.begins.cancelled():
                self._row = [each for each in self._row if each is not suspect]

    def _go_on(self) -> None:
        if self._next_turn is not None:
            self._next_turn.cancel()
        self._turn = self._next_turn = None
        self._row = [each for each in self._row if not each.begins.done()]
        if not self._row:
            return
        if self._last is None:
            # A worker that was killed has no memory, but the number of the delivery moves the beginning of the row.
            first = max(each.attempt for each in self._row) % len(self._row)
        else:
            first = bisect.bisect_right(self._row, self._last) % len(self._row)
        self._turn = self._last = self._row.pop(first)
        self._turn.begins.set_result(None)
        seconds = min(self._longest, _FIRST_TURN * 2.0 ** (self._turn.attempt - SUSPECT_FROM))
        self._next_turn = asyncio.get_running_loop().call_later(seconds, self._go_on)
