"""How many messages a second may be taken: a bucket of tokens that fills up steadily."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RateLimit"]


class RateLimit:
    """A rate, for one or several consumers together; after a rest a second's worth may come at once.

    What arrives is charged, not what is asked for: a long poll of an empty topic keeps nothing from others. Polls that
    are out at the same time may so bring more than there was room for, and nobody polls until that is made up for.

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

    def room(self) -> int:
        """How many messages may come now; 0 for none."""
        now = self._clock()
        self._tokens = min(self._most, self._tokens + (now - self._filled_at) * self._per_second)
        self._filled_at = now
        return max(0, int(self._tokens))

    def charge(self, arrived: int) -> None:
        """So many messages came."""
        self._tokens -= arrived
