"""The topics and consumer groups that a broker knows, and what is refused because of them.

Unless the broker is strict, first use makes them: a topic takes the type of its first message or lite subscriber, a
group becomes a lite group, bound to that LITE topic and exclusive, when its first consumer is a lite one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.dev.embedded.queues import Queue
from agentscope_rocketmq.dev.embedded.refusal import Code, Refused

if TYPE_CHECKING:
    from agentscope_rocketmq.dev.embedded.settings import Settings
    from agentscope_rocketmq.dev.embedded.store import Store

__all__ = ["TYPES", "Catalog", "Group", "Topic", "check_group_name", "check_topic_name"]

# What topics may hold here. Real brokers also have DELAY, TRANSACTION and MIXED.
TYPES = ("NORMAL", "FIFO", "LITE", "PRIORITY")
DEAD_LETTERS = "%DLQ%"

_NAME = re.compile(r"[%|a-zA-Z0-9_-]+")
_LONGEST_TOPIC = 127
_LONGEST_DEAD_LETTER_TOPIC = 255
_LONGEST_GROUP = 120
_ALLOWED = "^[%|a-zA-Z0-9_-]+$"


@dataclass(slots=True, eq=False)
class Topic:
    """One topic.

    Attributes:
        name: Its name.
        type: One of `TYPES`; None until its first use says.
        width: How many numbered queues it has (a LITE topic none, though it announces them).
        expiration: Minutes after the last send at which its LiteTopics are deleted; -1 for never.
        queues: Its numbered queues, made at the first send.
        lite: Its LiteTopics by name.
        sent: Messages sent to it since the start; the next one's queue is chosen by it.
    """

    name: str
    type: str | None
    width: int
    expiration: int = -1
    queues: list[Queue] = field(default_factory=list)
    lite: dict[str, Queue] = field(default_factory=dict)
    sent: int = 0

    def row(self) -> tuple[Any, ...]:
        """Its row in the store."""
        return (self.type or "", self.width, self.expiration)


@dataclass(slots=True, eq=False)
class Group:
    """One consumer group.

    Attributes:
        id: Its number, never used again.
        name: Its name.
        kind: `regular`, `lite`, or empty until its first consumer says.
        bound_to: The LITE topic that a lite group reads, else None.
        exclusive: Whether a LiteTopic of a lite group has one reader at a time.
        ordered: Whether it reads queues in order; None does so for FIFO topics.
        quota: LiteTopics that one client of it may subscribe.
        max_attempts: Deliveries of a message after which it becomes a dead letter.
    """

    id: int
    name: str
    kind: str
    bound_to: str | None
    exclusive: bool
    ordered: bool | None
    quota: int
    max_attempts: int

    def row(self) -> tuple[Any, ...]:
        """Its row in the store."""
        ordered = None if self.ordered is None else int(self.ordered)
        return (self.name, self.kind, self.bound_to, int(self.exclusive), ordered, self.quota, self.max_attempts)

    def reads_in_order(self, topic: Topic) -> bool:
        """Whether it reads the queues of that topic in order."""
        if topic.type == "LITE":
            return True
        return topic.type == "FIFO" if self.ordered is None else self.ordered


class Catalog:
    """All topics and groups.

    Args:
        store: Where they are kept.
        settings: The broker's settings.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self.topics: dict[str, Topic] = {}
        self.groups: dict[str, Group] = {}
        self.queues: dict[int, Queue] = {}
        self.lite_topics = 0
        self._last_queue = 0
        self._last_group = 0

    async def load(self) -> None:
        """Read what the store has."""
        for name, kind, width, expiration in await self._store.rows("SELECT * FROM topic"):
            self.topics[name] = Topic(name, kind or None, width, expiration)
        for number, name, kind, bound_to, exclusive, ordered, quota, attempts in await self._store.rows(
            "SELECT * FROM consumer_group"
        ):
            in_order = None if ordered is None else bool(ordered)
            self.groups[name] = Group(number, name, kind, bound_to, bool(exclusive), in_order, quota, attempts)
            self._last_group = max(self._last_group, number)
        newest = "(SELECT {} FROM message WHERE id >= q.id << 32 AND id < (q.id + 1) << 32 ORDER BY id DESC LIMIT 1)"
        for number, topic, index, lite_topic, first, oldest_ms, last, newest_ms in await self._store.rows(
            f"SELECT q.*, {newest.format('id')}, {newest.format('store_ms')} FROM queue q ORDER BY topic, number"  # noqa: S608
        ):
            queue = Queue(
                number, topic, index, lite_topic, first, oldest_ms=oldest_ms, newest_ms=newest_ms or oldest_ms
            )
            queue.end = queue.reserved = first if last is None else last - queue.key(0) + 1
            self._add(queue)

    def topic(self, name: str) -> Topic:
        """A topic by its name, made where that is allowed.

        Raises:
            Refused: ILLEGAL_TOPIC or TOPIC_NOT_FOUND.
        """
        check_topic_name(name)
        topic = self.topics.get(name)
        if topic is None:
            if self._settings.strict:
                raise Refused(Code.TOPIC_NOT_FOUND, f"No topic route info in name server for the topic: {name}")
            if len(self.topics) >= self._settings.max_topics:
                raise Refused(Code.TOPIC_NOT_FOUND, f"this broker holds {len(self.topics)} topics and makes no more")
            topic = self.topics[name] = Topic(name, None, self._settings.queues)
        return topic

    def add_topic(self, name: str, kind: str, *, queues: int, expiration: int) -> Topic:
        """Make a topic, or change what may change about it.

        Raises:
            Refused: Its name is illegal, or it holds messages of another type.
        """
        check_topic_name(name)
        topic = self.topics.get(name)
        if topic is None:
            topic = self.topics[name] = Topic(name, None, queues)
        self.set_type(topic, kind)
        topic.expiration = expiration
        while topic.queues and len(topic.queues) < queues:
            self.add_queue(topic, len(topic.queues))
        topic.width = max(queues, len(topic.queues))
        self._store.put("topic", (name,), topic.row())
        return topic

    def set_type(self, topic: Topic, kind: str) -> None:
        """Give a topic its type, or check that it is this one.

        Raises:
            Refused: MESSAGE_PROPERTY_CONFLICT_WITH_TYPE, in the words of a proxy.
        """
        if topic.type is None:
            topic.type = kind
            self._store.put("topic", (topic.name,), topic.row())
        if topic.type != kind:
            raise Refused(
                Code.MESSAGE_PROPERTY_CONFLICT_WITH_TYPE,
                f"TopicMessageType validate failed, the expected type is {topic.type}, but actual type is {kind}",
            )

    def numbered(self, topic: Topic) -> list[Queue]:
        """The numbered queues of a topic, made if need be."""
        while len(topic.queues) < topic.width:
            self.add_queue(topic, len(topic.queues))
        return topic.queues

    def add_queue(self, topic: Topic, number: int, lite_topic: str | None = None) -> Queue:
        """Make a queue.

        Raises:
            Refused: LITE_TOPIC_QUOTA_EXCEEDED.
        """
        if lite_topic is not None and self.lite_topics >= self._settings.max_lite_topics:
            raise Refused(
                Code.LITE_TOPIC_QUOTA_EXCEEDED, f"lite topic quota exceeded: {self._settings.max_lite_topics}"
            )
        queue = Queue(self._last_queue + 1, topic.name, number, lite_topic)
        self._add(queue)
        self._store.put("queue", (queue.id,), queue.row())
        return queue

    def remove_queue(self, queue: Queue) -> None:
        """Forget a LiteTopic and what was read of it; one of the same name begins anew, at offset 0."""
        assert queue.lite_topic is not None  # noqa: S101  (numbered queues stay)
        del self.topics[queue.topic].lite[queue.lite_topic]
        del self.queues[queue.id]
        self.lite_topics -= 1
        self._store.put("queue", (queue.id,), None)
        for group in queue.consumers:
            self._store.put("position", (group, queue.id), None)
        self._store.purge(queue.key(0), queue.key(queue.reserved))

    def group(self, name: str) -> Group | None:
        """A group by its name, made where that is allowed; None when it does not exist.

        Raises:
            Refused: ILLEGAL_CONSUMER_GROUP.
        """
        check_group_name(name)
        group = self.groups.get(name)
        if group is None and not self._settings.strict and len(self.groups) < self._settings.max_topics:
            group = self._new_group(name)
        return group

    def add_group(
        self,
        name: str,
        *,
        bound_to: str | None,
        exclusive: bool,
        ordered: bool | None,
        quota: int | None,
        max_attempts: int | None,
    ) -> Group:
        """Make a group, or change it.

        Raises:
            Refused: A name is illegal, or the topic is no LITE topic.
        """
        check_group_name(name)
        if bound_to is not None:
            self.set_type(self.topic(bound_to), "LITE")
        group = self.groups.get(name) or self._new_group(name)
        group.kind = "regular" if bound_to is None else "lite"
        group.bound_to, group.exclusive, group.ordered = bound_to, exclusive, ordered
        group.quota = self._settings.lite_quota if quota is None else quota
        group.max_attempts = self._settings.max_attempts if max_attempts is None else max_attempts
        self._store.put("consumer_group", (group.id,), group.row())
        return group

    def use_as_lite(self, name: str, topic_name: str) -> Group:
        """The group for a lite consumer of a topic.

        Raises:
            Refused: ILLEGAL_CONSUMER_GROUP or ILLEGAL_TOPIC, in the words of a proxy.
        """
        check_topic_name(topic_name)
        group = self._group_or_refuse(name)
        if group.kind == "regular":
            raise Refused(Code.ILLEGAL_CONSUMER_GROUP, f"regular group cannot use LITE mode: {name}")
        if not group.kind:
            topic = self.topic(topic_name)
            if topic.type not in (None, "LITE"):
                raise Refused(
                    Code.ILLEGAL_TOPIC,
                    f"lite group {name} is expected to bind topic of type LITE, but actual is {topic_name}, which is "
                    f"{topic.type}",
                )
            self.set_type(topic, "LITE")
            group.kind, group.bound_to, group.exclusive = "lite", topic_name, True
            self._store.put("consumer_group", (group.id,), group.row())
        self.check_bound(group, topic_name)
        return group

    def use_as_regular(self, name: str) -> Group:
        """The group for an ordinary consumer.

        Raises:
            Refused: ILLEGAL_CONSUMER_GROUP, in the words of a proxy.
        """
        group = self._group_or_refuse(name)
        if group.kind == "lite":
            raise Refused(Code.ILLEGAL_CONSUMER_GROUP, f"lite group must use LITE mode: {name}")
        if not group.kind:
            group.kind = "regular"
            self._store.put("consumer_group", (group.id,), group.row())
        return group

    def check_bound(self, group: Group, topic_name: str) -> None:
        """Refuse a topic that a lite group is not bound to."""
        if group.bound_to != topic_name:
            bound = "null" if group.bound_to is None else group.bound_to
            raise Refused(
                Code.ILLEGAL_TOPIC,
                f"lite group {group.name} is expected to bind topic {bound}, but actual is {topic_name}",
            )

    def _group_or_refuse(self, name: str) -> Group:
        group = self.group(name)
        if group is None:
            raise Refused(Code.ILLEGAL_CONSUMER_GROUP, f"group not found: {name}")
        return group

    def _new_group(self, name: str) -> Group:
        settings = self._settings
        self._last_group += 1
        group = Group(self._last_group, name, "", None, True, None, settings.lite_quota, settings.max_attempts)
        self.groups[name] = group
        return group

    def _add(self, queue: Queue) -> None:
        self.queues[queue.id] = queue
        self._last_queue = max(self._last_queue, queue.id)
        topic = self.topics[queue.topic]
        if queue.lite_topic is None:
            topic.queues.append(queue)
        else:
            topic.lite[queue.lite_topic] = queue
            self.lite_topics += 1


