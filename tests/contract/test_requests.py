"""What is answered, and what is refused with which code."""

from __future__ import annotations

import re
import time
from pathlib import Path

import grpc
import pytest

from agentscope_rocketmq.rocketmq.protocol import definition, service
from tests.contract.conftest import DIFFERENCES
from tests.contract.wire import Code, Type, message, resource

MIB = 1024 * 1024


def test_there_are_at_most_ten_named_differences_and_each_is_asserted():
    assert len(DIFFERENCES) <= 10
    source = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert set(re.findall(r'target\.differs\("([a-z-]+)"\)', source)) == set(DIFFERENCES)


@pytest.mark.parametrize("kind", ["NORMAL", "FIFO", "LITE", "PRIORITY"])
async def test_a_route_has_the_topics_queues_and_type(peer, make, kind):
    names = await make(kind, queues=3)
    answer = await peer().call("QueryRoute", service.QueryRouteRequest(topic=resource(names.topic)))
    assert answer.status.code == Code.OK
    assert [queue.id for queue in answer.message_queues] == [0, 1, 2]
    assert {queue.permission for queue in answer.message_queues} == {definition.Permission.READ_WRITE}
    assert all(list(queue.accept_message_types) == [Type.Value(kind)] for queue in answer.message_queues)


async def test_a_group_is_assigned_any_queue_of_the_broker(peer, make):
    names = await make()
    request = service.QueryAssignmentRequest(topic=resource(names.topic), group=resource(names.group))
    answer = await peer().call("QueryAssignment", request)
    assert [assignment.message_queue.id for assignment in answer.assignments] == [-1]


@pytest.mark.parametrize(
    ("topic", "code"),
    [("NoSuchTopic", "TOPIC_NOT_FOUND"), ("", "ILLEGAL_TOPIC"), ("a b", "ILLEGAL_TOPIC"), ("x" * 128, "ILLEGAL_TOPIC")],
)
async def test_a_route_to_nowhere_is_refused(peer, topic, code):
    answer = await peer().call("QueryRoute", service.QueryRouteRequest(topic=resource(topic)))
    assert answer.status.code == Code.Value(code)


async def test_a_call_without_client_id_is_refused(peer, make):
    names = await make()
    answer = await peer().stub.QueryRoute(service.QueryRouteRequest(topic=resource(names.topic)))
    assert answer.status.code == Code.CLIENT_ID_REQUIRED


async def test_a_producer_is_told_the_limits(peer):
    settings = await peer().announce("PRODUCER")
    assert settings.publishing.max_body_size == 4 * MIB
    assert settings.publishing.validate_message_type
    assert settings.backoff_policy.max_attempts == 3


async def test_consumers_are_told_attempts_pauses_and_quota(peer, make):
    normal, lite = await make(), await make("LITE", group_attributes={"lite.sub.client.quota": "7"})
    settings = await peer().announce("PUSH_CONSUMER", normal.group, normal.topic)
    assert settings.backoff_policy.max_attempts == 17
    assert [pause.seconds for pause in settings.backoff_policy.customized_backoff.next][:3] == [1, 5, 10]
    assert not settings.subscription.fifo
    settings = await peer().announce("LITE_PUSH_CONSUMER", lite.group, lite.topic)
    assert (settings.subscription.lite_subscription_quota, settings.subscription.max_lite_topic_size) == (7, 64)


