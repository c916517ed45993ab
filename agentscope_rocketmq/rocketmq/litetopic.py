"""One LiteTopic as its reader knows it: where to begin, what came, what is missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentscope_rocketmq.rocketmq.protocol import definition

if TYPE_CHECKING:
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage

__all__ = ["LiteBatch", "LiteLost", "Position", "Subscription"]

# The broker is asked to look at a LiteTopic again when it has been quiet for so many seconds, and once more when it
# still is: while it looks, a message that arrives just then may be overlooked in the same way.
LOOK_AGAIN_AFTER = (0.5, 10.0)


@dataclass(frozen=True, slots=True)
class Position:
    """Where to begin in a LiteTopic. Use the class methods.

    A LiteTopic's offsets are 0, 1, 2, …; `committed` is the first offset not acked by the group.
    """

    option: str
    value: int

    @property
    def start(self) -> int | None:
        """The offset of the first message to come, where it is known before."""
        return self.value if self.option == "offset" else None

    @classmethod
    def offset(cls, value: int) -> Position:
        """At that offset."""
        if value < 0:
            raise ValueError(f"An offset is 0 or more, not {value}.")
        return cls("offset", value)

    @classmethod
    def first(cls) -> Position:
        """At the first message kept."""
        return cls("policy", int(definition.OffsetOption.MIN))

    @classmethod
    def last(cls) -> Position:
        """After the last message: only what is sent from now on."""
        return cls("policy", int(definition.OffsetOption.MAX))

    @classmethod
    def tail(cls, count: int) -> Position:
        """`count` messages before the committed offset; does nothing when nothing was ever acked."""
        if count < 0:
            raise ValueError(f"A tail is 0 or more messages, not {count}.")
        return cls("tail_n", count)


@dataclass(frozen=True, slots=True)
class LiteBatch:
    """Messages of one LiteTopic, in order of their offsets, none of them delivered before.

    The next batch of this LiteTopic comes when all of these are acked.

    Attributes:
        lite_topic: Its name.
        messages: The messages.
        reading: The number that was given when the LiteTopic was subscribed.
    """

    lite_topic: str
    messages: tuple[ReceivedMessage, ...]
    reading: int


@dataclass(frozen=True, slots=True)
class LiteLost:
    """Another consumer of the exclusive group took the LiteTopic over: nothing more comes here.

    Attributes:
        lite_topic: Its name.
        reading: The number that was given when the LiteTopic was subscribed.
    """

    lite_topic: str
    reading: int


@dataclass(slots=True)
class Subscription:
    """What is known of one subscribed LiteTopic.

    Attributes:
        reading: Number that tells one subscription of the LiteTopic from the next.
        start: Offset that was asked for; None where it is not known before the first message.
        newest: The message of the highest offset delivered; None before the first.
        unacked: Delivered and not given to `ack` yet, by offset: a redelivery brings a new receipt handle for the same
            message.
        doubtful: The connection was interrupted since: another consumer may have taken over without this one being
            told.
        sought: Offset from which the LiteTopic was read anew because its message did not come; None for none.
        quiet_since: Time of the event loop of its last subscription, batch or ack.
        looked_again: How often the broker was asked since then to look at it again.
    """

    reading: int = 0
    start: int | None = None
    newest: ReceivedMessage | None = None
    unacked: dict[int, ReceivedMessage] = field(default_factory=dict)
    doubtful: bool = False
    sought: int | None = None
    quiet_since: float = 0.0
    looked_again: int = 0

    def stir(self, now: float) -> None:
        """Something happened to it, at that time of the event loop."""
        self.quiet_since = now
        self.looked_again = 0

    def may_be_overlooked(self, now: float) -> bool:
        """Whether the broker should be asked to look at it again. What is out un-acked makes it look by itself."""
        if self.unacked or self.looked_again >= len(LOOK_AGAIN_AFTER):
            return False
        return now - self.quiet_since >= LOOK_AGAIN_AFTER[self.looked_again]

    @property
    def due(self) -> int | None:
        """Offset that comes next, where that is known."""
        return self.start if self.newest is None else self.newest.offset + 1

    def disown(self) -> None:
        """What is un-acked is somebody else's now, or will be read again: its ack would commit it."""
        for message in self.unacked.values():
            message.receipt_handle = ""

    def lacks_what_is_before(self, message: ReceivedMessage) -> bool:
        """Whether messages before this one never came here, and were not looked for yet."""
        if self.newest is not None and message.offset <= self.newest.offset:
            return False
        return self.due not in (None, self.sought) and message.offset > (self.due or 0)

    def take(self, message: ReceivedMessage) -> bool:
        """Whether this message is new; notes it, or its new receipt handle."""
        newest = self.newest
        if newest is not None and message.offset <= newest.offset and message.store_time <= newest.store_time:
            held = self.unacked.get(message.offset)
            if held is not None:
                held.receipt_handle = message.receipt_handle
            return False
        if newest is not None and message.offset <= newest.offset:
            # Older offset, newer message: the LiteTopic expired and began anew.
            self.unacked.clear()
        self.newest = message
        self.unacked[message.offset] = message
        return True
