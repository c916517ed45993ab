"""Provisioning, against a real RocketMQ: what was planned is what brokers have, and messages go through it."""

from __future__ import annotations

import asyncio
import shlex
import subprocess

import pytest

from agentscope_rocketmq.config import RocketMQConfig
from agentscope_rocketmq.dev.maven import rocketmq_jars
from agentscope_rocketmq.errors import (
    BrokerUnreachable,
    CardError,
    ConfigurationError,
    GroupNotBound,
    IllegalRequest,
    TopicTypeMismatch,
)
from agentscope_rocketmq.provision import Outcome, ProvisionPlan, apply, mqadmin_lines, plan
from agentscope_rocketmq.rocketmq.admin import Admin, GroupSettings, TopicSettings
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer, Position
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from tests.conftest import unique

EXCLUSIVE = {
    "lite.sub.model": "Exclusive",
    "lite.sub.client.max.event.cnt": "20000",
    "lite.sub.client.quota": "20000",
}


def card(*urls: str) -> dict[str, object]:
    return {
        "name": "Weather",
        "description": "Knows the weather.",
        "version": "1.0.0",
        "capabilities": {},
        "defaultInputModes": ["text/plain"],
        "defaultOutputModes": ["text/plain"],
        "skills": [],
        "supportedInterfaces": [{"url": url, "protocolBinding": "RocketMQ", "protocolVersion": "1.0"} for url in urls],
    }


def fresh(engine, **values) -> RocketMQConfig:
    names = {field: unique(field) for field in ("reply_topic", "reply_group", "state_topic", "state_group")}
    return RocketMQConfig(endpoint=engine.endpoint, namesrv=engine.namesrv, **{**names, **values})


def test_a_card_and_a_configuration_need_these_topics_and_groups():
    config = RocketMQConfig()
    planned = plan([card("http://127.0.0.1:8081//WeatherAgentTask")], config, retention_minutes=60)
    lite = {"message.type": "LITE", "lite.topic.expiration": "60"}
    assert planned.topics == (
        TopicSettings("WeatherAgentTask", {"message.type": "NORMAL"}),
        TopicSettings("WorkerAgentResponse", lite),
        TopicSettings("WorkerAgentResponseServer", lite),
    )
    reply = {"lite.bind.topic": "WorkerAgentResponse", **EXCLUSIVE}
    assert planned.groups == (
        GroupSettings("WeatherAgentTaskConsumerGroup"),
        GroupSettings("CID_HOST_AGENT_LITE", reply),
        GroupSettings("CID_HOST_AGENT_LITE_OBSERVER", reply),
        GroupSettings("CID_HOST_AGENT_LITE_SERVER", {"lite.bind.topic": "WorkerAgentResponseServer", **EXCLUSIVE}),
    )


def test_namespaces_are_those_of_the_card_and_of_the_configuration():
    planned = plan([card("http://127.0.0.1:8081/agents/Weather")], RocketMQConfig(namespace="callers"))
    assert [topic.name for topic in planned.topics] == [
        "agents%Weather",
        "callers%WorkerAgentResponse",
        "callers%WorkerAgentResponseServer",
    ]
    assert [group.name for group in planned.groups] == [
        "agents%WeatherConsumerGroup",
        "callers%CID_HOST_AGENT_LITE",
        "callers%CID_HOST_AGENT_LITE_OBSERVER",
        "callers%CID_HOST_AGENT_LITE_SERVER",
    ]
    assert planned.groups[1].attributes["lite.bind.topic"] == "callers%WorkerAgentResponse"


def test_two_agents_on_one_topic_need_it_once():
    url = "http://127.0.0.1:8081//Shared"
    planned = plan([card(url), card(url, "http://127.0.0.1:8081//Other")], RocketMQConfig())
    assert [topic.name for topic in planned.topics[:2]] == ["Shared", "Other"]
    assert len(planned.topics) == 4


def test_a_card_without_a_rocketmq_interface_is_refused():
    with pytest.raises(CardError, match="no RocketMQ interface"):
        plan([card()], RocketMQConfig())


def test_a_request_topic_that_is_the_reply_topic_is_refused():
    with pytest.raises(ConfigurationError, match="at once"):
        plan([card("http://127.0.0.1:8081//WorkerAgentResponse")], RocketMQConfig())


@pytest.mark.parametrize("minutes", [-2, 0, 14, 35792, 43200])
def test_a_retention_that_brokers_get_wrong_is_refused(minutes):
    with pytest.raises(ConfigurationError, match="35791"):
        plan([], RocketMQConfig(), retention_minutes=minutes)


