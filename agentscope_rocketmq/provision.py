"""The topics and consumer groups that agents need, planned from their cards and made on a cluster.

::

    plan(cards, config)          what is needed, a plain value
    apply(plan, config)          makes what is missing, through the name server; safe to repeat
    mqadmin_lines(plan, …)       the same as commands for RocketMQ's own mqadmin

What each topic and group is for, and why its attributes are what they are: docs/provisioning.md.
"""

from __future__ import annotations

import enum
import os
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from agentscope_rocketmq.card import parse_card, priority_topics, read_card, rocketmq_addresses
from agentscope_rocketmq.errors import (
    BrokerError,
    BrokerUnreachable,
    CardError,
    ConfigurationError,
    GroupNotBound,
    TopicTypeMismatch,
)
from agentscope_rocketmq.rocketmq.admin import Admin, GroupSettings, TopicSettings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from a2a.types import AgentCard

    from agentscope_rocketmq.config import RocketMQConfig

__all__ = ["DEFAULT_RETENTION_MINUTES", "Applied", "Outcome", "ProvisionPlan", "apply", "mqadmin_lines", "plan"]

CardSource: TypeAlias = "AgentCard | Mapping[str, Any] | str | os.PathLike[str]"

DEFAULT_RETENTION_MINUTES = 3 * 24 * 60
"""How long a LiteTopic stays after its last message: 72 h, the brokers' own default for messages."""

_LEAST_RETENTION = 15
# The brokers count it in milliseconds of 32 bits: above this a LiteTopic is deleted after 15 minutes instead
# (AbstractLiteLifecycleManager#isLiteTopicExpired of 5.5.0), although they accept up to 43,200.
_MOST_RETENTION = (2**31 - 1) // 60_000
_FOR_EVER = -1

_MESSAGE_TYPE = "message.type"
_EXPIRATION = "lite.topic.expiration"
_BOUND_TOPIC = "lite.bind.topic"
_MANY_SESSIONS = {
    # RocketMQ's defaults (400 and 2,000) make a burst over many sessions trickle.
    "lite.sub.client.max.event.cnt": "20000",
    "lite.sub.client.quota": "20000",
}
# One reader of a LiteTopic at a time, so that another process can take it over cleanly.
_LITE_GROUP_ATTRIBUTES = {"lite.sub.model": "Exclusive", **_MANY_SESSIONS}


@dataclass(frozen=True, slots=True)
class ProvisionPlan:
    """Topics and groups that a cluster must have, with full names (`NS%name`).

    Attributes:
        topics: In the order to make them; before the groups that are bound to them.
        groups: In the order to make them.
    """

    topics: tuple[TopicSettings, ...]
    groups: tuple[GroupSettings, ...]


class Outcome(enum.StrEnum):
    """What `apply` did about one topic or group."""

    CREATED = "created"
    CHANGED = "changed"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Applied:
    """One line of what `apply` did.

    Attributes:
        kind: `"topic"` or `"group"`.
        name: Full name.
        attributes: The attributes it must have.
        outcome: Whether it was made, changed, or right already; over several brokers, the most that was done on any.
    """

    kind: str
    name: str
    attributes: Mapping[str, str]
    outcome: Outcome


