"""How objects end, and where they live: closed once whoever asks, in one event loop."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.errors import WrongEventLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["Closing", "Home"]

logger = logging.getLogger(__name__)


class Closing:
    """The one close of an object, however often it is asked for.

    The work is a task of its own: whoever waits for it may be cancelled, and it goes on; whoever closes again waits
    for its end.

    Args:
        limit: Seconds that it may take.
        name: Name of its task.
    """

    def __init__(self, *, limit: float, name: str) -> None:
        self._limit = limit
        self._name = name
        self._task: asyncio.Task[None] | None = None

    @property
    def begun(self) -> bool:
        """Whether anybody asked for it."""
        return self._task is not None

    @property
    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self._task is not None and self._task.done()

    async def __call__(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Close, or wait for the close under way.

        Args:
            work: What closing is. It releases what costs nothing in `finally`: when its time is over it is cancelled.

        Raises:
            Exception: Whatever closing raised, each time.
        """
        if self._task is None:
            self._task = asyncio.create_task(self._bounded(work), name=self._name)
        await asyncio.shield(self._task)

    def again(self) -> Closing:
        """The next close, of an object that can be started again."""
        return Closing(limit=self._limit, name=self._name)

    async def _bounded(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            async with asyncio.timeout(self._limit) as bound:
                await work()
        except TimeoutError:
            if not bound.expired():
                raise
            logger.warning("%s took longer than %g s; what was left is dropped", self._name, self._limit)


class Home:
    """The event loop that an object lives in: the first one it is used from.

    Args:
        what: The object, as it begins a sentence.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._loop: asyncio.AbstractEventLoop | None = None

    def check(self) -> None:
        """Note the running event loop, or compare.

        Raises:
            WrongEventLoop: The object lives in another one.
        """
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            ended = " (which has ended)" if self._loop.is_closed() else ""
            raise WrongEventLoop(
                f"{self._what} is used from another event loop than the one it was first used from{ended}: its "
                "connections live there. Make one in each event loop (in each asyncio.run), inside it, and close it "
                "there; or call it in its own loop with asyncio.run_coroutine_threadsafe."
            )

    def leave(self) -> None:
        """Live nowhere again, after a close."""
        self._loop = None
