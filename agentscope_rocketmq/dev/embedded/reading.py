"""Receiving, acking, hiding for longer, giving up: everything that consumers do with messages."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.dev.embedded.consumption import Competing, Delivery, InOrder, Lease
from agentscope_rocketmq.dev.embedded.handles import Handle, Handles
from agentscope_rocketmq.dev.embedded.refusal import Code, Refused
from agentscope_rocketmq.rocketmq.protocol import definition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agentscope_rocketmq.dev.embedded.catalog import Group, Topic
    from agentscope_rocketmq.dev.embedded.engine import Engine
    from agentscope_rocketmq.dev.embedded.lite import LiteClient
    from agentscope_rocketmq.dev.embedded.queues import Queue
    from agentscope_rocketmq.dev.embedded.waiting import Waiters

__all__ = ["Reader", "Received", "Terms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How a consumer wants its messages.

    Attributes:
        count: How many at most.
        invisible_ms: How long they are hidden from the others.
        wait: Seconds to wait for one.
        tags: Those with these tags; None for all. What does not match counts as read.
        attempt_id: The consumer's name for this try; see `InOrder.take`.
        renew_for: Client for which the broker renews them by itself; None for none.
    """

    count: int
    invisible_ms: int
    wait: float
    tags: frozenset[str] | None = None
    attempt_id: str = ""
    renew_for: str | None = None


@dataclass(slots=True)
class Received:
    """A message for a consumer.

    Attributes:
        delivery: What it is.
        message: The protocol's message, handle and attempt filled in.
    """

    delivery: Delivery
    message: Any


