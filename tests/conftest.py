"""What all tests share: a RocketMQ to run against, and topics and groups on it that no other test uses.

    pytest                          launches a real Apache RocketMQ, once for the whole run
    pytest --engine HOST:PORT       uses one that runs already; ROCKETMQ_NAMESRV must name its name server

Nothing is skipped for want of a RocketMQ: what a run needs and can't have is an error.
"""

from __future__ import annotations

import functools
import os
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

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
        launched: What controls its processes (kill, pause, start again); None when it was running before.
    """

    endpoint: str
    namesrv: str
    launched: ApacheRocketMQ | None


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


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The RocketMQ under test. Tests that kill or pause its processes start or resume them before they end."""
    choice = request.config.getoption("--engine")
    if choice != APACHE:
        namesrv = os.environ.get("ROCKETMQ_NAMESRV")
        if namesrv is None:
            pytest.exit(f"--engine {choice} needs ROCKETMQ_NAMESRV: tests make topics.", returncode=2)
        yield Engine(choice, namesrv, None)
        return
    from agentscope_rocketmq.dev.apache import ApacheRocketMQ  # noqa: PLC0415  (tests without an engine are quick)

    with ApacheRocketMQ() as launched:
        yield Engine(launched.endpoint, launched.namesrv, launched)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for `localhost` and 127.0.0.1 that signs itself, and its key, as PEM files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("certificate")
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


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
