"""Credentials, TLS and namespaces on a real RocketMQ, and what is said when one of them, or a name, is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from contextlib import AsyncExitStack

import pytest
from a2a.client.errors import A2AClientError

from agentscope_rocketmq import RocketMQ, RocketMQConfig, Timeouts
from agentscope_rocketmq.dev import ApacheRocketMQ, DevBroker
from agentscope_rocketmq.errors import (
    AgentScopeRocketMQError,
    BrokerUnreachable,
    ConfigurationError,
    GroupNotBound,
    GroupNotFound,
    NotAuthorized,
    TopicNotFound,
)
from agentscope_rocketmq.provision import apply, plan
from agentscope_rocketmq.rocketmq.admin import Admin
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from agentscope_rocketmq.rocketmq.lite import LiteConsumer
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from tests.certificates import self_signed
from tests.conftest import new_config, new_topic, unique
from tests.faults import Counter, Follower
from tests.services import card_for, server_for
from tests.waiting import LIMIT, closed_port

ACCESS_KEY, SECRET_KEY = "the-access-key", "the-secret-key"
CONNECT = 5.0  # seconds that a start may take
FOR_EVER = Timeouts(connect=1000)  # so that only what is given up early ends a start


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return self_signed(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def secured(certificate):
    """A RocketMQ with access control that also serves TLS."""
    with ApacheRocketMQ(authentication=(ACCESS_KEY, SECRET_KEY), tls=certificate) as launched:
        yield launched


def config_of(secured, **values) -> RocketMQConfig:
    names = {field: unique(field) for field in ("reply_topic", "reply_group", "state_topic", "state_group")}
    keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
    timeouts = Timeouts(connect=CONNECT)
    known = {"endpoint": secured.endpoint, "namesrv": secured.namesrv, "timeouts": timeouts, **names, **keys}
    return RocketMQConfig(**(known | values))


def changed(config: RocketMQConfig, **values) -> RocketMQConfig:
    return RocketMQConfig(**(dict(config) | values))


def card_at(url: str, config: RocketMQConfig) -> dict:
    interface = {"url": url, "protocolBinding": "RocketMQ", "protocolVersion": "1.0"}
    return card_for(config, "unused", supportedInterfaces=[interface])


async def answer(counter, config, card) -> list[int]:
    """Serve a card and call it."""
    async with (
        server_for(counter, config, "unused", card=card),
        RocketMQ(config, card_cache=None) as rocketmq,
        await rocketmq.client(card) as client,
    ):
        return await Follower(client, "numbers 5").whole()


@pytest.mark.parametrize(
    ("scheme", "tls"),
    [("http", False), ("http", True), ("https", False)],
    ids=["plaintext", "TLS by configuration", "TLS by card"],
)
async def test_signed_calls_provision_serve_and_call(secured, certificate, counter, scheme, tls):
    config = config_of(secured, tls=tls, tls_ca=certificate[0])
    card = card_at(f"{scheme}://{secured.endpoint}//{unique('Task')}", config)
    await apply(plan([card], config), config)
    assert await answer(counter, config, card) == [0, 1, 2, 3, 4]


async def start_producer(config, topic):
    async with Connection.from_config(config) as connection, Producer(connection, connect_timeout=CONNECT) as producer:
        await producer.send(Message(topic=topic, body=b"x"), timeout=CONNECT)


async def start_group_consumer(config, topic):
    async with (
        Connection.from_config(config) as connection,
        GroupConsumer(connection, topic, f"{topic}ConsumerGroup", connect_timeout=CONNECT),
    ):
        pass


async def start_lite_consumer(config, _topic):
    async with (
        Connection.from_config(config) as connection,
        LiteConsumer(connection, config.reply_topic, config.reply_group, connect_timeout=CONNECT),
    ):
        pass


async def start_server(config, topic):
    async with server_for(Counter.__new__(Counter), config, topic):
        pass


async def make_client(config, topic):
    async with RocketMQ(config, card_cache=None) as rocketmq:
        await rocketmq.client(card_for(config, topic))


async def provision(config, topic):
    await apply(plan([card_for(config, topic)], config), config)


DOORS = [start_producer, start_group_consumer, start_lite_consumer, start_server, make_client]


@pytest.mark.parametrize(
    "keys",
    [
        {"secret_key": "a-wrong-secret"},
        {"access_key": "an-unknown-user"},
        {"access_key": None, "secret_key": None},
    ],
    ids=["wrong secret", "unknown user", "no credentials"],
)
@pytest.mark.parametrize("door", [*DOORS, provision])
async def test_calls_that_are_not_signed_by_a_user_are_refused_with_the_remedy(secured, caplog, door, keys):
    good, topic = config_of(secured), unique("Task")
    await provision(good, topic)
    bad = changed(good, **keys)
    caplog.set_level(logging.DEBUG, "agentscope_rocketmq")
    async with asyncio.timeout(3 * CONNECT):
        with pytest.raises(NotAuthorized, match="ROCKETMQ_ACCESS_KEY and ROCKETMQ_SECRET_KEY") as caught:
            await door(bad, topic)
    said = caplog.text + "".join(map(repr, chain(caught.value))) + repr(bad)
    for secret in (SECRET_KEY, "a-wrong-secret"):
        assert secret not in said


def chain(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("door", [start_server, make_client])
async def test_a_certificate_that_is_not_trusted_ends_the_start_at_once(secured, tmp_path, door):
    good, topic = config_of(secured, timeouts=FOR_EVER), unique("Task")
    await provision(changed(good, timeouts=Timeouts()), topic)
    for authority in (self_signed(tmp_path)[0], None):
        async with asyncio.timeout(LIMIT):
            with pytest.raises(BrokerUnreachable, match=r"CERTIFICATE_VERIFY_FAILED.*not trusted.*ROCKETMQ_TLS_CA"):
                await door(changed(good, tls=True, tls_ca=authority), topic)


@contextlib.asynccontextmanager
async def tls_server(certificate, host="127.0.0.1"):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.set_alpn_protocols(["h2"])

    async def hang_up(_reader, writer):
        writer.close()

    async with await asyncio.start_server(hang_up, host, 0, ssl=context) as server:
        yield f"{host}:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("door", [start_server, make_client])
async def test_what_waiting_can_not_mend_ends_the_start_at_once_with_the_reason(certificate, door):
    async with (
        tls_server(certificate) as only_tls,
        tls_server(certificate, "127.0.0.2") as another_host,
        DevBroker() as plain,  # the launched Apache answers both
    ):
        encrypted = {"tls": True, "tls_ca": certificate[0]}
        for values, reason in (
            ({"endpoint": only_tls}, "wants TLS and was spoken to in plain text.*ROCKETMQ_TLS"),
            ({"endpoint": plain.endpoint, **encrypted}, "does not speak TLS.*TLS is set the same on both sides"),
            ({"endpoint": another_host, **encrypted}, "certificate is for another host"),
            ({"endpoint": "no-such-host.invalid:8081"}, "host name is unknown"),
            ({"endpoint": f"no-such-host.invalid:8081;{only_tls}"}, "host name is unknown|wants TLS"),
        ):
            async with asyncio.timeout(LIMIT):
                with pytest.raises(BrokerUnreachable, match=reason):
                    await door(RocketMQConfig(timeouts=FOR_EVER, **values), "Task")


async def test_one_endpoint_of_no_use_does_not_keep_the_others_from_being_used(engine):
    endpoints = f"no-such-host.invalid:8081;{engine.endpoint}"
    async with Connection(endpoints) as connection, Producer(connection, connect_timeout=LIMIT) as producer:
        assert producer.max_body_size > 0


async def test_a_file_without_authorities_is_said_before_anything_is_connected_to(certificate, tmp_path):
    binary, words = tmp_path / "binary.pem", tmp_path / "words.pem"
    binary.write_bytes(b"\xff\x00")
    words.write_text("These are no certificates.")
    for file in (binary, words, certificate[1], tmp_path, tmp_path / "none.pem"):
        with pytest.raises(ConfigurationError, match="ROCKETMQ_TLS_CA"):
            Connection("127.0.0.1:8081", tls=True, tls_ca=file)


async def test_an_agent_in_a_namespace_is_served_and_called_there_and_nowhere_else(engine, counter):
    names = {field: unique(field) for field in ("reply_topic", "reply_group", "state_topic", "state_group")}
    config = RocketMQConfig(endpoint=engine.endpoint, namesrv=engine.namesrv, namespace="Space", **names)
    topic = unique("Task")
    card = card_at(f"http://{engine.endpoint}/Space/{topic}", config)
    await apply(plan([card], config), config)
    async with Admin(engine.namesrv) as admin:
        [broker] = (await admin.brokers()).values()
        assert await admin.topic(broker, f"Space%{topic}") is not None
        assert await admin.topic(broker, topic) is None
    assert await answer(counter, config, card) == [0, 1, 2, 3, 4]
    with pytest.raises(AgentScopeRocketMQError, match="provision"):
        await answer(counter, config, card_at(f"http://{engine.endpoint}//{topic}", config))


@pytest.mark.parametrize(
    ("door", "field", "error"),
    [
        (start_server, "state_topic", (TopicNotFound, GroupNotBound)),
        (start_server, "state_group", GroupNotFound),
        (make_client, "reply_topic", (TopicNotFound, GroupNotBound)),
        (make_client, "reply_group", GroupNotFound),
    ],
)
async def test_a_wrong_name_in_the_configuration_fails_the_start_with_the_remedy(engine, door, field, error):
    config, names = await new_config(engine), await new_topic(engine)
    with pytest.raises(error, match=r"NoSuchName.*provision"):
        await door(changed(config, **{field: "NoSuchName"}), names.topic)


async def test_a_wrong_topic_or_group_fails_the_start_of_a_server_with_the_remedy(engine, counter):
    config, names = await new_config(engine), await new_topic(engine)
    with pytest.raises(TopicNotFound, match=r"NoSuchName.*provision"):
        await server_for(counter, config, "NoSuchName", group=names.group).start()
    with pytest.raises(GroupNotFound, match=r"NoSuchName.*provision"):
        await server_for(counter, config, names.topic, group="NoSuchName").start()


async def test_a_call_to_a_topic_that_does_not_exist_fails_at_once_with_the_remedy(engine):
    config = await new_config(engine)
    async with AsyncExitStack() as stack:
        rocketmq = await stack.enter_async_context(RocketMQ(config, card_cache=None))
        client = await stack.enter_async_context(await rocketmq.client(card_for(config, "NoSuchTopic")))
        async with asyncio.timeout(5):
            with pytest.raises(A2AClientError, match=r"NoSuchTopic.*provision") as caught:
                await Follower(client, "numbers 5").whole()
    assert any(isinstance(error, TopicNotFound) for error in chain(caught.value))


@pytest.mark.parametrize("door", DOORS)
async def test_nobody_at_the_endpoint_is_said_in_time(door):
    config = RocketMQConfig(endpoint=f"127.0.0.1:{closed_port()}", timeouts=Timeouts(connect=1))
    async with asyncio.timeout(2 * CONNECT):
        with pytest.raises(BrokerUnreachable, match=rf"{config.endpoint}.*gRPC port"):
            await door(config, "Task")
