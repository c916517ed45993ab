"""Which instance a request goes to: named by its task's id or learnt from responses, per agent."""

from __future__ import annotations

import json

import pytest

from agentscope_rocketmq.jsonrpc import RpcRequest
from agentscope_rocketmq.routes import (
    INSTANCE_HEADER,
    InstanceRoutes,
    instance_asked_for,
    is_instance,
    is_task_channel,
    new_task_id,
    same_server,
)

ONE, TWO = "i-" + "1" * 32, "i-" + "2" * 32


def rpc(**params):
    return RpcRequest.read(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "GetTask", "params": params}))


def result(**members):
    return json.dumps({"jsonrpc": "2.0", "id": 1, "result": members})


def test_a_task_id_is_the_channel_of_its_task():
    task = new_task_id("request 1")
    assert is_task_channel(task)
    assert task == new_task_id("request 1") != new_task_id("request 2")
    for request in (rpc(id=task), rpc(taskId=task), rpc(message={"taskId": task})):
        assert instance_asked_for(request, {}) == task
        assert instance_asked_for(request, {INSTANCE_HEADER: TWO}) == task
        assert InstanceRoutes("State").find("Agent", request) == ("State", task)
    for name in (f"{task}0", task[:-1], task.upper(), f"{task}\n", f" {task}"):
        assert not is_task_channel(name)
    assert instance_asked_for(rpc(id="abc"), {}) is None
    assert instance_asked_for(rpc(id=7, message=[], task=None), {}) is None


@pytest.mark.parametrize(
    "name", ["", "i-1", "c-" + "1" * 32, ONE.upper(), ONE + "-", ONE + "-1234", ONE + "\n", "x" + ONE]
)
def test_only_instances_can_be_asked_for(name):
    assert not is_instance(name)
    assert instance_asked_for(rpc(), {INSTANCE_HEADER: name}) is None
    assert not same_server(ONE, name)


def test_a_server_may_listen_on_several_brokers():
    assert is_instance(f"{ONE}-1")
    assert same_server(f"{ONE}-1", ONE)
    assert not same_server(f"{ONE}-1", f"{TWO}-1")
    assert instance_asked_for(rpc(), {INSTANCE_HEADER.upper(): f"{ONE}-1"}) == f"{ONE}-1"


def test_what_a_response_tells_is_known_for_its_agent_only():
    routes = InstanceRoutes("State")
    asked = rpc(message={"contextId": "trip"})
    routes.note("Weather", ("Java", "f99"), asked, result(task={"id": "t1", "contextId": "trip"}))
    assert routes.find("Weather", asked) == routes.find("Weather", rpc(id="t1")) == ("Java", "f99")
    # Two agents asked in one session share its context id.
    assert routes.find("Travel", asked) is None


def test_the_first_event_of_a_stream_tells_too():
    routes = InstanceRoutes("State")
    event = f"data: {result(statusUpdate={'taskId': 't2', 'contextId': 'c'})}\n\n"
    routes.note("Agent", ("State", ONE), rpc(), event * 2)
    assert routes.find("Agent", rpc(id="t2")) == ("State", ONE)


def test_a_task_that_nobody_has_is_asked_for_again_only_when_it_was_heard_of():
    routes = InstanceRoutes("State")
    channel = new_task_id("request 1")
    task = rpc(id=channel)
    routes.forget(("State", channel))
    assert routes.find("Agent", task) is None
    routes.note("Agent", ("State", ONE), rpc(id="other"), "{}")
    assert routes.find("Agent", task) is None
    routes.note("Agent", ("State", ONE), task, "{}")
    assert routes.find("Agent", task) == ("State", channel)
    # Who runs it now matters, not who ran it when it was last heard of.
    routes.note("Agent", ("State", TWO), task, "{}")
    assert routes.find("Agent", task) == ("State", channel)


def test_what_is_known_is_bounded():
    routes = InstanceRoutes("State", most=3)
    for number in range(5):
        routes.note("Agent", ("State", ONE), rpc(id=f"t{number}"), "{}")
        routes.find("Agent", rpc(id="t0"))
    known = [number for number in range(5) if routes.find("Agent", rpc(id=f"t{number}"))]
    assert known == [0, 3, 4]
