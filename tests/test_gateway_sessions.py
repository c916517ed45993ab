"""Sessions through gateways: every event has a cursor, and any gateway goes on from it."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from urllib.parse import quote

import pytest
from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskUpdater
from a2a.types import Part, Task, TaskState, TaskStatus
from pydantic import SecretStr

from agentscope_rocketmq import RocketMQ, RocketMQConfig
from agentscope_rocketmq.dev import DevBroker
from agentscope_rocketmq.dev.embedded import broker as embedded
from agentscope_rocketmq.gateway.cursors import Cursors, Place
from agentscope_rocketmq.gateway.replays import Replays
from agentscope_rocketmq.provision import apply, plan
from agentscope_rocketmq.sse import parse_events
from tests.faults import Counter, Ledger
from tests.gateways import (
    VERSIONS,
    about,
    client,
    events,
    gateway_for,
    message,
    numbers,
    result,
    stream,
    task_of,
)
from tests.services import card_for, server_for
from tests.test_session_expiration import expire, until_gone
from tests.waiting import LIMIT, take, until

STATUS = {"1.0": "statusUpdate", "0.3": "status-update"}
both_versions = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture
async def setting(config, make_topic, tmp_path):
    """A counter behind RocketMQ: its card, its ledger and itself."""
    names = await make_topic("NORMAL")
    counter = Counter(Ledger(tmp_path / "ledger"))
    card = card_for(config, names.topic)
    async with server_for(counter, config, names.topic, card=card):
        yield card, counter
        for enough in counter.enough.values():
            enough.set()


@both_versions
async def test_from_every_cursor_of_a_stream_the_rest_of_it_can_be_had_at_another_gateway(config, setting, version):
    card, _ = setting
    async with gateway_for(config, card) as one, gateway_for(config, card) as other:
        async with client(one.url, version=version) as http:
            found = await events(http, "/", message("x 7", version=version))
        assert numbers(found) == list(range(7))
        [session] = {task_of(found[0])["contextId"]}
        async with client(other.url, version=version) as http:
            for position in range(len(found) - 1):
                path = f"/sessions/{session}/events?follow=false"
                rest = await events(http, path, **{"last-event-id": found[position].id})
                assert [(e.id, e.data) for e in rest] == [(e.id, e.data) for e in found[position + 1 :]]
                assert await events(http, f"{path}&after={found[position].id}") == rest
            whole = await events(http, f"/sessions/{session}/events?from_start=1&follow=0")
            assert [(e.id, e.data) for e in whole] == [(e.id, e.data) for e in found]


@pytest.mark.parametrize("asked", VERSIONS)
@both_versions
async def test_an_ended_task_answers_with_itself_and_then_with_what_came_after_the_cursor(
    config, setting, version, asked
):
    card, _ = setting
    async with gateway_for(config, card) as one, gateway_for(config, card) as other:
        async with client(one.url, version=version) as http:
            found = await events(http, "/", message("x 5", version=version))
        task = task_of(found[0])
        async with client(other.url, version=asked) as http:
            first, *rest = await events(
                http, "/", about("subscribe", task["id"], version=asked), **{"last-event-id": found[2].id}
            )
        assert task_of(first)["id"] == task["id"]
        assert task_of(first)["status"]["state"] in ("TASK_STATE_COMPLETED", "completed")
        assert {json.loads(event.data)["id"] for event in rest} == {"q"}
        assert numbers(rest) == [2, 3, 4]
        assert [event.id for event in rest] == [event.id for event in found[3:]]
        if version == asked:
            assert [result(event) for event in rest] == [result(event) for event in found[3:]]


@both_versions
async def test_an_ended_task_of_which_nothing_is_left_is_known_to_be_so_without_waiting(
    config, setting, version, monkeypatch
):
    monkeypatch.setattr("agentscope_rocketmq.gateway.replays._FIRST_SECONDS", 10 * LIMIT)
    card, _ = setting
    async with gateway_for(config, card) as served, client(served.url, version=version) as http:
        found = await events(http, "/", message("x 2", version=version))
        subscribed = about("subscribe", task_of(found[0])["id"], version=version)
        async with asyncio.timeout(LIMIT):
            [task] = await events(http, "/", subscribed, **{"last-event-id": found[-1].id})
        assert task_of(task)["status"]["state"] in ("TASK_STATE_COMPLETED", "completed")


async def test_who_has_all_events_of_a_quiet_session_is_answered_at_once_and_hears_the_next(
    config, setting, monkeypatch
):
    monkeypatch.setattr("agentscope_rocketmq.gateway.replays._FIRST_SECONDS", 10 * LIMIT)
    card, _ = setting
    async with gateway_for(config, card) as one, gateway_for(config, card) as other:
        async with client(one.url) as http:
            found = await events(http, "/", message("x 2", contextId="quiet"))
        last = {"last-event-id": found[-1].id}
        async with (
            client(other.url) as http,
            asyncio.timeout(LIMIT),
            stream(http, "/sessions/quiet/events", **last) as response,
        ):
            assert response.status_code == 200
            asked = await events(http, "/", message("y 2", contextId="quiet"))
            heard = await take(response.events, len(asked))
        assert [event.id for event in heard] == [event.id for event in asked]


@both_versions
async def test_a_running_task_goes_on_at_another_gateway_where_the_client_left_it(config, setting, version):
    card, counter = setting
    async with gateway_for(config, card) as one, gateway_for(config, card) as other:
        async with client(one.url, version=version) as http, stream(http, "/", message("x", version=version)) as left:
            before = await take(left.events, 4)
        async with (
            client(other.url, version=version) as http,
            stream(
                http,
                "/",
                about("subscribe", task_of(before[0])["id"], version=version),
                **{"last-event-id": before[-1].id},
            ) as joined,
        ):
            [task] = await take(joined.events, 1)
            after = await take(joined.events, 4)
            counter.enough["x"].set()
            async with asyncio.timeout(LIMIT):
                after += [event async for event in joined.events]
    assert task_of(task)["id"] == task_of(before[0])["id"]
    counted = numbers(before) + numbers(after)
    assert counted == list(range(len(counted)))
    assert counter.ledger.count("end", "x") == 1


async def test_a_client_that_leaves_cancels_nothing(config, setting):
    card, counter = setting
    async with gateway_for(config, card) as served, client(served.url) as http:
        async with stream(http, "/", message("x")) as left:
            await take(left.events, 2)
        await until(lambda: len(served.gateway.streams) == 0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(http.post("/", json=message("y", stream=False)), 0.5)
        assert [counter.ledger.count("end", name) for name in "xy"] == [0, 0]
        for name in "xy":
            counter.enough[name].set()
        await until(lambda: [counter.ledger.count("end", name) for name in "xy"] == [1, 1])


async def test_where_no_event_came_yet_the_response_says_what_to_go_on_from(config, setting):
    card, counter = setting
    async with gateway_for(config, card) as one, gateway_for(config, card) as other:
        async with client(one.url) as http, stream(http, "/", message("x")) as response:
            cursor = response.headers["last-event-id"]
        counter.enough["x"].set()
        await until(lambda: counter.ledger.count("end", "x") == 1)
        session = Cursors(None).read(cursor, owner="anonymous").session
        async with client(other.url) as http:
            rest = await events(http, f"/sessions/{session}/events?follow=0", **{"last-event-id": cursor})
        assert task_of(rest[0])["contextId"] == session
        assert numbers(rest) == list(range(len(numbers(rest))))


async def test_a_session_that_began_anew_is_gone_on_with_from_its_new_start(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "_TIDY_INTERVAL", 0.5)
    counter = Counter(Ledger(tmp_path / "ledger"))
    async with DevBroker(port=0) as broker:
        config = RocketMQConfig(endpoint=broker.endpoint, namesrv=broker.namesrv)
        card = card_for(config, "AgentTopic")
        await apply(plan([card], config), config)
        async with (
            server_for(counter, config, "AgentTopic", card=card),
            gateway_for(config, card) as served,
            client(served.url) as http,
        ):
            await events(http, "/", message("x 3", contextId="talk"))
            await expire(config, config.reply_topic, minutes=0)
            await until_gone(served.gateway._session("talk", "anonymous"))
            await expire(config, config.reply_topic, minutes=-1)
            async with stream(http, "/", message("y 1", contextId="talk")) as response:
                cursor = response.headers["last-event-id"]
                found = [event async for event in response.events]
            rest = await events(http, "/sessions/talk/events?follow=0", **{"last-event-id": cursor})
            assert [event.id for event in rest] == [event.id for event in found]


async def test_a_session_can_be_replayed_from_its_start_from_a_time_and_from_its_end(config, setting):
    card, _ = setting
    async with gateway_for(config, card) as served, client(served.url) as http:
        first = await events(http, "/", message("x 2", contextId="talk"))
        between = datetime.now(UTC)
        second = await events(http, "/", message("y 3", contextId="talk"))
        path = "/sessions/talk/events?follow=0"
        data = [event.data for event in (*first, *second)]
        assert [e.data for e in await events(http, f"{path}&from_start=true")] == data
        assert [e.data for e in await events(http, f"{path}&from_start=true&observe=true")] == data
        since = between.isoformat().replace("+00:00", "Z")
        assert [e.data for e in await events(http, f"{path}&since={since}")] == [e.data for e in second]
        assert [e.data for e in await events(http, f"{path}&tail=2")] == data[-2:]


async def test_a_replay_follows_what_comes(config, setting):
    card, _ = setting
    async with gateway_for(config, card) as served, client(served.url) as http:
        first = await events(http, "/", message("x 2", contextId="talk"))
        async with stream(http, "/sessions/talk/events?from_start=1") as followed:
            assert [e.data for e in await take(followed.events, len(first))] == [e.data for e in first]
            second = await events(http, "/", message("y 3", contextId="talk"))
            assert [e.data for e in await take(followed.events, len(second))] == [e.data for e in second]


class _AskBack(AgentExecutor):
    """Asks back once, then is done."""

    async def execute(self, context, event_queue):
        if context.current_task is None:
            submitted = TaskStatus(state=TaskState.TASK_STATE_SUBMITTED)
            await event_queue.enqueue_event(
                Task(id=context.task_id, context_id=context.context_id, status=submitted, history=[context.message])
            )
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        if context.current_task is None:
            await updater.requires_input()
            return
        await updater.add_artifact([Part(text="7")], artifact_id="a")
        await updater.complete()

    async def cancel(self, context, event_queue):
        raise NotImplementedError


@both_versions
async def test_a_message_that_names_only_its_task_is_of_the_tasks_session(config, make_topic, version):
    names = await make_topic("NORMAL")
    card = card_for(config, names.topic)
    async with (
        server_for(_AskBack(), config, names.topic, card=card),
        gateway_for(config, card) as one,
        gateway_for(config, card) as other,
    ):
        async with client(one.url, version=version) as http:
            asked = await events(http, "/", message("x", version=version))
        task = task_of(asked[0])
        async with client(other.url, version=version) as http:
            answered = await events(http, "/", message("y", version=version, taskId=task["id"]))
            assert numbers(answered) == [7]
            path = f"/sessions/{task['contextId']}/events?from_start=1&follow=0"
            assert [e.data for e in await events(http, path)] == [e.data for e in (*asked, *answered)]
            _, *rest = await events(
                http, "/", about("subscribe", task["id"], version=version), **{"last-event-id": asked[0].id}
            )
            assert [e.id for e in rest] == [e.id for e in (*asked[1:], *answered)]


@pytest.mark.parametrize(
    "query",
    ["since=yesterday", "since=2026-01-01T00:00:00", "tail=x", "tail=-1", "follow=maybe", "tail=1&from_start=1"],
)
async def test_what_cannot_be_read_is_refused(config, setting, query):
    card, _ = setting
    async with gateway_for(config, card) as served, client(served.url) as http:
        response = await http.get(f"/sessions/talk/events?{query}")
        assert response.status_code == 400
        assert response.json()["error"]["data"]["reason"] == "bad-request"


async def test_sessions_that_are_not_there_and_cursors_that_lead_nowhere_are_refused_each_by_its_status(
    config, setting
):
    card, _ = setting
    secret = "a secret"
    config = config.model_copy(update={"a2a_secret": SecretStr(secret)})
    async with gateway_for(config, card) as served, client(served.url) as http:
        found = await events(http, "/", message("x 1", contextId="talk"))
        cursors = Cursors(secret)
        made_up = cursors.write(Place("talk", "5.0.000000000000"), owner="anonymous")
        gone = cursors.write(Place("nobody", "5.0.000000000000"), owner="anonymous")
        for path, headers, status, reason in (
            ("/sessions/nobody/events?from_start=1", {}, 404, "no-such-session"),
            ("/sessions/nobody/events?tail=3&follow=0", {}, 404, "no-such-session"),
            ("/sessions/nobody/events", {"last-event-id": gone}, 410, "gap"),
            ("/sessions/talk/events", {"last-event-id": made_up}, 410, "gap"),
            ("/sessions/talk/events", {"last-event-id": "nonsense"}, 403, "bad-cursor"),
            ("/sessions/other/events", {"last-event-id": found[0].id}, 403, "bad-cursor"),
            ("/sessions/talk/events", {"last-event-id": found[0].id[:-1] + "_"}, 403, "bad-cursor"),
            ("/sessions/talk/events?after=" + Cursors(None).write(Place("talk", ""), owner=""), {}, 403, "bad-cursor"),
        ):
            response = await http.get(path, headers=headers)
            assert (response.status_code, response.json()["error"]["data"]["reason"]) == (status, reason), path
        body = about("subscribe", task_of(found[0])["id"])
        elsewhere = await events(http, "/", message("y 1", contextId="other"))
        for cursor in ("nonsense", elsewhere[0].id):
            response = await http.post("/", json=body, headers={"last-event-id": cursor})
            assert (response.status_code, response.json()["id"]) == (403, "q")
        response = await http.post("/", json=about("subscribe", "no-such-task"), headers={"last-event-id": found[0].id})
        assert (response.status_code, response.json()["error"]["code"], response.json()["id"]) == (200, -32001, "q")


async def test_a_session_of_another_owner_is_refused_by_what_is_recorded_in_it(config, setting):
    card, counter = setting
    async with RocketMQ(config, card_cache=None) as rocketmq:
        await rocketmq.session("bobs", owner="bob").announce()
    async with gateway_for(config, card) as served, client(served.url) as http:
        response = await http.get("/sessions/bobs/events?from_start=1")
        assert (response.status_code, response.json()["error"]["data"]["reason"]) == (403, "wrong-owner")
        response = await http.post("/", json=message("x 1", contextId="bobs"))
        assert (response.status_code, response.json()["id"]) == (403, "q")
    assert counter.ledger.count("begin", "x") == 0


@pytest.mark.parametrize(("name", "other"), [("contextId", "context_id"), ("taskId", "task_id")])
async def test_a_field_that_is_written_twice_is_refused(config, setting, name, other):
    card, counter = setting
    async with gateway_for(config, card) as served, client(served.url) as http:
        twice = message("x 1")
        twice["params"]["message"] |= {name: "mine", other: "another"}
        response = await http.post("/", json=twice)
        assert response.json()["error"]["code"] == -32602
        found = await events(http, "/", message("y 1", context_id="in-other-words"))
        assert task_of(found[0])["contextId"] == "in-other-words"
        assert await events(http, "/sessions/in-other-words/events?from_start=1&follow=0")
    assert counter.ledger.count("begin", "x") == 0


@pytest.mark.parametrize(
    ("place", "twice"),
    [
        ('"method": ', '"method": "GetTask", "method": '),
        ('"message": ', '"message": {}, "message": '),
        ('"contextId": ', '"contextId": "another", "contextId": '),
    ],
)
async def test_a_member_that_is_given_twice_is_refused(config, setting, place, twice):
    """The agent's server may take the other one."""
    card, counter = setting
    text = json.dumps(message("x 1", contextId="mine"))
    assert text.count(place) == 1
    async with gateway_for(config, card) as served, client(served.url) as http:
        response = await http.post("/", content=text.replace(place, twice))
        assert response.json()["error"]["code"] == -32600
    assert counter.ledger.count("begin", "x") == 0


