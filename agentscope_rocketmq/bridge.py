"""From RocketMQ to an ASGI app and back: takes requests of a topic, runs the app, publishes its responses.

A request is leased while the app works on it and acked when the last message of its response is stored, so a worker
that dies loses it to another one. A full bridge asks the broker for no more. What can't be a request is set aside
once: counted, logged, answered where there is somewhere to answer, never handed out again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from agentscope_rocketmq.envelope import ReplyAddress, RequestEnvelope, ResponseEnvelope
from agentscope_rocketmq.errors import BrokerError, EnvelopeError
from agentscope_rocketmq.jsonrpc import INTERNAL_ERROR, RpcRequest
from agentscope_rocketmq.reply import ReplyEncoder, error_envelope
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer, Position
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.routes import TAKE_WITHIN_HEADER

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from agentscope_rocketmq.config import Limits, Timeouts
    from agentscope_rocketmq.rocketmq.consumer import GroupConsumer, LeasedMessage
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage
    from agentscope_rocketmq.rocketmq.producer import Producer

    ASGIApp = Callable[
        [dict[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]
    ]

__all__ = ["Bridge", "BridgeCounters"]

logger = logging.getLogger(__name__)

INVALID_REQUEST = -32600
# Requests answered not long ago: a copy of one (a send repeated, a lost ack) is acked, not run again.
_ANSWERED = 10_000
# A reply waits out a restart of the broker that takes this long, whatever the timeout for other sends is.
_REPLY_SECONDS = 300.0
# Room in a message beside the body: properties and what the broker adds.
_MESSAGE_OVERHEAD = 16 * 1024


@dataclass(slots=True)
class BridgeCounters:
    """What a bridge has done since its start.

    Attributes:
        taken: Requests that were run.
        answered: Requests whose response is complete on the broker.
        repeated: Copies of requests running or answered here, not run again.
        refused: Messages set aside: not an envelope, too large, a reply topic that is not allowed.
        unanswered: Of those taken, the ones whose response could not be published in full.
    """

    taken: int = 0
    answered: int = 0
    repeated: int = 0
    refused: int = 0
    unanswered: int = 0


@dataclass(slots=True, eq=False)
class _Run:
    """One request at work, with every delivery of it that is to be acked when it is done."""

    deliveries: list[LeasedMessage] = field(default_factory=list)


class Bridge:
    """Serves one A2A app on one RocketMQ topic, and on the LiteTopic of this instance.

    Args:
        app: The ASGI app; its JSON-RPC endpoint is `path`.
        consumer: Takes requests; started and closed by this object.
        producer: Sends responses. Not closed by this object.
        instance_consumer: Takes requests meant for this very instance; started and closed by this object. None for
            an instance that is not addressed by itself.
        instance: Its LiteTopic.
        reply_topics: LITE topics that responses may go to.
        timeouts: `lease`, `send` and `drain` count here.
        limits: `request_bytes` and `response_buffer_bytes` count here.
        path: Path of the app's JSON-RPC endpoint.

    Attributes:
        counters: What it has done.
        failed: Set when it can take no more requests, which only a bug makes happen; `failure` is the exception.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        consumer: GroupConsumer,
        producer: Producer,
        reply_topics: frozenset[str],
        timeouts: Timeouts,
        limits: Limits,
        instance_consumer: LiteConsumer | None = None,
        instance: str = "",
        path: str = "/",
    ) -> None:
        self.counters = BridgeCounters()
        self.failure: BaseException | None = None
        self.failed = asyncio.Event()
        self._app = app
        self._consumer = consumer
        self._producer = producer
        self._instance_consumer = instance_consumer
        self._instance = instance
        self._sticky = (instance_consumer.topic, instance) if instance_consumer is not None else None
        self._reply_topics = reply_topics
        self._timeouts = timeouts
        self._limits = limits
        self._path = path
        self._instance_slots = asyncio.Semaphore(limits.concurrency)
        self._running: dict[tuple[str, str], _Run] = {}
        self._answered: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []

    @property
    def topic(self) -> str:
        """The request topic."""
        return self._consumer.topic

    async def start(self) -> None:
        """Connect and begin to serve.

        Raises:
            BrokerError: Nobody answers, or topic, group or credentials are refused.
        """
        if self._instance_consumer is not None:
            await self._instance_consumer.start()
            try:
                await self._instance_consumer.subscribe([self._instance], at=Position.last())
            except BaseException:
                await self._instance_consumer.aclose()
                raise
        try:
            await self._consumer.start()
        except BaseException:
            if self._instance_consumer is not None:
                await self._instance_consumer.aclose()
            raise
        self._start_loop(self._request_loop(), "requests")
        if self._instance_consumer is not None:
            self._start_loop(self._instance_loop(self._instance_consumer), "instance")

    async def aclose(self) -> None:
        """Take no more requests, let those at work end within `Timeouts.drain`, give back the rest. Idempotent."""
        stopping = asyncio.create_task(self._consumer.stop(), name=f"bridge[{self.topic}].stop")
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=self._timeouts.drain)
        for task in (*self._tasks, *self._loops):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._loops, return_exceptions=True)
        await asyncio.gather(stopping, return_exceptions=True)
        # What was not finished is given back, and another worker of the group goes on with it.
        await self._consumer.aclose()
        if self._instance_consumer is not None:
            await self._instance_consumer.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _start_loop(self, loop: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(loop, name=f"bridge[{self.topic}].{name}")
        task.add_done_callback(self._loop_ended)
        self._loops.append(task)

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("%s failed: this server is deaf", task.get_name(), exc_info=error)
            self.failure = error
            self.failed.set()

    async def _request_loop(self) -> None:
        async for leased in self._consumer.messages():
            self._spawn(self._serve_leased(leased), leased.message)

    async def _instance_loop(self, consumer: LiteConsumer) -> None:
        async for item in consumer.batches():
            if not isinstance(item, LiteBatch):
                logger.error("The LiteTopic of this instance was taken over: instance ids must be unique")
                continue
            # Acked on arrival, or a long run would hold up the cancel behind it: what concerns this instance's
            # tasks ends with it, and its caller then turns to another worker.
            await consumer.ack(item.messages)
            for message in item.messages:
                if not self._given_up(message):
                    self._spawn(self._serve(message, None), message)

    def _spawn(self, work: Any, message: ReceivedMessage) -> None:
        task = asyncio.create_task(work, name=f"bridge[{self.topic}].serve[{message.message_id}]")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("Serving %s failed", task.get_name(), exc_info=error)

    async def _serve_leased(self, leased: LeasedMessage) -> None:
        try:
            done = await self._serve(leased.message, leased)
        except Exception:
            # Its slot must not be lost with it, and another worker may do better.
            await self._consumer.release(leased)
            raise
        if done:
            await self._consumer.ack(leased)
        elif done is False:
            await self._consumer.release(leased)

    async def _serve(self, message: ReceivedMessage, leased: LeasedMessage | None) -> bool | None:
        """Serve one message; whether it is done with. None: a copy, which the run that it is a copy of will ack."""
        try:
            body = message.body(limit=self._limits.request_bytes + _MESSAGE_OVERHEAD)
        except EnvelopeError as error:
            self._set_aside(message, error)
            return True
        try:
            envelope = RequestEnvelope.decode(body)
        except EnvelopeError as error:
            self._set_aside(message, error)
            await self._answer_unreadable(body, error)
            return True
        if envelope.reply_topic not in self._reply_topics:
            self._set_aside(
                message,
                EnvelopeError(
                    f"Request {envelope.request_id} wants its answer on topic {envelope.reply_topic!r}, which this "
                    "server does not write to. Allow it with RocketMQConfig.allowed_reply_topics "
                    "(ROCKETMQ_ALLOWED_REPLY_TOPICS) if it is right."
                ),
            )
            return True
        key = (envelope.request_id, envelope.lite_topic)
        if key in self._answered:
            self.counters.repeated += 1
            return True
        if (run := self._running.get(key)) is not None:
            # Delivered again although it is at work here: its newest lease is the one that counts.
            self.counters.repeated += 1
            if leased is not None:
                run.deliveries.append(leased)
            return None
        run = self._running[key] = _Run()
        self.counters.taken += 1
        try:
            complete = await self._run(envelope, message)
        finally:
            del self._running[key]
        if complete:
            self.counters.answered += 1
            self._remember(key)
        for delivery in run.deliveries:
            await (self._consumer.ack if complete else self._consumer.release)(delivery)
        return complete

    async def _run(self, envelope: RequestEnvelope, message: ReceivedMessage) -> bool:
        request = RpcRequest.read(envelope.body)
        encoder = ReplyEncoder(
            envelope.request_id,
            peer_reads_batches=envelope.reads_batches,
            sticky=self._sticky,
            attempt=message.attempt - 1,
            max_message_bytes=self._producer.max_body_size - _MESSAGE_OVERHEAD,
            wants_stream=request.wants_stream,
            rpc_id=request.id,
        )
        size = len(envelope.body.encode())
        response = _Response(encoder, limit=self._limits.response_buffer_bytes)
        if message.lite_topic is not None:
            response.begin()
        publishing = asyncio.create_task(
            self._publish(envelope, response), name=f"bridge[{self.topic}].publish[{envelope.request_id}]"
        )
        try:
            if size > self._limits.request_bytes:
                encoder.fail(
                    INVALID_REQUEST,
                    f"The request has {size} bytes; this agent takes {self._limits.request_bytes}. Send less.",
                )
            elif message.lite_topic is not None and request.runs_agent:
                # They don't come through the consumer, which counts those that do.
                async with self._instance_slots:
                    await self._call_app(envelope, message, response)
            else:
                await self._call_app(envelope, message, response)
            response.changed.set()
            return await publishing
        finally:
            response.over.set()
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)

    async def _call_app(self, envelope: RequestEnvelope, message: ReceivedMessage, response: _Response) -> None:
        receive = _Receive(envelope.body.encode(), response.over)
        try:
            await self._app(self._scope(envelope, message), receive, response.send)
        except Exception:
            logger.exception("The A2A app failed on request %s", envelope.request_id)
            response.encoder.fail(
                INTERNAL_ERROR, f"The agent's server failed on request {envelope.request_id}; its log says why."
            )
            return
        if _cancelled():
            # The a2a-sdk swallows the cancellation of a blocking send and answers with a task at work.
            raise asyncio.CancelledError
        response.encoder.finish()
        if not response.encoder.saw_end_of_task:
            # The a2a-sdk ends the stream of a reader that it finds too slow as if all were well.
            response.encoder.fail(
                INTERNAL_ERROR,
                f"The response to request {envelope.request_id} ended before its task did. "
                "The task may go on: ask for it (GetTask), or subscribe to it.",
            )

    async def _publish(self, envelope: RequestEnvelope, response: _Response) -> bool:
        """Send the response's messages one after the other; what piles up meanwhile rides in the next."""
        encoder = response.encoder
        while not encoder.finished:
            reply = encoder.take()
            if reply is None:
                response.changed.clear()
                response.drained.set()
                await response.changed.wait()
                continue
            try:
                await self._send(envelope.reply_topic, envelope.lite_topic, reply)
            except BrokerError as error:
                # The agent goes on: its task can be asked for. A worker that could reach the broker may answer
                # better; where the reply topic itself is refused, none could.
                logger.error("The response to request %s is not published: %s", reply.request_id, error)  # noqa: TRY400
                self.counters.unanswered += 1
                return not error.transient
        return True

    async def _send(self, reply_topic: str, lite_topic: str, reply: ResponseEnvelope) -> None:
        message = Message(topic=reply_topic, lite_topic=lite_topic, body=reply.encode(), keys=(reply.request_id,))
        await self._producer.send(message, timeout=max(self._timeouts.send, _REPLY_SECONDS))

    async def _answer_unreadable(self, body: bytes, error: EnvelopeError) -> None:
        address = ReplyAddress.find(body)
        if address is None or address.reply_topic not in self._reply_topics:
            return
        reply = error_envelope(address.request_id, code=INVALID_REQUEST, message=str(error))
        try:
            await self._send(address.reply_topic, address.lite_topic, reply)
        except BrokerError as failure:
            logger.warning("%s", failure)

    def _set_aside(self, message: ReceivedMessage, error: EnvelopeError) -> None:
        self.counters.refused += 1
        logger.warning("Message %s of topic %r is set aside: %s", message.message_id, self.topic, error)

    def _remember(self, key: tuple[str, str]) -> None:
        self._answered[key] = None
        while len(self._answered) > _ANSWERED:
            self._answered.popitem(last=False)

    def _given_up(self, message: ReceivedMessage) -> bool:
        """Whether the caller of a request to this instance has turned to another worker by now."""
        try:
            headers = RequestEnvelope.decode(message.body(limit=self._limits.request_bytes)).headers
            within = float(headers[TAKE_WITHIN_HEADER])
        except (EnvelopeError, KeyError, ValueError):
            return False
        return (datetime.now(UTC) - message.store_time).total_seconds() > within

    def _scope(self, envelope: RequestEnvelope, message: ReceivedMessage) -> dict[str, Any]:
        headers = {name.lower(): value for name, value in envelope.headers.items()}
        headers.setdefault("content-type", "application/json")
        headers.setdefault("host", "rocketmq")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode("latin-1", "replace"), value.encode()) for name, value in headers.items()],
            "client": None,
            "server": None,
            "state": {},
            # For apps that want to know how a request came.
            "rocketmq": {
                "topic": message.topic,
                "lite_topic": envelope.lite_topic,
                "request_id": envelope.request_id,
                "message_id": message.message_id,
                "attempt": message.attempt,
            },
        }


