"""The contract suite: what a broker does, said once and run on every engine.

Where they differ on purpose, the difference has a name and a reason in `DIFFERENCES`, and the test says what each does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conftest import EMBEDDED, Engine
from tests.contract.wire import Peer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.conftest import MakeTopic, Names

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


class Target(Engine):
    """The broker under test."""

    def differs(self, difference: str) -> bool:
        """Whether this is the embedded broker where both differ in that named way."""
        assert difference in DIFFERENCES
        return self.name == EMBEDDED


@pytest.fixture
def target(engine: Engine) -> Target:
    return Target(engine.endpoint, engine.namesrv, engine.name)


@pytest.fixture
def make(make_topic: MakeTopic) -> MakeTopic:
    """Makes a topic and its group."""
    return make_topic


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
