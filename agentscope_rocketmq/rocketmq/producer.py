"""Sending: one message at a time, flow control and outages waited out up to a deadline."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from agentscope_rocketmq.errors import BrokerError, MessageTooLarge
from agentscope_rocketmq.rocketmq.client import Client, retried
from agentscope_rocketmq.rocketmq.connection import user_agent
from agentscope_rocketmq.rocketmq.message import encode
from agentscope_rocketmq.rocketmq.protocol import definition, service
from agentscope_rocketmq.rocketmq.status import check

if TYPE_CHECKING:
    from agentscope_rocketmq.rocketmq.connection import Connection
    from agentscope_rocketmq.rocketmq.message import Message

__all__ = ["Producer", "SendReceipt"]

# One try of one send. A broker that is up answers in milliseconds; the caller's deadline is what counts.
TRY_TIMEOUT = 5.0
# Above this, compressing and copying a body would hold up the event loop noticeably.
_OFF_LOOP_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class SendReceipt:
    """What the broker answered to a send.

    Attributes:
        message_id: Id of the message.
        offset: Its offset in its queue; for LITE messages that of the parent topic, not of the LiteTopic.
    """

    message_id: str
    offset: int


class Producer:
    """Sends messages of any topic of a connection's namespace.

    Delivery is at least once: a send that got no answer is tried again with the same message id until the deadline,
    so the broker may hold it twice. Sends that are in flight at the same time may be stored in any order; who needs
    order awaits each send before the next.

    Args:
        connection: The cluster to send to.
        connect_timeout: Seconds that `start` may take.
    """

    def __init__(self, connection: Connection, *, connect_timeout: float = 10.0) -> None:
        settings = definition.Settings(
            client_type=definition.ClientType.PRODUCER,
            access_point=connection.endpoints_message(),
            publishing=definition.Publishing(),
            user_agent=user_agent(),
        )
        settings.request_timeout.FromMilliseconds(int(TRY_TIMEOUT * 1000))
        self._connection = connection
        self._connect_timeout = connect_timeout
        self._client = Client(connection, settings)
        self._sent_to: set[str] = set()

    @property
    def max_body_size(self) -> int:
        """Largest body in bytes, as sent (compressed), that the server takes; 4 MiB until it has said so."""
        return self._client.server_settings.publishing.max_body_size or 4 * 1024 * 1024

    async def start(self) -> None:
        """Connect.

        Raises:
            BrokerError: Nobody answers, or the credentials are refused.
        """
        await self._client.start(timeout=self._connect_timeout)

    async def send(self, message: Message, *, timeout: float = 30.0) -> SendReceipt:  # noqa: ASYNC109
        """Send one message and wait until the broker has stored it.

        Flow control, restarts of broker or proxy, and answers that did not come are tried again until the deadline. A
        topic that was sent to before and is unknown now is taken for one whose brokers are away, and waited for.

        Args:
            message: What to send.
            timeout: Seconds until the broker must have taken it.

        Returns:
            The broker's receipt.

        Raises:
            BrokerError: A typed subclass: at once when trying again can't help (unknown topic, body too large, not
                authorised, …), else the last failure when the deadline is over. After `BrokerUnreachable` the
                message may have been stored all the same.
        """
        resource = self._connection.resource(message.topic)
        if len(message.body) > _OFF_LOOP_BYTES:
            encoded = await asyncio.to_thread(encode, message, resource, room=self.max_body_size)
        else:
            encoded = encode(message, resource, room=self.max_body_size)
        doing = f"Sending to topic {message.topic!r}" + (
            f", LiteTopic {message.lite_topic!r}" if message.lite_topic is not None else ""
        )
        if len(encoded.body) > self.max_body_size:
            raise MessageTooLarge(
                f"{doing} failed before anything was sent: the body has {len(message.body)} bytes "
                f"({len(encoded.body)} compressed), the server takes {self.max_body_size}. Send less, or raise "
                "maxMessageSize on the brokers and proxies.",
                code=int(definition.Code.MESSAGE_BODY_TOO_LARGE),
            )
        request = service.SendMessageRequest(messages=[encoded])

        async def send_once(seconds: float) -> SendReceipt:
            answer = await self._client.call("SendMessage", request, doing=doing, timeout=min(TRY_TIMEOUT, seconds))
            known = message.topic in self._sent_to
            check(answer.entries[0].status if answer.entries else answer.status, doing, known=known)
            check(answer.status, doing, known=known)
            self._sent_to.add(message.topic)
            return SendReceipt(answer.entries[0].message_id, answer.entries[0].offset)

        try:
            return await retried(send_once, timeout=timeout)
        except BrokerError as error:
            if not error.transient:
                raise
            raise type(error)(
                f"{error} (Tried for {timeout:g} s, the send time limit.)", code=error.code, transient=True
            ) from error

    async def aclose(self) -> None:
        """Leave. Repeated calls are safe."""
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
