"""Attributes of topics and groups, as mqadmin sets them: which there are in 5.5.0, and what they may be.

Those that this broker has no use for are kept and shown, so that provisioning finds what it wrote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentscope_rocketmq.dev.embedded.refusal import Code, Refused

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["GROUP_ATTRIBUTES", "TOPIC_ATTRIBUTES", "check_attributes"]

_MOST = 2**63
_BOOLEAN = ("true", "false")

# Name -> the words or the range of numbers that it may be; None for any text. `message.type` is checked with the topic.
TOPIC_ATTRIBUTES: Mapping[str, Collection[str] | range | None] = {
    "message.type": None,
    "queue.type": ("BatchCQ", "SimpleCQ"),
    "cleanup.policy": ("DELETE", "COMPACTION"),
    "reserve.time": range(-1, _MOST),
    "lite.topic.expiration": range(-1, 30 * 24 * 60 + 1),
}
GROUP_ATTRIBUTES: Mapping[str, Collection[str] | range | None] = {
    "priority.factor": range(101),
    "lite.bind.topic": None,
    "lite.sub.model": ("Shared", "Exclusive"),
    "lite.sub.reset.offset.exclusive": _BOOLEAN,
    "lite.sub.reset.offset.unsubscribe": _BOOLEAN,
    "lite.sub.client.quota": range(-1, _MOST),
    "lite.sub.client.max.event.cnt": range(10, _MOST),
    "lite.sub.wildcard": None,
}


def check_attributes(known: Mapping[str, Collection[str] | range | None], attributes: Mapping[str, str]) -> None:
    """Refuse what a broker refuses.

    Args:
        known: `TOPIC_ATTRIBUTES` or `GROUP_ATTRIBUTES`.
        attributes: Name -> value.

    Raises:
        Refused: BAD_REQUEST, in the words of a broker.
    """
    for name, value in attributes.items():
        if name not in known:
            raise Refused(Code.BAD_REQUEST, f"unsupported key: {name}")
        allowed = known[name]
        if isinstance(allowed, range):
            if not value.removeprefix("-").isdecimal() or int(value) not in allowed:
                text = f"{name}: value is not in range({allowed.start}, {allowed.stop - 1})"
                raise Refused(Code.BAD_REQUEST, text)
        elif allowed is not None and value not in allowed:
            raise Refused(Code.BAD_REQUEST, f"{name}: value is not in set: {', '.join(allowed)}")
