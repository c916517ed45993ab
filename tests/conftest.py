"""What all tests share: a RocketMQ to run against, and topics and groups on it that no other test uses.

    pytest                          every test that needs a RocketMQ on both engines, each launched once for the whole run
    pytest -n 6                     the same, with one of each for all six processes
    pytest --engine embedded        only on the embedded broker
    pytest --engine apache          only on a real Apache RocketMQ
    pytest --engine HOST:PORT       only on one that runs already; ROCKETMQ_NAMESRV must name its name server

Nothing is skipped for want of a RocketMQ: what a run needs and can't have is an error.
"""

from __future__ import annotations

import asyncio
import functools
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import pytest_asyncio
from hypothesis import settings

from agentscope_rocketmq.config import RocketMQConfig
from agentscope_rocketmq.provision import apply, plan
from agentscope_rocketmq.rocketmq.admin import Admin, GroupSettings, TopicSettings
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.producer import Producer
from tests.faults import Counter, Ledger
from tests.services import Keeper

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from agentscope_rocketmq import RocketMQ
    from agentscope_rocketmq.dev import ApacheRocketMQ, EmbeddedRocketMQ


EMBEDDED, APACHE = "embedded", "apache"

# How long an example takes depends on what else the machine does; pytest bounds the whole.
settings.register_profile("here", deadline=None)
settings.load_profile("here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine",
        metavar="embedded|apache|HOST:PORT",
        help="RocketMQ to test against: launch the embedded broker, launch a real Apache RocketMQ, or use the one with "
        "that gRPC endpoint, whose name server is ROCKETMQ_NAMESRV. Default: embedded and apache, every test on both.",
    )


@dataclass(frozen=True)
class Engine:
    """The RocketMQ under test.

    Attributes:
        endpoint: `host:port` of the gRPC endpoint.
        namesrv: `host:port` of the name server.
        name: `embedded` or `apache`, for the few tests that must know.
    """

    endpoint: str
    namesrv: str
    name: str = APACHE


@dataclass(frozen=True)
class Names:
    """A topic and a group that reads it, made for one test."""

    topic: str
    group: str


class MakeTopic(Protocol):
    async def __call__(
        self, message_type: str = "NORMAL", *, group_attributes: Mapping[str, str] | None = None, queues: int = 8
    ) -> Names:
        """Make a topic and a group on the engine.

        Args:
            message_type: NORMAL, LITE or PRIORITY. A LITE topic's group is bound to it.
            group_attributes: Further attributes of the group; None makes a LITE topic's group exclusive with raised
                limits, as `agentscope-rocketmq provision` does.
            queues: Queues of the topic.
        """


_ENGINES = "agentscope_rocketmq_engines"
_launched: pytest.StashKey[dict[str, ApacheRocketMQ | EmbeddedRocketMQ]] = pytest.StashKey()


