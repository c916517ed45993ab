"""`apache.rocketmq.v2.MessagingService`: from the protocol's requests to the engine, and back."""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import TYPE_CHECKING, Any

import grpc

from agentscope_rocketmq.dev.embedded.checks import check_lite_topic, milliseconds, tags_of
from agentscope_rocketmq.dev.embedded.clients import Client
from agentscope_rocketmq.dev.embedded.reading import Terms
from agentscope_rocketmq.dev.embedded.refusal import OK, Code, Refused, not_modelled, status
from agentscope_rocketmq.dev.embedded.store import StoreFailed
from agentscope_rocketmq.rocketmq.protocol import MessagingServiceServicer, definition, service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from agentscope_rocketmq.dev.embedded.catalog import Group, Topic
    from agentscope_rocketmq.dev.embedded.clients import Clients
    from agentscope_rocketmq.dev.embedded.engine import Engine
    from agentscope_rocketmq.dev.embedded.lite import LiteClient
    from agentscope_rocketmq.dev.embedded.reading import Reader, Received
    from agentscope_rocketmq.dev.embedded.settings import Settings

__all__ = ["BROKER_NAME", "Servicer"]

logger = logging.getLogger(__name__)

BROKER_NAME = "embedded"

_MOST_MESSAGES = 32
_LONGEST_CLIENT_ID = 512
# A client that has not read what it asked for by then is given up, and its messages go to others.
_WRITE_TIMEOUT = 30.0
_Types = definition.MessageType
_ANY_TYPE = [kind for kind in _Types.values() if kind != _Types.MESSAGE_TYPE_UNSPECIFIED]


