"""From RocketMQ to an ASGI app and back: takes requests of a topic, runs the app, publishes its responses.

A request is leased while the app works on it and acked when the last message of its response is stored, so a worker
that dies loses it to another one. One that belongs to another instance's conversation is handed over there, its lease
kept here. A full bridge asks the broker for no more. What can't be a request is set aside once: counted, logged,
answered where there is somewhere to answer, never handed out again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import uuid
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.application import Application
from agentscope_rocketmq.asgi import Response, cancelled, request_name, with_rpc_id
from agentscope_rocketmq.bodies import PART_OVERHEAD, BodyReceiver
from agentscope_rocketmq.errors import BlobStoreError, BrokerError, EnvelopeError, SessionTakenOver
from agentscope_rocketmq.handover import Handover, Offer, Outcome
from agentscope_rocketmq.intake import MOST_MESSAGE_BYTES, Intake
from agentscope_rocketmq.jsonrpc import INTERNAL_ERROR, INVALID_REQUEST, RpcRequest
from agentscope_rocketmq.priority import Tier
from agentscope_rocketmq.publisher import Publisher
from agentscope_rocketmq.questions import Questions
from agentscope_rocketmq.reply import ReplyEncoder
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer, Position
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.routes import (
    INSTANCE_HEADER,
    instance_asked_for,
    is_task_channel,
    new_task_id,
    same_server,
)
from agentscope_rocketmq.runs import Answered, BridgeCounters, Delivery, Run
from agentscope_rocketmq.spool import Spools
from agentscope_rocketmq.suspects import Suspects
from agentscope_rocketmq.taskchannels import TaskChannels

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

    from agentscope_rocketmq.asgi import ASGIApp
    from agentscope_rocketmq.blobs import BlobStore
    from agentscope_rocketmq.config import Limits, Timeouts
    from agentscope_rocketmq.envelope import RequestEnvelope
    from agentscope_rocketmq.rocketmq.consumer import GroupConsumer, LeasedMessage
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage
    from agentscope_rocketmq.rocketmq.producer import Producer
    from agentscope_rocketmq.slots import Slots

__all__ = ["Bridge"]

logger = logging.getLogger(__name__)

_LAST_WORDS = 2.0  # seconds in which a stopping bridge still talks to those who wait for it
_FAIL_TRIES = 5  # deliveries of a request that is given up at which its task may still be failed


class Bridge:
    """Serves one A2A app on one RocketMQ topic, and on the LiteTopic of this instance.

    Args:
        app: The ASGI app; its JSON-RPC endpoint is `path`.
        consumers: Take requests, for each tier one; started and closed by this object.
        caller_of: Says whose a request is.
        producer: Sends responses. Not closed by this object.
        instance_consumer: Takes what is meant for this very instance: requests about its tasks, requests handed over
            and reports on those; started and closed by this object.
        instance: Its LiteTopic.
        reply_topics: LITE topics that responses may go to.
        timeouts: `lease`, `send`, `parts` and `drain` count here.
        limits: `attempts`, `response_buffer_bytes` and those of large bodies count here.
        slots: The places of the server, which all its bridges share.
        path: Path of the app's JSON-RPC endpoint.
        fails_tasks: Whether the app ends a request whose scope says `given_up` with a failed task.
        blobs: Where large bodies may be, for callers that share it; None for nowhere.

    Attributes:
        counters: What it has done.
        failed: Set when it can take no more requests, which only a bug makes happen; `failure` is the exception.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        consumers: Mapping[Tier, GroupConsumer],
        caller_of: Callable[[RequestEnvelope], str],
        producer: Producer,
        reply_topics: frozenset[str],
        timeouts: Timeouts,
        limits: Limits,
        slots: Slots,
        instance_consumer: LiteConsumer,
        instance: str,
        path: str = "/",
        fails_tasks: bool = False,
        blobs: BlobStore | None = None,
    ) -> None:
        self.counters = BridgeCounters()
        self.failure: BaseException | None = None
        self.failed = asyncio.Event()
        self._consumers = consumers
        self._caller_of = caller_of
        self._producer = producer
        large = min(limits.blob_bytes, limits.response_buffer_bytes)
        self._publisher = Publisher(producer, timeout=timeouts.send, blobs=blobs, store_above=large)
        self._questions = Questions(self._publisher)
        self._intake = Intake(
            producer,
            self._publisher,
            self.counters,
            topic=consumers[Tier.NORMAL].topic,
            state_topic=instance_consumer.topic,
            reply_topics=reply_topics,
            timeout=timeouts.send,
        )
        self._instance_consumer = instance_consumer
        self._instance = instance
        self._sticky = (instance_consumer.topic, instance)
        self._handover = Handover(
            producer,
            topic=instance_consumer.topic,
            instance=instance,
            silence=timeouts.lease,
            send_timeout=timeouts.send,
        )
        self._task_channels = TaskChannels(instance_consumer)
        self._bodies = BodyReceiver(
            instance_consumer,
            spools=Spools.of(limits, most=limits.request_bytes),
            patience=timeouts.parts,
            blobs=blobs,
        )
        self._application = Application(app, path, bodies=self._bodies, counters=self.counters)
        self._fails_tasks = fails_tasks
        self._timeouts = timeouts
        self._limits = limits
        self._slots = slots
        self._suspects = Suspects(timeouts.lease)
        self._watched: set[asyncio.Task[None]] = set()
        self._running: dict[tuple[str, str], Run] = {}
        self._answered = Answered()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._stopping = False
        self._stops: list[asyncio.Task[None]] = []
        self._cut: list[Offer] = []  # begun for other instances, which have the leases, and cut off by the drain

    @property
    def topic(self) -> str:
        """The request topic."""
        return self._consumers[Tier.NORMAL].topic

    def keep(self, task: str) -> None:
        """A task lives in this instance now: what is sent to its channel is served here."""
        if is_task_channel(task):
            self._task_channels.keep(task)

    async def start(self) -> None:
        """Connect and begin to serve.

        Raises:
            BrokerError: Nobody answers, or topic, group or credentials are refused.
        """
        await self._instance_consumer.start()
        try:
            await self._instance_consumer.subscribe([self._instance], at=Position.last())
            for consumer in self._consumers.values():
                await consumer.start()
        except BaseException:
            await asyncio.gather(*(each.aclose() for each in self._consumers.values()), return_exceptions=True)
            await self._instance_consumer.aclose()
            raise
        for tier in self._consumers:
            self._start_loop(self._request_loop(tier), f"requests.{tier}")
        self._start_loop(self._instance_loop(), "instance")
        self._start_loop(self._task_channels.run(), "task-channels")

    async def drain(self) -> None:
        """Take no more requests, let those at work end within `Timeouts.drain`, cut off the rest. Idempotent.

        Nobody else gets what was cut off before `aclose`: the app may have to be closed for its agents to end.
        """
        self._stopping = True
        consumers = self._consumers.values()
        self._stops += [asyncio.create_task(each.stop(), name=f"bridge[{each.topic}].stop") for each in consumers]
        # Somebody else watches over those as well, or may begin those: they get them back.
        waiting = {run.serving for run in self._running.values() if not run.begun and run.serving is not None}
        for task in self._watched | waiting:
            task.cancel()
        if working := self._tasks - self._watched - waiting:
            await asyncio.wait(working, timeout=self._timeouts.drain)
        for task in (*self._tasks, *self._loops):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._loops, return_exceptions=True)

    async def aclose(self) -> None:
        """Drain, and give back what was cut off. Idempotent."""
        await self.drain()
        await self._say_last(*(self._handover.report_end(offer, complete=False) for offer in self._cut))
        self._cut.clear()
        # What was not finished is given back, and another worker of the group goes on with it.
        await asyncio.gather(*self._stops, *(one.aclose() for one in self._consumers.values()), return_exceptions=True)
        await self._instance_consumer.aclose()

    def _start_loop(self, loop: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(loop, name=f"bridge[{self.topic}].{name}")
        task.add_done_callback(self._loop_ended)
        self._loops.append(task)

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("%s failed: this server is deaf", task.get_name(), exc_info=error)
            self.failure = error
            self.failed.set()

    async def _request_loop(self, tier: Tier) -> None:
        async for leased in self._consumers[tier].messages():
            self._spawn(self._serve_leased(leased, tier), leased.message)

    async def _instance_loop(self) -> None:
        async for item in self._instance_consumer.batches():
            if self._bodies.hear(item):
                continue
            if not isinstance(item, LiteBatch):
                self._lost(item.lite_topic)
                continue
            for message in item.messages:
                self._spawn(self._serve_addressed(message), message)
            # Acked on arrival, or a long run would hold up the cancel behind it. Nothing is lost with it: work has its
            # lease elsewhere, and whatever else concerns this instance's tasks ends with it.
            await self._instance_consumer.ack(item.messages)

    def _lost(self, lite_topic: str) -> None:
        if not is_task_channel(lite_topic):
            logger.error("The LiteTopic of this instance was taken over: instance ids must be unique")
            return
        runs = [run for run in self._running.values() if run.task == lite_topic]
        self._task_channels.lost(lite_topic, ours=any(run.is_leased for run in runs))

    def _spawn(self, work: Coroutine[Any, Any, None], message: ReceivedMessage) -> None:
        task = asyncio.create_task(work, name=f"bridge[{self.topic}].serve[{message.message_id}]")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("Serving %s failed", task.get_name(), exc_info=error)

    async def _serve_leased(self, leased: LeasedMessage, tier: Tier) -> None:
        """Serve a message of a topic."""
        delivery = Delivery(leased.message, leased=leased, tier=tier)
        try:
            envelope = await self._intake.read(leased.message)
            if envelope is None:
                await delivery.ack()
                return
            request = RpcRequest.read(envelope.body)
            known = _key(envelope) in self._running or _key(envelope) in self._answered
            if delivery.attempt >= self._limits.attempts and not known:
                await self._give_up(envelope, request, delivery)
                return
            instance = instance_asked_for(request, envelope.headers)
            elsewhere = instance is not None and not self._is_here(instance)
            if not (instance and elsewhere and await self._hand_over(envelope, request, delivery, instance)):
                await self._serve(envelope, request, delivery)
        except Exception:
            # Its slot must not be lost with it, and another worker may do better.
            await delivery.release(at_most=self._timeouts.lease)
            raise

    async def _give_up(self, envelope: RequestEnvelope, request: RpcRequest, delivery: Delivery) -> None:
        """Let a request be, that no worker has brought to its end: it may be what kills them."""
        reason = (
            f"Request {envelope.request_id} was given up after {delivery.attempt} deliveries: each worker that had it "
            "died, stopped, or gave it back. See their logs; `agentscope-rocketmq dead-letters` has the request."
        )
        await self._intake.set_aside(delivery.message, reason)
        if self._may_fail(request, delivery):
            delivery.given_up = reason
            await self._serve(envelope, request, delivery)
        else:
            await self._publisher.answer_given_up(envelope, request, reason, attempt=delivery.attempt)
            await delivery.ack()

    def _may_fail(self, request: RpcRequest, delivery: Delivery) -> bool:
        """Whether the app can end a request that is given up with a failed task, as its caller wants to have it."""
        task = instance_asked_for(request, {})
        return (
            self._fails_tasks
            and request.runs_agent
            and (task is None or self._is_here(task))
            # Not for ever: it may be on its way to its task that it kills workers.
            and delivery.attempt < self._limits.attempts + _FAIL_TRIES
        )

    async def _serve_addressed(self, message: ReceivedMessage) -> None:
        """Serve a message of this instance's LiteTopic."""
        with contextlib.suppress(EnvelopeError):
            if self._handover.hear(message.body(limit=MOST_MESSAGE_BYTES)):
                return
        envelope = await self._intake.read(message)
        if envelope is None:
            return
        request = RpcRequest.read(envelope.body)
        offer = Offer.of(envelope.headers)
        delivery = Delivery(message, offer=offer)
        if offer is None and request.runs_agent:
            # Work is done under a lease only: whoever gets it from the topic hands it over to this instance.
            headers = {**envelope.headers, INSTANCE_HEADER: self._instance}
            await self._readdress(dataclasses.replace(envelope, headers=headers))
        elif offer is None:
            await self._questions.serve(envelope, request, lambda: self._serve(envelope, request, delivery))
        elif await self._take(offer, request):
            await self._serve(envelope, request, delivery)

    async def _take(self, offer: Offer, request: RpcRequest) -> bool:
        """Take an offered request; whether it is to be begun."""
        if self._stopping and request.runs_agent and not instance_asked_for(request, {}):
            # The conversation ends here anyway; a message to a task can only be taken here.
            await self._handover.report_end(offer, complete=False)
            return False
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  (it runs in one)
        self._watched.add(task)
        try:
            return await self._handover.take(offer)
        except asyncio.CancelledError:
            await self._say_last(self._handover.report_end(offer, complete=False))
            raise
        finally:
            self._watched.discard(task)

    def _is_here(self, instance: str) -> bool:
        return same_server(instance, self._instance) or self._task_channels.keeps(instance)

    async def _readdress(self, envelope: RequestEnvelope) -> None:
        message = Message(topic=self.topic, body=envelope.encode(), keys=(envelope.request_id,))
        try:
            await self._producer.send(message, timeout=self._timeouts.send)
        except BrokerError as error:
            logger.warning("Request %s to this instance is not served: %s", envelope.request_id, error)

    async def _hand_over(
        self, envelope: RequestEnvelope, request: RpcRequest, delivery: Delivery, instance: str
    ) -> bool:
        """Have a request answered by another instance; whether that is so. It is to be served here otherwise."""
        key = _key(envelope)
        if self._answered.settles(key, delivery) or key in self._running or delivery.ran_out(envelope, request):
            return False
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  (it runs in one)
        self._watched.add(task)
        try:
            delivery.park()  # it is no work here
            outcome = await self._handover.offer(
                envelope,
                instance,
                attempt=delivery.attempt,
                waited=delivery.waited,
                # A message to a task has no meaning to who has not got it.
                patient=request.runs_agent and is_task_channel(instance),
            )
        finally:
            self._watched.discard(task)
        if outcome is Outcome.NOT_TAKEN:
            logger.info("Instance %s does not answer: request %s is served here", instance, envelope.request_id)
            return False
        if outcome is Outcome.DONE:
            self.counters.handed_over += 1
            self._answered.add(key, delivery.attempt)
            if await delivery.ack():
                # Who answered it does not know whether somebody else may get it still.
                await self._bodies.forget(envelope)
        else:
            await delivery.release(at_most=self._timeouts.lease)
        return True

    async def _serve(self, envelope: RequestEnvelope, request: RpcRequest, delivery: Delivery) -> None:
        """Run a request, unless it runs or ran here already, and settle its deliveries."""
        key = _key(envelope)
        if self._answered.settles(key, delivery):
            self.counters.repeated += 1
            await self._settle(delivery, complete=True)
            return
        # A message to a task at work can't be begun anew: it is in that very run.
        to_task = instance_asked_for(request, {}) is not None
        if (run := self._running.get(key)) is not None and (to_task or run.is_repeated_by(delivery)):
            # Delivered again although it is at work here: its newest lease is the one that counts.
            self.counters.repeated += 1
            self._join(run, delivery)
            return
        task = instance_asked_for(request, {}) or new_task_id(request_name(envelope))
        run = self._running[key] = Run(task, asyncio.current_task())
        self._join(run, delivery)
        self.counters.taken += 1
        complete = False
        try:
            complete = await self._run(envelope, request, delivery, run)
        finally:
            if self._running.get(key) is run:
                del self._running[key]
            for report in run.reports:
                report.cancel()
            if complete:
                self.counters.answered += 1
                self._answered.add(key, run.attempt)
            if not cancelled():
                settled = [await self._settle(each, complete=complete) for each in run.deliveries]
                if complete and all(settled):
                    self._answered.settle(key)
                if complete and any(settled) and delivery.given_up is None:  # a dead letter may be sent again
                    await self._bodies.forget(envelope)
            # What was at work is given back when its agent has ended.
            elif run.begun:
                self._cut += [each.offer for each in run.deliveries if each.offer]
            else:
                await self._say_last(*(self._settle(each, complete=False) for each in run.deliveries))

    def _join(self, run: Run, delivery: Delivery) -> None:
        run.deliveries.append(delivery)
        if delivery.offer is not None:
            reporting = self._handover.report_taken(delivery.offer)
            run.reports.append(asyncio.create_task(reporting, name=f"bridge[{self.topic}].report[{delivery.offer.id}]"))

    async def _settle(self, delivery: Delivery, *, complete: bool) -> bool:
        """Whether nobody gets that delivery of a request any more."""
        if delivery.offer is not None:
            await self._handover.report_end(delivery.offer, complete=complete)
        elif complete:
            return await delivery.ack()
        else:
            await delivery.release(at_most=self._timeouts.lease)
        return False

    async def _say_last(self, *words: Awaitable[object]) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS):
                await asyncio.gather(*words, return_exceptions=True)

    async def _run(self, envelope: RequestEnvelope, request: RpcRequest, delivery: Delivery, run: Run) -> bool:
        """Run a request through the app and publish its response; whether it is complete on the broker."""
        envelope = with_rpc_id(envelope, request)
        encoder = ReplyEncoder(
            envelope.request_id,
            peer_reads_batches=envelope.reads_batches,
            sticky=self._sticky,
            attempt=delivery.attempt,
            run=uuid.uuid4().hex[:16],
            max_message_bytes=self._producer.max_body_size - PART_OVERHEAD,
            wants_stream=request.wants_stream,
            rpc_id=request.id,
            max_body_bytes=self._limits.response_bytes,
            store_above=self._publisher.store_above(envelope),
        )
        size = len(envelope.body.encode())
        # A document that the app sends in pieces is only published when a message is full.
        limit = max(self._limits.response_buffer_bytes, self._producer.max_body_size)
        response = Response(encoder, limit=limit)
        addressed = delivery.leased is None and delivery.offer is None
        if addressed:
            response.begin()
        late = delivery.ran_out(envelope, request)
        publishing = asyncio.create_task(
            self._publisher.publish(envelope, response, within=delivery.time_to_tell(envelope)),
            name=f"bridge[{self.topic}].publish[{envelope.request_id}]",
        )
        try:
            if size > self._limits.request_bytes:
                encoder.fail(
                    INVALID_REQUEST,
                    f"The request has {size} bytes; this agent takes {self._limits.request_bytes}. Send less.",
                )
            elif request.runs_agent and late is not None:
                self._application.expire(envelope, late, response)
            elif request.runs_agent:
                tier = delivery.tier_with(envelope.headers)
                attempt = delivery.attempt if delivery.given_up is None else 0  # the agent does not see it any more
                async with (
                    self._suspects.turn(request_name(envelope), attempt, on_wait=delivery.park),
                    self._slots.slot(tier, self._caller_of(envelope), on_aside=delivery.park),
                ):
                    run.begun = True
                    # While it waited for a place, its caller was told that it is taken.
                    if (late := delivery.ran_out(envelope, request, told=True)) is None:
                        await self._application.answer(envelope, request, delivery, response)
                    else:
                        self._application.expire(envelope, late, response)
            else:
                run.begun = True
                delivery.park()  # it needs no place
                await self._application.answer(envelope, request, delivery, response)
            response.changed.set()
            return await publishing
        except (BrokerError, BlobStoreError, SessionTakenOver) as error:
            logger.warning("Request %s is given back: %s", envelope.request_id, error)
            return False
        except asyncio.CancelledError:
            if addressed:
                # Nobody else will answer it.
                encoder.fail(INTERNAL_ERROR, "The agent's server stops. Ask again: another one may answer.")
                response.changed.set()
                await self._say_last(publishing)
            raise
        finally:
            self.counters.unanswered += response.unpublished
            response.end()
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)


def _key(envelope: RequestEnvelope) -> tuple[str, str]:
    return envelope.request_id, envelope.lite_topic