@pytest.mark.parametrize("name", ["a\nb", "a/events", "ü ?#%", "\x01" * 1024])
async def test_a_session_may_have_any_name(config, setting, name):
    card, _ = setting
    async with gateway_for(config, card) as served, client(served.url) as http:
        found = await events(http, "/", message("x 1", contextId=name))
        path = f"/sessions/{quote(name, safe='')}/events?follow=0"
        assert [event.id for event in await events(http, f"{path}&from_start=1")] == [event.id for event in found]
        rest = await events(http, path, **{"last-event-id": found[0].id})
        assert [event.id for event in rest] == [event.id for event in found[1:]]


@both_versions
async def test_a_task_whose_events_are_not_in_its_session_ends_for_who_resumes_it(
    config, setting, version, monkeypatch
):
    monkeypatch.setattr("agentscope_rocketmq.gateway.replays._ASK_AGAIN_SECONDS", 0.3)
    card, counter = setting
    async with gateway_for(config, card) as served, client(served.url, version=version) as http:
        found = await events(http, "/", message("x 1", version=version, contextId="talk"))
        body = message("y", version=version, stream=False, contextId="talk")
        body["params"]["configuration"] = {"blocking": False} if version == "0.3" else {"returnImmediately": True}
        begun = (await http.post("/", json=body)).json()["result"]
        task = begun if version == "0.3" else begun["task"]
        subscribed = about("subscribe", task["id"], version=version)
        async with asyncio.timeout(LIMIT), stream(http, "/", subscribed, **{"last-event-id": found[-1].id}) as response:
            first = task_of(await anext(response.events))
            assert (first["id"], first["status"]["state"].lower().endswith("completed")) == (task["id"], False)
            counter.enough["y"].set()
            rest = [event async for event in response.events]
        last = task_of(rest[-1])
        assert (last["id"], last["status"]["state"].lower().endswith("completed")) == (task["id"], True)