def plan(
    cards: Iterable[CardSource],
    config: RocketMQConfig,
    *,
    retention_minutes: int = DEFAULT_RETENTION_MINUTES,
    java_groups: Iterable[str] = (),
) -> ProvisionPlan:
    """What these agents, and whoever calls them with this configuration, need.

    For each RocketMQ interface of a card, and each further topic for a priority: its NORMAL topic, and the group
    `<topic>ConsumerGroup`, in the namespace of the interface. For the configuration, in its namespace: reply topic and
    state topic (LITE); reply group, observer group (reply group + `_OBSERVER`) and state group, each bound to its
    topic, exclusive.

    Args:
        cards: Agent cards, their JSON, or paths of card files. None at all plans for a caller alone.
        config: Reply and state topics and groups, namespace.
        retention_minutes: How long a LiteTopic, and with it a conversation, is kept after its last message; 15 to
            35,791, or -1 as long as the brokers keep messages.
        java_groups: Further groups of the reply topic, for callers in Java: ordered, since these take a stream's events
            in the order in which they are handed over.

    Raises:
        CardError: A card can't be read, or has no RocketMQ interface.
        ConfigurationError: `retention_minutes` is out of range.
    """
    if retention_minutes != _FOR_EVER and not _LEAST_RETENTION <= retention_minutes <= _MOST_RETENTION:
        raise ConfigurationError(
            f"LiteTopics can't be kept for {retention_minutes} minutes: give {_LEAST_RETENTION} to {_MOST_RETENTION}, "
            f"or {_FOR_EVER} to keep them as long as the brokers keep messages."
        )
    topics: dict[str, TopicSettings] = {}
    groups: dict[str, GroupSettings] = {}
    for card in map(_load, cards):
        addresses = rocketmq_addresses(card)
        if not addresses:
            raise CardError(
                f"The card of {card.name!r} lists no RocketMQ interface: add one, its URL "
                "http://ENDPOINT/NAMESPACE/TOPIC."
            )
        tiers = [replace(addresses[0], topic=topic) for topic in priority_topics(card).values()]
        for address in (*addresses, *tiers):
            topic = _full_name(address.namespace, address.topic)
            group = _full_name(address.namespace, f"{address.topic}ConsumerGroup")
            topics[topic] = TopicSettings(topic, {_MESSAGE_TYPE: "NORMAL"})
            groups[group] = GroupSettings(group)
    lite = {
        config.reply_topic: (config.reply_group, f"{config.reply_group}_OBSERVER"),
        config.state_topic: (config.state_group,),
    }
    for lite_topic, readers in lite.items():
        topic = _full_name(config.namespace, lite_topic)
        if topic in topics:
            raise ConfigurationError(
                f"Topic {topic!r} can't be an agent's request topic and a topic for replies or state at once: "
                "choose another name for one of them."
            )
        topics[topic] = TopicSettings(topic, {_MESSAGE_TYPE: "LITE", _EXPIRATION: str(retention_minutes)})
        for reader in readers:
            group = _full_name(config.namespace, reader)
            groups[group] = GroupSettings(group, {_BOUND_TOPIC: topic, **_LITE_GROUP_ATTRIBUTES})
    reply_topic = _full_name(config.namespace, config.reply_topic)
    for group in (_full_name(config.namespace, name) for name in java_groups):
        if group in groups:
            raise ConfigurationError(
                f"Group {group!r} is one of this package's own: choose another name for the group of Java callers."
            )
        groups[group] = GroupSettings(group, {_BOUND_TOPIC: reply_topic, **_MANY_SESSIONS}, ordered=True)
    return ProvisionPlan(tuple(topics.values()), tuple(groups.values()))


async def apply(
    plan: ProvisionPlan, config: RocketMQConfig, *, namesrv: str | None = None, cluster: str | None = None
) -> list[Applied]:
    """Make what is missing and correct what differs, on every master broker of a cluster; then read it back.

    Attributes that the plan does not name, queue counts and all else of what exists stay as they are. A topic of
    another message type, or a group bound to another topic, serves somebody else: that is an error, not changed.

    Args:
        plan: What must be there.
        config: Where the name server is, credentials, and how long a call may take (`timeouts.connect`).
        namesrv: Another name server than the configuration's.
        cluster: Name of the cluster; None where the name server knows only one.

    Returns:
        One entry for each topic and group of the plan, in its order.

    Raises:
        ConfigurationError: No name server is configured, or several clusters and none was chosen.
        TopicTypeMismatch: A topic exists as another type.
        GroupNotBound: A group exists and is bound to another topic.
        BrokerError: A broker refused or did not answer; `NotAuthorized` when credentials lack the permission.
    """
    async with Admin.from_config(config, namesrv=namesrv) as admin:
        brokers = await admin.brokers(cluster=cluster)
        if not brokers:
            raise BrokerUnreachable(
                f"No broker has registered at the name server {', '.join(admin.namesrvs)}: start one, or check that "
                "it has this name server's address.",
                transient=True,
            )
        applied = []
        for topic in plan.topics:
            outcomes = [await _apply_topic(admin, broker, topic) for broker in brokers.values()]
            applied.append(Applied("topic", topic.name, topic.attributes, _most(outcomes)))
        for group in plan.groups:
            outcomes = [await _apply_group(admin, broker, group) for broker in brokers.values()]
            applied.append(Applied("group", group.name, group.attributes, _most(outcomes)))
    return applied