def check_topic_name(name: str) -> None:
    """Refuse what can't be a topic's name, in the words of a proxy."""
    longest = _LONGEST_DEAD_LETTER_TOPIC if name.startswith(DEAD_LETTERS) else _LONGEST_TOPIC
    if not name.strip():
        raise Refused(Code.ILLEGAL_TOPIC, "The specified topic is blank")
    if not _NAME.fullmatch(name):
        raise Refused(
            Code.ILLEGAL_TOPIC,
            f"The specified topic[{name[:200]}] contains illegal characters, allowing only {_ALLOWED}",
        )
    if len(name) > longest:
        raise Refused(Code.ILLEGAL_TOPIC, f"The specified topic is longer than topic max length {longest}.")
    if name.startswith("rmq_sys_"):
        raise Refused(Code.ILLEGAL_TOPIC, "cannot access system topic")


def check_group_name(name: str) -> None:
    """Refuse what can't be a group's name, in the words of a proxy."""
    if not name.strip():
        raise Refused(Code.ILLEGAL_CONSUMER_GROUP, "the specified group is blank")
    if not _NAME.fullmatch(name):
        raise Refused(
            Code.ILLEGAL_CONSUMER_GROUP,
            f"the specified group[{name[:200]}] contains illegal characters, allowing only {_ALLOWED}",
        )
    if len(name) > _LONGEST_GROUP:
        raise Refused(
            Code.ILLEGAL_CONSUMER_GROUP, f"the specified group is longer than group max length {_LONGEST_GROUP}."
        )
