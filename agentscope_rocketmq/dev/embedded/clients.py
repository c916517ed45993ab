"""Connected clients: their settings, and the telemetry streams over which the broker speaks to them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.dev.embedded.refusal import OK, Code, Refused
from agentscope_rocketmq.rocketmq.protocol import definition, service

if TYPE_CHECKING:
    from agentscope_rocketmq.dev.embedded.catalog import Catalog
    from agentscope_rocketmq.dev.embedded.settings import Settings

__all__ = ["Client", "Clients"]

# What a client has not read yet; one that is further behind is cut off and will ask for everything anew.
_MOST_UNREAD = 20_000
_BATCH_SIZE = 32
_MILLISECONDS_BETWEEN_ATTEMPTS = tuple(
    seconds * 1000
    for seconds in (1, 5, 10, 30, 60, 120, 180, 240, 300, 360, 420, 480, 540, 600, 1200, 1800, 3600, 7200)
)
_REGULAR = (definition.ClientType.PUSH_CONSUMER, definition.ClientType.SIMPLE_CONSUMER)


class Client:
    """One telemetry stream.

    Attributes:
        id: The client's id.
        settings: Its settings as the broker answered them; None before it has sent any.
        outbox: Commands for it; None ends the stream.
    """

    def __init__(self, client_id: str) -> None:
        self.id = client_id
        self.settings: Any = None
        self.outbox: asyncio.Queue[Any] = asyncio.Queue()

    def tell(self, command: Any) -> None:
        """Send it a command; or, when it does not read, end its stream."""
        if self.outbox.qsize() < _MOST_UNREAD:
            self.outbox.put_nowait(command)
        elif self.outbox.qsize() == _MOST_UNREAD:
            self.outbox.put_nowait(None)


class Clients:
    """All clients that have a telemetry stream.

    Args:
        settings: The broker's settings.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._clients: dict[str, Client] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def get(self, client_id: str) -> Client | None:
        """A client that has sent its settings."""
        return self._clients.get(client_id)

    def is_alive(self, client_id: str) -> bool:
        """Whether that client has a stream."""
        return client_id in self._clients

    def announce(self, client: Client, announced: Any, catalog: Catalog) -> Any:
        """Take a client's settings.

        Args:
            client: Its stream.
            announced: The protocol's `Settings` as it sent them.
            catalog: Topics and groups.

        Returns:
            The `TelemetryCommand` to answer with.

        Raises:
            Refused: They are not acceptable.
        """
        kind = announced.WhichOneof("pub_sub")
        if kind is None:
            raise Refused(Code.BAD_REQUEST, "there is no publishing or subscription data in settings")
        answer = definition.Settings()
        answer.CopyFrom(announced)
        answer.metric.SetInParent()
        if kind == "publishing":
            self._fill_publishing(answer)
        else:
            self._fill_subscription(answer, catalog)
        client.settings = answer
        # A client that reconnects may do so before its old stream is known to be dead.
        self._clients[client.id] = client
        return service.TelemetryCommand(status=OK, settings=answer)

    def gone(self, client: Client) -> bool:
        """A stream has ended; says whether the client has no other, also when it said good-bye before."""
        if self._clients.get(client.id, client) is not client:
            return False
        self._clients.pop(client.id, None)
        return True

    def evict(self, client_id: str, lite_topic: str) -> None:
        """Tell a client that it reads a LiteTopic no longer."""
        client = self._clients.get(client_id)
        if client is not None:
            command = service.NotifyUnsubscribeLiteCommand(lite_topic=lite_topic)
            client.tell(service.TelemetryCommand(notify_unsubscribe_lite_command=command))

    def close(self) -> None:
        """End all streams."""
        for client in self._clients.values():
            client.outbox.put_nowait(None)

    def _fill_publishing(self, answer: Any) -> None:
        answer.publishing.max_body_size = self._settings.max_body_bytes
        answer.publishing.validate_message_type = True
        answer.backoff_policy.max_attempts = 3
        backoff = answer.backoff_policy.exponential_backoff
        backoff.initial.FromMilliseconds(10)
        backoff.max.FromMilliseconds(1000)
        backoff.multiplier = 2

    def _fill_subscription(self, answer: Any, catalog: Catalog) -> None:
        subscription = answer.subscription
        name, topics = subscription.group.name, [entry.topic.name for entry in subscription.subscriptions]
        if answer.client_type == definition.ClientType.LITE_PUSH_CONSUMER:
            if not topics:
                raise Refused(Code.BAD_REQUEST, "a lite consumer must say which topic it subscribes")
            group = catalog.use_as_lite(name, topics[0])
            ordered = bool(group.ordered)  # whether its listener is called one message at a time
        elif answer.client_type in _REGULAR:
            group = catalog.use_as_regular(name)
            known = [catalog.topics[topic] for topic in topics if topic in catalog.topics]
            ordered = bool(group.ordered) or any(group.reads_in_order(topic) for topic in known)
        else:
            raise Refused(
                Code.UNRECOGNIZED_CLIENT_TYPE,
                f"Client type is not consumer, type: {definition.ClientType.Name(answer.client_type)}"
                if answer.client_type in definition.ClientType.values()
                else "Client type is not known",
            )
        subscription.fifo = ordered
        subscription.receive_batch_size = _BATCH_SIZE
        subscription.long_polling_timeout.FromMilliseconds(int(self._settings.max_long_poll * 1000))
        subscription.lite_subscription_quota = group.quota
        subscription.max_lite_topic_size = self._settings.max_lite_topic_length
        answer.backoff_policy.max_attempts = group.max_attempts
        answer.backoff_policy.customized_backoff.SetInParent()
        del answer.backoff_policy.customized_backoff.next[:]
        for pause in _MILLISECONDS_BETWEEN_ATTEMPTS:
            answer.backoff_policy.customized_backoff.next.add().FromMilliseconds(pause)