def mqadmin_lines(plan: ProvisionPlan, *, namesrv: str, cluster: str = "DefaultCluster") -> list[str]:
    """The plan as commands for RocketMQ's own `mqadmin`, ready for a shell.

    Args:
        plan: What must be there.
        namesrv: `host:port` of the name server.
        cluster: Name of the cluster.
    """
    where = ["-n", namesrv, "-c", cluster]
    lines = []
    for topic in plan.topics:
        queues = ["-r", str(topic.read_queues), "-w", str(topic.write_queues)]
        lines.append(
            ["mqadmin", "updateTopic", *where, "-t", topic.name, *queues, "-a", _modification(topic.attributes)]
        )
    for group in plan.groups:
        attributes = ["--attributes", _modification(group.attributes)] if group.attributes else []
        ordered = ["-o", "true"] if group.ordered else []
        lines.append(["mqadmin", "updateSubGroup", *where, "-g", group.name, *attributes, *ordered])
    return [shlex.join(line) for line in lines]


def _load(card: CardSource) -> AgentCard:
    if isinstance(card, str | os.PathLike) and not (isinstance(card, str) and card.lstrip().startswith("{")):
        return read_card(card)
    return parse_card(card)


def _full_name(namespace: str, name: str) -> str:
    return f"{namespace}%{name}" if namespace else name


def _modification(attributes: Mapping[str, str]) -> str:
    return ",".join(f"+{key}={value}" for key, value in attributes.items())


def _most(outcomes: Sequence[Outcome]) -> Outcome:
    return min(outcomes, key=list(Outcome).index)


async def _apply_topic(admin: Admin, broker: str, wanted: TopicSettings) -> Outcome:
    found = await admin.topic(broker, wanted.name)
    if found is None:
        await admin.put_topic(broker, wanted)
    elif found.message_type != wanted.message_type:
        raise TopicTypeMismatch(
            f"Topic {wanted.name!r} exists at {broker} for {found.message_type} messages and is needed for "
            f"{wanted.message_type} ones: choose another name, or delete it first (mqadmin deleteTopic)."
        )
    elif not _has({**found.attributes, _MESSAGE_TYPE: found.message_type}, wanted.attributes):
        await admin.put_topic(broker, replace(found, attributes=wanted.attributes))
    else:
        return Outcome.UNCHANGED
    written = await admin.topic(broker, wanted.name)
    _check_written(f"topic {wanted.name!r}", broker, wanted.attributes, written.attributes if written else None)
    return Outcome.CREATED if found is None else Outcome.CHANGED


async def _apply_group(admin: Admin, broker: str, wanted: GroupSettings) -> Outcome:
    found = await admin.group(broker, wanted.name)
    bound = found.attributes.get(_BOUND_TOPIC) if found is not None else None
    if bound is not None and bound != wanted.attributes.get(_BOUND_TOPIC):
        raise GroupNotBound(
            f"Group {wanted.name!r} exists at {broker} and is bound to LITE topic {bound!r}: choose another name, or "
            "delete it first (mqadmin deleteSubGroup)."
        )
    if found is not None and _has(found.attributes, wanted.attributes) and found.ordered >= wanted.ordered:
        return Outcome.UNCHANGED
    await admin.put_group(broker, wanted)
    written = await admin.group(broker, wanted.name)
    _check_written(f"group {wanted.name!r}", broker, wanted.attributes, written.attributes if written else None)
    return Outcome.CREATED if found is None else Outcome.CHANGED


def _has(found: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return wanted.items() <= found.items()


def _check_written(what: str, broker: str, wanted: Mapping[str, str], found: Mapping[str, str] | None) -> None:
    if found is None or not _has(found, wanted):
        raise BrokerError(
            f"{broker} took the settings of {what} without an error, but has {dict(found or {})} instead of "
            f"{dict(wanted)}: LiteTopics need Apache RocketMQ 5.5 or newer."
        )
