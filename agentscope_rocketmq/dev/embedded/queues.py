"""Queues of messages, and the messages themselves: in memory while they are fresh, from the store when they are not.

A queue is one of a topic's numbered queues or one LiteTopic. Its offsets count 0, 1, 2, … without holes. A message's
key in the store is its queue's number and its offset in one integer, so that a queue's messages lie side by side.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentscope_rocketmq.dev.embedded.store import Store

__all__ = ["Log", "Queue"]

_OFFSET_BITS = 32
# A reader that lags reads this many messages at once from the store, unless they are large: reading ahead pays as long
# as what was read is still in the cache when its turn comes.
_READ_AHEAD = 64
_READ_AHEAD_BYTES = 1024 * 1024


@dataclass(slots=True, eq=False)
class Queue:
    """One queue.

    Attributes:
        id: Number of the queue, never used again.
        topic: Name of its topic.
        number: Its number in the topic.
        lite_topic: The LiteTopic that it is, None for a numbered queue.
        first: Offset of the oldest message kept.
        end: Offset after the newest message that may be read.
        reserved: Offset that the next message gets; messages from `end` on are not committed yet.
        oldest_ms: When the message at `first` was stored, or a bit earlier, in ms since 1970.
        newest_ms: When the newest message was stored.
        consumers: Group number -> how far the group has read.
    """

    id: int
    topic: str
    number: int
    lite_topic: str | None = None
    first: int = 0
    end: int = 0
    reserved: int = 0
    oldest_ms: int = 0
    newest_ms: int = 0
    consumers: dict[int, Any] = field(default_factory=dict)

    def key(self, offset: int) -> int:
        """The store's key of a message."""
        return self.id << _OFFSET_BITS | offset

    def row(self) -> tuple[Any, ...]:
        """Its row in the store."""
        return (self.topic, self.number, self.lite_topic, self.first, self.oldest_ms)


class Log:
    """The messages of all queues.

    Args:
        store: Where they are kept.
        cache_bytes: How many bytes of them to keep in memory as well.
    """

    def __init__(self, store: Store, *, cache_bytes: int) -> None:
        self._store = store
        self._most = cache_bytes
        self._bytes = 0
        self._cache: OrderedDict[int, bytes] = OrderedDict()

    def append(self, queue: Queue, offset: int, now_ms: int, data: bytes, *, then: Callable[[], None]) -> None:
        """Add a message at the offset reserved for it.

        Args:
            queue: Its queue.
            offset: Its offset.
            now_ms: When it is stored.
            data: The message, as it will be read.
            then: Called once it may be read.
        """
        key = queue.key(offset)
        self._store.append(key, now_ms, data)
        self._remember(key, data)

        def visible() -> None:
            queue.end = offset + 1
            then()

        self._store.after_commit(visible)

    async def read(self, queue: Queue, offset: int) -> bytes | None:
        """A message, or None when it is no longer kept."""
        if offset < queue.first:
            return None
        key = queue.key(offset)
        data = self._cache.get(key)
        if data is None:
            data = self._store.unwritten(key)
        if data is None:
            rows = await self._store.read(key, queue.key(queue.end), most=_READ_AHEAD, most_bytes=_READ_AHEAD_BYTES)
            for found, stored in reversed(rows):
                self._remember(found, stored)
            data = rows[0][1] if rows and rows[0][0] == key else None
        return data

    async def find(self, queue: Queue, at_ms: int) -> int:
        """Offset of the first message stored at that time or later; the queue's end if there is none."""
        end = queue.end
        await self._store.written()
        return await self._store.find(queue.key(queue.first), queue.key(end), at_ms) - queue.key(0)

    def purge(self, queue: Queue, first: int) -> None:
        """Delete the messages before an offset."""
        self._store.purge(queue.key(queue.first), queue.key(first))
        queue.first = first
        self._store.put("queue", (queue.id,), queue.row())

    def _remember(self, key: int, data: bytes) -> None:
        old = self._cache.pop(key, None)
        self._bytes += len(data) - (len(old) if old is not None else 0)
        self._cache[key] = data
        while self._bytes > self._most:
            _, dropped = self._cache.popitem(last=False)
            self._bytes -= len(dropped)