@pytest.mark.parametrize("minutes", [-1, 15, 35791])
def test_the_limits_of_retention_are_allowed(minutes):
    topics = plan([], RocketMQConfig(), retention_minutes=minutes).topics
    assert [topic.attributes["lite.topic.expiration"] for topic in topics] == [str(minutes)] * 2


async def test_what_was_planned_is_what_the_broker_has_afterwards(engine):
    config = fresh(engine, namespace=unique("ns"))
    planned = plan([card(f"http://{engine.endpoint}/{config.namespace}/Weather")], config)
    applied = await apply(planned, config)
    assert [line.outcome for line in applied] == [Outcome.CREATED] * 7
    async with Admin(engine.namesrv) as admin:
        (broker,) = (await admin.brokers()).values()
        for topic in planned.topics:
            assert await admin.topic(broker, topic.name) == topic
        for group in planned.groups:
            assert await admin.group(broker, group.name) == group


async def test_applying_a_second_time_changes_nothing(engine):
    config = fresh(engine)
    planned = plan([card(f"http://{engine.endpoint}//{unique('Weather')}")], config)
    await apply(planned, config)
    assert {line.outcome for line in await apply(planned, config)} == {Outcome.UNCHANGED}


async def test_only_what_differs_is_changed_and_the_rest_is_kept(engine):
    config = fresh(engine)
    await apply(plan([], config), config)
    async with Admin(engine.namesrv) as admin:
        (broker,) = (await admin.brokers()).values()
        other = {"message.type": "LITE", "reserve.time": "100", "lite.topic.expiration": "15"}
        await admin.put_topic(broker, TopicSettings(config.reply_topic, other, read_queues=3, write_queues=2))
        shared = {"lite.sub.model": "Shared", "priority.factor": "7"}
        await admin.put_group(broker, GroupSettings(config.reply_group, shared))

        applied = await apply(plan([], config), config)

        assert {line.name for line in applied if line.outcome is Outcome.CHANGED} == {
            config.reply_topic,
            config.reply_group,
        }
        assert await admin.topic(broker, config.reply_topic) == TopicSettings(
            config.reply_topic, {**other, "lite.topic.expiration": "4320"}, read_queues=3, write_queues=2
        )
        assert await admin.group(broker, config.reply_group) == GroupSettings(
            config.reply_group, {"lite.bind.topic": config.reply_topic, "priority.factor": "7", **EXCLUSIVE}
        )


async def test_other_settings_of_a_group_survive(engine, make_topic):
    names = await make_topic("LITE", group_attributes={})
    async with Admin(engine.namesrv) as admin:
        (broker,) = (await admin.brokers()).values()
        before = await admin._group_fields(broker, names.group)
        await admin.put_group(broker, GroupSettings(names.group, EXCLUSIVE))
        after = await admin._group_fields(broker, names.group)
    assert before is not None
    assert after == {**before, "attributes": {"lite.bind.topic": names.topic, **EXCLUSIVE}}


async def test_a_group_for_java_callers_is_ordered_and_shared(engine):
    config = fresh(engine)
    java = unique("JavaGroup")
    planned = plan([], config, java_groups=[java])
    wanted = planned.groups[-1]
    assert wanted.ordered
    assert set(wanted.attributes) == {"lite.bind.topic", *EXCLUSIVE} - {"lite.sub.model"}
    assert mqadmin_lines(planned, namesrv="n:1")[-1].endswith(" -o true")
    async with Admin(engine.namesrv) as admin:
        (broker,) = (await admin.brokers()).values()
        # One that is there already, not ordered.
        await apply(ProvisionPlan(planned.topics, (GroupSettings(java, wanted.attributes),)), config)
        for outcome in (Outcome.CHANGED, Outcome.UNCHANGED):
            assert (await apply(planned, config))[-1].outcome is outcome
            assert await admin.group(broker, java) == wanted


def test_a_group_for_java_callers_is_none_of_our_own():
    with pytest.raises(ConfigurationError, match="another name"):
        plan([], RocketMQConfig(), java_groups=["CID_HOST_AGENT_LITE"])


async def test_a_group_is_made_ordered_and_stays_so(engine, make_topic):
    # As mqadmin's `-o true` does: the Java client hands over what it reads in order only then.
    names = await make_topic("LITE", group_attributes={})
    async with Admin(engine.namesrv) as admin:
        (broker,) = (await admin.brokers()).values()
        for change in (GroupSettings(names.group, ordered=True), GroupSettings(names.group, EXCLUSIVE)):
            await admin.put_group(broker, change)
            assert await admin.group(broker, names.group) == GroupSettings(
                names.group, {"lite.bind.topic": names.topic, **change.attributes}, ordered=True
            )


async def test_a_topic_of_another_type_is_not_taken_over(engine, make_topic):
    names = await make_topic("NORMAL")
    config = fresh(engine, reply_topic=names.topic)
    with pytest.raises(TopicTypeMismatch, match=r"NORMAL.*LITE"):
        await apply(plan([], config), config)