async def test_half_of_a_surrogate_pair_in_an_id_comes_back_as_it_is(config, setting):
    """JSON can say it by an escape, UTF-8 can't."""
    card, _ = setting
    half = "\ud800"

    def said(body):
        return {"content": json.dumps(body | {"id": half})}

    async with gateway_for(config, card) as served, client(served.url) as http:
        found = await events(http, "/", message("x 1", contextId="talk"))
        refused = await http.post("/", **said(message("y 1", contextId="c" * 2000)))
        assert (refused.status_code, refused.json()["id"]) == (400, half)
        resumed = about("subscribe", task_of(found[0])["id"])
        again = parse_events((await http.post("/", **said(resumed), headers={"last-event-id": found[0].id})).text)
        assert [json.loads(event.data)["id"] for event in again] == [half] * 3
        async with stream(http, "/", message("z", contextId="talk")) as running:
            begun = await anext(running.events)
            resumed, headers = about("subscribe", task_of(begun)["id"]), {"last-event-id": begun.id}
            async with http.stream("POST", "/", **said(resumed), headers=headers) as broken_off:
                until_its_end = broken_off.aiter_text()
                text = await anext(until_its_end)
                served.gateway.streams.ending.set()
                async with asyncio.timeout(LIMIT):
                    text += "".join([piece async for piece in until_its_end])
        *_, last = parse_events(text)
        assert (last.name, json.loads(last.data)["id"]) == ("reconnect", half)


