"""How far a consumer group has read a queue, in the two ways that RocketMQ knows. No I/O, no clock: both are given.

`Competing`: any consumer takes any message; each is leased by itself and comes again when its lease runs out.
`InOrder` (LiteTopics, FIFO queues): one batch at a time; the queue is blocked until all of the batch is acked, its
invisible time is over, or somebody seeks.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentscope_rocketmq.dev.embedded.queues import Queue

__all__ = ["Competing", "Delivery", "InOrder", "Lease"]

_HEAP_SLACK = 64


@dataclass(slots=True)
class Delivery:
    """One message on its way to one consumer.

    Attributes:
        queue: Its queue.
        offset: Its offset.
        attempt: How often it has been delivered, this time included.
        serial: Number of this delivery.
    """

    queue: Queue
    offset: int
    attempt: int
    serial: int


@dataclass(slots=True)
class Lease:
    """A message that somebody has.

    Attributes:
        attempt: How often it has been delivered.
        serial: Number of the delivery that holds it.
        visible_ms: When it comes again.
        client: Client for which the broker renews it by itself, None for none.
        renew_until_ms: When it stops renewing.
    """

    attempt: int
    serial: int
    visible_ms: int
    client: str | None = None
    renew_until_ms: int = 0


class Competing:
    """A group's place in a queue whose messages are leased one by one.

    Args:
        queue: The queue.
        next_offset: First offset never delivered.
        leases: Those that are out, by offset.
        moved: Called with `next` when it has changed.
        changed: Called with an offset, and its lease or None, whenever a lease changes.

    Attributes:
        next: First offset never delivered.
    """

    __slots__ = ("_changed", "_due", "_leases", "_moved", "next", "queue")

    def __init__(
        self,
        queue: Queue,
        *,
        next_offset: int,
        leases: dict[int, Lease],
        moved: Callable[[int], None],
        changed: Callable[[int, Lease | None], None],
    ) -> None:
        self.queue = queue
        self.next = next_offset
        self._leases = leases
        self._moved = moved
        self._changed = changed
        self._due = [(lease.visible_ms, offset) for offset, lease in leases.items()]
        heapq.heapify(self._due)

    def has_work(self, now_ms: int) -> bool:
        """Whether `take` would bring something."""
        due = self.due_ms()
        return max(self.next, self.queue.first) < self.queue.end or (due is not None and due <= now_ms)

    def take(self, count: int, *, now_ms: int, serial: int, lease: Lease) -> list[Delivery]:
        """Lease at most so many messages, those that come again first.

        Args:
            count: How many at most.
            now_ms: The time.
            serial: Number of the delivery.
            lease: Terms of the leases; its attempt is not used.
        """
        taken: list[Delivery] = []
        while len(taken) < count and (due := self.due_ms()) is not None and due <= now_ms:
            _, offset = heapq.heappop(self._due)
            taken.append(self._deliver(offset, self._leases[offset].attempt + 1, serial, lease))
        start = max(self.next, self.queue.first)
        for offset in range(start, min(self.queue.end, start + count - len(taken))):
            self.next = offset + 1
            taken.append(self._deliver(offset, 1, serial, lease))
        self._moved(self.next)
        return taken

    def lease(self, offset: int) -> Lease | None:
        """The lease on a message, None when nobody has it (not delivered yet, or done)."""
        return self._leases.get(offset)

    def done(self, offset: int) -> None:
        """The message is not delivered again."""
        if self._leases.pop(offset, None) is not None:
            self._changed(offset, None)
            if len(self._due) > 2 * len(self._leases) + _HEAP_SLACK:
                self._due = [(lease.visible_ms, offset) for offset, lease in self._leases.items()]
                heapq.heapify(self._due)

    def renew(self, offset: int, *, serial: int, visible_ms: int) -> None:
        """Move the time at which a leased message comes again, under a new serial number."""
        lease = self._leases[offset]
        lease.serial, lease.visible_ms, lease.client = serial, visible_ms, None
        heapq.heappush(self._due, (visible_ms, offset))
        self._changed(offset, lease)

    def extend(self, now_ms: int, by_ms: int, *, alive: Callable[[str], bool]) -> None:
        """Renew what is due and is to be renewed by the broker, as long as its client is there."""
        expired: list[tuple[int, int]] = []
        while (due := self.due_ms()) is not None and due <= now_ms:
            _, offset = heapq.heappop(self._due)
            lease = self._leases[offset]
            if lease.client is not None and now_ms < lease.renew_until_ms and alive(lease.client):
                lease.visible_ms = now_ms + by_ms
                heapq.heappush(self._due, (lease.visible_ms, offset))
                self._changed(offset, lease)
            else:
                expired.append((due, offset))
        for entry in expired:
            heapq.heappush(self._due, entry)

    def due_ms(self) -> int | None:
        """When the next leased message comes again; None when none is leased."""
        while self._due:
            visible_ms, offset = self._due[0]
            lease = self._leases.get(offset)
            if lease is not None and lease.visible_ms == visible_ms:
                return visible_ms
            heapq.heappop(self._due)
        return None

    def _deliver(self, offset: int, attempt: int, serial: int, terms: Lease) -> Delivery:
        lease = Lease(attempt, serial, terms.visible_ms, terms.client, terms.renew_until_ms)
        self._leases[offset] = lease
        heapq.heappush(self._due, (lease.visible_ms, offset))
        self._changed(offset, lease)
        return Delivery(self.queue, offset, attempt, serial)


@dataclass(slots=True)
class _Batch:
    """The batch that is out."""

    serial: int
    attempt_id: str
    start: int
    attempts: list[int]
    visible_ms: list[int]
    acked: list[bool] = field(default_factory=list)
    client: str | None = None
    renew_until_ms: int = 0


class InOrder:
    """A group's place in a queue that is read in order.

    Args:
        queue: The queue.
        committed: First offset not acked.
        moved: Called with `committed` when it has changed.

    Attributes:
        committed: First offset not acked.
    """

    __slots__ = ("_batch", "_moved", "committed", "queue")

    def __init__(self, queue: Queue, *, committed: int, moved: Callable[[int], None]) -> None:
        self.queue = queue
        self.committed = committed
        self._moved = moved
        self._batch: _Batch | None = None

    def has_work(self, now_ms: int) -> bool:
        """Whether `take` would bring something."""
        due = self.due_ms()
        return (due is None or due <= now_ms) and max(self.committed, self.queue.first) < self.queue.end

    def take(self, count: int, *, now_ms: int, serial: int, lease: Lease, attempt_id: str) -> list[Delivery]:
        """The next batch, unless the last one still blocks.

        Args:
            count: How many messages at most.
            now_ms: The time.
            serial: Number of the delivery.
            lease: Its terms; attempt and serial are not used.
            attempt_id: The consumer's name for this try of its receive; a repeated try gets its batch again. Empty
                for none.
        """
        last = self._batch
        repeated = last is not None and attempt_id != "" and last.attempt_id == attempt_id
        if not repeated and not self.has_work(now_ms):
            return []
        start = min(max(self.committed, self.queue.first), self.queue.end)
        end = min(self.queue.end, start + count)
        attempts = []
        for offset in range(start, end):
            before = last.attempts[offset - last.start] if last and 0 <= offset - last.start < len(last.attempts) else 0
            attempts.append(before if repeated and before else before + 1)
        if not attempts:
            return []
        size = len(attempts)
        self._batch = _Batch(
            serial,
            attempt_id,
            start,
            attempts,
            [lease.visible_ms] * size,
            [False] * size,
            lease.client,
            lease.renew_until_ms,
        )
        return [Delivery(self.queue, start + i, attempt, serial) for i, attempt in enumerate(attempts)]

    def holds(self, offset: int, serial: int) -> bool:
        """Whether that delivery of that message is the one that is out."""
        batch = self._batch
        return (
            batch is not None
            and batch.serial == serial
            and 0 <= (index := offset - batch.start) < len(batch.acked)
            and not batch.acked[index]
        )

    def done(self, offset: int) -> None:
        """A message of the batch that is out is acked."""
        batch = self._batch
        assert batch is not None  # noqa: S101  (the caller asked `holds`)
        batch.acked[offset - batch.start] = True
        if all(batch.acked):
            self._commit(batch.start + len(batch.acked))
            self._batch = None
        else:
            self._commit(batch.start + batch.acked.index(False))

    def renew(self, offset: int, *, visible_ms: int) -> None:
        """Move the time until which a message of the batch blocks."""
        batch = self._batch
        assert batch is not None  # noqa: S101  (the caller asked `holds`)
        batch.visible_ms[offset - batch.start] = visible_ms
        batch.client = None

    def suspend(self, *, visible_ms: int) -> None:
        """Block with all of the batch until then, and do not count its delivery as an attempt."""
        batch = self._batch
        assert batch is not None  # noqa: S101  (the caller asked `holds`)
        batch.visible_ms = [visible_ms] * len(batch.visible_ms)
        batch.attempts = [attempt - 1 for attempt in batch.attempts]
        batch.client = None

    def extend(self, now_ms: int, by_ms: int, *, alive: Callable[[str], bool]) -> None:
        """Renew a batch that is due and is to be renewed by the broker, as long as its client is there."""
        batch, due = self._batch, self.due_ms()
        if batch is None or due is None or due > now_ms or batch.client is None:
            return
        if now_ms < batch.renew_until_ms and alive(batch.client):
            batch.visible_ms = [now_ms + by_ms] * len(batch.visible_ms)

    def seek(self, offset: int) -> None:
        """Go on from an offset, whatever is out."""
        self._batch = None
        self._commit(min(max(offset, self.queue.first), self.queue.end))

    def due_ms(self) -> int | None:
        """When the batch that is out stops blocking; None when none is out."""
        if self._batch is None:
            return None
        return max(v for v, acked in zip(self._batch.visible_ms, self._batch.acked, strict=True) if not acked)

    def _commit(self, offset: int) -> None:
        if offset != self.committed:
            self.committed = offset
            self._moved(offset)
