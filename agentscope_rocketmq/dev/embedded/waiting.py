"""Long polls that wait for a message."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Waiters"]


class Waiters:
    """Polls that wait for the same thing, woken one at a time, the one that waits longest first.

    No wake-up is lost: a poll registers before it looks, one that is woken and leaves without looking passes it on,
    and `wake` while nobody waits is not needed, since whoever comes next looks first.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: OrderedDict[asyncio.Event, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def wake(self) -> None:
        """There is something for one of them."""
        for event in self._waiting:
            if not event.is_set():
                event.set()
                return

    @contextlib.contextmanager
    def registered(self) -> Iterator[asyncio.Event]:
        """While in here, `wake` may set the event. Clear it before looking."""
        event = asyncio.Event()
        self._waiting[event] = None
        try:
            yield event
        finally:
            del self._waiting[event]
            if event.is_set():
                self.wake()
