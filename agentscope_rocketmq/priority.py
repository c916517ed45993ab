"""Tiers of urgency: named by a request's header, carried on topics of their own, which an agent's card lists.

A topic is a queue, and what is behind in it waits, however urgent. So an agent that has tiers has a topic for each, all
of them NORMAL ones, beside the one that callers without an idea of tiers use.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from agentscope_rocketmq.errors import IllegalRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PRIORITY_EXTENSION", "PRIORITY_HEADER", "Tier", "tier_of"]

PRIORITY_EXTENSION = "urn:agentscope-rocketmq:extension:priority:v1"
"""URI of the A2A extension by which a card lists an agent's further topics; its parameters are `high` and `low`."""

PRIORITY_HEADER = "x-rocketmq-priority"
"""Header of a request: `high`, `normal` or `low`."""


class Tier(StrEnum):
    """How urgent a request is."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @classmethod
    def parse(cls, text: str) -> Tier:
        """Read it from what somebody wrote.

        Raises:
            IllegalRequest: It is none of the three.
        """
        try:
            return cls(text.strip().lower())
        except ValueError:
            raise IllegalRequest(f"{text!r} is no priority: it is high, normal or low.") from None


def tier_of(headers: Mapping[str, str]) -> Tier:
    """The tier that a request's headers name; normal where they name none that is known."""
    text = next((value for name, value in headers.items() if name.lower() == PRIORITY_HEADER), "")
    try:
        return Tier.parse(text)
    except IllegalRequest:
        return Tier.NORMAL
