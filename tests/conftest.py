"""What all tests share: a RocketMQ to run against, and topics and groups on it that no other test uses.

    pytest                          launches a real Apache RocketMQ, once for the whole run
    pytest -n 4                     the same, with one RocketMQ for all four processes
    pytest --engine HOST:PORT       uses one that runs already; ROCKETMQ_NAMESRV must name its name server

Nothing is skipped for want of a RocketMQ: what a run needs and can't have is an error.
"""

from __future__ import annotations

import functools
import os
import uuid
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

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from agentscope_rocketmq.dev.apache import ApacheRocketMQ


APACHE = "apache"

# How long an example takes depends on what else the machine does; pytest bounds the whole.
settings.register_profile("here", deadline=None)
settings.load_profile("here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine",
        default=APACHE,
        metavar="apache|HOST:PORT",
        help="RocketMQ to test against: 'apache' launches a real one (default), HOST:PORT is the gRPC endpoint of one "
        "that runs already, whose name server is ROCKETMQ_NAMESRV.",
    )


@dataclass(frozen=True)
class Engine:
    """The RocketMQ under test.

    Attributes:
        endpoint: `host:port` of the gRPC endpoint.
        namesrv: `host:port` of the name server.
    """

    endpoint: str
    namesrv: str


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


_WORKER_ENGINE = "agentscope_rocketmq_engine"
_launched: pytest.StashKey[ApacheRocketMQ] = pytest.StashKey()


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_configure_node(node: Any) -> None:
    """Let all processes of a parallel run share one RocketMQ, launched here before the first of them starts."""
    config = node.config
    if config.getoption("--engine") != APACHE:
        return
    if _launched not in config.stash:
        from agentscope_rocketmq.dev.apache import ApacheRocketMQ

        config.stash[_launched] = ApacheRocketMQ()
        config.stash[_launched].start()
    node.workerinput[_WORKER_ENGINE] = (config.stash[_launched].endpoint, config.stash[_launched].namesrv)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _launched in config.stash:
        config.stash[_launched].stop()


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The RocketMQ under test, shared by all tests: those that break one launch their own."""
    choice = request.config.getoption("--engine")
    shared = getattr(request.config, "workerinput", {}).get(_WORKER_ENGINE)
    if shared is not None:
        yield Engine(*shared)
    elif choice == APACHE:
        from agentscope_rocketmq.dev.apache import ApacheRocketMQ

        with ApacheRocketMQ() as launched:
            yield Engine(launched.endpoint, launched.namesrv)
    else:
        namesrv = os.environ.get("ROCKETMQ_NAMESRV")
        if namesrv is None:
            pytest.exit(f"--engine {choice} needs ROCKETMQ_NAMESRV: tests make topics.", returncode=2)
        yield Engine(choice, namesrv)


@pytest.fixture
def make_topic(engine: Engine) -> MakeTopic:
    """Makes topics and groups with names of their own, some 20 ms each."""
    return functools.partial(new_topic, engine)


@pytest.fixture
async def config(engine: Engine) -> RocketMQConfig:
    """A configuration for the engine whose reply and state topics and groups exist and are used by nobody else."""
    return await new_config(engine)


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
