"""The launcher of a real Apache RocketMQ: restarts, durability, access control, TLS, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from agentscope_rocketmq.config import RocketMQConfig
from agentscope_rocketmq.dev import ApacheRocketMQ, maven
from agentscope_rocketmq.dev.maven import default_cache, rocketmq_jars
from agentscope_rocketmq.dev.ports import Ports
from agentscope_rocketmq.errors import BrokerUnreachable, ClosedError, ConfigurationError, NotAuthorized
from agentscope_rocketmq.provision import apply, plan
from agentscope_rocketmq.rocketmq.admin import Admin, GroupSettings, TopicSettings
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer, Position
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from tests.certificates import self_signed
from tests.conftest import unique

CREDENTIALS = ("dev-access", "dev-secret-1")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return self_signed(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def apache(tmp_path_factory, certificate):
    """A RocketMQ with a durable folder, access control, TLS and options of its own, for these tests alone."""
    with ApacheRocketMQ(
        data=tmp_path_factory.mktemp("data"),
        authentication=CREDENTIALS,
        tls=certificate,
        proxy_options={"maxMessageSize": 1024 * 1024},
        java_options=["-Dchosen.by=the-test"],
    ) as launched:
        yield launched


def config_of(apache: ApacheRocketMQ, **values) -> RocketMQConfig:
    names = {field: unique(field) for field in ("reply_topic", "reply_group", "state_topic", "state_group")}
    keys = {"access_key": CREDENTIALS[0], "secret_key": CREDENTIALS[1]}
    return RocketMQConfig(endpoint=apache.endpoint, namesrv=apache.namesrv, **{**names, **keys, **values})


def admin_of(apache: ApacheRocketMQ, *, timeout: float = 10.0) -> Admin:
    return Admin(apache.namesrv, access_key=CREDENTIALS[0], secret_key=CREDENTIALS[1], timeout=timeout)


async def send(config: RocketMQConfig, body: bytes, *, timeout: float = 30.0) -> None:
    async with Connection.from_config(config) as connection, Producer(connection, connect_timeout=timeout) as producer:
        await producer.send(Message(topic=config.reply_topic, body=body, lite_topic="session"), timeout=timeout)


async def receive(config: RocketMQConfig, count: int) -> list[bytes]:
    bodies: list[bytes] = []
    async with (
        asyncio.timeout(60),
        Connection.from_config(config) as connection,
        LiteConsumer(connection, config.reply_topic, config.reply_group) as consumer,
    ):
        await consumer.subscribe(["session"], at=Position.first())
        while len(bodies) < count:
            batch = await anext(consumer.batches())
            assert isinstance(batch, LiteBatch)
            bodies += [message.body() for message in batch.messages]
            await consumer.ack(batch.messages)
    return bodies


async def test_a_killed_proxy_comes_back_at_the_same_endpoint(apache):
    config = config_of(apache)
    await apply(plan([], config), config)
    endpoint = apache.endpoint
    await asyncio.to_thread(apache.kill_proxy)
    with pytest.raises(BrokerUnreachable):
        await send(config, b"lost", timeout=0.5)
    await asyncio.to_thread(apache.start_proxy)
    assert apache.endpoint == endpoint
    await send(config, b"kept")
    assert await receive(config, 1) == [b"kept"]


async def test_a_killed_broker_comes_back_with_its_messages(apache):
    config = config_of(apache)
    await apply(plan([], config), config)
    await send(config, b"before")
    address = apache.broker_address
    await asyncio.to_thread(apache.kill_broker)
    with pytest.raises(BrokerUnreachable):
        apache.check()
    await asyncio.to_thread(apache.start_broker)
    assert apache.broker_address == address
    await send(config, b"after")
    assert await receive(config, 2) == [b"before", b"after"]


async def test_a_paused_broker_is_silent_and_goes_on(apache):
    async with admin_of(apache, timeout=0.5) as admin:
        apache.pause_broker()
        try:
            with pytest.raises(BrokerUnreachable, match="no answer"):
                await admin.topic(apache.broker_address, "AnyTopic")
        finally:
            apache.resume_broker()
    async with admin_of(apache) as admin:
        assert await admin.topic(apache.broker_address, "AnyTopic") is None


async def test_what_was_not_provisioned_does_not_spring_up(apache):
    config = config_of(apache)
    await apply(plan([], config), config)
    topic, group = unique("Never"), unique("NeverGroup")
    with pytest.raises(Exception, match=topic):
        await send(config.model_copy(update={"reply_topic": topic}), b"x")
    with pytest.raises(Exception, match=group):
        await receive(config.model_copy(update={"reply_group": group}), 1)
    async with admin_of(apache) as admin:
        assert await admin.topic(apache.broker_address, topic) is None
        assert await admin.group(apache.broker_address, group) is None


def test_starting_twice_is_refused(apache):
    with pytest.raises(ClosedError):
        apache.start()


async def test_signed_calls_are_let_in(apache):
    config = config_of(apache)
    await apply(plan([], config), config)
    await send(config, b"signed")
    assert await receive(config, 1) == [b"signed"]


@pytest.mark.parametrize(
    "keys", [{"access_key": None, "secret_key": None}, {"secret_key": "wrong"}, {"access_key": "nobody"}]
)
async def test_calls_that_are_not_signed_by_the_user_are_refused(apache, keys):
    good, bad = config_of(apache), config_of(apache, **keys)
    await apply(plan([], good), good)
    with pytest.raises(NotAuthorized):
        await apply(plan([], bad), bad)
    with pytest.raises(NotAuthorized):
        await send(bad.model_copy(update={"reply_topic": good.reply_topic}), b"x")


async def test_the_given_certificate_is_served(apache, certificate):
    config = config_of(apache, tls=True, tls_ca=certificate[0])
    await apply(plan([], config), config)
    await send(config, b"encrypted")
    assert await receive(config, 1) == [b"encrypted"]
    with pytest.raises(BrokerUnreachable):
        await send(config.model_copy(update={"tls_ca": None}), b"x", timeout=1.0)


def test_java_options_reach_all_three(apache):
    pids = ",".join(map(str, apache.pids.values()))
    command_lines = subprocess.run(
        ["ps", "-ww", "-o", "args=", "-p", pids], capture_output=True, text=True, check=True
    ).stdout
    assert command_lines.count("-Dchosen.by=the-test") == 3


async def test_options_reach_the_proxy(apache):
    config = config_of(apache)
    async with Connection.from_config(config) as connection, Producer(connection) as producer:
        assert producer.max_body_size == 1024 * 1024


async def test_a_data_folder_brings_everything_back_after_a_stop(apache):
    config = config_of(apache)
    await apply(plan([], config), config)
    await send(config, b"durable")
    await asyncio.to_thread(apache.stop)
    assert apache.pids == {}
    await asyncio.to_thread(apache.start)
    again = config.model_copy(update={"endpoint": apache.endpoint, "namesrv": apache.namesrv})
    assert await receive(again, 1) == [b"durable"]


def test_a_data_folder_in_use_is_refused(apache):
    with pytest.raises(ConfigurationError, match="in use by another process"):
        ApacheRocketMQ(data=apache._data).start()


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"Port {port} can't be used"):
            ApacheRocketMQ(port=port).start()


def test_a_broker_that_ends_early_is_an_error_with_its_last_words(tmp_path):
    with pytest.raises(BrokerUnreachable, match=r"broker ended\.(.|\n)*Slave's brokerId must be > 0"):
        ApacheRocketMQ(data=tmp_path, broker_options={"brokerRole": "SLAVE"}).start()


def test_a_reserved_port_can_be_listened_on_and_is_given_to_nobody_else():
    ports = Ports()
    port = ports.choose(also_below=2)
    with socket.create_server(("", port)), socket.create_server(("127.0.0.1", port - 2)):
        pass
    others = Ports()
    assert port not in {others.choose() for _ in range(200)}
    others.close()
    ports.close()


def test_without_java_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(ConfigurationError, match="install a Java runtime"):
        ApacheRocketMQ().start()


def test_without_maven_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="install Maven"):
        rocketmq_jars(tmp_path, print)


def test_the_cache_folder_follows_the_desktop_specification(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "agentscope-rocketmq"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert default_cache().is_relative_to(Path.home())


def stand_in_for_maven(folder: Path, script: str) -> None:
    program = folder / "mvn"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_two_who_fetch_at_once_fetch_once_and_see_all_of_it(monkeypatch, tmp_path):
    stand_in_for_maven(
        tmp_path,
        f'echo called >> {tmp_path}/calls; for a; do case $a in -DoutputDirectory=*) d="${{a#*=}}";; esac; done; '
        'mkdir "$d"; touch "$d/a.jar"; sleep 0.3; touch "$d/z.jar"',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    seen: list[list[str]] = []

    def fetch():
        jars = rocketmq_jars(tmp_path / "cache", lambda _: None)
        seen.append(sorted(path.name for path in jars.iterdir()))

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert seen == [["a.jar", "z.jar"]] * 3
    assert (tmp_path / "calls").read_text(encoding="utf-8") == "called\n"


def test_a_failing_maven_is_quoted_and_leaves_nothing_half_done(monkeypatch, tmp_path):
    stand_in_for_maven(
        tmp_path, 'for a; do case $a in -D*) mkdir "${a#*=}";; esac; done; echo "no route to repository"; exit 1'
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigurationError, match="no route to repository"):
        rocketmq_jars(tmp_path / "cache", lambda _: None)
    kept = tmp_path / "cache" / f"rocketmq-{maven.ROCKETMQ_VERSION}"
    assert [path.name for path in kept.iterdir()] == [".lock"]


async def test_a_group_bound_twice_to_one_topic_reads_it(apache):
    # A group's own name is all that tells readers apart: two groups each get every message.
    config = config_of(apache)
    await apply(plan([], config), config)
    second = config.model_copy(update={"reply_group": f"{config.reply_group}_OBSERVER"})
    await send(config, b"both")
    assert await receive(config, 1) == [b"both"]
    assert await receive(second, 1) == [b"both"]


def test_settings_files_with_keys_are_for_their_owner_alone(apache):
    for name in ("broker.conf", "rmq-proxy.json"):
        mode = (apache._data / "conf" / name).stat().st_mode
        assert stat.S_IMODE(mode) == 0o600


async def test_topics_of_a_broker_are_those_it_was_given(apache):
    async with admin_of(apache) as admin:
        topic = TopicSettings(unique("Queues"), {"message.type": "PRIORITY"}, read_queues=4, write_queues=4)
        await admin.put_topic(apache.broker_address, topic)
        await admin.put_group(apache.broker_address, GroupSettings(unique("Group")))
        assert await admin.topic(apache.broker_address, topic.name) == topic
