"""LiteTopics: one consumer reads many of them, each in order, from where it says.

What the broker does (rocketmq-facts.md, measured on 5.5.0): it hands out one batch of a LiteTopic at a time and blocks
that LiteTopic for the group until all of the batch is acked, its invisible time is over, or somebody seeks. In an
exclusive group a subscription with an offset option takes the LiteTopic over, un-acked batch or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Self, TypeVar

from agentscope_rocketmq.errors import BrokerError, BrokerUnreachable, ClosedError, IllegalRequest, QuotaExceeded
from agentscope_rocketmq.rocketmq.changes import Changes
from agentscope_rocketmq.rocketmq.client import CALL_TIMEOUT, CLOSE_TIMEOUT, Client, retried, seconds_left
from agentscope_rocketmq.rocketmq.lifecycle import Closing
from agentscope_rocketmq.rocketmq.litecalls import LiteCalls, lite_settings
from agentscope_rocketmq.rocketmq.litetopic import LiteBatch, LiteLost, Position, Subscription
from agentscope_rocketmq.rocketmq.message import LITE_TOPIC_NAME
from agentscope_rocketmq.rocketmq.polling import BATCH_SIZE, Poller

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterable

    from agentscope_rocketmq.rocketmq.connection import Connection
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage

__all__ = ["LiteBatch", "LiteConsumer", "LiteLost", "Position"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# A batch handed to a reader that died, or to a poll whose connection broke, is handed out again after this. The least
# that a proxy accepts (minInvisibleTimeMillsForRecv): a broken connection costs a stream at most that and the 5 s that
# polls live. Whoever holds a batch for longer gets it again, and does not see it; a take-over seeks and does not wait.
INVISIBLE = 10.0
# The client sends its whole set anew this often. The broker forgets sets when it restarts; and a proxy that notices
# late that a client's connection broke drops the client's set, although the client has subscribed anew over another
# connection since (ClientActivity#handleGrpcCancel). Mostly it notices within a moment: hence once more soon after.
REFRESH_INTERVAL = 10.0
REFRESH_AGAIN = 1.0
# The broker drops the announcement of a message that it hits upon twice in one poll, or while an ack is being worked
# on (PopLiteMessageProcessor#popByClientId, RocketMQ issue 11191): the message lies there until another one comes.
# Subscribing a LiteTopic anew makes the broker look into it. This often, those are looked for that were stirred and
# have become quiet since.
LOOK_INTERVAL = 1.0
# A call with this many names took 6 ms (rocketmq-facts.md).
NAMES_A_CALL = 200
# Batches received but not taken by the reader yet; beyond it the consumer does not poll.
UNREAD_BATCHES = 64


class LiteConsumer:
    """Reads LiteTopics of one LITE topic under one client id, for a group that is bound to that topic.

    Within a LiteTopic messages come in order and, while this consumer holds it, once each: redeliveries of what was
    delivered already are recognised by offset and store time and not shown again. Across LiteTopics there is no order.

    Args:
        connection: The cluster.
        topic: The LITE topic, without namespace.
        group: Consumer group bound to it, without namespace; exclusive, since what is missing before a message is
            taken for the doing of an owner before or after this one.
        connect_timeout: Seconds that `start` may take.
        unread: Where to put what comes, instead of `batches`: several consumers may share it. None for a queue of
            its own.
    """

    def __init__(
        self,
        connection: Connection,
        topic: str,
        group: str,
        *,
        connect_timeout: float = 10.0,
        unread: asyncio.Queue[LiteBatch | LiteLost | None] | None = None,
    ) -> None:
        self.topic = topic
        self.group = group
        self._connection = connection
        self._connect_timeout = connect_timeout
        self._subscriptions: dict[str, Subscription] = {}
        self._unread: asyncio.Queue[LiteBatch | LiteLost | None] = asyncio.Queue() if unread is None else unread
        self._shares = unread is not None
        self._refresh_now = asyncio.Event()
        self._changes = Changes()
        self._refreshing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = Closing(limit=4 * CLOSE_TIMEOUT, name=f"lite[{topic}].close")
        self._client = Client(
            connection,
            lite_settings(connection, topic, group),
            group=group,
            on_command=self._on_command,
            on_established=self._on_established,
        )
        self._calls = LiteCalls(self._client, topic=topic, group=group)
        self._poller = Poller(
            self._client,
            topic=topic,
            group=group,
            invisible=INVISIBLE,
            reserve=lambda _sharing: 0 if self._unread.qsize() >= UNREAD_BATCHES else BATCH_SIZE,
            deliver=self._deliver,
            on_recovered=self._after_interruption,
        )

    @property
    def lite_topics(self) -> frozenset[str]:
        """The LiteTopics subscribed here."""
        return frozenset(self._subscriptions)

    @property
    def quota(self) -> int:
        """How many LiteTopics the server lets one client subscribe (`lite.sub.client.quota` of the group)."""
        return int(self._client.server_settings.subscription.lite_subscription_quota)

    async def start(self) -> None:
        """Connect and begin to receive.

        Raises:
            BrokerError: Nobody answers, or topic, group or credentials are refused: `GroupNotBound` when the group
                is bound to another topic or none, …
        """
        deadline = asyncio.get_running_loop().time() + self._connect_timeout
        await self._client.start(timeout=self._connect_timeout)
        try:
            # An empty set asks the broker whether this group may read this topic at all.
            await self._calls.sync("COMPLETE_ADD", (), timeout=seconds_left(deadline))
            self._calls.accepted = True
            self._refresh_now.clear()
            await self._poller.start(timeout=seconds_left(deadline))
        except BaseException:
            await self._client.aclose()
            raise
        self._refreshing = asyncio.create_task(
            self._refresh_loop(), name=f"rocketmq[{self._client.client_id}].subscriptions"
        )

    async def subscribe(
        self,
        lite_topics: Collection[str],
        *,
        at: Position | None = None,
        reading: int = 0,
        timeout: float = 30.0,  # noqa: ASYNC109
    ) -> None:
        """Read these LiteTopics from now on, in one call for up to 200 of them.

        In an exclusive group they are taken from whoever reads them; that consumer gets a `LiteLost`.

        Args:
            lite_topics: Their names. Those subscribed already are read anew from `at`.
            at: Where to begin. None goes on at the group's committed offset, after a batch that another consumer
                left un-acked only when its invisible time (10 s) is over: give a position to take over at once.
            reading: Number that comes back with all that is read, to tell it from what an earlier subscription of
                the same LiteTopic still brings.
            timeout: Seconds to keep trying while the broker does not answer.

        Raises:
            IllegalRequest: A name that is not 1-64 letters, digits, '_' or '-'.
            QuotaExceeded: More than the server allows one client.
            BrokerError: As the broker says.
        """
        for name in lite_topics:
            if not LITE_TOPIC_NAME.fullmatch(name):
                raise IllegalRequest(f"{name!r} is not a LiteTopic name: use 1-64 letters, digits, '_' or '-'.")
        wanted = len(self._subscriptions.keys() | set(lite_topics))
        if self.quota and wanted > self.quota:
            raise QuotaExceeded(
                f"Subscribing {len(lite_topics)} LiteTopics of {self.topic!r} failed: {wanted} are more than the "
                f"{self.quota} that group {self.group!r} allows one client. Raise its lite.sub.client.quota "
                "(`agentscope-rocketmq provision` does)."
            )
        # A seek on one's own subscription would make the broker tell this very client that it lost the LiteTopic, and
        # drop it from the client's set (LiteSubscriptionRegistryImpl#excludeClientByLmqName): leave it first.
        deadline = asyncio.get_running_loop().time() + timeout
        async with self._within(deadline, self._changes.of(lite_topics)):
            leaving = [name for name in lite_topics if name in self._subscriptions]
            for name in leaving:
                self._subscriptions[name].disown()
            await retried(lambda seconds: self._leave(leaving, timeout=seconds), timeout=seconds_left(deadline))
            for names in _chunks(lite_topics, NAMES_A_CALL):
                # Known before the call: the first message may come before the call returns.
                now = asyncio.get_running_loop().time()
                for name in names:
                    start = None if at is None else at.start
                    self._subscriptions[name] = Subscription(reading=reading, start=start, quiet_since=now)
                try:
                    await self._join(names, at, seconds_left(deadline))
                except BaseException:
                    for name in names:
                        self._subscriptions.pop(name, None)
                    raise

    async def _join(self, names: Collection[str], at: Position | None, timeout: float) -> None:  # noqa: ASYNC109
        tried = False

        async def join_once(seconds: float) -> None:
            nonlocal tried
            deadline = asyncio.get_running_loop().time() + seconds
            if tried:
                # The last try may have subscribed them although its answer did not come.
                await self._calls.sync("PARTIAL_REMOVE", names, timeout=min(CALL_TIMEOUT, seconds))
            tried = True
            await self._calls.sync("PARTIAL_ADD", names, at, timeout=min(CALL_TIMEOUT, seconds_left(deadline)))

        await retried(join_once, timeout=timeout)

    async def unsubscribe(self, lite_topics: Collection[str]) -> None:
        """Read these no longer. What is un-acked goes to the group's next reader. Unknown names are ignored.

        Raises:
            BrokerError: The broker was not told. It is with the next refresh of the whole set, within 10 s.
        """
        deadline = asyncio.get_running_loop().time() + CLOSE_TIMEOUT
        # Known before the call: whatever becomes of it, the next refresh is without them.
        left = {name: self._subscriptions.pop(name) for name in lite_topics if name in self._subscriptions}
        async with self._within(deadline, self._changes.of(left)):
            await self._leave(left, timeout=seconds_left(deadline))
        for subscription in left.values():
            self._give_back_unacked(subscription)

    async def _leave(self, lite_topics: Collection[str], *, timeout: float) -> None:  # noqa: ASYNC109
        deadline = asyncio.get_running_loop().time() + timeout
        for name in lite_topics:
            self._subscriptions.pop(name, None)
        for names in _chunks(lite_topics, NAMES_A_CALL):
            await self._calls.sync("PARTIAL_REMOVE", names, timeout=min(CALL_TIMEOUT, seconds_left(deadline)))

    @contextlib.asynccontextmanager
    async def _within(
        self, deadline: float, change: contextlib.AbstractAsyncContextManager[None]
    ) -> AsyncIterator[None]:
        """A change of the set of subscriptions, when those before it are through."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout_at(deadline):
                    await stack.enter_async_context(change)
            except TimeoutError:
                raise BrokerUnreachable(
                    f"Subscribing LiteTopics of {self.topic!r} in group {self.group!r} failed: earlier calls are still "
                    "without an answer. Check that the RocketMQ proxy runs.",
                    transient=True,
                ) from None
            yield

    async def seek(self, lite_topic: str, at: Position) -> None:
        """Read a LiteTopic anew from there; the same as subscribing it again."""
        await self.subscribe([lite_topic], at=at)

    async def batches(self) -> AsyncIterator[LiteBatch | LiteLost]:
        """What comes, until the consumer is closed. For one reader, who must ack for more to come."""
        while (item := await self._unread.get()) is not None:
            self.wake()
            yield item

    def wake(self) -> None:
        """There is room for more."""
        self._poller.wake()

    async def ack(self, messages: Iterable[ReceivedMessage], *, timeout: float = 30.0) -> None:  # noqa: ASYNC109
        """These are taken: the group's committed offset moves behind them once all before them are acked too.

        An ack that comes late (the LiteTopic was taken over, the message handed out again) changes nothing and is no
        error.

        Args:
            messages: Any number, of any of this consumer's LiteTopics.
            timeout: Seconds to keep trying while the broker does not answer; then the messages are handed out again.
        """
        taken = list(messages)
        for message in taken:
            # When the ack does not get through, the message comes again and is acked then.
            subscription = self._subscriptions.get(message.lite_topic or "")
            if subscription is not None and subscription.unacked.get(message.offset) is message:
                del subscription.unacked[message.offset]
        deadline = asyncio.get_running_loop().time() + timeout
        for chunk in _chunks(taken, NAMES_A_CALL):
            try:
                await self._ack_all(chunk, seconds_left(deadline))
            except BrokerError as error:
                logger.warning("%s They will be delivered again.", error)
        for name in {message.lite_topic or "" for message in taken}:
            if (subscription := self._subscriptions.get(name)) is not None:
                subscription.stir(asyncio.get_running_loop().time())

    async def _ack_all(self, messages: list[ReceivedMessage], timeout: float) -> None:  # noqa: ASYNC109
        async def ack_once(seconds: float) -> None:
            # Not those of LiteTopics lost meanwhile: they are the new owner's.
            messages[:] = [message for message in messages if message.receipt_handle]
            failure = await self._calls.ack(messages, min(CALL_TIMEOUT, seconds)) if messages else None
            if failure is not None:
                raise failure

        await retried(ack_once, timeout=timeout)

    async def aclose(self) -> None:
        """Drop all subscriptions and leave. Repeated calls are safe."""
        await self._closing(self._aclose)

    async def _aclose(self) -> None:
        deadline = asyncio.get_running_loop().time() + CLOSE_TIMEOUT
        self._poller.stop()
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        left, self._subscriptions = self._subscriptions, {}
        try:
            if self._client.established:
                try:
                    async with self._within(deadline, self._changes.of_all()):
                        await self._calls.sync("COMPLETE_REMOVE", (), timeout=seconds_left(deadline))
                except (BrokerError, ClosedError) as error:
                    logger.debug("%s", error)
                for subscription in left.values():
                    self._give_back_unacked(subscription)
                # What was given back before is not others' yet, either.
                if self._tasks:
                    await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            # Without subscriptions there is nothing that the polls in flight could be given, so they may be cut.
            await self._poller.aclose(wait=False)
            await self._client.aclose()
            if not self._shares:
                self._unread.put_nowait(None)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _deliver(self, _reserved: int, messages: list[ReceivedMessage]) -> None:
        by_topic: dict[str, list[ReceivedMessage]] = defaultdict(list)
        for message in messages:
            by_topic[message.lite_topic or ""].append(message)
        for name, batch in by_topic.items():
            subscription = self._subscriptions.get(name)
            batch.sort(key=lambda message: message.offset)
            if subscription is None:
                # Left or lost meanwhile: its next reader gets them.
                self._give_back(batch[0])
                continue
            if subscription.lacks_what_is_before(batch[0]):
                self._mend(name, subscription, batch[0])
                continue
            subscription.stir(asyncio.get_running_loop().time())
            fresh = [message for message in batch if subscription.take(message)]
            if fresh:
                self._unread.put_nowait(LiteBatch(name, tuple(fresh), subscription.reading))
            acked = [message for message in batch if message.offset not in subscription.unacked]
            if acked:
                # Their ack got lost on the way; the LiteTopic stays blocked until it is repeated.
                self._background(self.ack(acked))

    def _mend(self, name: str, subscription: Subscription, message: ReceivedMessage) -> None:
        """Somebody else got what is missing before this message."""
        if subscription.doubtful:
            # It took the LiteTopic over while this consumer could not be told, and the newest owner is the owner.
            self._lose(name, message)
        else:
            # Polls of its former owner did, before that one was told.
            self._background(self._read_again(name, subscription, message))

    async def _read_again(self, name: str, subscription: Subscription, message: ReceivedMessage) -> None:
        async with self._changes.of([name]):
            due = subscription.due
            if due is None or not subscription.lacks_what_is_before(message):
                return
            try:
                await self._calls.sync("PARTIAL_REMOVE", [name])
                # Told meanwhile that another consumer has it?
                if self._subscriptions.get(name) is subscription:
                    # What is not there any more is looked for once.
                    subscription.sought = due
                    await self._join([name], Position.offset(due), CALL_TIMEOUT)
            except BrokerError as error:
                subscription.sought = None
                logger.warning("%s What came after offset %d is delivered again.", error, due)

    def _lose(self, name: str, held: ReceivedMessage | None = None) -> None:
        """Another consumer has the LiteTopic: leave it to that one, with what is un-acked."""
        # Kept, the next refresh of the whole set would take it back. One that crossed the notice on its way has.
        subscription = self._subscriptions.pop(name, None)
        if subscription is None:
            return
        logger.info("LiteTopic %r of %r was taken over by another client", name, self.topic)
        self._refresh_now.set()
        if held is not None:
            self._give_back(held)
        self._give_back_unacked(subscription)
        subscription.disown()
        self._unread.put_nowait(LiteLost(name, subscription.reading))

    def _give_back_unacked(self, subscription: Subscription) -> None:
        # All that is un-acked of a LiteTopic is of one batch.
        for message in list(subscription.unacked.values())[:1]:
            self._give_back(message)

    def _give_back(self, message: ReceivedMessage) -> None:
        """Let the LiteTopic's owner have the batch of this message at once, rather than when it is visible again."""
        # Until it gets through, the LiteTopic's owner waits for it; after that long it is visible by itself.
        timeout = CLOSE_TIMEOUT if self._closing.begun else INVISIBLE
        self._background(self._calls.give_back(message, message.receipt_handle, timeout=timeout))

    def _background(self, work: Any) -> None:
        task = asyncio.create_task(work, name=f"rocketmq[{self._client.client_id}].ack")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_established(self) -> None:
        self._after_interruption()
        self._poller.renew()

    def _after_interruption(self) -> None:
        for subscription in self._subscriptions.values():
            subscription.doubtful = True
        self._refresh_now.set()

    def _on_command(self, command: Any) -> None:
        if command.HasField("notify_unsubscribe_lite_command"):
            self._lose(command.notify_unsubscribe_lite_command.lite_topic)

    async def _refresh_loop(self) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        due = loop.time() + REFRESH_INTERVAL
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_INTERVAL):
                    await self._refresh_now.wait()
            asked, now = self._refresh_now.is_set(), loop.time()
            quiet = [name for name, each in self._subscriptions.items() if each.may_be_overlooked(now)]
            if not (asked or quiet or now >= due):
                continue
            self._refresh_now.clear()
            if asked or now >= due:
                due = now + (REFRESH_AGAIN if asked else REFRESH_INTERVAL)
            try:
                await self._refresh(quiet[:NAMES_A_CALL])
                failures = 0
            except BrokerError as error:
                failures += 1
                logger.log(logging.WARNING if failures == 1 else logging.DEBUG, "%s", error)
                await asyncio.sleep(1.0)
                self._refresh_now.set()

    async def _refresh(self, again: Collection[str]) -> None:
        """Send the whole set, in a way that makes the broker look again into these LiteTopics."""
        async with self._changes.of_all():
            again = [name for name in again if name in self._subscriptions]
            if again:
                await self._calls.sync("PARTIAL_REMOVE", again)
            # Not PARTIAL_ADD, which would take a LiteTopic back from an owner of whom the notice is still on its way.
            await self._calls.sync("COMPLETE_ADD", list(self._subscriptions))
            for name in again:
                if (subscription := self._subscriptions.get(name)) is not None:
                    subscription.looked_again += 1


def _chunks(items: Collection[_T], size: int) -> Iterable[list[_T]]:
    everything = list(items)
    return (everything[start : start + size] for start in range(0, len(everything), size))
