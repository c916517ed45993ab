"""Requests at work in a bridge: how each came here, and what is to be settled when it is done."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from agentscope_rocketmq.envelope import ACK_TIMEOUT_HEADER, IDLE_TIMEOUT_HEADER, TOTAL_TIMEOUT_HEADER
from agentscope_rocketmq.priority import Tier, tier_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentscope_rocketmq.envelope import RequestEnvelope
    from agentscope_rocketmq.handover import Offer
    from agentscope_rocketmq.jsonrpc import RpcRequest
    from agentscope_rocketmq.rocketmq.consumer import LeasedMessage
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage

__all__ = ["Answered", "BridgeCounters", "Delivery", "Limit", "Run"]


# A copy of a request that was answered not long ago (a send repeated, a lost ack) is acked, not run again.
_ANSWERED = 10_000


class Answered:
    """Requests that were answered not long ago, with the delivery that was."""

    def __init__(self) -> None:
        self._attempts: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._settled: set[tuple[str, str]] = set()

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._attempts

    def settles(self, key: tuple[str, str], delivery: Delivery) -> bool:
        """Whether that delivery of a request needs no answer of its own."""
        # The next delivery is ours, unless the broker took our acks: then it is that of a copy, which another worker
        # had. With one in between another worker had it, too. Its caller may listen to that one, which is dead.
        answered = self._attempts.get(key)
        return answered is not None and delivery.attempt <= answered + (key not in self._settled)

    def add(self, key: tuple[str, str], attempt: int) -> None:
        """A delivery of a request was answered."""
        self._attempts[key] = attempt
        self._settled.discard(key)
        while len(self._attempts) > _ANSWERED:
            forgotten, _ = self._attempts.popitem(last=False)
            self._settled.discard(forgotten)

    def settle(self, key: tuple[str, str]) -> None:
        """The broker took the acks of all its deliveries that were here."""
        if key in self._attempts:
            self._settled.add(key)


@dataclass(slots=True)
class BridgeCounters:
    """What a bridge has done since its start.

    Attributes:
        taken: Requests that were run.
        answered: Requests whose response is complete on the broker.
        repeated: Copies of requests running or answered here, not run again.
        handed_over: Requests answered by the instance that knows their conversation.
        refused: Messages set aside: not an envelope, too large, a reply topic that is not allowed.
        expired: Of those taken, the ones that were not begun because their caller had given up: its time had run out.
        unanswered: Of those taken, the ones whose response could not be published in full.
    """

    taken: int = 0
    answered: int = 0
    repeated: int = 0
    handed_over: int = 0
    refused: int = 0
    expired: int = 0
    unanswered: int = 0


class Limit(NamedTuple):
    """A time limit of a caller.

    Attributes:
        which: `ack`, `idle` or `total`.
        seconds: How long it is, from the sending of the request.
    """

    which: str
    seconds: float


@dataclass(slots=True, eq=False)
class Delivery:
    """One way in which a request came here: leased from the topic, offered by another instance, or by neither.

    Attributes:
        message: The message.
        leased: Its lease, when it came from the topic.
        offer: The offer, when another instance has the lease.
        tier: The tier whose topic it came from.
        arrived: When it came, on the event loop's clock.
        given_up: Why its task is to fail instead of being worked on; None for work.
    """

    message: ReceivedMessage
    leased: LeasedMessage | None = None
    offer: Offer | None = None
    tier: Tier = Tier.NORMAL
    arrived: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    given_up: str | None = None

    @property
    def waited(self) -> float:
        """Seconds that the caller has waited, by the servers' clocks; of one that was given back: since then."""
        before = 0.0 if self.offer is None else self.offer.waited
        return before + self.message.waited + (asyncio.get_running_loop().time() - self.arrived)

    def ran_out(self, envelope: RequestEnvelope, request: RpcRequest, *, told: bool = False) -> Limit | None:
        """The limit that ran out, so that the caller waits no more; None while it waits, as far as can be known.

        Args:
            envelope: The request.
            request: What its body says.
            told: Whether the caller has heard by now that the request is taken.
        """
        if request.returns_at_once and self.attempt > 0:
            return None  # its caller may have had its answer in time, and counts on the work
        total = envelope.seconds(TOTAL_TIMEOUT_HEADER)
        if total is not None and self.waited >= total:
            return Limit("total", total)
        limit = None if told else self._told_within(envelope)
        return limit if limit is not None and self.waited >= limit.seconds else None

    def time_to_tell(self, envelope: RequestEnvelope) -> float | None:
        """Seconds within which the caller must hear that the request is taken; None for no such limit."""
        limit = self._told_within(envelope)
        return None if limit is None else max(0.0, limit.seconds - self.waited)

    def _told_within(self, envelope: RequestEnvelope) -> Limit | None:
        if self.attempt > 0:
            return None  # it was taken before, and its caller may have heard of that
        for which, header in (("ack", ACK_TIMEOUT_HEADER), ("idle", IDLE_TIMEOUT_HEADER)):
            if (seconds := envelope.seconds(header)) is not None:
                return Limit(which, seconds)
        return None

    def tier_with(self, headers: Mapping[str, str]) -> Tier:
        """The request's tier: its topic's, or what its headers say where it came otherwise."""
        return tier_of(headers) if self.tier is Tier.NORMAL else self.tier

    def park(self) -> None:
        """Let another message be taken while this one waits."""
        if self.leased is not None:
            self.leased.consumer.park(self.leased)

    async def ack(self) -> bool:
        """The request is done with; for one that was leased. Whether nobody else gets it any more."""
        if self.leased is None:
            return False
        held = self.leased.holds
        return await self.leased.consumer.ack(self.leased) and held

    async def release(self, *, at_most: float) -> None:
        """Somebody else may do better; for one that was leased.

        What failed it (a broker, a blob store, another instance) may last: after a second, and after twice as long
        each further time.

        Args:
            at_most: But in no more than this, in seconds.
        """
        if self.leased is not None:
            await self.leased.consumer.release(self.leased, after=min(at_most, 2.0**self.attempt))

    @property
    def attempt(self) -> int:
        """Which delivery of the request this is, from 0."""
        if self.offer is not None:
            return self.offer.attempt
        return self.message.attempt - 1 if self.leased is not None else 0


@dataclass(slots=True, eq=False)
class Run:
    """One request at work, with its task and every delivery of it that is to be settled when it is done.

    Attributes:
        task: The task that it is about.
        serving: Serves it.
        deliveries: What is to be settled.
        reports: Tell other instances that it is taken.
        begun: Whether the app was called, or may be at any moment.
    """

    task: str
    serving: asyncio.Task[None] | None
    begun: bool = False
    deliveries: list[Delivery] = field(default_factory=list)
    reports: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def attempt(self) -> int:
        """The latest delivery that was joined to it, from 0."""
        return max((each.attempt for each in self.deliveries), default=0)

    @property
    def is_leased(self) -> bool:
        """Whether nobody else has been given the request, as far as is known here.

        By the clock: who stood still is told by the broker only when it renews.
        """
        return any(each.leased is None or each.leased.holds for each in self.deliveries)

    def is_repeated_by(self, delivery: Delivery) -> bool:
        """Whether a further delivery of its request is of a message that is here, or the first one of a copy.

        A later one of a copy was another worker's before, and so was one that comes with a delivery in between: the
        caller may listen to that one, which is dead. It is told anew, as the run it is now.
        """
        ours = any(each.leased is None or not each.leased.holds for each in self.deliveries)
        return delivery.attempt <= self.attempt + ours