class Reader:
    """The consumers' side of an engine.

    Args:
        engine: The engine.
        handles: Writes and reads receipt handles.
    """

    def __init__(self, engine: Engine, handles: Handles) -> None:
        self._engine = engine
        self._handles = handles
        self._turn = 0
        self._waits: set[asyncio.Timeout] = set()
        self._closing = False

    def close(self) -> None:
        """End all long polls now, without messages, as if their time was over."""
        self._closing = True
        for limit in self._waits:
            limit.reschedule(asyncio.get_running_loop().time())

    async def receive(self, group: Group, topic: Topic, terms: Terms) -> list[Received]:
        """Messages of any of a topic's numbered queues: a proxy ignores the number that a consumer asks for."""
        waiters = self._engine.waiters(topic.name, group)
        try:
            return await self._wait(group, waiters, lambda: self._take(group, self._now(topic), terms), terms)
        finally:
            self._engine.release_waiters(topic.name, group)

    async def receive_lite(self, client: LiteClient, topic: Topic, terms: Terms) -> list[Received]:
        """Messages of a client's LiteTopics."""
        return await self._wait(
            client.group, client.waiters, lambda: self._take_lite(client, self._now(topic), terms), terms
        )

    def give_back(self, group: Group, received: Iterable[Received]) -> None:
        """These did not reach their consumer: let them come again at once."""
        now_ms = self._engine.now_ms()
        for delivery in (item.delivery for item in received):
            queue = delivery.queue
            place = queue.consumers.get(group.id)
            if place is None or not _held(place, delivery.offset, delivery.serial):
                continue
            if isinstance(place, InOrder):
                place.renew(delivery.offset, visible_ms=now_ms)
            else:
                place.renew(delivery.offset, serial=next(self._engine.serials), visible_ms=now_ms)
            self._engine.watch(group, queue, place)

    def ack(self, text: str, group: Group, topic: str, lite_topic: str | None) -> None:
        """A message is done. Acking it again, or after its LiteTopic was taken over, changes nothing.

        Args:
            text: Its receipt handle.
            group: The group that received it.
            topic: Its topic.
            lite_topic: Its LiteTopic, None for none.

        Raises:
            Refused: INVALID_RECEIPT_HANDLE: forged, expired, replaced, or of another topic or group.
        """
        handle, queue = self._resolve(text, group, topic, lite_topic)
        place = queue.consumers.get(group.id) if queue is not None else None
        if queue is None or place is None:
            return
        if isinstance(place, InOrder):
            if not place.holds(handle.offset, handle.serial):
                return
        else:
            lease = place.lease(handle.offset)
            if lease is None:
                return
            if lease.serial != handle.serial:
                raise Refused(Code.INVALID_RECEIPT_HANDLE, "receipt handle was replaced by a later one")
        self._done(group, queue, place, handle.offset)

    def hide(
        self, text: str, group: Group, topic: str, lite_topic: str | None, *, invisible_ms: int, suspend: bool
    ) -> str:
        """Hide a received message for so long from now.

        Args:
            text: Its receipt handle.
            group: The group that received it.
            topic: Its topic.
            lite_topic: Its LiteTopic, None for none.
            invisible_ms: For how long; 0 lets it come again at once.
            suspend: Hide all of a LiteTopic's batch, and do not count this delivery as an attempt.

        Returns:
            The handle that replaces it.

        Raises:
            Refused: INVALID_RECEIPT_HANDLE, as `ack`; also when the message is done already.
        """
        handle, queue = self._resolve(text, group, topic, lite_topic)
        place = queue.consumers.get(group.id) if queue is not None else None
        if queue is None or place is None:
            raise Refused(Code.INVALID_RECEIPT_HANDLE, "receipt handle belongs to a message that is gone")
        visible_ms = self._engine.now_ms() + invisible_ms
        serial = handle.serial
        if isinstance(place, InOrder):
            if not place.holds(handle.offset, serial):
                return text
            if suspend:
                place.suspend(visible_ms=visible_ms)
            else:
                place.renew(handle.offset, visible_ms=visible_ms)
        else:
            if not _held(place, handle.offset, serial):
                raise Refused(
                    Code.INVALID_RECEIPT_HANDLE, "receipt handle belongs to a message that is done or given on"
                )
            serial = next(self._engine.serials)
            place.renew(handle.offset, serial=serial, visible_ms=visible_ms)
        self._engine.watch(group, queue, place)
        return self._handles.write(Handle(group.id, queue.id, handle.offset, serial, visible_ms))

    async def bury(self, text: str, group: Group, topic: str, lite_topic: str | None) -> None:
        """Move a received message to the group's dead letters.

        Raises:
            Refused: INVALID_RECEIPT_HANDLE, as `ack`.
        """
        handle, queue = self._resolve(text, group, topic, lite_topic)
        if queue is None:
            return
        data = await self._engine.log.read(queue, handle.offset)
        place = queue.consumers.get(group.id)
        if data is not None and _held(place, handle.offset, handle.serial):
            self._engine.bury(group, data)
            self._done(group, queue, place, handle.offset)

    async def seek(self, group: Group, topic: Topic, lite_topic: str, option: Any) -> None:
        """Let a group go on elsewhere in a LiteTopic, whatever it has out.

        Args:
            group: The group.
            topic: The LITE topic.
            lite_topic: The LiteTopic; nothing happens when it has no messages.
            option: The protocol's `OffsetOption`.

        Raises:
            Refused: ILLEGAL_OFFSET: negative.
        """
        queue = topic.lite.get(lite_topic)
        if queue is None:
            return
        place = self._engine.place(group, queue)
        assert isinstance(place, InOrder)  # noqa: S101  (all LiteTopics are)
        kind = option.WhichOneof("offset_type")
        value = int(getattr(option, kind)) if kind else 0
        if value < 0:
            raise Refused(Code.ILLEGAL_OFFSET, f"the offset option {kind}={value} is negative")
        target: int | None = None
        if kind == "offset":
            target = value
        elif kind == "tail_n":
            target = max(0, place.committed - value)
        elif kind == "timestamp":
            target = await self._engine.log.find(queue, value)
        elif kind == "policy" and value == definition.OffsetOption.MIN:
            target = 0
        elif kind == "policy" and value == definition.OffsetOption.MAX:
            target = queue.end
        if target is not None:
            place.seek(target)
            self._engine.watch(group, queue, place)
            self._engine.offer(queue, group)

    async def _wait(
        self, group: Group, waiters: Waiters, take: Callable[[], list[Delivery]], terms: Terms
    ) -> list[Received]:
        deadline = asyncio.get_running_loop().time() + terms.wait
        with waiters.registered() as woken:
            while True:
                woken.clear()
                deliveries = take()
                received = await self._load(group, deliveries, terms)
                if received:
                    # There may be more than one poll can carry.
                    waiters.wake()
                    return received
                if deliveries:
                    # All of it was for nobody (tags); let others run before looking further.
                    await asyncio.sleep(0)
                    continue
                if self._closing:
                    return []
                try:
                    async with asyncio.timeout_at(deadline) as limit:
                        self._waits.add(limit)
                        await woken.wait()
                except TimeoutError:
                    return []
                finally:
                    self._waits.discard(limit)

    def _now(self, topic: Topic) -> Topic:
        # It may have been deleted and made anew while the poll waited.
        return self._engine.catalog.topics.get(topic.name, topic)

    def _take(self, group: Group, topic: Topic, terms: Terms) -> list[Delivery]:
        queues = topic.queues
        if topic.type == "PRIORITY":
            queues = queues[::-1]
        elif queues:
            self._turn += 1
            turn = self._turn % len(queues)
            queues = queues[turn:] + queues[:turn]
        taken: list[Delivery] = []
        for queue in queues:
            if len(taken) == terms.count:
                break
            if queue.end > queue.first or group.id in queue.consumers:
                taken += self._take_from(group, queue, terms, terms.count - len(taken))
        return taken

    def _take_lite(self, client: LiteClient, topic: Topic, terms: Terms) -> list[Delivery]:
        taken: list[Delivery] = []
        for name in client.next_ready():
            queue = topic.lite.get(name)
            if queue is not None:
                taken += self._take_from(client.group, queue, terms, terms.count - len(taken))
            if len(taken) == terms.count:
                break
        return taken

    def _take_from(self, group: Group, queue: Queue, terms: Terms, count: int) -> list[Delivery]:
        now_ms = self._engine.now_ms()
        place = self._engine.place(group, queue)
        self._engine.renew(place, now_ms)
        serial = next(self._engine.serials)
        until_ms = now_ms + int(self._engine.settings.auto_renew_most * 1000)
        lease = Lease(0, serial, now_ms + terms.invisible_ms, terms.renew_for, until_ms)
        if isinstance(place, InOrder):
            taken = place.take(count, now_ms=now_ms, serial=serial, lease=lease, attempt_id=terms.attempt_id)
        else:
            taken = place.take(count, now_ms=now_ms, serial=serial, lease=lease)
        if taken:
            self._engine.watch(group, queue, place)
        return taken

    async def _load(self, group: Group, deliveries: list[Delivery], terms: Terms) -> list[Received]:
        received: list[Received] = []
        try:
            for delivery in deliveries:
                data = await self._engine.log.read(delivery.queue, delivery.offset)
                if not _held(delivery.queue.consumers.get(group.id), delivery.offset, delivery.serial):
                    # Somebody took the LiteTopic over, or it expired, while the store was read.
                    continue
                message = definition.Message.FromString(data) if data is not None else None
                if message is None or (terms.tags is not None and message.system_properties.tag not in terms.tags):
                    # A message that its group need not see is done.
                    self._done(group, delivery.queue, delivery.queue.consumers[group.id], delivery.offset)
                elif data is not None and delivery.attempt > group.max_attempts:
                    self._engine.bury(group, data)
                    self._done(group, delivery.queue, delivery.queue.consumers[group.id], delivery.offset)
                else:
                    received.append(Received(delivery, self._addressed(group, delivery, message, terms)))
            if any(isinstance(delivery.queue.consumers.get(group.id), Competing) for delivery in deliveries):
                # A lease that is forgotten at a crash would take the attempt and the handle along.
                await self._engine.store.committed()
        except BaseException:
            self.give_back(group, (Received(delivery, None) for delivery in deliveries))
            raise
        return received

    def _addressed(self, group: Group, delivery: Delivery, message: Any, terms: Terms) -> Any:
        settings = self._engine.settings
        valid_ms = int(settings.auto_renew_most * 1000) if terms.renew_for is not None else terms.invisible_ms
        expires_ms = self._engine.now_ms() + valid_ms
        system = message.system_properties
        system.receipt_handle = self._handles.write(
            Handle(group.id, delivery.queue.id, delivery.offset, delivery.serial, expires_ms)
        )
        system.delivery_attempt = delivery.attempt
        return message

    def _done(self, group: Group, queue: Queue, place: Any, offset: int) -> None:
        place.done(offset)
        if isinstance(place, InOrder):
            self._engine.watch(group, queue, place)
            if place.has_work(self._engine.now_ms()):
                self._engine.offer(queue, group)

    def _resolve(self, text: str, group: Group, topic: str, lite_topic: str | None) -> tuple[Handle, Queue | None]:
        handle = self._handles.read(text, now_ms=self._engine.now_ms())
        queue = self._engine.catalog.queues.get(handle.queue)
        if handle.group != group.id:
            raise Refused(Code.INVALID_RECEIPT_HANDLE, f"receipt handle does not belong to group {group.name}")
        if queue is not None and (queue.topic != topic or (queue.lite_topic or "") != (lite_topic or "")):
            belongs = queue.topic if queue.lite_topic is None else f"{queue.topic}, LiteTopic {queue.lite_topic}"
            raise Refused(Code.INVALID_RECEIPT_HANDLE, f"receipt handle belongs to topic {belongs}: name that")
        if queue is not None and handle.serial < self._engine.first_serial:
            place = queue.consumers.get(group.id)
            if place is None or (isinstance(place, InOrder) and handle.offset >= place.committed):
                # Which batch was out is not kept. OK would be a promise that is not held.
                text = "receipt handle is from before a restart: the message comes again"
                raise Refused(Code.INVALID_RECEIPT_HANDLE, text)
        return handle, queue


def _held(place: Competing | InOrder | None, offset: int, serial: int) -> bool:
    """Whether that delivery still is the one that counts."""
    if isinstance(place, InOrder):
        return place.holds(offset, serial)
    lease = place.lease(offset) if place is not None else None
    return lease is not None and lease.serial == serial
