"""A consumer group's share of a NORMAL (or PRIORITY) topic: each message leased to one consumer until it is acked."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Self

from agentscope_rocketmq.errors import BrokerError
from agentscope_rocketmq.rocketmq.client import CALL_TIMEOUT, CLOSE_TIMEOUT, Client, retried, seconds_left
from agentscope_rocketmq.rocketmq.connection import user_agent
from agentscope_rocketmq.rocketmq.lifecycle import Closing
from agentscope_rocketmq.rocketmq.polling import LONG_POLL, Poller
from agentscope_rocketmq.rocketmq.protocol import definition, service
from agentscope_rocketmq.rocketmq.status import check

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agentscope_rocketmq.rocketmq.connection import Connection
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage
    from agentscope_rocketmq.rocketmq.rate import RateLimit

__all__ = ["GroupConsumer", "LeasedMessage"]

logger = logging.getLogger(__name__)

# What a stopping consumer still gets goes back to the others after this (the broker's minimum is a second).
RELEASE_AFTER = 1.0


class LeasedMessage:
    """A message and the lease on it: nobody else of the group gets it while the lease holds.

    The lease is renewed every third of its length until `GroupConsumer.ack` or `release`.

    Attributes:
        message: What was received.
        consumer: Who received it, and acks and releases it.
        lost: Set when the lease could not be renewed in time: another consumer may have the message by now.
    """

    __slots__ = ("_handle_lock", "_parked", "_renewal", "_valid_until", "consumer", "lost", "message")

    def __init__(self, message: ReceivedMessage, consumer: GroupConsumer, *, lease: float) -> None:
        self.message = message
        self.consumer = consumer
        self.lost = asyncio.Event()
        self._valid_until = asyncio.get_running_loop().time() + lease
        # A renewal replaces the receipt handle; an ack with the old one is refused.
        self._handle_lock = asyncio.Lock()
        self._renewal: asyncio.Task[None] | None = None
        self._parked = False

    @property
    def holds(self) -> bool:
        """Whether nobody else can have the message: the lease is not lost, and a process that stood still had time."""
        return not self.lost.is_set() and asyncio.get_running_loop().time() < self._valid_until


class GroupConsumer:
    """Takes messages of one topic in one consumer group, at most `concurrency` at a time.

    A full consumer does not ask the broker for more: the backlog stays there for others. Delivery is at least once:
    a message whose lease runs out, or whose ack is lost, is delivered again, with a higher `attempt`.

    Args:
        connection: The cluster.
        topic: Topic, without namespace.
        group: Consumer group, without namespace; all its consumers share the messages.
        concurrency: Messages that may be leased at a time.
        lease: Seconds until another consumer gets a message that is neither renewed nor acked; at least 10.
        rate: How many messages a second it may take, perhaps together with other consumers; None sets no limit.
        connect_timeout: Seconds that `start` may take.
    """

    def __init__(
        self,
        connection: Connection,
        topic: str,
        group: str,
        *,
        concurrency: int = 16,
        lease: float = 30.0,
        rate: RateLimit | None = None,
        connect_timeout: float = 10.0,
    ) -> None:
        self.topic = topic
        self.group = group
        self._connection = connection
        self._lease = lease
        self._connect_timeout = connect_timeout
        self._rate = rate
        self._free = self._concurrency = concurrency
        self._parked = 0
        self._leased: set[LeasedMessage] = set()
        # Bounded by the reservations: it never holds more than `concurrency` messages.
        self._arrived: asyncio.Queue[LeasedMessage | None] = asyncio.Queue()
        self._late: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._stop = Closing(limit=LONG_POLL + 1 + 2 * CLOSE_TIMEOUT, name=f"consumer[{topic}].stop")
        self._closing = Closing(limit=LONG_POLL + 1 + 6 * CLOSE_TIMEOUT, name=f"consumer[{topic}].close")
        self._client = Client(
            connection,
            _settings(connection, topic, group),
            group=group,
            on_established=self._on_established,
        )
        self._poller = Poller(
            self._client,
            topic=topic,
            group=group,
            invisible=lease,
            reserve=self._reserve,
            deliver=self._deliver,
        )

    async def start(self) -> None:
        """Connect and begin to receive.

        Raises:
            BrokerError: Nobody answers, or topic, group or credentials are refused (typed subclasses).
        """
        deadline = asyncio.get_running_loop().time() + self._connect_timeout
        await self._client.start(timeout=self._connect_timeout)
        try:
            await self._poller.start(timeout=seconds_left(deadline))
        except BaseException:
            await self._client.aclose()
            raise

    async def messages(self) -> AsyncIterator[LeasedMessage]:
        """The messages as they come, until the consumer is stopped. For one reader."""
        while (leased := await self._arrived.get()) is not None:
            yield leased

    async def ack(self, leased: LeasedMessage, *, timeout: float = 30.0) -> bool:  # noqa: ASYNC109
        """Done: the message is not delivered again.

        Args:
            leased: The message.
            timeout: Seconds to keep trying while the broker does not answer.

        Returns:
            Whether the broker took it. False (lease lost, broker away): the message will come again to somebody.
            False, too, for a message that was acked or released before.
        """
        return await self._settle(leased, timeout=timeout, ack=True)

    async def release(self, leased: LeasedMessage, *, after: float = RELEASE_AFTER) -> bool:
        """Give it back: it is delivered again, to anybody of the group, in `after` seconds (at least 1).

        Returns:
            Whether the broker took it. False: it is delivered again when its lease is over.
        """
        return await self._settle(leased, timeout=CLOSE_TIMEOUT, ack=False, after=after)

    def park(self, leased: LeasedMessage) -> None:
        """Keep the lease but let another message be taken meanwhile: for who waits for something else than work here.

        As many as may be leased may be parked beside them; beyond that it does nothing, and no more is taken.
        """
        if leased in self._leased and not leased._parked and self._parked < self._concurrency:  # noqa: SLF001
            leased._parked = True  # noqa: SLF001
            self._parked += 1
            self._free += 1
            self._poller.wake()

    async def _settle(self, leased: LeasedMessage, *, timeout: float, ack: bool, after: float = 0) -> bool:  # noqa: ASYNC109
        message = leased.message
        if leased not in self._leased:
            return False

        async def settle(seconds: float) -> None:
            if ack:
                await self._ack_once(message, min(CALL_TIMEOUT, seconds))
            else:
                await self._change_invisible(message, after, timeout=min(CALL_TIMEOUT, seconds))

        deadline = asyncio.get_running_loop().time() + timeout
        lock = leased._handle_lock  # noqa: SLF001  (one room: the lease is this class's own)
        try:
            # A renewal under way may take its time.
            async with asyncio.timeout_at(deadline):
                await lock.acquire()
            try:
                await retried(settle, timeout=seconds_left(deadline))
            finally:
                lock.release()
        except BrokerError as error:
            logger.warning("%s It will be delivered again.", error)
            return False
        except TimeoutError:
            logger.warning("Message %s could not be settled within %g s and comes again", message.message_id, timeout)
            return False
        else:
            return True
        finally:
            self._forget(leased)

    def _forget(self, leased: LeasedMessage) -> None:
        if leased not in self._leased:
            return
        self._leased.discard(leased)
        if leased._renewal is not None:  # noqa: SLF001
            leased._renewal.cancel()  # noqa: SLF001
        if leased._parked:  # noqa: SLF001
            self._parked -= 1
        else:
            self._free += 1
            self._poller.wake()

    async def stop(self) -> None:
        """Take no more messages. Those leased stay leased and can be acked; what still arrives is given back.

        Ends when the polls in flight have ended, after at most some 5 s; `messages()` ends then.
        """
        self._stopping = True
        await self._stop(self._end_polls)

    async def _end_polls(self) -> None:
        try:
            await self._poller.aclose(wait=True)
            if self._late:
                await asyncio.gather(*self._late, return_exceptions=True)
        finally:
            self._arrived.put_nowait(None)

    async def aclose(self) -> None:
        """Stop, give back what is still leased, and leave. Repeated calls are safe."""
        await self._closing(self._aclose)

    async def _aclose(self) -> None:
        try:
            await self.stop()
            if self._client.established:
                await asyncio.gather(*(self.release(leased) for leased in list(self._leased)), return_exceptions=True)
        finally:
            for leased in list(self._leased):
                self._forget(leased)
            await self._client.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _on_established(self) -> None:
        self._poller.renew()

    def _reserve(self, sharing: int) -> int:
        count = 0 if self._stopping else -(-self._free // sharing)
        if self._rate is not None:
            count = min(count, -(-self._rate.room() // sharing))
        self._free -= count
        return count

    def _deliver(self, reserved: int, messages: list[ReceivedMessage]) -> None:
        self._free += reserved - len(messages)
        if self._rate is not None:
            self._rate.charge(len(messages))
        for message in messages:
            leased = LeasedMessage(message, self, lease=self._lease)
            self._leased.add(leased)
            if self._stopping:
                self._late.add(asyncio.create_task(self._give_back(leased), name="rocketmq.give-back"))
                continue
            leased._renewal = asyncio.create_task(  # noqa: SLF001
                self._renew(leased), name=f"rocketmq[{self._client.client_id}].renew"
            )
            self._arrived.put_nowait(leased)

    async def _give_back(self, leased: LeasedMessage) -> None:
        await self.release(leased)

    async def _renew(self, leased: LeasedMessage) -> None:
        loop = asyncio.get_running_loop()
        wait = self._lease / 3
        while True:
            await asyncio.sleep(wait)
            try:
                async with leased._handle_lock:  # noqa: SLF001
                    asked = loop.time()
                    await self._change_invisible(leased.message, self._lease)
                leased._valid_until = asked + self._lease  # noqa: SLF001  (one room)
                wait = self._lease / 3
            except BrokerError as error:
                if not error.transient or not leased.holds:
                    logger.warning("The lease on message %s is lost: %s", leased.message.message_id, error)
                    leased.lost.set()
                    return
                logger.warning("%s Trying again.", error)
                wait = 1.0

    async def _ack_once(self, message: ReceivedMessage, timeout: float) -> None:  # noqa: ASYNC109
        request = service.AckMessageRequest(
            group=self._connection.resource(self.group),
            topic=self._connection.resource(self.topic),
            entries=[service.AckMessageEntry(message_id=message.message_id, receipt_handle=message.receipt_handle)],
        )
        doing = f"Acking message {message.message_id} of topic {self.topic!r}"
        answer = await self._client.call("AckMessage", request, doing=doing, timeout=timeout)
        check(answer.entries[0].status if answer.entries else answer.status, doing, known=True)

    async def _change_invisible(
        self,
        message: ReceivedMessage,
        seconds: float,
        *,
        timeout: float = CALL_TIMEOUT,  # noqa: ASYNC109
    ) -> None:
        request = service.ChangeInvisibleDurationRequest(
            group=self._connection.resource(self.group),
            topic=self._connection.resource(self.topic),
            receipt_handle=message.receipt_handle,
            message_id=message.message_id,
        )
        request.invisible_duration.FromMilliseconds(int(seconds * 1000))
        doing = f"Renewing the lease on message {message.message_id} of topic {self.topic!r}"
        answer = await self._client.call("ChangeInvisibleDuration", request, doing=doing, timeout=timeout)
        check(answer.status, doing, known=True)
        message.receipt_handle = answer.receipt_handle or message.receipt_handle


def _settings(connection: Connection, topic: str, group: str) -> Any:
    settings = definition.Settings(
        client_type=definition.ClientType.PUSH_CONSUMER,
        access_point=connection.endpoints_message(),
        user_agent=user_agent(),
    )
    settings.request_timeout.FromMilliseconds(int(CALL_TIMEOUT * 1000))
    settings.subscription.group.CopyFrom(connection.resource(group))
    settings.subscription.subscriptions.add(
        topic=connection.resource(topic),
        expression=definition.FilterExpression(type=definition.FilterType.TAG, expression="*"),
    )
    return settings
