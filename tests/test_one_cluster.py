"""One cluster, however it is spelt: one connection to it, its credentials, and no session taken over by oneself."""

from __future__ import annotations

import asyncio
import logging

import pytest

from agentscope_rocketmq import RocketMQ, RocketMQConfig
from agentscope_rocketmq.config import endpoint_key
from agentscope_rocketmq.rocketmq.connection import Connection
from tests.agents import make_echo_agent
from tests.services import card_for, reply, server_for


@pytest.mark.parametrize(
    "spellings",
    [
        ["broker:8081", "Broker:8081", "broker.:8081", "broker:08081"],
        ["a:1;b:2", "b:2;a:1", "B:2, a:1", "a:1;b:2;a:1"],
        ["127.0.0.1:8081", "localhost:8081", "LocalHost:8081", "[::1]:8081", "[0:0:0:0:0:0:0:1]:8081"],
        ["[2001:db8::1]:8081", "[2001:DB8:0::1]:8081"],
    ],
)
def test_spellings_of_one_cluster_are_one(spellings):
    assert len({endpoint_key(spelling) for spelling in spellings}) == 1


def test_what_may_be_another_cluster_is_another():
    different = ["127.0.0.1:8081", "127.0.0.1:8082", "127.0.0.2:8081", "broker:8081", "broker.example:8081", "a:1;b:2"]
    assert len({endpoint_key(endpoint) for endpoint in different}) == len(different)


async def test_two_spellings_of_a_cluster_share_a_session(config, make_topic):
    host, _, port = config.endpoint.rpartition(":")
    assert host == "127.0.0.1", "this test needs a broker on loopback"
    topic = (await make_topic("NORMAL")).topic
    other = card_for(config.model_copy(update={"endpoint": f"LOCALHOST:{port}"}), topic)
    async with server_for(make_echo_agent, config, topic), RocketMQ(config, card_cache=None) as rocketmq:
        async with (
            await rocketmq.client(card_for(config, topic), session="trip-42") as one,
            await rocketmq.client(other, session="trip-42") as another,
        ):
            for _ in range(3):
                first, second = await asyncio.gather(reply(one, "one"), reply(another, "another"))
                assert first.endswith("one")
                assert second.endswith("another")
        assert len(rocketmq._carriers) == 1


def test_credentials_go_to_the_cluster_that_the_configuration_names_and_what_is_withheld_is_said(caplog):
    config = RocketMQConfig(endpoint="127.0.0.1:8081;other:8081", access_key="AK", secret_key="SK")
    for endpoint, sent in (
        (None, True),
        ("localhost:8081", True),
        ("OTHER:8081;127.0.0.1:8081", True),
        ("elsewhere:8081", False),
        ("other:8081;elsewhere:8081", False),
    ):
        caplog.clear()
        connection = Connection.from_config(config, endpoint=endpoint)
        assert ("authorization" in dict(connection.metadata("id"))) is sent
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == (0 if sent else 1)
        assert all(str(endpoint) in text and "ROCKETMQ_ENDPOINT" in text and "SK" not in text for text in warnings)


async def test_a_server_of_two_topics_does_not_take_its_own_instance_over(config, make_topic, caplog):
    topics = [(await make_topic("NORMAL")).topic for _ in range(2)]
    cards = [card_for(config, topic) for topic in topics]
    both = cards[0] | {"supportedInterfaces": [card["supportedInterfaces"][0] for card in cards]}
    async with (
        server_for(make_echo_agent, config, topics[0], card=both),
        RocketMQ(config, card_cache=None) as rocketmq,
        await rocketmq.client(cards[0]) as one,
        await rocketmq.client(cards[1]) as another,
    ):
        assert await reply(one, "one") == "echo:one"
        assert await reply(another, "another") == "echo:another"
    assert "taken over" not in caplog.text
