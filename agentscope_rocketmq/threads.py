"""A few threads for work that may hang: they hold up neither other work of the process nor its end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Threads"]

T = TypeVar("T")
P = ParamSpec("P")


class Threads:
    """Runs functions in threads that live while there is something to do.

    Unlike those of `asyncio.to_thread` and `concurrent.futures` nobody else waits for them: they are daemons.

    Args:
        most: How many at a time; further work waits for one of them.
        name: Begins their names.
    """

    def __init__(self, most: int, *, name: str) -> None:
        self._most = most
        self._name = name
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._count = 0

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in a thread, and wait for what it returns.

        When the waiting is cancelled, what has not begun is not begun; the rest goes on and nobody hears of it.
        """
        job = self.submit(lambda: function(*args, **kwargs))
        try:
            return await asyncio.wrap_future(job[0])
        finally:
            with self._lock, contextlib.suppress(ValueError):
                self._waiting.remove(job)

    def submit(self, call: Callable[[], T]) -> tuple[Future[T], Callable[[], T]]:
        """Call a function in a thread, some time; the future has what it returns."""
        job = (Future[T](), call)
        with self._lock:
            self._waiting.append(job)
            another = self._count < self._most
            self._count += another
        if another:
            threading.Thread(target=self._work, name=f"{self._name}-{self._count}", daemon=True).start()
        return job

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._count -= 1
                    return
                future, call = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001  (whoever waits for it gets it)
                    future.set_exception(error)
            del future, call  # what they hold may be large