async def test_settings_that_make_no_sense_end_the_stream(peer, make):
    normal, lite, other = await make(), await make("LITE"), await make("LITE")
    for client_type, group, topic, words in (
        ("LITE_PUSH_CONSUMER", normal.group, lite.topic, "regular group cannot use LITE mode"),
        (
            "LITE_PUSH_CONSUMER",
            other.group,
            lite.topic,
            f"expected to bind topic {other.topic}, but actual is {lite.topic}",
        ),
        ("PUSH_CONSUMER", lite.group, lite.topic, "lite group must use LITE mode"),
        ("PUSH_CONSUMER", "NoSuchGroup", normal.topic, "group not found: NoSuchGroup"),
        ("PUSH_CONSUMER", "a b", normal.topic, "illegal characters"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
            await peer().announce(client_type, group, topic)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError, match="no publishing or subscription"):
        await peer().announce_settings(definition.Settings())


async def test_a_heartbeat_tells_whether_the_client_is_known(peer, make):
    names, one = await make(), peer()
    request = service.HeartbeatRequest(group=resource(names.group), client_type=definition.ClientType.PUSH_CONSUMER)
    assert (await one.call("Heartbeat", request)).status.code == Code.UNRECOGNIZED_CLIENT_TYPE
    await one.announce("PUSH_CONSUMER", names.group, names.topic)
    assert (await one.call("Heartbeat", request)).status.code == Code.OK
    leave = service.NotifyClientTerminationRequest(group=resource(names.group))
    assert (await one.call("NotifyClientTermination", leave)).status.code == Code.OK
    assert (await one.call("Heartbeat", request)).status.code == Code.UNRECOGNIZED_CLIENT_TYPE


async def test_a_receive_without_settings_is_refused(peer, make):
    names = await make()
    status, messages = await peer().poll(names.group, names.topic)
    assert (status.code, messages) == (Code.INTERNAL_SERVER_ERROR, [])


def changed(make_message, **fields):
    def change(topic):
        made = make_message(topic)
        for name, value in fields.items():
            setattr(made.system_properties, name, value)
        return made

    return change


def with_properties(properties):
    def change(topic):
        made = message(topic)
        made.user_properties.update(properties)
        return made

    return change


REFUSED = {
    "an empty body": (lambda topic: message(topic, b""), "MESSAGE_BODY_EMPTY", "body cannot be empty"),
    "a body over 4 MiB": (
        lambda topic: message(topic, bytes(4 * MIB + 1)),
        "MESSAGE_BODY_TOO_LARGE",
        "cannot exceed the max 4194304",
    ),
    "no id": (changed(message, message_id=""), "ILLEGAL_MESSAGE_ID", "cannot be empty"),
    "a tag with a bar": (changed(message, tag="a|b"), "ILLEGAL_MESSAGE_TAG", "'|'"),
    "a blank tag": (changed(message, tag="  "), "ILLEGAL_MESSAGE_TAG", "whitespace"),
    "a property of the system's": (with_properties({"KEYS": "x"}), "ILLEGAL_MESSAGE_PROPERTY_KEY", "used by system"),
    "a property with a control character": (
        with_properties({"k": "\x01"}),
        "ILLEGAL_MESSAGE_PROPERTY_KEY",
        "control character",
    ),
    "129 properties": (
        with_properties({f"k{number}": "" for number in range(129)}),
        "MESSAGE_PROPERTIES_TOO_LARGE",
        "max is 128",
    ),
    "16 KiB of properties": (
        with_properties({"k": "v" * 16 * 1024}),
        "MESSAGE_PROPERTIES_TOO_LARGE",
        "max is 16384",
    ),
    "a long message group": (changed(message, message_group="g" * 64), "ILLEGAL_MESSAGE_GROUP", "max size 64"),
    "another type": (
        changed(message, message_group="g"),
        "MESSAGE_PROPERTY_CONFLICT_WITH_TYPE",
        "the expected type is NORMAL, but actual type is FIFO",
    ),
    "a priority": (
        changed(message, priority=1),
        "MESSAGE_PROPERTY_CONFLICT_WITH_TYPE",
        "the expected type is NORMAL, but actual type is PRIORITY",
    ),
    "a lite topic": (
        changed(message, lite_topic="a"),
        "MESSAGE_PROPERTY_CONFLICT_WITH_TYPE",
        "the expected type is NORMAL, but actual type is LITE",
    ),
    "a blank in the lite topic": (changed(message, lite_topic="a b"), "ILLEGAL_LITE_TOPIC", "alphanumeric"),
    "a long lite topic": (changed(message, lite_topic="a" * 65), "ILLEGAL_LITE_TOPIC", "max size 64"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_a_message_is_refused_for(producer, make, what):
    make_message, code, words = REFUSED[what]
    names = await make()
    answer = await producer.send(make_message(names.topic))
    assert answer.status.code == Code.Value(code), answer.status
    assert words in answer.status.message


async def test_sending_nothing_to_nowhere_or_to_two_topics_is_refused(producer, make):
    one, two = await make(), await make()
    assert (await producer.send()).status.code == Code.MESSAGE_CORRUPTED
    assert (await producer.send(message(one.topic), message(two.topic))).status.code == Code.MESSAGE_CORRUPTED
    answer = await producer.send(message("NoSuchTopic"))
    assert answer.status.code == Code.MESSAGE_PROPERTY_CONFLICT_WITH_TYPE
    assert "the expected type is UNSPECIFIED, but actual type is NORMAL" in answer.status.message


async def test_a_delayed_message_does_not_fit_a_normal_topic(producer, make):
    delayed = message((await make()).topic)
    delayed.system_properties.delivery_timestamp.FromSeconds(int(time.time()) + 5)
    answer = await producer.send(delayed)
    assert answer.status.code == Code.MESSAGE_PROPERTY_CONFLICT_WITH_TYPE


@pytest.mark.parametrize(("seconds", "words"), [(5, "min is 10000"), (13 * 3600, "max is 43200000")])
async def test_a_message_can_be_hidden_for_10_seconds_to_12_hours(consumer, make, seconds, words):
    names = await make()
    status, _ = await (await consumer(names)).poll(names.group, names.topic, invisible=seconds)
    assert status.code == Code.ILLEGAL_INVISIBLE_TIME
    assert words in status.message


async def test_a_receive_for_an_unknown_topic_or_group_is_refused(consumer, make):
    names = await make()
    one = await consumer(names)
    status, _ = await one.poll(names.group, "NoSuchTopic")
    assert status.code == Code.TOPIC_NOT_FOUND
    status, _ = await one.poll("NoSuchGroup", names.topic)
    assert status.code == Code.CONSUMER_GROUP_NOT_FOUND


async def test_what_is_no_receipt_handle_is_refused(target, peer, make):
    names = await make()
    request = service.AckMessageRequest(
        group=resource(names.group),
        topic=resource(names.topic),
        entries=[service.AckMessageEntry(message_id="x", receipt_handle="junk")],
    )
    answer = await peer().call("AckMessage", request)
    code = Code.INVALID_RECEIPT_HANDLE if target.differs("handle-junk") else Code.INTERNAL_SERVER_ERROR
    assert [entry.status.code for entry in answer.entries] == [code]


@pytest.mark.parametrize("method", ["PullMessage", "UpdateOffset", "GetOffset", "QueryOffset"])
async def test_pulling_is_not_implemented(peer, method):
    one = peer()
    call = getattr(one.stub, method)(getattr(service, f"{method}Request")(), metadata=one.metadata)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if method == "PullMessage" else call)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("action", ["PARTIAL_ADD", "COMPLETE_ADD"])
async def test_a_subscription_must_fit_group_and_topic(peer, make, action):
    one, other, normal = await make("LITE"), await make("LITE"), await make()
    for group, topic, code, words in (
        (other.group, one.topic, "ILLEGAL_TOPIC", f"expected to bind topic {other.topic}, but actual is {one.topic}"),
        (normal.group, one.topic, "ILLEGAL_TOPIC", f"expected to bind topic null, but actual is {one.topic}"),
        ("NoSuchGroup", one.topic, "ILLEGAL_CONSUMER_GROUP", "group not found: NoSuchGroup"),
    ):
        status = await peer().sync(group, topic, action, ["a"])
        assert status.code == Code.Value(code)
        assert words in status.message


async def test_a_lite_topics_name_is_checked_when_it_is_subscribed(peer, make):
    names = await make("LITE")
    for name in ("a b", "x" * 65, "ä"):
        assert (await peer().sync(names.group, names.topic, "PARTIAL_ADD", [name])).code == Code.ILLEGAL_LITE_TOPIC


async def test_a_subscription_far_over_the_quota_is_refused(peer, make):
    names = await make("LITE", group_attributes={"lite.sub.client.quota": "5"})
    status = await peer().sync(names.group, names.topic, "PARTIAL_ADD", [f"s{number}" for number in range(400)])
    assert status.code == Code.LITE_SUBSCRIPTION_QUOTA_EXCEEDED
