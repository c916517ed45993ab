"""The official clients, driven by their public API, on the RocketMQ under test."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from agentscope_rocketmq.dev import DevBroker
from agentscope_rocketmq.rocketmq.admin import Admin, GroupSettings
from tests.clients.official import OfficialClient, OfficialError
from tests.conftest import APACHE
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import Engine


@pytest.fixture(params=("python", "java"))
def language(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def client(language: str, engine: Engine, tmp_path: Path) -> AsyncIterator[OfficialClient]:
    async with OfficialClient(language, engine.endpoint, tmp_path) as client:
        yield client


async def order(engine: Engine, group: str, **attributes: str) -> None:
    """Have the official clients consume what a group reads in order."""
    async with Admin(engine.namesrv) as admin:
        for broker in (await admin.brokers()).values():
            await admin.put_group(broker, GroupSettings(group, attributes, ordered=True))


async def receive(client: OfficialClient, count: int) -> list[Any]:
    """Receive until there are so many; a RocketMQ may answer with less, or nothing."""
    found: list[Any] = []
    async with asyncio.timeout(LIMIT):
        while len(found) < count:
            found += await client.ask("receive", count=count)
    return found


def bodies(messages) -> list[str]:
    return [message["body"] for message in messages]


async def test_a_simple_consumer_gets_what_a_producer_sends(client, make_topic):
    names = await make_topic()
    await client.ask("producer_of", topic=names.topic)
    sent = await client.ask(
        "send", topic=names.topic, body="grüß dich", tag="t", key="k", properties={"a": "1", "b": "zwei"}
    )
    await client.ask("simple", group=names.group, topic=names.topic)
    (message,) = await receive(client, 1)
    assert message == {
        "id": sent,
        "topic": names.topic,
        "body": "grüß dich",
        "tag": "t",
        "keys": ["k"],
        "properties": {"a": "1", "b": "zwei"},
        "message_group": None,
        "lite_topic": None,
        "attempt": 1,
    }
    await client.ask("ack", message_id=message["id"])


async def test_a_simple_consumer_gets_again_what_it_did_not_ack(client, make_topic):
    names = await make_topic()
    await client.ask("producer_of", topic=names.topic)
    for number in range(10):
        await client.ask("send", topic=names.topic, body=str(number), tag="even" if number % 2 == 0 else "odd")
    await client.ask("simple", group=names.group, topic=names.topic, tag="even")
    messages = await receive(client, 5)
    assert sorted(bodies(messages)) == ["0", "2", "4", "6", "8"]
    for message in messages[:3]:
        await client.ask("ack", message_id=message["id"])
    for message in messages[3:]:
        await client.ask("hide", message_id=message["id"], seconds=1)
    again = await receive(client, 2)
    assert sorted(bodies(again)) == sorted(bodies(messages[3:]))
    assert {message["attempt"] for message in again} == {2}
    for message in again:
        await client.ask("ack", message_id=message["id"])
    assert await client.ask("receive", count=32) == []


async def test_a_push_consumer_is_called_again_for_what_failed(client, make_topic):
    names = await make_topic()
    await client.ask("producer_of", topic=names.topic)
    await client.ask("push", group=names.group, topic=names.topic)
    for number in range(20):
        await client.ask("send", topic=names.topic, body=str(number), properties={"fail": str(int(number == 7))})
    messages = await client.take(21)
    assert sorted(bodies(messages), key=int) == sorted([*map(str, range(20)), "7"], key=int)
    assert [message["attempt"] for message in messages if message["body"] == "7"] == [1, 2]
    await client.ask("close")
    await client.ask("simple", group=names.group, topic=names.topic)
    assert await client.ask("receive", count=32) == []
    await client.close()


async def test_a_push_consumer_keeps_the_order_of_a_message_group(client, engine, make_topic):
    names = await make_topic("FIFO")
    await order(engine, names.group)
    await client.ask("producer_of", topic=names.topic)
    for number in range(10):
        for group in ("a", "b"):
            properties = {"fail": "1" if number == 3 else "0"}
            body = f"{group}{number}"
            await client.ask("send", topic=names.topic, body=body, message_group=group, properties=properties)
    await client.ask("push", group=names.group, topic=names.topic)
    messages = await client.take(22)
    for group in ("a", "b"):
        expected = [f"{group}{number}" for number in (0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9)]
        assert bodies(message for message in messages if message["message_group"] == group) == expected


async def test_a_simple_consumer_gets_the_highest_priority_first(client, make_topic):
    names = await make_topic("PRIORITY")
    await client.ask("producer_of", topic=names.topic)
    for priority in (1, 7, 3, 7, 5):
        await client.ask("send", topic=names.topic, body=str(priority), priority=priority)
    await client.ask("simple", group=names.group, topic=names.topic)
    assert bodies([(await receive(client, 1))[0] for _ in range(5)]) == ["7", "7", "5", "3", "1"]


async def test_a_lite_push_consumer_gets_the_lite_topics_it_subscribes(client, engine, make_topic):
    names = await make_topic("LITE")
    await order(engine, names.group, **{"lite.bind.topic": names.topic})
    await client.ask("producer_of", topic=names.topic)
    await client.ask("lite", group=names.group, topic=names.topic)
    for name in ("session-1", "session-2"):
        await client.ask("subscribe", name=name)
    for number in range(10):
        for name in ("session-1", "session-2", "session-3"):
            properties = {"fail": "1" if number == 3 else "0"}
            await client.ask("send", topic=names.topic, body=str(number), lite_topic=name, properties=properties)
    messages = await client.take(22)
    for name in ("session-1", "session-2"):
        mine = [message for message in messages if message["lite_topic"] == name]
        assert bodies(mine) == ["0", "1", "2", "3", "3", "4", "5", "6", "7", "8", "9"]
    await client.ask("unsubscribe", name="session-1")
    await client.ask("send", topic=names.topic, body="for nobody", lite_topic="session-1")
    await client.ask("send", topic=names.topic, body="for me", lite_topic="session-2")
    got = bodies(await client.take(1))
    if engine.name == APACHE and got == ["for nobody"]:
        # The difference `after-unsubscribing` of the contract suite.
        got = bodies(await client.take(1))
    assert got == ["for me"]


async def test_a_lite_push_consumer_takes_a_session_over_from_an_offset(engine, make_topic, tmp_path):
    names = await make_topic("LITE")
    await order(engine, names.group, **{"lite.bind.topic": names.topic})
    # The Python client has no offset options.
    async with OfficialClient("java", engine.endpoint, tmp_path) as client:
        await client.ask("producer_of", topic=names.topic)
        await client.ask("lite", group=names.group, topic=names.topic)
        await client.ask("subscribe", name="session")
        for number in range(5):
            await client.ask("send", topic=names.topic, body=str(number), lite_topic="session")
        assert bodies(await client.take(5)) == ["0", "1", "2", "3", "4"]
        await client.ask("lite", group=names.group, topic=names.topic)
        await client.ask("subscribe", name="session", offset=2)
        assert bodies(await client.take(3)) == ["2", "3", "4"]
        await client.ask("send", topic=names.topic, body="live", lite_topic="session")
        assert bodies(await client.take(1)) == ["live"]


@pytest.mark.parametrize("options", [{"delay": 60}, {"transaction": True}], ids=str)
async def test_what_a_topic_does_not_hold_is_refused_before_it_is_sent(client, make_topic, options):
    names = await make_topic()
    await client.ask("producer_of", topic=names.topic)
    with pytest.raises(OfficialError, match=r"(?i)message type not match.*NORMAL"):
        await client.ask("send", topic=names.topic, body="x", **options)


async def test_the_embedded_broker_needs_no_provisioning_and_says_what_it_does_not_model(language, tmp_path):
    async with DevBroker() as broker, OfficialClient(language, broker.endpoint, tmp_path) as client:
        await client.ask("producer_of", topic="Delayed")
        for options in ({"delay": 60}, {"transaction": True}):
            with pytest.raises(OfficialError, match=r"not modelled.*use a real Apache RocketMQ"):
                await client.ask("send", topic="Delayed", body="x", **options)
        await client.ask("producer_of", topic="Replies")
        await client.ask("lite", group="RepliesGroup", topic="Replies")
        await client.ask("subscribe", name="session")
        await client.ask("send", topic="Replies", body="hello", lite_topic="session")
        assert bodies(await client.take(1)) == ["hello"]
