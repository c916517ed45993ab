"""The asyncio RocketMQ client sends to a real broker, and says what is wrong when it can't."""

from __future__ import annotations

import asyncio
import base64
import os
from datetime import UTC, datetime, timedelta

import pytest

from agentscope_rocketmq.errors import (
    BrokerUnreachable,
    ConfigurationError,
    IllegalRequest,
    MessageTooLarge,
    TopicNotFound,
    TopicTypeMismatch,
)
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from agentscope_rocketmq.rocketmq.message import GZIP_FROM_BYTES, Message
from agentscope_rocketmq.rocketmq.producer import Producer
from tests.waiting import closed_port, take


async def test_a_message_arrives_with_all_that_was_sent_with_it(connection, producer, make_topic):
    topic = await make_topic("NORMAL")
    async with GroupConsumer(connection, topic.topic, topic.group) as consumer:
        before = datetime.now(UTC)
        receipt = await producer.send(
            Message(
                topic=topic.topic,
                body="你好".encode(),
                tag="greeting",
                keys=("key-1", "key-2"),
                properties={"traceparent": "00-ab-cd-01", "name": "值"},
            )
        )
        [leased] = await take(consumer.messages(), 1)
        message = leased.message
        assert message.message_id == receipt.message_id
        assert message.body() == "你好".encode()
        assert (message.topic, message.lite_topic, message.tag) == (topic.topic, None, "greeting")
        assert message.keys == ("key-1", "key-2")
        assert message.properties.items() >= {"traceparent": "00-ab-cd-01", "name": "值"}.items()
        assert message.attempt == 1
        assert abs(message.store_time - before) < timedelta(seconds=10)
        assert await consumer.ack(leased)


@pytest.mark.parametrize(
    ("body", "compressed"),
    [
        (b"x" * (GZIP_FROM_BYTES - 1), False),
        (b"x" * GZIP_FROM_BYTES, True),
        (os.urandom(GZIP_FROM_BYTES), False),
        (os.urandom(3_900_000), False),
        (b"0123456789" * 1_000_000, True),
        (b"0123456789" * 300_000, True),
        (base64.b64encode(os.urandom(20_000)), False),
        (base64.b64encode(os.urandom(2_000_000)), False),
        (base64.b64encode(os.urandom(3_900_000)), True),
    ],
    ids=[
        *("small", "large", "incompressible", "just below the limit", "beyond the limit unless compressed"),
        *("text", "a small picture", "a picture", "a picture beyond the limit unless compressed"),
    ],
)
async def test_large_bodies_are_compressed_where_it_pays(connection, producer, make_topic, body, compressed):
    topic = await make_topic("NORMAL")
    async with GroupConsumer(connection, topic.topic, topic.group) as consumer:
        await producer.send(Message(topic=topic.topic, body=body))
        [leased] = await take(consumer.messages(), 1)
        assert leased.message.body() == body
        assert (len(leased.message.raw_body) < len(body)) is compressed
        await consumer.ack(leased)


async def test_a_priority_topic_hands_out_higher_levels_first(connection, producer, make_topic):
    topic = await make_topic("PRIORITY")
    for priority in (0, 5, 2, 7, 5):
        await producer.send(Message(topic=topic.topic, body=str(priority).encode(), priority=priority))
    taken = []
    async with GroupConsumer(connection, topic.topic, topic.group, concurrency=1) as consumer:
        async with asyncio.timeout(60):
            async for leased in consumer.messages():
                taken.append(int(leased.message.body()))
                await consumer.ack(leased)
                if len(taken) == 5:
                    break
    assert taken == [7, 5, 5, 2, 0]


async def test_an_unknown_topic_is_named_with_the_remedy(producer):
    with pytest.raises(TopicNotFound, match=r"NoSuchTopic.*provision"):
        await producer.send(Message(topic="NoSuchTopic", body=b"x"))


async def test_a_topic_of_another_type_is_told_apart_from_a_missing_one(producer, make_topic):
    normal, lite = await make_topic("NORMAL"), await make_topic("LITE")
    with pytest.raises(TopicTypeMismatch, match=lite.topic):
        await producer.send(Message(topic=lite.topic, body=b"x"))
    with pytest.raises(TopicTypeMismatch, match=normal.topic):
        await producer.send(Message(topic=normal.topic, body=b"x", lite_topic="a"))


async def test_a_body_over_the_limit_is_refused_before_anything_is_sent(producer, make_topic):
    topic = await make_topic("NORMAL")
    with pytest.raises(MessageTooLarge, match=r"before anything was sent.*5000000 bytes.*4194304"):
        await producer.send(Message(topic=topic.topic, body=os.urandom(5_000_000)))


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "ä", "a/b"])
async def test_an_illegal_lite_topic_name_is_refused(producer, make_topic, name):
    topic = await make_topic("LITE")
    with pytest.raises(IllegalRequest, match="LiteTopic"):
        await producer.send(Message(topic=topic.topic, body=b"x", lite_topic=name))


async def test_the_broker_is_asked_about_names_that_only_it_judges(producer):
    with pytest.raises(IllegalRequest, match="a b"):
        await producer.send(Message(topic="a b", body=b"x"))
    with pytest.raises(IllegalRequest, match="no body"):
        await producer.send(Message(topic="T", body=b""))


async def test_nobody_at_the_endpoint_is_an_error_within_the_time_given():
    port = closed_port()
    async with Connection(f"127.0.0.1:{port}") as connection:
        with pytest.raises(BrokerUnreachable, match=rf"127\.0\.0\.1:{port}.*gRPC port"):
            await Producer(connection, connect_timeout=1).start()


async def test_the_next_endpoint_of_the_list_is_used_when_the_first_is_dead(engine, make_topic):
    topic = await make_topic("NORMAL")
    async with (
        Connection(f"127.0.0.1:{closed_port()};{engine.endpoint}") as connection,
        Producer(connection) as producer,
        GroupConsumer(connection, topic.topic, topic.group) as consumer,
    ):
        await producer.send(Message(topic=topic.topic, body=b"x"))
        [leased] = await take(consumer.messages(), 1)
        assert await consumer.ack(leased)


async def test_credentials_go_only_to_the_endpoints_of_the_configuration(config):
    config = config.model_copy(update={"access_key": "AK", "secret_key": _secret("SK")})
    own = Connection.from_config(config)
    other = Connection.from_config(config, endpoint="198.51.100.7:8081")
    assert "authorization" in dict(own.metadata("client"))
    assert "authorization" not in dict(other.metadata("client"))
    assert "SK" not in repr(own)


async def test_an_unreadable_certificate_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match="ROCKETMQ_TLS_CA"):
        Connection("127.0.0.1:8081", tls=True, tls_ca=tmp_path / "missing.pem")


def _secret(text):
    from pydantic import SecretStr

    return SecretStr(text)
