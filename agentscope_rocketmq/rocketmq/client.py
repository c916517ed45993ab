"""One client id at a RocketMQ proxy: its telemetry stream, settings and heartbeats, re-established by themselves.

A proxy serves `ReceiveMessage` and heartbeats only to clients whose settings it holds, and it forgets those when the
telemetry stream ends. So all of a client's calls go to the endpoint that its stream is on, and wait while the stream
is being opened anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from agentscope_rocketmq.errors import BrokerError, BrokerUnreachable, ClosedError
from agentscope_rocketmq.rocketmq.connection import new_client_id, speaks_tls
from agentscope_rocketmq.rocketmq.lifecycle import Closing, Home
from agentscope_rocketmq.rocketmq.protocol import definition, service
from agentscope_rocketmq.rocketmq.status import check, from_rpc_error, from_status, hopeless, hung_up

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agentscope_rocketmq.rocketmq.connection import Connection, Endpoint

__all__ = ["CALL_TIMEOUT", "CLOSE_TIMEOUT", "Client", "backoff", "retried", "seconds_left"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# The proxy drops a client that has not sent a heartbeat for a while, so beat well within that.
HEARTBEAT_INTERVAL = 5.0
HEARTBEAT_TIMEOUT = 4.0
# A connection whose far end is gone without a word (pulled cable, paused proxy) is given up after this many in a row,
# so within 13 s.
HEARTBEATS_MISSED = 2
# A proxy that takes a connection but does not answer with settings is given up after this.
SETTINGS_TIMEOUT = 5.0
CALL_TIMEOUT = 10.0
CLOSE_TIMEOUT = 3.0


def backoff(attempt: int, *, first: float = 0.05, most: float = 1.0) -> float:
    """Seconds to wait before try `attempt` (from 1): doubling from `first` up to `most`, half of it random."""
    delay = min(most, first * 2 ** min(attempt - 1, 10))
    return float(delay * (0.5 + random.random() / 2))  # noqa: S311  (spreads load, guards nothing)


def seconds_left(deadline: float) -> float:
    """Seconds until that time of the event loop; some at least, so that a call fails in its own words."""
    return max(0.05, deadline - asyncio.get_running_loop().time())


async def retried(call: Callable[[float], Awaitable[_T]], *, timeout: float) -> _T:  # noqa: ASYNC109
    """Call until it succeeds, fails for good, or time is over.

    Args:
        call: Told how many seconds are left.
        timeout: Seconds to keep trying after failures that are transient.

    Raises:
        BrokerError: The last failure.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    attempt = 0
    while True:
        attempt += 1
        try:
            return await call(seconds_left(deadline))
        except BrokerError as error:
            delay = backoff(attempt)
            if not error.transient or loop.time() + delay >= deadline:
                raise
            level = logging.WARNING if isinstance(error, BrokerUnreachable) and attempt == 1 else logging.DEBUG
            logger.log(level, "%s (try %d, trying again)", error, attempt)
        await asyncio.sleep(delay)


