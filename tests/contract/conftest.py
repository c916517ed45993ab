"""The contract suite runs every test on the embedded broker and on a real Apache RocketMQ.

Where they differ on purpose, the difference has a name and a reason in `DIFFERENCES`, and the test says what each does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from agentscope_rocketmq.dev import DevBroker
from tests.conftest import Engine, Names, new_topic
from tests.contract.wire import Peer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

EMBEDDED, APACHE = "embedded", "apache"

DIFFERENCES = {
    "handle-junk": "Apache answers a string that is no receipt handle with an internal error; embedded says what it is.",
    "lite-ack-unnamed": "Apache answers OK, or an internal error, to an ack that does not name its LiteTopic, and does "
    "nothing; embedded refuses it.",
    "seek-by-time": "Apache takes a timestamp and ignores it; embedded seeks.",
    "seek-to-committed": "Apache ignores a seek to where the group is already, and the batch that is out keeps "
    "blocking; embedded delivers at once.",
    "batch-entries": "Apache answers a batch with one entry that joins the ids; embedded with one entry a message.",
    "after-unsubscribing": "Apache may hand out one more batch of a LiteTopic that was just unsubscribed; embedded not.",
}


@dataclass(frozen=True)
class Target:
    """The broker under test."""

    name: str
    endpoint: str
    namesrv: str

    def differs(self, difference: str) -> bool:
        """Whether this is the embedded broker where both differ in that named way."""
        assert difference in DIFFERENCES
        return self.name == EMBEDDED


class Make(Protocol):
    async def __call__(
        self, message_type: str = "NORMAL", *, group_attributes: Mapping[str, str] | None = None, queues: int = 8
    ) -> Names: ...


@pytest.fixture(params=(EMBEDDED, APACHE))
async def target(request: pytest.FixtureRequest) -> AsyncIterator[Target]:
    if request.param == APACHE:
        engine: Engine = request.getfixturevalue("engine")
        yield Target(APACHE, engine.endpoint, engine.namesrv)
        return
    async with DevBroker(strict=True) as broker:
        yield Target(EMBEDDED, broker.endpoint, broker.namesrv)


@pytest.fixture
def make(target: Target) -> Make:
    """Makes a topic and its group, as `make_topic` of the whole suite does."""

    async def make(message_type: str = "NORMAL", **options: Any) -> Names:
        return await new_topic(Engine(target.endpoint, target.namesrv), message_type, **options)

    return make


@pytest.fixture
async def peer(target: Target) -> AsyncIterator[Callable[[], Peer]]:
    """Makes clients; each has its own id."""
    peers: list[Peer] = []

    def new() -> Peer:
        peers.append(Peer(target.endpoint))
        return peers[-1]

    yield new
    for one in peers:
        await one.aclose()


@pytest.fixture
async def producer(peer: Callable[[], Peer]) -> Peer:
    one = peer()
    await one.announce("PRODUCER")
    return one


@pytest.fixture
def consumer(peer: Callable[[], Peer]) -> Callable[[Names], Awaitable[Peer]]:
    """Makes an ordinary consumer of a topic and group."""

    async def consumer(names: Names) -> Peer:
        one = peer()
        await one.announce("SIMPLE_CONSUMER", names.group, names.topic)
        return one

    return consumer


@pytest.fixture
def lite_consumer(peer: Callable[[], Peer]) -> Callable[[Names], Awaitable[Peer]]:
    """Makes a lite consumer of a LITE topic and group, without subscriptions."""

    async def consumer(names: Names) -> Peer:
        one = peer()
        await one.announce("LITE_PUSH_CONSUMER", names.group, names.topic)
        return one

    return consumer
