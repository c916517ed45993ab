"""Many LiteTopics: a consumer that spreads them over as many client ids as they need, on one connection.

The broker keeps, for each client, what has something to deliver. How much of that it keeps is a setting of the group
(`lite.sub.client.max.event.cnt`, 400 unless raised) that nobody tells the client, and what overflows trickles in over
minutes. The quota, which is told, gives it away: a group whose quota was raised was provisioned for many.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Self

from agentscope_rocketmq.rocketmq.lite import LiteConsumer
from agentscope_rocketmq.rocketmq.litetopic import LiteLost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterable

    from agentscope_rocketmq.rocketmq.connection import Connection
    from agentscope_rocketmq.rocketmq.litetopic import LiteBatch, Position
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage

__all__ = ["LitePool"]

logger = logging.getLogger(__name__)

# RocketMQ's default quota, and how many LiteTopics a client may have where nothing was raised: 400 events are kept for
# it, and even exactly 400 LiteTopics overflow (rocketmq-facts.md).
_DEFAULT_QUOTA = 2000
_CAUTIOUS = 300
# The whole set of a client is sent again and again: in pieces of this size that costs the broker little.
_MOST = 1000


class LitePool:
    """Reads any number of LiteTopics of one LITE topic; otherwise as `LiteConsumer`, which says what is not said here.

    Args:
        connection: The cluster.
        topic: The LITE topic, without namespace.
        group: Consumer group bound to it, without namespace; exclusive.
        connect_timeout: Seconds that `start` may take, and each further client's.
    """

    def __init__(self, connection: Connection, topic: str, group: str, *, connect_timeout: float = 10.0) -> None:
        self.topic = topic
        self.group = group
        self._connection = connection
        self._connect_timeout = connect_timeout
        self._unread: asyncio.Queue[LiteBatch | LiteLost | None] = asyncio.Queue()
        self._consumers: list[LiteConsumer] = []
        self._homes: dict[str, LiteConsumer] = {}
        self._counts: dict[LiteConsumer, int] = {}
        self._growing = asyncio.Lock()

    @property
    def clients(self) -> int:
        """How many client ids it uses."""
        return len(self._consumers)

    async def start(self) -> None:
        """Connect and begin to receive.

        Raises:
            BrokerError: As `LiteConsumer.start`.
        """
        await self._add()

    async def subscribe(self, lite_topics: Collection[str], *, at: Position | None = None, reading: int = 0) -> None:
        """Read these LiteTopics from there on, on as many client ids as they need.

        Args:
            lite_topics: Their names.
            at: As `LiteConsumer.subscribe`.
            reading: As `LiteConsumer.subscribe`.

        Raises:
            BrokerError: As `LiteConsumer.subscribe`, or a further client could not be started.
        """
        async with self._growing:
            spread = await self._spread(lite_topics)
        try:
            await asyncio.gather(
                *(consumer.subscribe(names, at=at, reading=reading) for consumer, names in spread.items())
            )
        except BaseException:
            for consumer, names in spread.items():
                self._forget(names, consumer)
            raise

    async def unsubscribe(self, lite_topics: Collection[str]) -> None:
        """Read these no longer. Unknown names are ignored.

        Raises:
            BrokerError: The broker was not told.
        """
        spread: dict[LiteConsumer, list[str]] = defaultdict(list)
        for name in lite_topics:
            if name in self._homes:
                spread[self._homes[name]].append(name)
        for consumer, names in spread.items():
            self._forget(names, consumer)
        await asyncio.gather(*(consumer.unsubscribe(names) for consumer, names in spread.items()))

    async def batches(self) -> AsyncIterator[LiteBatch | LiteLost]:
        """What comes, until the pool is closed. For one reader, who must ack for more to come."""
        while (item := await self._unread.get()) is not None:
            for consumer in self._consumers:
                consumer.wake()
            home = self._homes.get(item.lite_topic) if isinstance(item, LiteLost) else None
            if home is not None and item.lite_topic not in home.lite_topics:
                self._forget([item.lite_topic], home)
            yield item

    async def ack(self, messages: Iterable[ReceivedMessage], *, timeout: float = 30.0) -> None:  # noqa: ASYNC109
        """These are taken.

        Args:
            messages: Any number.
            timeout: Seconds to keep trying while the broker does not answer.
        """
        spread: dict[LiteConsumer, list[ReceivedMessage]] = defaultdict(list)
        for message in messages:
            # Of one that was left, the group's ack is as good from any client.
            spread[self._homes.get(message.lite_topic or "", self._consumers[0])].append(message)
        await asyncio.gather(*(consumer.ack(taken, timeout=timeout) for consumer, taken in spread.items()))

    async def aclose(self) -> None:
        """Drop all subscriptions and leave. Repeated calls are safe."""
        async with self._growing:
            results = await asyncio.gather(*(consumer.aclose() for consumer in self._consumers), return_exceptions=True)
        self._unread.put_nowait(None)
        for error in results:
            if error is not None:
                raise error

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _add(self) -> LiteConsumer:
        consumer = LiteConsumer(
            self._connection, self.topic, self.group, connect_timeout=self._connect_timeout, unread=self._unread
        )
        await consumer.start()
        self._consumers.append(consumer)
        self._counts[consumer] = 0
        return consumer

    async def _spread(self, names: Collection[str]) -> dict[LiteConsumer, list[str]]:
        """Who reads which of these: whoever does already, then those that have room, then new ones."""
        spread: dict[LiteConsumer, list[str]] = defaultdict(list)
        for name in names:
            home = self._homes.get(name)
            if home is None:
                home = next((one for one in self._consumers if self._counts[one] < _capacity(one)), None)
                if home is None:
                    home = await self._add()
                    logger.info("%d clients read the LiteTopics of %r", len(self._consumers), self.topic)
                self._homes[name] = home
                self._counts[home] += 1
            spread[home].append(name)
        return spread

    def _forget(self, names: Iterable[str], consumer: LiteConsumer) -> None:
        for name in names:
            if self._homes.get(name) is consumer:
                del self._homes[name]
                self._counts[consumer] -= 1


def _capacity(consumer: LiteConsumer) -> int:
    quota = consumer.quota
    return min(quota, _MOST) if quota > _DEFAULT_QUOTA else min(quota or _CAUTIOUS, _CAUTIOUS)