def _answers(response: Any) -> Callable[[Callable[..., Awaitable[Any]]], Callable[..., Awaitable[Any]]]:
    """Turn what a unary handler raises into a response of that type with a status: nothing else leaves the broker."""

    def decorate(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(handler)
        async def answer(self: Servicer, request: Any, context: Any) -> Any:
            try:
                return await handler(self, request, context, _client_id(context))
            except Exception as error:  # noqa: BLE001  (the outermost handler: logged and answered)
                return response(status=_status_of(error))

        return answer

    return decorate


class Servicer(MessagingServiceServicer):  # type: ignore[misc]
    """The calls of the protocol.

    Args:
        engine: Topics and messages.
        reader: Receiving and acking.
        clients: Telemetry streams.
        settings: The broker's settings.
        host: Host of the broker's endpoint, for clients that don't say how they reached it.
    """

    def __init__(self, engine: Engine, reader: Reader, clients: Clients, settings: Settings, *, host: str) -> None:
        self._engine = engine
        self._reader = reader
        self._clients = clients
        self._settings = settings
        self._host = host
        self.port = 0

    def close(self) -> None:
        """End what waits (long polls, telemetry streams) as if its time was over, so that nothing need be cut."""
        self._clients.close()
        self._reader.close()

    # ---- where things are ----

    @_answers(service.QueryRouteResponse)
    async def QueryRoute(self, request: Any, _context: Any, _client: str) -> Any:  # noqa: N802  (the protocol's names)
        """The queues of a topic."""
        topic = self._engine.catalog.topic(request.topic.name)
        # Official clients refuse by themselves to send what is not listed here. While any type may be the first, let
        # them send what is not modelled, too: the answer says more.
        kinds = [_Types.Value(topic.type)] if topic.type is not None else _ANY_TYPE
        response = service.QueryRouteResponse(status=OK)
        for number in range(topic.width):
            queue = self._message_queue(request, number)
            queue.accept_message_types.extend(kinds)
            response.message_queues.append(queue)
        return response

    @_answers(service.QueryAssignmentResponse)
    async def QueryAssignment(self, request: Any, _context: Any, _client: str) -> Any:  # noqa: N802
        """What a consumer polls: any queue of this broker, or each by itself where it reads them in order."""
        topic = self._engine.catalog.topic(request.topic.name)
        group = self._engine.catalog.group(request.group.name)
        in_order = group is not None and topic.type != "LITE" and group.reads_in_order(topic)
        response = service.QueryAssignmentResponse(status=OK)
        for number in range(topic.width) if in_order else (-1,):
            response.assignments.add().message_queue.CopyFrom(self._message_queue(request, number))
        return response

    def _message_queue(self, request: Any, number: int) -> Any:
        broker = definition.Broker(name=BROKER_NAME)
        if request.endpoints.addresses:
            # The client knows best how it reaches this broker (through a forwarded port, say).
            broker.endpoints.CopyFrom(request.endpoints)
        else:
            broker.endpoints.scheme = definition.AddressScheme.IPv4
            broker.endpoints.addresses.add(host=self._host, port=self.port)
        return definition.MessageQueue(
            topic=request.topic, id=number, permission=definition.Permission.READ_WRITE, broker=broker
        )

    # ---- clients ----

    async def Telemetry(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """A client's settings, and the broker's commands to it."""
        try:
            client = Client(_client_id(context))
        except Refused as refused:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, refused.text)
            return
        reading = asyncio.create_task(self._read_telemetry(client, requests), name=f"telemetry[{client.id}]")
        try:
            while (command := await client.outbox.get()) is not None:
                yield command
            if reading.done() and (error := reading.exception()) is not None:
                await self._abort(context, error)
        finally:
            # First what must happen: a second cancellation may end the waiting below.
            reading.cancel()
            if self._clients.gone(client):
                self._engine.subscriptions.forget(client.id)
            await asyncio.gather(reading, return_exceptions=True)

    async def _read_telemetry(self, client: Client, requests: AsyncIterator[Any]) -> None:
        try:
            async for command in requests:
                if command.WhichOneof("command") == "settings":
                    client.tell(self._clients.announce(client, command.settings, self._engine.catalog))
        finally:
            client.outbox.put_nowait(None)

    async def _abort(self, context: Any, error: BaseException) -> None:
        answer = _status_of(error)
        invalid = Code.BAD_REQUEST <= answer.code < Code.INTERNAL_ERROR
        code = grpc.StatusCode.INVALID_ARGUMENT if invalid else grpc.StatusCode.INTERNAL
        await context.abort(code, f"process client telemetryCommand failed. {answer.message}")

    @_answers(service.HeartbeatResponse)
    async def Heartbeat(self, _request: Any, _context: Any, client_id: str) -> Any:  # noqa: N802
        """Whether the broker still knows the client."""
        if self._clients.get(client_id) is None:
            raise Refused(Code.UNRECOGNIZED_CLIENT_TYPE, "cannot find client settings for this client")
        return service.HeartbeatResponse(status=OK)

    @_answers(service.NotifyClientTerminationResponse)
    async def NotifyClientTermination(self, _request: Any, _context: Any, client_id: str) -> Any:  # noqa: N802
        """A client leaves."""
        client = self._clients.get(client_id)
        if client is None:
            raise Refused(Code.UNRECOGNIZED_CLIENT_TYPE, "cannot find client settings for this client")
        self._clients.gone(client)
        self._engine.subscriptions.forget(client_id)
        return service.NotifyClientTerminationResponse(status=OK)

    # ---- sending ----

    @_answers(service.SendMessageResponse)
    async def SendMessage(self, request: Any, context: Any, _client: str) -> Any:  # noqa: N802
        """One message or several."""
        ids = [message.system_properties.message_id for message in request.messages]
        offsets = await self._engine.send(request.messages, peer=_address(context))
        response = service.SendMessageResponse(status=OK)
        for message_id, offset in zip(ids, offsets, strict=True):
            response.entries.add(status=OK, message_id=message_id, offset=offset)
        return response

    # ---- receiving ----

    async def ReceiveMessage(self, request: Any, context: Any) -> None:  # noqa: N802
        """Messages for a consumer, waited for if there are none."""
        received: list[Received] = []
        group: Group | None = None
        written = 0
        try:
            try:
                group, received = await self._receive(request, context)
                answer = OK if received else status(Code.MESSAGE_NOT_FOUND, "no new message")
            except Exception as error:  # noqa: BLE001  (the outermost handler: logged and answered)
                answer = _status_of(error)
            async with asyncio.timeout(_WRITE_TIMEOUT):
                await context.write(service.ReceiveMessageResponse(status=answer))
                for item in received:
                    await context.write(service.ReceiveMessageResponse(message=item.message))
                    written += 1
                end = service.ReceiveMessageResponse()
                end.delivery_timestamp.GetCurrentTime()
                await context.write(end)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the client does not read what it asked for")
        finally:
            if group is not None:
                self._reader.give_back(group, received[written:])

    async def _receive(self, request: Any, context: Any) -> tuple[Group, list[Received]]:
        client = self._clients.get(_client_id(context))
        if client is None:
            raise Refused(Code.INTERNAL_SERVER_ERROR, "no settings for this client: open a telemetry stream first")
        wait = self._polling_time(request, context)
        topic = self._engine.catalog.topic(request.message_queue.topic.name)
        group = self._engine.catalog.group(request.group.name)
        if group is None:
            name = request.group.name
            raise Refused(Code.CONSUMER_GROUP_NOT_FOUND, f"subscription group [{name}] does not exist")
        if request.batch_size < 1:
            raise Refused(Code.BAD_REQUEST, "the batch size must be positive")
        settings = self._settings
        invisible_ms = milliseconds(request.invisible_duration)
        if request.auto_renew:
            invisible_ms = int(settings.auto_renew_invisible * 1000)
        self._check_invisible(invisible_ms, least=settings.min_invisible)
        terms = Terms(
            count=min(request.batch_size, _MOST_MESSAGES),
            invisible_ms=invisible_ms,
            wait=wait,
            tags=tags_of(request.filter_expression),
            attempt_id=request.attempt_id,
            renew_for=client.id if request.auto_renew else None,
        )
        if client.settings.client_type == definition.ClientType.LITE_PUSH_CONSUMER:
            self._engine.catalog.check_bound(group, topic.name)
            lite = self._engine.subscriptions.client(client.id, group, topic.name)
            try:
                return group, await self._reader.receive_lite(lite, topic, terms)
            finally:
                self._engine.subscriptions.release(lite)
        self._engine.catalog.use_as_regular(group.name)
        if topic.type == "LITE":
            raise Refused(Code.ILLEGAL_TOPIC, f"topic {topic.name} is of type LITE: only lite consumers read it")
        return group, await self._reader.receive(group, topic, terms)

    def _polling_time(self, request: Any, context: Any) -> float:
        settings = self._settings
        remaining = context.time_remaining()
        wait = milliseconds(request.long_polling_timeout) / 1000
        if not request.HasField("long_polling_timeout"):
            wait = settings.max_long_poll
        wait = min(max(wait, settings.min_long_poll), settings.max_long_poll)
        if remaining is None or wait <= remaining:
            return float(wait)
        if remaining >= settings.min_long_poll:
            return float(remaining)
        raise Refused(
            Code.ILLEGAL_POLLING_TIME,
            "The deadline time remaining is not enough for polling, please check network condition",
        )

    def _check_invisible(self, invisible_ms: int, *, least: float) -> None:
        if invisible_ms < least * 1000:
            text = f"the invisibleTime is too small. min is {int(least * 1000)}"
            raise Refused(Code.ILLEGAL_INVISIBLE_TIME, text)
        most = int(self._settings.max_invisible * 1000)
        if invisible_ms > most:
            raise Refused(Code.ILLEGAL_INVISIBLE_TIME, f"the invisibleTime is too large. max is {most}")

    @_answers(service.AckMessageResponse)
    async def AckMessage(self, request: Any, _context: Any, _client: str) -> Any:  # noqa: N802
        """Messages are done; each gets its own answer."""
        topic, group = self._topic_and_group(request)
        if not request.entries:
            raise Refused(Code.BAD_REQUEST, "no message to ack")
        response = service.AckMessageResponse()
        codes = set()
        for entry in request.entries:
            answer = OK
            try:
                self._reader.ack(entry.receipt_handle, group, topic.name, entry.lite_topic)
            except Refused as refused:
                answer = status(refused.code, refused.text)
            codes.add(answer.code)
            response.entries.add(status=answer, message_id=entry.message_id, receipt_handle=entry.receipt_handle)
        await self._engine.store.committed()
        response.status.CopyFrom(status(codes.pop() if len(codes) == 1 else Code.MULTIPLE_RESULTS))
        return response

    @_answers(service.ChangeInvisibleDurationResponse)
    async def ChangeInvisibleDuration(self, request: Any, _context: Any, _client: str) -> Any:  # noqa: N802
        """A message is hidden for longer, or shorter."""
        topic, group = self._topic_and_group(request)
        invisible_ms = milliseconds(request.invisible_duration)
        self._check_invisible(invisible_ms, least=0)
        handle = self._reader.hide(
            request.receipt_handle,
            group,
            topic.name,
            request.lite_topic,
            invisible_ms=invisible_ms,
            suspend=request.suspend,
        )
        await self._engine.store.committed()
        return service.ChangeInvisibleDurationResponse(status=OK, receipt_handle=handle)

    @_answers(service.ForwardMessageToDeadLetterQueueResponse)
    async def ForwardMessageToDeadLetterQueue(self, request: Any, _context: Any, _client: str) -> Any:  # noqa: N802
        """A consumer gives a message up."""
        topic, group = self._topic_and_group(request)
        await self._reader.bury(request.receipt_handle, group, topic.name, request.lite_topic)
        await self._engine.store.committed()
        return service.ForwardMessageToDeadLetterQueueResponse(status=OK)

    def _topic_and_group(self, request: Any) -> tuple[Topic, Group]:
        topic = self._engine.catalog.topic(request.topic.name)
        group = self._engine.catalog.group(request.group.name)
        if group is None:
            raise Refused(Code.CONSUMER_GROUP_NOT_FOUND, f"subscription group [{request.group.name}] does not exist")
        return topic, group

    @_answers(service.SyncLiteSubscriptionResponse)
    async def SyncLiteSubscription(self, request: Any, _context: Any, client_id: str) -> Any:  # noqa: N802
        """A client's set of LiteTopics changes."""
        engine, names = self._engine, list(dict.fromkeys(request.lite_topic_set))
        known = engine.catalog.group(request.group.name)
        if known is not None and known.known:
            engine.catalog.check_bound(known, request.topic.name)
        group = engine.catalog.use_as_lite(request.group.name, request.topic.name)
        client = engine.subscriptions.client(client_id, group, request.topic.name)
        try:
            await self._sync(request, client, names)
        finally:
            engine.subscriptions.release(client)
        await engine.store.committed()
        return service.SyncLiteSubscriptionResponse(status=OK)

    async def _sync(self, request: Any, client: LiteClient, names: list[str]) -> None:
        engine = self._engine
        actions = definition.LiteSubscriptionAction
        if request.action == actions.COMPLETE_REMOVE:
            engine.subscriptions.forget(client.id)
        elif request.action == actions.PARTIAL_REMOVE:
            engine.subscriptions.remove(client, names)
        elif request.action in (actions.PARTIAL_ADD, actions.COMPLETE_ADD):
            partial = request.action == actions.PARTIAL_ADD
            wanted = client.names.union(names) if partial else names
            if len(wanted) > client.group.quota:
                text = f"lite subscription quota exceeded: {client.group.quota}"
                raise Refused(Code.LITE_SUBSCRIPTION_QUOTA_EXCEEDED, text)
            for name in names:
                check_lite_topic(name, self._settings)
            if not partial:
                engine.subscriptions.remove(client, client.names.difference(names))
            for name in names:
                if partial and request.HasField("offset_option"):
                    topic = engine.catalog.topics[request.topic.name]
                    await self._reader.seek(client.group, topic, name, request.offset_option)
                engine.subscriptions.add(client, name, take_over=partial)
        else:
            raise Refused(Code.BAD_REQUEST, f"unknown LiteSubscriptionAction: {request.action}")

    # ---- what only a real RocketMQ does ----

    @_answers(service.EndTransactionResponse)
    async def EndTransaction(self, _request: Any, _context: Any, _client: str) -> Any:  # noqa: N802
        """Not modelled."""
        raise not_modelled("Transactions")

    @_answers(service.RecallMessageResponse)
    async def RecallMessage(self, _request: Any, _context: Any, _client: str) -> Any:  # noqa: N802
        """Not modelled."""
        raise not_modelled("Delayed messages and their recall")

    async def PullMessage(self, _request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Not modelled, nor is it by the proxy of 5.5.0."""
        await _unimplemented(context)
        yield

    async def UpdateOffset(self, _request: Any, context: Any) -> None:  # noqa: N802
        """Not modelled, nor is it by the proxy of 5.5.0."""
        await _unimplemented(context)

    async def GetOffset(self, _request: Any, context: Any) -> None:  # noqa: N802
        """Not modelled, nor is it by the proxy of 5.5.0."""
        await _unimplemented(context)

    async def QueryOffset(self, _request: Any, context: Any) -> None:  # noqa: N802
        """Not modelled, nor is it by the proxy of 5.5.0."""
        await _unimplemented(context)


async def _unimplemented(context: Any) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, not_modelled("Pull consumers and their offsets").text)


def _client_id(context: Any) -> str:
    for name, value in context.invocation_metadata() or ():
        if name == "x-mq-client-id" and value:
            if len(value) > _LONGEST_CLIENT_ID:
                raise Refused(Code.BAD_REQUEST, f"client id exceed the max size {_LONGEST_CLIENT_ID}")
            return str(value)
    raise Refused(Code.CLIENT_ID_REQUIRED, "client id cannot be empty")


def _address(context: Any) -> str:
    # ipv4:127.0.0.1:50000
    return str(context.peer()).partition(":")[2]


def _status_of(error: BaseException) -> Any:
    if isinstance(error, Refused):
        return status(error.code, error.text)
    if isinstance(error, StoreFailed):
        return status(Code.INTERNAL_SERVER_ERROR, str(error))
    logger.error("The embedded broker failed at a request", exc_info=error)
    return status(Code.INTERNAL_SERVER_ERROR, "the embedded broker failed at this request; its log says why")
