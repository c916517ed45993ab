"""The broker without its protocol: messages in, messages out, timers. One event loop owns all of it."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import time
import zlib
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.dev.embedded.catalog import DEAD_LETTERS, TYPES, Catalog
from agentscope_rocketmq.dev.embedded.checks import check_message, type_of
from agentscope_rocketmq.dev.embedded.consumption import Competing, InOrder, Lease
from agentscope_rocketmq.dev.embedded.lite import Subscriptions
from agentscope_rocketmq.dev.embedded.queues import Log
from agentscope_rocketmq.dev.embedded.refusal import Code, Refused, not_modelled
from agentscope_rocketmq.dev.embedded.waiting import Waiters
from agentscope_rocketmq.rocketmq.protocol import definition

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from agentscope_rocketmq.dev.embedded.catalog import Group, Topic
    from agentscope_rocketmq.dev.embedded.queues import Queue
    from agentscope_rocketmq.dev.embedded.settings import Settings
    from agentscope_rocketmq.dev.embedded.store import Store

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

# Above this, hashing and copying a body would hold up the event loop noticeably.
_OFF_LOOP_BYTES = 256 * 1024

# Deliveries between two starts are numbered with so many bits, above them starts are: no number comes twice.
_SERIAL_BITS = 40

_IDENTITY = definition.Encoding.IDENTITY
_MD5 = definition.DigestType.MD5
_TYPES = {kind: definition.MessageType.Value(kind) for kind in TYPES}


class Engine:
    """Topics, groups, messages and who waits for them.

    Args:
        store: Opened; where everything is kept.
        settings: The broker's settings.
        alive: Whether a client is connected, by its id.
        evicted: Called with a client's id and the LiteTopic that another client took from it.
        now: The time in seconds since 1970.

    Attributes:
        catalog: Topics and groups.
        subscriptions: Who reads which LiteTopics.
        log: The messages.
        serials: Numbers for deliveries.
        first_serial: Deliveries with smaller numbers were made before the broker's start.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        *,
        alive: Callable[[str], bool],
        evicted: Callable[[str, str], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.settings = settings
        self.catalog = Catalog(store, settings)
        self.subscriptions = Subscriptions(evicted)
        self.log = Log(store, cache_bytes=settings.cache_bytes)
        self.store_host = ""
        self._alive = alive
        self._now = now
        self.first_serial = 0
        self.serials = itertools.count()
        self._waiters: dict[str, dict[int, Waiters]] = {}
        self._alarms: dict[tuple[int, int], asyncio.TimerHandle] = {}

    def now_ms(self) -> int:
        """The time in ms since 1970."""
        return int(self._now() * 1000)

    async def load(self) -> None:
        """Go on from what the store has."""
        await self._count_start()
        await self.catalog.load()
        groups = {group.id: group for group in self.catalog.groups.values()}
        leases: dict[tuple[int, int], dict[int, Lease]] = {}
        for group_id, queue_id, offset, attempt, serial, visible_ms in await self.store.rows("SELECT * FROM lease"):
            leases.setdefault((group_id, queue_id), {})[offset] = Lease(attempt, serial, visible_ms)
        for group_id, queue_id, position in await self.store.rows("SELECT * FROM position"):
            queue, group = self.catalog.queues.get(queue_id), groups.get(group_id)
            if queue is None or group is None:
                # A consumer wrote it while its topic or group was being deleted.
                self.store.put("position", (group_id, queue_id), None)
                continue
            place = self.place(group, queue, start=position, leases=leases.pop((group_id, queue_id), None))
            self.watch(group, queue, place)
        # Of topics and groups that were deleted.
        for key, orphans in leases.items():
            for offset in orphans:
                self.store.put("lease", (*key, offset), None)

    async def _count_start(self) -> None:
        # The clock would not do: it may have gone back, and an ack from before would look like one of now.
        starts = 1
        for (before,) in await self.store.rows("SELECT value FROM meta WHERE name = 'starts'"):
            starts += int(before)
        self.store.put("meta", ("starts",), (starts,))
        await self.store.committed()
        self.first_serial = starts << _SERIAL_BITS
        self.serials = itertools.count(self.first_serial)

    def close(self) -> None:
        """Stop all timers."""
        for alarm in self._alarms.values():
            alarm.cancel()
        self._alarms.clear()

    # ---- sending ----

    async def send(self, messages: Sequence[Any], *, peer: str) -> list[int]:
        """Store messages of one topic.

        Args:
            messages: The protocol's messages; they are changed.
            peer: Address of the sender.

        Returns:
            Each message's number in its topic.

        Raises:
            Refused: None was stored.
        """
        if not messages:
            raise Refused(Code.MESSAGE_CORRUPTED, "no message to send")
        kinds = [type_of(message) for message in messages]
        topic = self.catalog.topic_to_send_to(messages[0].topic.name, kinds[0])
        for message in messages:
            if message.topic != messages[0].topic:
                raise Refused(Code.MESSAGE_CORRUPTED, "topic in message is not same")
            check_message(message, self.settings)
        for kind in kinds:
            if kind not in TYPES and topic.type is None:
                raise not_modelled("Delayed messages" if kind == "DELAY" else "Transactions")
            self.catalog.set_type(topic, kind)
        size = sum(len(message.body) for message in messages)
        if self.store.unwritten_bytes + size > self.settings.max_unwritten_bytes + self.settings.max_body_bytes:
            raise Refused(Code.TOO_MANY_REQUESTS, "the broker can't write as fast as it is sent to: send slower")
        for message, kind in zip(messages, kinds, strict=True):
            _prepare(message, kind, peer)
        if size > _OFF_LOOP_BYTES:
            encoded = await asyncio.to_thread(lambda: [_encode(message) for message in messages])
        else:
            encoded = [_encode(message) for message in messages]
        if topic.type == "LITE":
            self.catalog.check_room(
                {str(message.system_properties.lite_topic) for message in messages} - topic.lite.keys()
            )
        offsets = [
            self._append(topic, self._queue_for(topic, message.system_properties), data)
            for message, data in zip(messages, encoded, strict=True)
        ]
        await self.store.committed()
        return offsets

    def bury(self, group: Group, data: bytes) -> None:
        """Put a message into a group's dead letter topic, `%DLQ%` + the group's name.

        Args:
            group: The group that could not process it.
            data: The message.
        """
        message = definition.Message.FromString(data)
        system = message.system_properties
        letter = definition.DeadLetterQueue(topic=message.topic.name, message_id=system.message_id)
        system.dead_letter_queue.CopyFrom(letter)
        system.message_type = definition.MessageType.NORMAL
        for name in ("lite_topic", "message_group", "priority"):
            system.ClearField(name)
        name = DEAD_LETTERS + group.name
        topic = self.catalog.topics.get(name)
        if topic is None or topic.type is None:
            # Nobody used it, or somebody only looked for it: it is not kept until it has a type.
            topic = self.catalog.put_topic(name, {}, queues=1)
        message.topic.name = name
        self._append(topic, self._queue_for(topic, system), message.SerializeToString())

    def _queue_for(self, topic: Topic, system: Any) -> Queue:
        if topic.type == "LITE":
            name = str(system.lite_topic)
            return topic.lite.get(name) or self.catalog.add_queue(topic, zlib.crc32(name.encode()) % topic.width, name)
        queues = self.catalog.numbered(topic)
        if topic.type == "FIFO":
            return queues[zlib.crc32(system.message_group.encode()) % len(queues)]
        if topic.type == "PRIORITY":
            return queues[min(max(int(system.priority), 0), len(queues) - 1)]
        return queues[topic.sent % len(queues)]

    def _append(self, topic: Topic, queue: Queue, data: bytes) -> int:
        now_ms = max(self.now_ms(), queue.newest_ms)
        offset, queue.reserved, queue.newest_ms = queue.reserved, queue.reserved + 1, now_ms
        if offset == queue.first:
            queue.oldest_ms = now_ms
        stamp = definition.SystemProperties(queue_id=queue.number, queue_offset=offset, store_host=self.store_host)
        stamp.store_timestamp.FromMilliseconds(now_ms)
        # Protocol buffers put end to end are merged when they are read: no need to encode a large body twice.
        tail = definition.Message(system_properties=stamp).SerializeToString()
        self.log.append(queue, offset, now_ms, data + tail, then=lambda: self.offer(queue))
        number, topic.sent = topic.sent, topic.sent + 1
        return number

    # ---- who waits ----

    def waiters(self, topic: str, group: Group) -> Waiters:
        """The polls of a group on a topic's numbered queues."""
        return self._waiters.setdefault(topic, {}).setdefault(group.id, Waiters())

    def release_waiters(self, topic: str, group: Group) -> None:
        """Forget those where no poll is left; to be called when a poll has ended."""
        groups = self._waiters.get(topic, {})
        if group.id in groups and not len(groups[group.id]):
            del groups[group.id]
            if not groups:
                del self._waiters[topic]

    def offer(self, queue: Queue, group: Group | None = None) -> None:
        """A queue may have something to deliver: wake who waits for it, of one group or (None) of all."""
        if queue.lite_topic is not None:
            self.subscriptions.offer(queue.topic, queue.lite_topic, group=group)
            return
        for group_id, waiters in self._waiters.get(queue.topic, {}).items():
            if group is None or group_id == group.id:
                waiters.wake()

    # ---- how far groups have read ----

    def place(
        self, group: Group, queue: Queue, *, start: int | None = None, leases: dict[int, Lease] | None = None
    ) -> Competing | InOrder:
        """How far a group has read a queue; a new group begins at the queue's first message.

        Args:
            group: The group.
            queue: The queue.
            start: Where it was, when this is not new.
            leases: What it had out.
        """
        found: Competing | InOrder | None = queue.consumers.get(group.id)
        if found is not None:
            return found
        store, key = self.store, (group.id, queue.id)
        begin = queue.first if start is None else min(start, queue.end)

        def moved(position: int) -> None:
            store.put("position", key, (position,))

        def changed(offset: int, lease: Lease | None) -> None:
            row = None if lease is None else (lease.attempt, lease.serial, lease.visible_ms)
            store.put("lease", (*key, offset), row)

        if group.reads_in_order(self.catalog.topics[queue.topic]):
            found = InOrder(queue, committed=begin, moved=moved)
        else:
            found = Competing(queue, next_offset=begin, leases=leases or {}, moved=moved, changed=changed)
        queue.consumers[group.id] = found
        return found

    def renew(self, place: Competing | InOrder, now_ms: int) -> None:
        """Renew what the broker renews by itself, so that it does not look due."""
        place.extend(now_ms, int(self.settings.auto_renew_invisible * 1000), alive=self._alive)

    def watch(self, group: Group, queue: Queue, place: Competing | InOrder) -> None:
        """Wake the group's polls when something that it has out comes again."""
        key = (group.id, queue.id)
        due_ms = place.due_ms()
        alarm = self._alarms.get(key)
        if due_ms is None:
            if alarm is not None:
                alarm.cancel()
                del self._alarms[key]
            return
        loop = asyncio.get_running_loop()
        # A little late rather than early: a poll that looks too early finds nothing and sleeps on.
        when = loop.time() + max(0, due_ms - self.now_ms()) / 1000 + 0.002
        if alarm is not None:
            if alarm.when() <= when:
                return
            alarm.cancel()
        self._alarms[key] = loop.call_at(when, self._ring, group, queue, place)

    def _ring(self, group: Group, queue: Queue, place: Competing | InOrder) -> None:
        del self._alarms[group.id, queue.id]
        now_ms = self.now_ms()
        self.renew(place, now_ms)
        due_ms = place.due_ms()
        if place.has_work(now_ms):
            self.offer(queue, group)
        if due_ms is not None and due_ms > now_ms:
            self.watch(group, queue, place)

    # ---- what gets old ----

    async def tidy(self) -> None:
        """Delete old messages, LiteTopics past their topic's expiration, and subscriptions of clients that are gone."""
        self.subscriptions.forget_all_but(self._alive)
        now_ms = self.now_ms()
        too_old = now_ms - int(self.settings.retention * 1000)
        for queue in list(self.catalog.queues.values()):
            if queue.id not in self.catalog.queues:
                continue  # Its topic was deleted while the store was asked.
            topic = self.catalog.topics[queue.topic]
            idle_ms = now_ms - queue.newest_ms
            if (
                queue.lite_topic is not None
                and queue.end == queue.reserved
                and 0 <= topic.expiration * 60_000 < idle_ms
            ):
                self._drop(queue)
            elif queue.first < queue.end and queue.oldest_ms < too_old:
                first = await self.log.find(queue, too_old)
                if queue.id in self.catalog.queues:
                    queue.oldest_ms = too_old
                    self.log.purge(queue, first)

    def _drop(self, queue: Queue) -> None:
        for group_id in queue.consumers:
            alarm = self._alarms.pop((group_id, queue.id), None)
            if alarm is not None:
                alarm.cancel()
        self.catalog.remove_queue(queue)


def _prepare(message: Any, kind: str, peer: str) -> None:
    system = message.system_properties
    system.message_type = _TYPES[kind]
    for name in ("receipt_handle", "delivery_attempt", "invisible_duration", "dead_letter_queue", "delivery_timestamp"):
        system.ClearField(name)
    system.body_encoding = system.body_encoding or _IDENTITY
    if not system.born_host:
        system.born_host = peer


def _encode(message: Any) -> bytes:
    # Proxies deliver every message with this digest, whatever the sender computed.
    checksum = hashlib.md5(message.body, usedforsecurity=False).hexdigest().upper()
    message.system_properties.body_digest.type = _MD5
    message.system_properties.body_digest.checksum = checksum
    encoded: bytes = message.SerializeToString()
    return encoded
