"""The three calls that concern LiteTopics: which are read, what is acked, and what goes back at once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.errors import BrokerError, ClosedError
from agentscope_rocketmq.rocketmq.client import CALL_TIMEOUT, retried
from agentscope_rocketmq.rocketmq.connection import user_agent
from agentscope_rocketmq.rocketmq.protocol import definition, service
from agentscope_rocketmq.rocketmq.status import check, from_status

if TYPE_CHECKING:
    from collections.abc import Collection

    from agentscope_rocketmq.rocketmq.client import Client
    from agentscope_rocketmq.rocketmq.connection import Connection
    from agentscope_rocketmq.rocketmq.litetopic import Position
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage

__all__ = ["LiteCalls", "lite_settings"]

logger = logging.getLogger(__name__)

# What a consumer may not have is handed out again after this: at once, but not 0, which the broker takes for unset.
GIVE_BACK_AFTER = 0.01


class LiteCalls:
    """The calls of one consumer of one LITE topic.

    Args:
        client: Makes them.
        topic: The LITE topic, without namespace.
        group: The consumer's group, without namespace.

    Attributes:
        accepted: Whether the broker has accepted topic and group before: what it does not know now is away.
    """

    def __init__(self, client: Client, *, topic: str, group: str) -> None:
        self.accepted = False
        self._client = client
        self._connection = client.connection
        self._topic = topic
        self._group = group

    async def sync(
        self,
        action: str,
        names: Collection[str],
        at: Position | None = None,
        *,
        timeout: float = CALL_TIMEOUT,  # noqa: ASYNC109
    ) -> None:
        """Change the set of LiteTopics that the client reads.

        Args:
            action: The protocol's `LiteSubscriptionAction`: `PARTIAL_ADD`, `PARTIAL_REMOVE`, `COMPLETE_ADD`, ….
            names: The LiteTopics.
            at: Where to begin in those that are added; None for the committed offset.
            timeout: Seconds for the call.

        Raises:
            BrokerError: As the broker says.
        """
        request = service.SyncLiteSubscriptionRequest(
            action=definition.LiteSubscriptionAction.Value(action),
            topic=self._connection.resource(self._topic),
            group=self._connection.resource(self._group),
            lite_topic_set=names,
        )
        if at is not None:
            setattr(request.offset_option, at.option, at.value)
        doing = f"Subscribing LiteTopics of {self._topic!r} in group {self._group!r}"
        answer = await self._client.call("SyncLiteSubscription", request, doing=doing, timeout=timeout)
        check(answer.status, doing, known=self.accepted)

    async def ack(self, messages: list[ReceivedMessage], timeout: float) -> BrokerError | None:  # noqa: ASYNC109
        """Ack these; those that may succeed later stay in the list, with the failure of one of them as answer."""
        request = service.AckMessageRequest(
            group=self._connection.resource(self._group), topic=self._connection.resource(self._topic)
        )
        for message in messages:
            request.entries.add(
                message_id=message.message_id, receipt_handle=message.receipt_handle, lite_topic=message.lite_topic
            )
        doing = f"Acking {len(messages)} messages of {self._topic!r}"
        answer = await self._client.call("AckMessage", request, doing=doing, timeout=timeout)
        if not answer.entries:
            check(answer.status, doing, known=True)
        failures: dict[str, BrokerError] = {}
        for entry in answer.entries:
            if entry.status.code != definition.Code.OK:
                failure = from_status(entry.status, doing, known=True)
                logger.debug("Message %s: %s", entry.message_id, failure)
                if failure.transient:
                    failures[entry.message_id] = failure
        messages[:] = [message for message in messages if message.message_id in failures]
        return next(iter(failures.values()), None)

    async def give_back(self, message: ReceivedMessage, receipt_handle: str, *, timeout: float) -> None:  # noqa: ASYNC109
        """Let the LiteTopic's owner have the batch of this message at once, rather than when it is visible again.

        Args:
            message: Any message of the batch.
            receipt_handle: The one it had when it was decided: it may be taken from the message meanwhile.
            timeout: Seconds to keep trying.
        """
        request = service.ChangeInvisibleDurationRequest(
            group=self._connection.resource(self._group),
            topic=self._connection.resource(self._topic),
            receipt_handle=receipt_handle,
            message_id=message.message_id,
            lite_topic=message.lite_topic,
            suspend=True,  # the batch as a whole, and it does not count as a delivery
        )
        request.invisible_duration.FromMilliseconds(int(GIVE_BACK_AFTER * 1000))
        doing = f"Giving back a batch of LiteTopic {message.lite_topic!r} of {self._topic!r}"

        async def send_once(seconds: float) -> None:
            within = min(CALL_TIMEOUT, seconds)
            answer = await self._client.call("ChangeInvisibleDuration", request, doing=doing, timeout=within)
            check(answer.status, doing, known=True)

        try:
            await retried(send_once, timeout=timeout)
        except (BrokerError, ClosedError) as error:
            logger.warning("%s", error)


def lite_settings(connection: Connection, topic: str, group: str) -> Any:
    """The protocol's `Settings` of a consumer of LiteTopics."""
    settings = definition.Settings(
        client_type=definition.ClientType.LITE_PUSH_CONSUMER,
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