class Client:
    """A client id with its telemetry stream. Producers and consumers each own one.

    Args:
        connection: Where it lives.
        settings: The protocol's `Settings` to announce.
        group: Its consumer group; None for producers.
        on_command: Called with each command of the server that this class does not handle itself.
        on_established: Called each time the server has taken the settings, the first time included.
    """

    def __init__(
        self,
        connection: Connection,
        settings: Any,
        *,
        group: str | None = None,
        on_command: Callable[[Any], None] | None = None,
        on_established: Callable[[], None] | None = None,
    ) -> None:
        self.connection = connection
        self.client_id = new_client_id()
        self._settings = settings
        self._group = group
        self._on_command = on_command
        self._on_established = on_established
        self._endpoint: Endpoint | None = None
        self._stream: Any = None
        self._drop_reason: BrokerError | None = None
        self._established = asyncio.Event()
        self._failure: BrokerError | None = None
        self._failed = asyncio.Event()
        # Endpoints that a start found to be of no use until somebody changes something.
        self._useless: set[str] = set()
        self._started = False
        self._tasks: list[asyncio.Task[None]] = []
        self._home = Home("This RocketMQ client")
        # The courtesy to the server, and the ends of the tasks.
        self._closing = Closing(limit=2 * CLOSE_TIMEOUT, name=f"rocketmq[{self.client_id}].close")

    @property
    def server_settings(self) -> Any:
        """The `Settings` as the server sent them back; what was announced before the first answer."""
        return self._settings

    @property
    def established(self) -> bool:
        """Whether the server holds the settings now; otherwise calls wait for that."""
        return self._established.is_set()

    async def start(self, *, timeout: float) -> None:  # noqa: ASYNC109  (part of the API: how long a start may take)
        """Open the telemetry stream and wait until the server has taken the settings.

        Args:
            timeout: Seconds this may take.

        Raises:
            BrokerError: The server refused them (a typed subclass), or nobody answered in time.
        """
        self._home.check()
        self._tasks = [
            asyncio.create_task(self._telemetry_loop(), name=f"rocketmq[{self.client_id}].telemetry"),
            asyncio.create_task(self._heartbeat_loop(), name=f"rocketmq[{self.client_id}].heartbeat"),
        ]
        try:
            async with asyncio.timeout(timeout):
                await self._wait_established()
        except TimeoutError:
            failure = self._failure or BrokerUnreachable(
                f"No answer from the RocketMQ proxy at {self.connection.address} within {timeout:g} s. Check that it "
                "runs there, that this is its gRPC port, and that TLS is set the same on both sides."
            )
            await self.aclose()
            raise failure from None
        except BaseException:
            await self.aclose()
            raise
        self._started = True

    async def call(self, method: str, request: Any, *, doing: str, timeout: float = CALL_TIMEOUT) -> Any:  # noqa: ASYNC109
        """One unary call, once.

        Args:
            method: Name of the protocol's method, e.g. `SendMessage`.
            request: Its request message.
            doing: What this is, as the start of an error's sentence.
            timeout: Seconds for the call, the wait for an established stream included.

        Returns:
            The response message, its status unchecked.

        Raises:
            BrokerError: No answer; `transient` says whether trying again makes sense.
            ClosedError: The client is closed.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        endpoint = await self._ready(doing, timeout)
        try:
            return await getattr(endpoint.stub, method)(
                request,
                metadata=self.connection.metadata(self.client_id),
                timeout=seconds_left(deadline),
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, doing, endpoint.address) from error

    async def stream(self, method: str, request: Any, *, doing: str, timeout: float) -> list[Any]:  # noqa: ASYNC109
        """One server-streaming call, read to its end (arguments and errors as `call`)."""
        deadline = asyncio.get_running_loop().time() + timeout
        endpoint = await self._ready(doing, min(timeout, CALL_TIMEOUT))
        answers = []
        try:
            call = getattr(endpoint.stub, method)(
                request, metadata=self.connection.metadata(self.client_id), timeout=seconds_left(deadline)
            )
            async for answer in call:
                answers.append(answer)  # noqa: PERF401  (what came before a failure must not be lost)
        except grpc.RpcError as error:
            if answers:
                logger.warning("%s was cut short by %s after %d answers", doing, endpoint.address, len(answers))
                return answers
            raise from_rpc_error(error, doing, endpoint.address) from error
        return answers

    async def aclose(self) -> None:
        """Tell the server that this client leaves, and end the stream. Repeated calls are safe."""
        self._home.check()
        await self._closing(self._aclose)

    async def _aclose(self) -> None:
        try:
            await self._take_leave()
        finally:
            for task in self._tasks:
                task.cancel()
            self._established.clear()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _take_leave(self) -> None:
        endpoint = self._endpoint
        if endpoint is not None and self._established.is_set():
            request = service.NotifyClientTerminationRequest()
            if self._group is not None:
                request.group.CopyFrom(self.connection.resource(self._group))
            # It is a courtesy: the server notices by itself, only later.
            with contextlib.suppress(grpc.RpcError, grpc.aio.UsageError):
                await endpoint.stub.NotifyClientTermination(
                    request, metadata=self.connection.metadata(self.client_id), timeout=CLOSE_TIMEOUT
                )

    async def _ready(self, doing: str, timeout: float) -> Endpoint:  # noqa: ASYNC109
        self._home.check()
        if self._closing.begun:
            raise ClosedError(f"{doing} failed: this RocketMQ client is closed.")
        if not self._established.is_set():
            try:
                async with asyncio.timeout(timeout):
                    await self._established.wait()
            except TimeoutError:
                raise self._no_connection(doing) from self._failure
        assert self._endpoint is not None  # noqa: S101  (established implies an endpoint)
        return self._endpoint

    def _no_connection(self, doing: str) -> BrokerError:
        if self._failure is not None:
            failure = self._failure
            return type(failure)(f"{doing} failed. {failure}", code=failure.code, transient=failure.transient)
        return BrokerUnreachable(
            f"{doing} failed: the RocketMQ proxy at {self.connection.address} does not answer. Check that it runs.",
            transient=True,
        )

    async def _wait_established(self) -> None:
        """Until established; a refusal that trying again can't mend is raised at once."""
        established = asyncio.ensure_future(self._established.wait())
        failed = asyncio.ensure_future(self._failed.wait())
        try:
            await asyncio.wait((established, failed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            established.cancel()
            failed.cancel()
        if not self._established.is_set() and self._failure is not None:
            raise self._failure

    async def _telemetry_loop(self) -> None:
        doing = f"Announcing a RocketMQ client of group {self._group!r}" if self._group else "Announcing a producer"
        attempt = 0
        failed: Endpoint | None = None
        while True:
            endpoint = self._endpoint = self.connection.endpoint(failed=failed)
            failed = None
            try:
                await self._telemetry(endpoint, doing)
            except BrokerError as error:
                self._failure = error
                failed = endpoint if isinstance(error, BrokerUnreachable) else None
                if not error.transient or (not self._started and await self._hopeless(endpoint, error)):
                    self._failed.set()
            if self._established.is_set():
                logger.info("Telemetry stream to %s ended; opening it anew", endpoint.address)
                attempt = 0
            self._established.clear()
            attempt += 1
            await asyncio.sleep(backoff(attempt))

    async def _hopeless(self, endpoint: Endpoint, error: BrokerError) -> bool:
        """Whether no endpoint of the connection can be of use before somebody changes something."""
        address = endpoint.address
        if hopeless(error.__cause__) is not None:
            self._useless.add(address)
        elif not self.connection.encrypted and hung_up(error.__cause__) and await speaks_tls(address):
            self._failure = BrokerUnreachable(
                f"The RocketMQ proxy at {address} wants TLS and was spoken to in plain text. TLS must be set the same "
                "on both sides: set ROCKETMQ_TLS=true here, or write https in the card."
            )
            self._useless.add(address)
        return self._useless.issuperset(self.connection.addresses)

    async def _telemetry(self, endpoint: Endpoint, doing: str) -> None:
        """One telemetry stream, from its opening to its end."""
        stream = endpoint.stub.Telemetry(metadata=self.connection.metadata(self.client_id))
        self._stream = stream
        try:
            async with asyncio.timeout(SETTINGS_TIMEOUT) as opening:
                await stream.write(service.TelemetryCommand(settings=self._settings))
                while (command := await stream.read()) is not grpc.aio.EOF:
                    self._handle(command, doing)
                    if self._established.is_set():
                        # From now on the server may be silent for hours; heartbeats watch over the connection.
                        opening.reschedule(None)
            await _raise_status(stream)
        except TimeoutError:
            raise BrokerUnreachable(
                f"{doing} failed: {endpoint.address} takes connections and does not answer. Check that this is the "
                "gRPC port of a RocketMQ proxy, and that the proxy is not stuck.",
                transient=True,
            ) from None
        except grpc.RpcError as error:
            raise from_rpc_error(error, doing, endpoint.address) from error
        except asyncio.CancelledError:
            # gRPC raises it also where not this task, but only its stream was cancelled.
            reason, self._drop_reason = self._drop_reason, None
            if reason is None or _cancelled():
                raise
            raise reason from None
        finally:
            self._stream = None
            stream.cancel()

    def _handle(self, command: Any, doing: str) -> None:
        if command.HasField("status") and command.status.code:
            check(command.status, doing)
        if command.HasField("settings"):
            self._settings = _merged(self._settings, command.settings)
            self._failure = None
            self._established.set()
            if self._on_established is not None:
                self._on_established()
        elif self._on_command is not None:
            self._on_command(command)

    async def _heartbeat_loop(self) -> None:
        request = service.HeartbeatRequest(client_type=self._settings.client_type)
        if self._group is not None:
            request.group.CopyFrom(self.connection.resource(self._group))
        doing = f"The heartbeat of RocketMQ client {self.client_id}"
        missed = 0
        while True:
            await self._established.wait()
            try:
                answer = await self.call("Heartbeat", request, doing=doing, timeout=HEARTBEAT_TIMEOUT)
            except BrokerError as error:
                missed += 1
                logger.warning("%s", error)
                if missed < HEARTBEATS_MISSED:
                    continue
                self._drop_stream(error)
            else:
                # The proxy is there, whatever it says of its brokers.
                if answer.status.code == definition.Code.UNRECOGNIZED_CLIENT_TYPE:
                    # It has lost the settings although the stream looks alive.
                    self._drop_stream(from_status(answer.status, doing))
                elif answer.status.code != definition.Code.OK:
                    logger.debug("%s", from_status(answer.status, doing, known=True))
            missed = 0
            await asyncio.sleep(HEARTBEAT_INTERVAL)

    def _drop_stream(self, reason: BrokerError) -> None:
        """End the telemetry stream, so that it is opened anew: elsewhere when the reason is `BrokerUnreachable`."""
        if self._stream is not None:
            self._drop_reason = reason
            self._stream.cancel()


def _cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _raise_status(stream: Any) -> None:
    code = await stream.code()
    if code is not grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(
            code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=await stream.details() or "stream ended"
        )


def _merged(announced: Any, answered: Any) -> Any:
    """What to announce next time: the server's answer, with the parts it leaves out kept."""
    merged = definition.Settings()
    merged.CopyFrom(announced)
    if answered.HasField("backoff_policy"):
        merged.backoff_policy.CopyFrom(answered.backoff_policy)
    if answered.HasField("publishing"):
        merged.publishing.max_body_size = answered.publishing.max_body_size
        merged.publishing.validate_message_type = answered.publishing.validate_message_type
    if answered.HasField("subscription"):
        subscription = answered.subscription
        merged.subscription.fifo = subscription.fifo
        merged.subscription.lite_subscription_quota = subscription.lite_subscription_quota
        merged.subscription.max_lite_topic_size = subscription.max_lite_topic_size
    return merged