async def test_a_group_of_another_topic_is_not_taken_over(engine, make_topic):
    names = await make_topic("LITE")
    config = fresh(engine, reply_group=names.group)
    with pytest.raises(GroupNotBound, match=names.topic):
        await apply(plan([], config), config)


async def test_an_attribute_that_the_broker_does_not_know_is_an_error(engine):
    unknown = ProvisionPlan((TopicSettings(unique("Topic"), {"message.type": "LITE", "no.such": "1"}),), ())
    with pytest.raises(IllegalRequest, match=r"no\.such"):
        await apply(unknown, fresh(engine))


async def test_no_name_server_at_the_address_is_one_clear_error(engine):
    with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1:1 can't be reached"):
        await apply(plan([], RocketMQConfig()), fresh(engine), namesrv="127.0.0.1:1")


async def test_another_service_at_the_address_is_one_clear_error(engine):
    with pytest.raises(BrokerUnreachable, match="Listing the brokers"):
        await apply(plan([], RocketMQConfig()), fresh(engine), namesrv=engine.endpoint)


async def test_a_silent_service_at_the_address_is_given_up_in_time(engine):
    left = asyncio.Event()

    async def say_nothing(reader, writer):
        await reader.read()
        writer.close()
        left.set()

    async with asyncio.timeout(5), await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Admin(f"127.0.0.1:{port}", timeout=0.2) as admin:
            with pytest.raises(BrokerUnreachable, match=r"within 0\.2 s"):
                await admin.brokers()
        await left.wait()


async def test_the_second_name_server_is_asked_when_the_first_is_down(engine):
    async with Admin(f"127.0.0.1:1;{engine.namesrv}") as admin:
        assert await admin.brokers()


async def test_a_missing_name_server_says_which_variable_to_set():
    with pytest.raises(ConfigurationError, match="ROCKETMQ_NAMESRV"):
        await apply(plan([], RocketMQConfig()), RocketMQConfig())


async def test_an_unknown_cluster_is_refused_with_those_there_are(engine):
    with pytest.raises(ConfigurationError, match="DefaultCluster"):
        await apply(plan([], RocketMQConfig()), fresh(engine), cluster="NoSuchCluster")


async def test_deleted_topics_and_groups_are_gone(engine, make_topic):
    names = await make_topic("LITE")
    async with Admin(engine.namesrv) as admin:
        (broker,) = (await admin.brokers()).values()
        await admin.delete_group(broker, names.group)
        await admin.delete_topic(broker, names.topic)
        assert await admin.topic(broker, names.topic) is None
        assert await admin.group(broker, names.group) is None


async def test_messages_go_through_provisioned_topics_at_once(engine):
    config = fresh(engine)
    topic = unique("Weather")
    await apply(plan([card(f"http://{engine.endpoint}//{topic}")], config), config)
    async with (
        asyncio.timeout(60),
        Connection.from_config(config) as connection,
        Producer(connection) as producer,
        GroupConsumer(connection, topic, f"{topic}ConsumerGroup", concurrency=1) as requests,
        LiteConsumer(connection, config.reply_topic, config.reply_group) as replies,
    ):
        await replies.subscribe(["trip-42"], at=Position.first())
        await producer.send(Message(topic=topic, body=b"question"))
        lease = await anext(requests.messages())
        assert lease.message.body() == b"question"
        assert await requests.ack(lease)
        await producer.send(Message(topic=config.reply_topic, body=b"answer", lite_topic="trip-42"))
        batch = await anext(replies.batches())
        assert isinstance(batch, LiteBatch)
        assert [message.body() for message in batch.messages] == [b"answer"]
        await replies.ack(batch.messages)


def test_the_printed_mqadmin_lines_do_the_same(engine):
    config = fresh(engine)
    planned = plan([], config, retention_minutes=60)
    one_each = ProvisionPlan(planned.topics[:1], planned.groups[:1])
    jars = rocketmq_jars(None, print)
    mqadmin = ["java", "-cp", f"{jars}/*", "org.apache.rocketmq.tools.command.MQAdminStartup"]
    lines = [shlex.split(line) for line in mqadmin_lines(one_each, namesrv=engine.namesrv)]
    assert [line[0] for line in lines] == ["mqadmin"] * 2
    running = [subprocess.Popen([*mqadmin, *line[1:]], stdout=subprocess.PIPE, text=True) for line in lines]
    for process in running:
        output, _ = process.communicate(timeout=60)
        assert "success" in output
    assert {line.outcome for line in asyncio.run(apply(one_each, config))} == {Outcome.UNCHANGED}
