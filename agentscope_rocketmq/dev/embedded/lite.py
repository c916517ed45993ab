"""Who reads which LiteTopics: one set a client, and for each client what of it may have something to deliver."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentscope_rocketmq.dev.embedded.refusal import Code, Refused
from agentscope_rocketmq.dev.embedded.waiting import Waiters

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from agentscope_rocketmq.dev.embedded.catalog import Group

__all__ = ["LiteClient", "Subscriptions"]


@dataclass(slots=True, eq=False)
class LiteClient:
    """What one client reads.

    Attributes:
        id: The client's id.
        group: Its group.
        topic: Name of the LITE topic.
        names: The LiteTopics subscribed.
        ready: Those of them that may have something to deliver, the longest waiting first.
        waiters: Its polls.
    """

    id: str
    group: Group
    topic: str
    names: set[str] = field(default_factory=set)
    ready: OrderedDict[str, None] = field(default_factory=OrderedDict)
    waiters: Waiters = field(default_factory=Waiters)

    def offer(self, name: str) -> None:
        """That LiteTopic may have something for this client."""
        if name in self.names:
            self.ready[name] = None
            self.waiters.wake()

    def next_ready(self) -> Iterator[str]:
        """The LiteTopics to look into now, each once; what the caller does not get to stays ready."""
        for _ in range(len(self.ready)):
            name, _ = self.ready.popitem(last=False)
            if name in self.names:
                yield name


class Subscriptions:
    """The subscriptions of all lite clients.

    Args:
        evicted: Called with a client's id and a LiteTopic that another client took over.
    """

    def __init__(self, evicted: Callable[[str, str], None]) -> None:
        self._evicted = evicted
        self._clients: dict[str, LiteClient] = {}
        self._readers: dict[tuple[str, str], list[LiteClient]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._readers.values()))

    def client(self, client_id: str, group: Group, topic: str) -> LiteClient:
        """A client, new or known.

        Raises:
            Refused: It reads for another group already.
        """
        client = self._clients.get(client_id)
        if client is None:
            client = self._clients[client_id] = LiteClient(client_id, group, topic)
        if client.group is not group or client.topic != topic:
            raise Refused(
                Code.ILLEGAL_CONSUMER_GROUP,
                f"client {client_id} reads LiteTopics for group {client.group.name} already: one client id serves one",
            )
        return client

    def add(self, client: LiteClient, name: str, *, take_over: bool) -> None:
        """Subscribe a client to a LiteTopic.

        Args:
            client: The client.
            name: The LiteTopic.
            take_over: In an exclusive group, whoever of the group reads it loses it and is told.
        """
        readers = self._readers.setdefault((client.topic, name), [])
        if take_over and client.group.exclusive:
            for other in [other for other in readers if other.group is client.group and other is not client]:
                self._remove(other, name)
                self._evicted(other.id, name)
            readers = self._readers.setdefault((client.topic, name), [])
        if name not in client.names:
            self._clients[client.id] = client
            client.names.add(name)
            readers.append(client)
            client.offer(name)

    def remove(self, client: LiteClient, names: Collection[str]) -> None:
        """Unsubscribe a client from LiteTopics; those it does not read are ignored."""
        for name in names:
            self._remove(client, name)

    def forget(self, client_id: str) -> None:
        """A client is gone, or dropped its whole set."""
        client = self._clients.get(client_id)
        if client is not None:
            self.remove(client, list(client.names))
            self.release(client)

    def forget_all_but(self, alive: Callable[[str], bool]) -> None:
        """Forget clients that are not there, whose end nobody will tell: they subscribed without a telemetry stream."""
        for client_id in [client_id for client_id in self._clients if not alive(client_id)]:
            self.forget(client_id)

    def release(self, client: LiteClient) -> None:
        """Forget a client that neither reads nor polls; to be called when a call of it has ended."""
        if not client.names and not len(client.waiters) and self._clients.get(client.id) is client:
            del self._clients[client.id]

    def offer(self, topic: str, name: str, *, group: Group | None = None) -> None:
        """A LiteTopic may have something to deliver.

        Args:
            topic: Its topic.
            name: The LiteTopic.
            group: Only for this group; None for all.
        """
        for client in self._readers.get((topic, name), ()):
            if group is None or client.group is group:
                client.offer(name)

    def _remove(self, client: LiteClient, name: str) -> None:
        if name not in client.names:
            return
        client.names.discard(name)
        client.ready.pop(name, None)
        readers = self._readers[client.topic, name]
        readers.remove(client)
        if not readers:
            del self._readers[client.topic, name]
