"""Long polls of one client: several in flight, staggered, never cancelled.

A message that arrives just while a poll is being registered on the broker is not announced to it and waits for the
next poll to look (rocketmq-facts.md, "Long polling loses wake-ups"). So a new poll starts at least every second: in
rest about five are in flight, and a lost wake-up costs at most that second. A poll that brought messages is
followed by another at once.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from datetime import UTC
from typing import TYPE_CHECKING

from agentscope_rocketmq.errors import BrokerError
from agentscope_rocketmq.rocketmq.client import CALL_TIMEOUT, backoff
from agentscope_rocketmq.rocketmq.message import received
from agentscope_rocketmq.rocketmq.protocol import definition, service
from agentscope_rocketmq.rocketmq.status import check

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentscope_rocketmq.rocketmq.client import Client
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage

__all__ = ["BATCH_SIZE", "Poller"]

logger = logging.getLogger(__name__)

# What the broker hands out at most, org.apache.rocketmq.broker.processor.PopLiteMessageProcessor#preCheck.
BATCH_SIZE = 32
# The proxy's minimum (grpcClientConsumerMinLongPollingTimeoutMillis).
LONG_POLL = 5.0
STAGGER = 1.0
MOST_IN_FLIGHT = 8
# Route of the topic: which brokers to poll.
ROUTE_REFRESH = 30.0


class Poller:
    """Polls one topic (or one LITE topic) for a consumer group, on each of its brokers.

    Args:
        client: The consumer's client.
        topic: Topic, without namespace.
        group: Consumer group, without namespace.
        invisible: Seconds that a received message stays invisible to others.
        reserve: Called before a poll with how many polls share what is free; returns how many messages the poll may
            bring, 0 to not poll now.
        deliver: Called with what was reserved and what came; must not block.
        on_recovered: Called when a poll succeeds after failures; None for nothing.
    """

    def __init__(
        self,
        client: Client,
        *,
        topic: str,
        group: str,
        invisible: float,
        reserve: Callable[[int], int],
        deliver: Callable[[int, list[ReceivedMessage]], None],
        on_recovered: Callable[[], None] | None = None,
    ) -> None:
        self._client = client
        self._topic = topic
        self._group = group
        self._invisible = invisible
        self._reserve = reserve
        self._deliver = deliver
        self._on_recovered = on_recovered
        self._brokers: list[str] = []
        self._polls: dict[str, set[asyncio.Task[None]]] = {}
        self._overdue: set[asyncio.Task[None]] = set()
        self._started: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._stopping = False
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, *, timeout: float) -> None:  # noqa: ASYNC109
        """Look up the topic's brokers and begin.

        Raises:
            BrokerError: The topic is unknown, the group is not allowed, …: whatever the first look-up says.
        """
        await self._refresh_route(timeout)
        name = f"rocketmq[{self._client.client_id}]"
        self._tasks = [
            asyncio.create_task(self._pace_loop(), name=f"{name}.pace"),
            asyncio.create_task(self._route_loop(), name=f"{name}.route"),
        ]

    def wake(self) -> None:
        """Something is free again: poll now rather than at the next second."""
        self._wake.set()

    def renew(self) -> None:
        """Poll anew: the client is at another proxy or connection, and polls on the old one may never be answered.

        They go on, and deliver what they still bring, but take no place.
        """
        for polls in self._polls.values():
            self._overdue |= polls
            polls.clear()
        self.wake()

    def stop(self) -> None:
        """Start no more polls; those in flight go on."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()

    async def aclose(self, *, wait: bool) -> None:
        """Stop, and end the polls in flight.

        Args:
            wait: Let them end by themselves (at most 6 s) and deliver what they still bring. A cancelled poll stays
                on the broker and swallows the next messages for seconds; cancel only when there is nothing that it
                could be given.
        """
        self.stop()
        polls = [*self._overdue, *(poll for tasks in self._polls.values() for poll in tasks)]
        try:
            if wait and polls:
                # What takes longer has no connection to a broker that could give it anything.
                await asyncio.wait(polls, timeout=LONG_POLL + 1)
        finally:
            for poll in polls:
                poll.cancel()
        await asyncio.gather(*self._tasks, *polls, return_exceptions=True)

    async def _pace_loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            now = loop.time()
            for broker in self._brokers:
                if now - self._started.get(broker, -STAGGER) >= STAGGER or not self._polls.get(broker):
                    self._start_poll(broker)
            try:
                async with asyncio.timeout(STAGGER / 4):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _start_poll(self, broker: str) -> None:
        polls = self._polls.setdefault(broker, set())
        if self._stopping or len(polls) >= MOST_IN_FLIGHT:
            return
        reserved = self._reserve(max(1, round(LONG_POLL / STAGGER) * len(self._brokers) - len(polls)))
        if reserved <= 0:
            return
        self._started[broker] = asyncio.get_running_loop().time()
        task = asyncio.create_task(
            self._poll(broker, min(reserved, BATCH_SIZE), reserved), name=f"rocketmq[{self._client.client_id}].poll"
        )
        polls.add(task)
        task.add_done_callback(lambda done: self._ended(broker, done))

    def _ended(self, broker: str, poll: asyncio.Task[None]) -> None:
        self._polls[broker].discard(poll)
        self._overdue.discard(poll)
        if not poll.cancelled() and poll.exception() is not None:
            logger.error("A poll of topic %r ended unexpectedly", self._topic, exc_info=poll.exception())

    async def _poll(self, broker: str, batch_size: int, reserved: int) -> None:
        messages: list[ReceivedMessage] = []
        try:
            messages = await self._receive(broker, batch_size)
            if self._failures.pop(broker, 0) and self._on_recovered is not None:
                self._on_recovered()
        except BrokerError as error:
            failures = self._failures[broker] = self._failures.get(broker, 0) + 1
            logger.log(logging.WARNING if failures == 1 else logging.DEBUG, "%s", error)
            await asyncio.sleep(backoff(failures, first=0.2))
        finally:
            self._deliver(reserved, messages)
        if messages and broker in self._brokers:
            # Its place is free although this task has not ended yet.
            self._polls[broker].discard(asyncio.current_task())
            self._start_poll(broker)

    async def _receive(self, broker: str, batch_size: int) -> list[ReceivedMessage]:
        connection = self._client.connection
        request = service.ReceiveMessageRequest(
            group=connection.resource(self._group),
            # Queue -1 is any queue of that broker.
            message_queue=definition.MessageQueue(
                topic=connection.resource(self._topic), id=-1, broker=definition.Broker(name=broker)
            ),
            filter_expression=definition.FilterExpression(type=definition.FilterType.TAG, expression="*"),
            batch_size=batch_size,
            attempt_id=uuid.uuid4().hex,
        )
        request.invisible_duration.FromMilliseconds(int(self._invisible * 1000))
        request.long_polling_timeout.FromMilliseconds(int(LONG_POLL * 1000))
        doing = f"Receiving from topic {self._topic!r} in group {self._group!r}"
        messages: list[ReceivedMessage] = []
        handed_out = None
        for answer in await self._client.stream(
            "ReceiveMessage", request, doing=doing, timeout=LONG_POLL + CALL_TIMEOUT
        ):
            kind = answer.WhichOneof("content")
            if kind == "message":
                messages.append(received(answer.message))
            elif kind == "delivery_timestamp":
                handed_out = answer.delivery_timestamp.ToDatetime(UTC)
            elif kind == "status" and answer.status.code != definition.Code.MESSAGE_NOT_FOUND:
                check(answer.status, doing, known=True)
        if handed_out is not None:
            for message in messages:
                message.waited = max(0.0, (handed_out - message.store_time).total_seconds())
        return messages

    async def _route_loop(self) -> None:
        while True:
            await asyncio.sleep(ROUTE_REFRESH)
            try:
                await self._refresh_route(CALL_TIMEOUT)
            except BrokerError as error:
                # The brokers known so far stay in use.
                logger.warning("%s", error)

    async def _refresh_route(self, timeout: float) -> None:  # noqa: ASYNC109
        connection = self._client.connection
        request = service.QueryRouteRequest(
            topic=connection.resource(self._topic), endpoints=connection.endpoints_message()
        )
        doing = f"Looking up topic {self._topic!r}"
        answer = await self._client.call("QueryRoute", request, doing=doing, timeout=timeout)
        check(answer.status, doing, known=bool(self._brokers))
        readable = (definition.Permission.READ, definition.Permission.READ_WRITE)
        brokers = sorted({queue.broker.name for queue in answer.message_queues if queue.permission in readable})
        if brokers:
            self._brokers = brokers