@both_versions
async def test_what_comes_while_the_agent_is_asked_whether_a_task_has_ended_is_not_left_out(
    config, setting, version, monkeypatch
):
    monkeypatch.setattr("agentscope_rocketmq.gateway.replays._ASK_AGAIN_SECONDS", 0.3)
    monkeypatch.setattr("agentscope_rocketmq.gateway.replays._QUIET_SECONDS", LIMIT)
    card, counter = setting
    counter.starts["x"] = asyncio.Event()

    async def ended_meanwhile(replays, *arguments):
        counter.starts["x"].set()
        await until(lambda: counter.ledger.count("end", "x") == 1)
        return await asked(replays, *arguments)

    asked = Replays._snapshot
    monkeypatch.setattr(Replays, "_snapshot", ended_meanwhile)
    async with gateway_for(config, card) as one, gateway_for(config, card) as other:
        async with (
            client(one.url, version=version) as http,
            stream(http, "/", message("x 3", version=version)) as response,
        ):
            first = await anext(response.events)
        async with client(other.url, version=version) as http:
            subscribed = about("subscribe", task_of(first)["id"], version=version)
            _, *rest = await events(http, "/", subscribed, **{"last-event-id": first.id})
        assert numbers(rest) == [0, 1, 2]
        # The end event is the end: there is nothing to add to it.
        assert (len(rest), result(rest[-1]).get("kind", "statusUpdate")) == (4, STATUS[version])
        assert all(event.id for event in rest)