def engines_of(config: pytest.Config) -> tuple[str, ...]:
    """What to test against: `embedded`, `apache` or a `host:port`."""
    choice = config.getoption("--engine")
    return (EMBEDDED, APACHE) if choice is None else (choice,)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    own = any("chosen_engine" in marker.args[0] for marker in metafunc.definition.iter_markers("parametrize"))
    if "chosen_engine" in metafunc.fixturenames and not own:
        metafunc.parametrize("chosen_engine", engines_of(metafunc.config), scope="session")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one group run one after the other because of what they share on an engine: each engine has its own."""
    for item in items:
        engine = getattr(item, "callspec", None) and item.callspec.params.get("chosen_engine")  # type: ignore[attr-defined]
        if engine is not None and item.get_closest_marker("xdist_group") is not None:
            item.add_marker(pytest.mark.xdist_group(engine))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_configure_node(node: Any) -> None:
    """Let all processes of a parallel run share the engines, launched here before the first of them starts."""
    names = [name for name in engines_of(node.config) if name in (EMBEDDED, APACHE)]
    node.workerinput[_ENGINES] = {name: _launch(node.config, name) for name in names}


def pytest_unconfigure(config: pytest.Config) -> None:
    for launched in config.stash.get(_launched, {}).values():
        launched.stop()


def _launch(config: pytest.Config, name: str) -> tuple[str, str]:
    """Endpoint and name server of an engine that is launched once in this process."""
    from agentscope_rocketmq.dev import ApacheRocketMQ, EmbeddedRocketMQ

    running = config.stash.setdefault(_launched, {})
    if name not in running:
        # Strict as a real one: what was not provisioned is an error on both.
        engine = EmbeddedRocketMQ(strict=True) if name == EMBEDDED else ApacheRocketMQ()
        engine.start()
        running[name] = engine
    return running[name].endpoint, running[name].namesrv


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest, chosen_engine: str) -> Engine:
    """The RocketMQ under test, shared by all tests: those that break one launch their own."""
    return engine_of(request.config, chosen_engine)


def engine_of(config: pytest.Config, chosen: str) -> Engine:
    """One of `engines_of`, launched if need be."""
    shared = getattr(config, "workerinput", {}).get(_ENGINES, {})
    if chosen in (EMBEDDED, APACHE):
        endpoint, namesrv = shared.get(chosen) or _launch(config, chosen)
        return Engine(endpoint, namesrv, chosen)
    namesrv = os.environ.get("ROCKETMQ_NAMESRV", "")
    if not namesrv:
        pytest.exit(f"--engine {chosen} needs ROCKETMQ_NAMESRV: tests make topics.", returncode=2)
    with ThreadPoolExecutor(1) as thread:  # whatever loop this thread has is not this fixture's
        brokers = thread.submit(asyncio.run, _brokers(namesrv)).result()
    return Engine(chosen, namesrv, EMBEDDED if EMBEDDED in brokers else APACHE)


async def _brokers(namesrv: str) -> Mapping[str, str]:
    async with Admin(namesrv) as admin:
        return await admin.brokers()


@pytest.fixture
def make_topic(engine: Engine) -> MakeTopic:
    """Makes topics and groups with names of their own, some 20 ms each."""
    return functools.partial(new_topic, engine)


@pytest.fixture
async def config(engine: Engine) -> RocketMQConfig:
    """A configuration for the engine whose reply and state topics and groups exist and are used by nobody else."""
    return await new_config(engine)


@pytest.fixture
async def topic(make_topic: MakeTopic) -> str:
    """A NORMAL topic with its group."""
    return (await make_topic("NORMAL")).topic


@pytest.fixture
async def rocketmq(config: RocketMQConfig) -> AsyncIterator[RocketMQ]:
    """A caller that closes its clients."""
    async with Keeper(config, card_cache=None) as rocketmq:
        yield rocketmq


@pytest.fixture
def counter(tmp_path: Path) -> Counter:
    """An executor that counts, and its ledger."""
    return Counter(Ledger(tmp_path / "ledger"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_config(engine: Engine) -> RocketMQConfig:
    """`config`, one for all tests of a module."""
    return await new_config(engine)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_topic(engine: Engine) -> Names:
    """A NORMAL topic and its group, one for all tests of a module."""
    return await new_topic(engine)


@pytest.fixture
async def connection(engine: Engine) -> AsyncIterator[Connection]:
    """A connection to the engine."""
    async with Connection(engine.endpoint) as connection:
        yield connection


@pytest.fixture
async def producer(connection: Connection) -> AsyncIterator[Producer]:
    """A producer on it."""
    async with Producer(connection) as producer:
        yield producer


async def new_topic(
    engine: Engine,
    message_type: str = "NORMAL",
    *,
    group_attributes: Mapping[str, str] | None = None,
    queues: int = 8,
) -> Names:
    """See `MakeTopic`."""
    topic = unique(f"{message_type.title()}Topic")
    names = Names(topic, f"{topic}ConsumerGroup")
    attributes: dict[str, str] = {}
    if message_type == "LITE":
        exclusive = {
            "lite.sub.model": "Exclusive",
            "lite.sub.client.max.event.cnt": "20000",
            "lite.sub.client.quota": "20000",
        }
        attributes = {"lite.bind.topic": topic, **(exclusive if group_attributes is None else group_attributes)}
    settings = TopicSettings(topic, {"message.type": message_type}, read_queues=queues, write_queues=queues)
    async with Admin(engine.namesrv) as admin:
        for broker in (await admin.brokers()).values():
            await admin.put_topic(broker, settings)
            await admin.put_group(broker, GroupSettings(names.group, attributes))
    return names


async def new_config(engine: Engine) -> RocketMQConfig:
    """See `config`."""
    fresh = RocketMQConfig(
        endpoint=engine.endpoint,
        namesrv=engine.namesrv,
        reply_topic=unique("ReplyTopic"),
        reply_group=unique("ReplyGroup"),
        state_topic=unique("StateTopic"),
        state_group=unique("StateGroup"),
    )
    await apply(plan([], fresh), fresh)
    return fresh


def unique(name: str) -> str:
    """A name that no other test and no other run uses."""
    return f"{name}-{uuid.uuid4().hex[:12]}"