class _Response:
    """ASGI's `send` side of one request: only notes what comes, so that a slow broker holds up nobody but itself."""

    def __init__(self, encoder: ReplyEncoder, *, limit: int) -> None:
        self.encoder = encoder
        self.changed = asyncio.Event()
        self.drained = asyncio.Event()
        self.over = asyncio.Event()
        self._limit = limit

    def begin(self) -> None:
        """Say at once that the request is taken."""
        self.encoder.begin()
        self.changed.set()

    async def send(self, event: Any) -> None:
        if self.over.is_set() or _cancelled():
            raise OSError("the response is over: this worker stops")
        if event["type"] == "http.response.start":
            self.encoder.start(event["status"], event.get("headers", ()))
        elif event["type"] == "http.response.body":
            self.encoder.feed(event.get("body", b""))
        self.changed.set()
        while self.encoder.pending_bytes > self._limit and not self.over.is_set():
            self.drained.clear()
            await self.drained.wait()


class _Receive:
    """ASGI's `receive` side: the request body, then nothing until the response is over.

    A caller that leaves can't be seen over RocketMQ, and would cancel nothing: the agent goes on (state.md).
    """

    def __init__(self, body: bytes, over: asyncio.Event) -> None:
        self._body: bytes | None = body
        self._over = over

    async def __call__(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._over.wait()
        return {"type": "http.disconnect"}


def _cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