async def test_a_head_request_takes_no_events(config, setting):
    card, _ = setting
    async with gateway_for(config, card) as served, client(served.url) as http:
        found = await events(http, "/", message("x 2", contextId="talk"))
        assert (await http.head("/sessions/talk/events?from_start=1")).status_code == 405
        assert len(served.gateway.streams) == 0
        again = await events(http, "/sessions/talk/events?from_start=1&follow=0")
        assert [event.id for event in again] == [event.id for event in found]


@pytest.mark.parametrize("stream_it", [True, False])
async def test_a_session_name_that_is_too_long_is_refused_at_its_first_call(config, setting, stream_it):
    card, counter = setting
    async with gateway_for(config, card) as served, client(served.url) as http:
        refused = await http.post("/", json=message("x 1", stream=stream_it, contextId="c" * 1025))
        assert (refused.status_code, refused.json()["error"]["data"]["reason"]) == (400, "bad-request")
        assert "1024" in refused.json()["error"]["message"]
        refused = await http.get(f"/sessions/{'c' * 1025}/events?from_start=1")
        assert refused.status_code == 400
        await events(http, "/", message("x 1", contextId="c" * 1024))
        assert len(await events(http, f"/sessions/{'c' * 1024}/events?from_start=1&follow=0")) == 3
    assert counter.ledger.count("begin", "x") == 1
