"""How many messages a second may be taken: a bucket of tokens that fills up steadily."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RateLimit"]


class RateLimit:
    """A rate, for one or several consumers together; after a rest a second's worth may come at once.

    Args:
        per_second: Messages a second, on average.
        clock: Gives the time in seconds.
    """

    def __init__(self, per_second: float, *, clock: Callable[[], float]) -> None:
        self._per_second = per_second
        self._most = max(1.0, per_second)
        self._clock = clock
        self._tokens = self._most
        self._filled_at = clock()
        self._reserved = 0

    def reserve(self, most: int) -> int:
        """Reserve tokens for a poll: up to so many, perhaps none. To be settled."""
        now = self._clock()
        self._tokens = min(self._most, self._tokens + (now - self._filled_at) * self._per_second)
        self._filled_at = now
        count = max(0, min(most, int(self._tokens) - self._reserved))
        self._reserved += count
        return count

    def settle(self, reserved: int, used: int) -> None:
        """What of a reservation was used; the rest is free again."""
        self._reserved -= reserved
        self._tokens -= used
