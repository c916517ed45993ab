"""The topics and consumer groups that a broker knows, and what is refused because of them.

Unless the broker is strict, first use makes them: a topic takes the type of its first message or lite subscriber, a
group becomes a lite group, bound to that LITE topic and exclusive, when its first consumer is a lite one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentscope_rocketmq.dev.embedded.attributes import GROUP_ATTRIBUTES, TOPIC_ATTRIBUTES, check_attributes
from agentscope_rocketmq.dev.embedded.queues import Queue
from agentscope_rocketmq.dev.embedded.refusal import Code, Refused, not_modelled

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

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
# RocketMQ's own default; groups made by their first use get more.
_QUOTA = 2000
_ALLOWED = "^[%|a-zA-Z0-9_-]+$"


@dataclass(slots=True, eq=False)
class Topic:
    """One topic.

    Attributes:
        name: Its name.
        width: How many numbered queues it has (a LITE topic none, though it announces them).
        readable: How many of them it says may be read; kept for provisioning, all are read here.
        attributes: As mqadmin names them: `message.type`, `lite.topic.expiration`, …
        queues: Its numbered queues, made at the first send.
        lite: Its LiteTopics by name.
        sent: Messages sent to it since the start; the next one's queue is chosen by it.
    """

    name: str
    width: int
    readable: int
    attributes: dict[str, str] = field(default_factory=dict)
    queues: list[Queue] = field(default_factory=list)
    lite: dict[str, Queue] = field(default_factory=dict)
    sent: int = 0

    @property
    def type(self) -> str | None:
        """One of `TYPES`; None until its first use says."""
        return self.attributes.get("message.type")

    @property
    def expiration(self) -> int:
        """Minutes after the last send at which its LiteTopics are deleted; -1 for never."""
        return int(self.attributes.get("lite.topic.expiration", -1))


@dataclass(slots=True, eq=False)
class Group:
    """One consumer group.

    Attributes:
        id: Its number, never used again.
        name: Its name.
        known: Whether it was made or used; else it takes its kind from its first consumer.
        attributes: As mqadmin names them: `lite.bind.topic`, `lite.sub.model`, …
        ordered: Whether it reads queues in order; None does so for FIFO topics.
        max_attempts: Deliveries of a message after which it becomes a dead letter.
    """

    id: int
    name: str
    known: bool
    attributes: dict[str, str]
    ordered: bool | None
    max_attempts: int

    @property
    def bound_to(self) -> str | None:
        """The LITE topic that it reads; None for a group of ordinary consumers."""
        return self.attributes.get("lite.bind.topic")

    @property
    def exclusive(self) -> bool:
        """Whether a LiteTopic has one reader of it at a time."""
        return self.attributes.get("lite.sub.model") == "Exclusive"

    @property
    def quota(self) -> int:
        """LiteTopics that one client of it may subscribe."""
        return int(self.attributes.get("lite.sub.client.quota", _QUOTA))

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
        for name, width, readable, attributes in await self._store.rows("SELECT * FROM topic"):
            self.topics[name] = Topic(name, width, readable, json.loads(attributes))
        for number, name, known, attributes, ordered, attempts in await self._store.rows(
            "SELECT * FROM consumer_group"
        ):
            in_order = None if ordered is None else bool(ordered)
            self.groups[name] = Group(number, name, bool(known), json.loads(attributes), in_order, attempts)
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
            topic = self.topics[name] = Topic(name, self._settings.queues, self._settings.queues)
        return topic

    def topic_to_send_to(self, name: str, kind: str) -> Topic:
        """A topic as `topic`, for a sender: a proxy knows an unknown topic by its lack of a type only.

        Raises:
            Refused: ILLEGAL_TOPIC or MESSAGE_PROPERTY_CONFLICT_WITH_TYPE, in the words of a proxy.
        """
        if self._settings.strict and name not in self.topics:
            check_topic_name(name)
            raise _other_type("UNSPECIFIED", kind)
        return self.topic(name)

    def put_topic(self, name: str, attributes: Mapping[str, str], *, queues: int, readable: int | None = None) -> Topic:
        """Make a topic, or change what may change about it.

        Args:
            name: Its name.
            attributes: As mqadmin names them; those not named stay as they are.
            queues: How many queues it has at least.
            readable: See `Topic`; None for all.

        Raises:
            Refused: Its name or an attribute is illegal, or it holds messages of another type.
        """
        check_topic_name(name)
        check_attributes(TOPIC_ATTRIBUTES, attributes)
        known = self.topics.get(name)
        kind = attributes.get("message.type", (known.type if known is not None else None) or "NORMAL")
        if kind not in TYPES:
            raise not_modelled(f"Topics of type {kind}")
        topic = known or self.topics.setdefault(name, Topic(name, queues, queues))
        self.set_type(topic, kind)
        topic.attributes.update(attributes)
        while topic.queues and len(topic.queues) < queues:
            self.add_queue(topic, len(topic.queues))
        topic.width = max(queues, len(topic.queues))
        topic.readable = topic.width if readable is None else readable
        self._save_topic(topic)
        return topic

    def set_type(self, topic: Topic, kind: str) -> None:
        """Give a topic its type, or check that it is this one.

        Raises:
            Refused: MESSAGE_PROPERTY_CONFLICT_WITH_TYPE, in the words of a proxy.
        """
        if topic.type is None:
            topic.attributes["message.type"] = kind
            self._save_topic(topic)
        elif topic.type != kind:
            raise _other_type(topic.type, kind)

    def numbered(self, topic: Topic) -> list[Queue]:
        """The numbered queues of a topic, made if need be."""
        while len(topic.queues) < topic.width:
            self.add_queue(topic, len(topic.queues))
        return topic.queues

    def check_room(self, names: Collection[str]) -> None:
        """Refuse new LiteTopics that would be too many.

        Raises:
            Refused: LITE_TOPIC_QUOTA_EXCEEDED.
        """
        most = self._settings.max_lite_topics
        if names and self.lite_topics + len(names) > most:
            raise Refused(Code.LITE_TOPIC_QUOTA_EXCEEDED, f"lite topic quota exceeded: {most}")

    def add_queue(self, topic: Topic, number: int, lite_topic: str | None = None) -> Queue:
        """Make a queue."""
        queue = Queue(self._last_queue + 1, topic.name, number, lite_topic)
        self._add(queue)
        self._store.put("queue", (queue.id,), queue.row())
        return queue

    def remove_queue(self, queue: Queue) -> None:
        """Forget a queue and what was read of it; a LiteTopic of the same name begins anew, at offset 0."""
        if queue.lite_topic is None:
            self.topics[queue.topic].queues.remove(queue)
        else:
            del self.topics[queue.topic].lite[queue.lite_topic]
            self.lite_topics -= 1
        del self.queues[queue.id]
        self._store.put("queue", (queue.id,), None)
        for group in queue.consumers:
            self._store.put("position", (group, queue.id), None)
        self._store.purge(queue.key(0), queue.key(queue.reserved))

    def delete_topic(self, name: str) -> None:
        """Forget a topic and its messages."""
        topic = self.topics.get(name)
        if topic is not None:
            for queue in (*topic.queues, *topic.lite.values()):
                self.remove_queue(queue)
            del self.topics[name]
            self._store.put("topic", (name,), None)

    def delete_group(self, name: str) -> None:
        """Forget a group and how far it has read."""
        group = self.groups.pop(name, None)
        if group is not None:
            for queue in self.queues.values():
                if queue.consumers.pop(group.id, None) is not None:
                    self._store.put("position", (group.id, queue.id), None)
            self._store.put("consumer_group", (group.id,), None)

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

    def put_group(
        self, name: str, attributes: Mapping[str, str], *, ordered: bool | None, max_attempts: int | None
    ) -> Group:
        """Make a group, or change it.

        Args:
            name: Its name.
            attributes: As mqadmin names them; those not named stay as they are.
            ordered: See `Group`.
            max_attempts: See `Group`; None takes the broker's.

        Raises:
            Refused: A name or an attribute is illegal, or the topic is no LITE topic.
        """
        check_group_name(name)
        check_attributes(GROUP_ATTRIBUTES, attributes)
        bound_to = attributes.get("lite.bind.topic")
        if bound_to is not None and not (self._settings.strict and bound_to not in self.topics):
            # Where topics must be made, the group may be made first, as on a real broker.
            self.set_type(self.topic(bound_to), "LITE")
        group = self.groups.get(name) or self._new_group(name)
        group.known = True
        group.attributes.update(attributes)
        group.ordered = ordered
        group.max_attempts = self._settings.max_attempts if max_attempts is None else max_attempts
        self._save_group(group)
        return group

    def use_as_lite(self, name: str, topic_name: str) -> Group:
        """The group for a lite consumer of a topic.

        Raises:
            Refused: ILLEGAL_CONSUMER_GROUP or ILLEGAL_TOPIC, in the words of a proxy.
        """
        check_topic_name(topic_name)
        group = self._group_or_refuse(name)
        if group.known and group.bound_to is None:
            raise Refused(Code.ILLEGAL_CONSUMER_GROUP, f"regular group cannot use LITE mode: {name}")
        if not group.known:
            topic = self.topic(topic_name)
            if topic.type not in (None, "LITE"):
                raise Refused(
                    Code.ILLEGAL_TOPIC,
                    f"lite group {name} is expected to bind topic of type LITE, but actual is {topic_name}, which is "
                    f"{topic.type}",
                )
            self.set_type(topic, "LITE")
            group.known = True
            group.attributes |= {
                "lite.bind.topic": topic_name,
                "lite.sub.model": "Exclusive",
                "lite.sub.client.quota": str(self._settings.lite_quota),
            }
            self._save_group(group)
        self.check_bound(group, topic_name)
        self.topic(topic_name)
        return group

    def use_as_regular(self, name: str) -> Group:
        """The group for an ordinary consumer.

        Raises:
            Refused: ILLEGAL_CONSUMER_GROUP, in the words of a proxy.
        """
        group = self._group_or_refuse(name)
        if group.bound_to is not None:
            raise Refused(Code.ILLEGAL_CONSUMER_GROUP, f"lite group must use LITE mode: {name}")
        if not group.known:
            group.known = True
            self._save_group(group)
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
        self._last_group += 1
        group = self.groups[name] = Group(self._last_group, name, False, {}, None, self._settings.max_attempts)
        return group

    def _save_topic(self, topic: Topic) -> None:
        self._store.put("topic", (topic.name,), (topic.width, topic.readable, json.dumps(topic.attributes)))

    def _save_group(self, group: Group) -> None:
        ordered = None if group.ordered is None else int(group.ordered)
        row = (group.name, int(group.known), json.dumps(group.attributes), ordered, group.max_attempts)
        self._store.put("consumer_group", (group.id,), row)

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


def _other_type(expected: str, actual: str) -> Refused:
    return Refused(
        Code.MESSAGE_PROPERTY_CONFLICT_WITH_TYPE,
        f"TopicMessageType validate failed, the expected type is {expected}, but actual type is {actual}",
    )
