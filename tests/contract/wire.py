"""A RocketMQ client with nothing between the test and the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import TYPE_CHECKING, Any

import grpc

from agentscope_rocketmq.rocketmq.protocol import MessagingServiceStub, definition, service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Code = definition.Code
Type = definition.MessageType
ANY = definition.FilterExpression(type=definition.FilterType.TAG, expression="*")
LIMIT = 30.0
# A proxy lets a poll wait for this at least.
LEAST_WAIT = 5.0
# What a poll may take beyond that. A real broker forgets a poll now and then (docs/rocketmq-client.md, "Polls that the
# broker forgets"): every client ends one that is overdue, and polls again.
OVERDUE = 5.0


def resource(name: str) -> Any:
    return definition.Resource(name=name)


def message(topic: str, body: bytes | str = b"x", **system: Any) -> Any:
    kind = "LITE" if "lite_topic" in system else "PRIORITY" if "priority" in system else "NORMAL"
    if "message_group" in system:
        kind = "FIFO"
    fields = {"message_id": uuid.uuid4().hex, "message_type": Type.Value(kind)} | system
    data = body.encode() if isinstance(body, str) else body
    made = definition.Message(topic=resource(topic), body=data, system_properties=definition.SystemProperties(**fields))
    made.system_properties.born_timestamp.GetCurrentTime()
    return made


def bodies(messages: list[Any]) -> list[str]:
    return [item.body.decode() for item in messages]


def offsets(messages: list[Any]) -> list[int]:
    return [item.system_properties.queue_offset for item in messages]


def attempts(messages: list[Any]) -> list[int]:
    return [item.system_properties.delivery_attempt for item in messages]


class Peer:
    """One client id: the calls of the protocol, one by one."""

    def __init__(self, endpoint: str) -> None:
        self._channel = grpc.aio.insecure_channel(
            endpoint,
            options=(
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                ("grpc.use_local_subchannel_pool", 1),
            ),
        )
        self.stub = MessagingServiceStub(self._channel)
        self.id = f"contract-{uuid.uuid4().hex}"
        self.commands: asyncio.Queue[Any] = asyncio.Queue()
        self._stream: Any = None
        self._listening: asyncio.Task[None] | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (
            ("x-mq-language", "PYTHON"),
            ("x-mq-protocol", "GRPC_V2"),
            ("x-mq-client-version", "5.1.2"),
            ("x-mq-client-id", self.id),
            ("x-mq-namespace", ""),
        )

    async def call(self, method: str, request: Any) -> Any:
        return await getattr(self.stub, method)(request, metadata=self.metadata, timeout=LIMIT)

    async def announce(self, client_type: str, group: str | None = None, topic: str | None = None) -> Any:
        """Open the telemetry stream and return the server's settings."""
        settings = definition.Settings(client_type=definition.ClientType.Value(client_type))
        if group is None:
            settings.publishing.SetInParent()
        else:
            settings.subscription.group.name = group
            settings.subscription.subscriptions.add(topic=resource(topic or ""), expression=ANY)
        return await self.announce_settings(settings)

    async def announce_settings(self, settings: Any) -> Any:
        self._stream = self.stub.Telemetry(metadata=self.metadata)
        await self._stream.write(service.TelemetryCommand(settings=settings))
        async with asyncio.timeout(LIMIT):
            command = await self._stream.read()
        if command is grpc.aio.EOF:
            raise grpc.aio.AioRpcError(
                await self._stream.code(), grpc.aio.Metadata(), grpc.aio.Metadata(), await self._stream.details()
            )
        self._listening = asyncio.create_task(self._listen())
        return command.settings

    async def _listen(self) -> None:
        while (command := await self._stream.read()) is not grpc.aio.EOF:
            self.commands.put_nowait(command)

    async def send(self, *messages: Any) -> Any:
        return await self.call("SendMessage", service.SendMessageRequest(messages=messages))

    async def send_lite(self, topic: str, lite_topic: str, *contents: object) -> None:
        for content in contents:
            answer = await self.send(message(topic, str(content), lite_topic=lite_topic))
            assert answer.status.code == Code.OK, answer.status

    async def poll(
        self,
        group: str,
        topic: str,
        *,
        count: int = 32,
        invisible: float = 20,
        wait: float = 5,
        tags: str = "*",
        attempt_id: str | None = None,
        auto_renew: bool = False,
        queue: int = -1,
    ) -> tuple[Any, list[Any]]:
        """One receive: its status, and its messages. It is repeated when it was forgotten."""
        request = service.ReceiveMessageRequest(
            group=resource(group),
            message_queue=definition.MessageQueue(topic=resource(topic), id=queue),
            filter_expression=definition.FilterExpression(type=definition.FilterType.TAG, expression=tags),
            batch_size=count,
            attempt_id=attempt_id or uuid.uuid4().hex,
            auto_renew=auto_renew,
        )
        request.invisible_duration.FromMilliseconds(int(invisible * 1000))
        request.long_polling_timeout.FromMilliseconds(int(wait * 1000))
        deadline = max(wait, LEAST_WAIT) + OVERDUE
        try:
            return await self._receive(request, deadline)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
        return await self._receive(request, deadline)

    async def _receive(self, request: Any, deadline: float) -> tuple[Any, list[Any]]:
        status, messages = None, []
        async for answer in self.stub.ReceiveMessage(request, metadata=self.metadata, timeout=deadline):
            kind = answer.WhichOneof("content")
            if kind == "message":
                messages.append(answer.message)
            elif kind == "status":
                status = answer.status
        return status, messages

    async def take(self, group: str, topic: str, least: int = 1, **options: Any) -> list[Any]:
        """Receive until there are so many. A real broker may answer a poll with less, or nothing, at times."""
        found: list[Any] = []
        async with asyncio.timeout(LIMIT):
            while len(found) < least:
                _, messages = await self.poll(group, topic, **options)
                found += messages
        return found

    async def ack(self, group: str, topic: str, messages: list[Any], *, name_lite_topic: bool = True) -> Any:
        request = service.AckMessageRequest(group=resource(group), topic=resource(topic))
        for item in messages:
            system = item.system_properties
            entry = request.entries.add(message_id=system.message_id, receipt_handle=system.receipt_handle)
            if system.HasField("lite_topic") and name_lite_topic:
                entry.lite_topic = system.lite_topic
        return await self.call("AckMessage", request)

    async def hide(self, group: str, topic: str, item: Any, seconds: float) -> Any:
        system = item.system_properties
        request = service.ChangeInvisibleDurationRequest(
            group=resource(group),
            topic=resource(topic),
            receipt_handle=system.receipt_handle,
            message_id=system.message_id,
        )
        if system.HasField("lite_topic"):
            request.lite_topic = system.lite_topic
        request.invisible_duration.FromMilliseconds(int(seconds * 1000))
        return await self.call("ChangeInvisibleDuration", request)

    async def sync(self, group: str, topic: str, action: str, names: list[str], **option: int) -> Any:
        request = service.SyncLiteSubscriptionRequest(
            action=definition.LiteSubscriptionAction.Value(action),
            topic=resource(topic),
            group=resource(group),
            lite_topic_set=names,
        )
        if option:
            request.offset_option.CopyFrom(definition.OffsetOption(**option))
        return (await self.call("SyncLiteSubscription", request)).status

    async def cut(self) -> None:
        """End the telemetry stream without a word."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        if self._stream is not None:
            self._stream.cancel()

    async def aclose(self) -> None:
        await self.cut()
        await self._channel.close()


@contextlib.asynccontextmanager
async def peer_of(
    broker: Any, client_type: str = "PRODUCER", group: str | None = None, topic: str | None = None
) -> AsyncIterator[Peer]:
    """A client of a broker that has announced itself."""
    peer = Peer(broker.endpoint)
    await peer.announce(client_type, group, topic)
    try:
        yield peer
    finally:
        await peer.aclose()
