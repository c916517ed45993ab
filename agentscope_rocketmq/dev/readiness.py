"""Does RocketMQ really answer? A LITE topic is provisioned and a LiteTopic of it written and read, as a client would.

An open port says little: the proxy listens before it knows a broker. What is used here is the bare protocol, not this
package's client, so that a broker starts whatever state that client is in.
"""

from __future__ import annotations

import asyncio
import queue
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc

from agentscope_rocketmq.errors import BrokerError, BrokerUnreachable
from agentscope_rocketmq.rocketmq.admin import Admin, GroupSettings, TopicSettings
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.protocol import MessagingServiceStub, definition, service
from agentscope_rocketmq.rocketmq.status import check

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentscope_rocketmq.config import RocketMQConfig

__all__ = ["broker_answers", "lite_topic_answers", "wait_until"]

_PROBE_TOPIC = "DevReadinessProbe"
_PROBE_GROUP = "DevReadinessProbeGroup"

_RETRY_INTERVAL = 0.1
_ATTEMPT_TIMEOUT = 10.0
# The least that a broker accepts as `lite.topic.expiration`, in minutes: each start leaves one LiteTopic behind.
_EXPIRATION = "15"


def wait_until(
    attempt: Callable[[], None], *, deadline: float, still_possible: Callable[[], None] = lambda: None
) -> None:
    """Try until it works.

    Args:
        attempt: Raises a `BrokerError` while it does not work yet.
        deadline: `time.monotonic()` at which the last error is raised.
        still_possible: Called before each attempt; raises when there is nothing to wait for any more.
    """
    while True:
        still_possible()
        try:
            attempt()
        except BrokerError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_RETRY_INTERVAL)
        else:
            return


def broker_answers(config: RocketMQConfig, broker: str) -> None:
    """Provision the readiness topic and group on a broker, and ask the name server whether that broker registered.

    A broker that found no name server at its start tries again only 10 s later, but a new topic makes it register
    at once; so this may be asked while both are still coming up.

    Args:
        config: Where the name server is, and credentials.
        broker: `host:port` of the broker.

    Raises:
        BrokerError: It does not answer or has not registered (yet).
    """

    async def ask() -> None:
        async with Admin.from_config(config) as admin:
            attributes = {"message.type": "LITE", "lite.topic.expiration": _EXPIRATION}
            await admin.put_topic(broker, TopicSettings(_PROBE_TOPIC, attributes))
            await admin.put_group(broker, GroupSettings(_PROBE_GROUP, {"lite.bind.topic": _PROBE_TOPIC}))
            if broker not in (await admin.brokers()).values():
                raise BrokerUnreachable(f"Broker {broker} has not registered at the name server {config.namesrv} yet.")

    # In a thread of its own: the launcher is synchronous and may be called where a loop runs already.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="readiness") as thread:
        thread.submit(lambda: asyncio.run(ask())).result()


def lite_topic_answers(config: RocketMQConfig) -> None:
    """Send a message to a new LiteTopic of the readiness topic and receive it.

    Raises:
        BrokerError: Some step does not work (yet).
    """
    secret = config.secret_key.get_secret_value() if config.secret_key is not None else None
    # Opens no channel: it is asked for signed metadata only.
    signer = Connection(config.endpoint, access_key=config.access_key, secret_key=secret)
    client_id = f"readiness@{uuid.uuid4().hex}"
    with grpc.insecure_channel(config.endpoints[0], options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            _send_and_receive(_Caller(MessagingServiceStub(channel), lambda: signer.metadata(client_id)))
        except grpc.RpcError as error:
            raise BrokerUnreachable(
                f"The proxy at {config.endpoint} failed the readiness check: {error}", transient=True
            ) from error


class _Caller:
    """The protocol's calls as one client."""

    def __init__(self, stub: Any, metadata: Callable[[], Any]) -> None:
        self._stub = stub
        self._metadata = metadata

    def __call__(self, method: str, request: Any) -> Any:
        return getattr(self._stub, method)(request, metadata=self._metadata(), timeout=_ATTEMPT_TIMEOUT)


def _send_and_receive(call: _Caller) -> None:
    topic = definition.Resource(name=_PROBE_TOPIC)
    group = definition.Resource(name=_PROBE_GROUP)
    lite_topic = body = uuid.uuid4().hex
    settings = definition.Settings(client_type=definition.ClientType.LITE_PUSH_CONSUMER)
    settings.subscription.group.CopyFrom(group)
    settings.subscription.subscriptions.add(
        topic=topic, expression=definition.FilterExpression(type=definition.FilterType.TAG, expression="*")
    )
    # The proxy serves a client as long as its telemetry stream is open: the queue keeps it open until None.
    commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
    commands.put(service.TelemetryCommand(settings=settings))
    stream = call("Telemetry", iter(commands.get, None))
    try:
        next(stream)
        answer = call(
            "SyncLiteSubscription",
            service.SyncLiteSubscriptionRequest(
                action=definition.LiteSubscriptionAction.PARTIAL_ADD,
                topic=topic,
                group=group,
                lite_topic_set=[lite_topic],
            ),
        )
        check(answer.status, "Subscribing a LiteTopic")
        check(call("SendMessage", _message(topic, lite_topic, body)).status, "Sending to a LiteTopic")
        _receive(call, topic, group, lite_topic, body.encode())
        call("NotifyClientTermination", service.NotifyClientTerminationRequest(group=group))
    finally:
        commands.put(None)
        stream.cancel()


def _message(topic: Any, lite_topic: str, body: str) -> Any:
    message = definition.Message(topic=topic, body=body.encode())
    properties = message.system_properties
    properties.message_id = f"01{uuid.uuid4().hex.upper()}"
    properties.message_type = definition.MessageType.LITE
    properties.lite_topic = lite_topic
    properties.body_encoding = definition.Encoding.IDENTITY
    properties.born_timestamp.GetCurrentTime()
    return service.SendMessageRequest(messages=[message])


def _receive(call: _Caller, topic: Any, group: Any, lite_topic: str, body: bytes) -> None:
    route = call("QueryRoute", service.QueryRouteRequest(topic=topic))
    check(route.status, "Looking up the readiness topic")
    request = service.ReceiveMessageRequest(
        group=group,
        message_queue=definition.MessageQueue(topic=topic, id=-1, broker=route.message_queues[0].broker),
        filter_expression=definition.FilterExpression(type=definition.FilterType.TAG, expression="*"),
        batch_size=1,
        attempt_id=uuid.uuid4().hex,
    )
    request.invisible_duration.FromSeconds(30)
    request.long_polling_timeout.FromSeconds(5)
    for answer in call("ReceiveMessage", request):
        if answer.WhichOneof("content") == "status":
            check(answer.status, "Receiving from a LiteTopic")
        elif answer.WhichOneof("content") == "message" and answer.message.body == body:
            acknowledgement = service.AckMessageRequest(group=group, topic=topic)
            acknowledgement.entries.add(
                message_id=answer.message.system_properties.message_id,
                receipt_handle=answer.message.system_properties.receipt_handle,
                lite_topic=lite_topic,
            )
            check(call("AckMessage", acknowledgement).status, "Acking a message of a LiteTopic")
            return
    raise BrokerError("The message sent to a LiteTopic did not come back.", transient=True)
