"""A run that was cut, and the one that takes over: the reader has one task, and each text once."""

from __future__ import annotations

import json

import pytest
from a2a.types import CancelTaskRequest, GetTaskRequest, TaskState
from agentscope.event import TextBlockDeltaEvent
from agentscope.message import Msg, UserMsg

from agentscope_rocketmq import Timeouts
from agentscope_rocketmq.rerun import RESTART_EXTENSION
from agentscope_rocketmq.sse import parse_events, render_event
from tests.faults import Follower, process
from tests.services import Keeper, card_for, server_for
from tests.test_exchange import data_of, feed_all, opened, ours
from tests.waiting import take
from tests.wires import result_event


@pytest.fixture
def quick(config):
    return config.model_copy(update={"timeouts": Timeouts(lease=10)})


IDS = {"taskId": "t", "contextId": "c"}


def task(legacy, *, task_id="t", state="SUBMITTED", **more):
    status = {"state": state.lower() if legacy else f"TASK_STATE_{state}", "timestamp": "2026-01-01T00:00:00Z"}
    fields = {"id": task_id, "contextId": "c", "status": status, **more}
    return {"kind": "task", **fields} if legacy else {"task": fields}


def chunk(legacy, text, *, artifact="a", append=False):
    part = {"kind": "text", "text": text} if legacy else {"text": text}
    fields = {**IDS, "artifact": {"artifactId": artifact, "parts": [part]}, "append": append}
    return {"kind": "artifact-update", **fields} if legacy else {"artifactUpdate": fields}


def ended(legacy):
    fields = {**IDS, "status": {"state": "completed" if legacy else "TASK_STATE_COMPLETED"}}
    return {"kind": "status-update", "final": True, **fields} if legacy else {"statusUpdate": fields}


def given(*runs):
    """What a reader is given of these runs of a request, each cut but the last, as a list of results."""
    exchange, call = opened()
    messages = [
        ours(seq, result_event(event), attempt=attempt, end=run is runs[-1] and seq == len(run) - 1)
        for attempt, run in runs_with_attempts(runs)
        for seq, event in enumerate(run)
    ]
    results = [json.loads(data)["result"] for data in data_of(feed_all(exchange, messages))]
    assert call.finished
    return results


def runs_with_attempts(runs):
    return list(enumerate(runs))


def kinds(legacy, results):
    """Each result in a word."""
    words = []
    for result in results:
        body = result if legacy else next(iter(result.values()))
        if "artifact" in body:
            text = "".join(part["text"] for part in body["artifact"]["parts"])
            words.append(f"{'+' if body.get('append') else '='}{body['artifact']['artifactId']}:{text}")
        elif RESTART_EXTENSION in body.get("metadata", {}):
            words.append(f"restart {body['metadata'][RESTART_EXTENSION]['attempt']}")
        else:
            words.append(body["status"]["state"].removeprefix("TASK_STATE_").lower())
    return words


both = pytest.mark.parametrize("legacy", [False, True], ids=["1.0", "0.3"])


@both
def test_the_artifacts_of_a_cut_run_are_emptied_at_the_seam(legacy):
    cut = [task(legacy), chunk(legacy, "old "), chunk(legacy, "text", append=True), chunk(legacy, "x", artifact="b")]
    new = [task(legacy), chunk(legacy, "new "), chunk(legacy, "text", append=True), ended(legacy)]
    results = given(cut, new)
    assert kinds(legacy, results) == [
        *("submitted", "=a:old ", "+a:text", "=b:x"),
        *("restart 1", "=a:", "=b:"),
        *("=a:new ", "+a:text", "completed"),
    ]
    seam = results[4] if legacy else results[4]["statusUpdate"]
    assert (seam["taskId"], seam["contextId"]) == ("t", "c")
    assert seam["status"]["timestamp"] == "2026-01-01T00:00:00Z"
    if legacy:
        assert [result.get("final", False) for result in results] == [False] * 9 + [True]


@both
def test_a_third_run_empties_what_the_second_left(legacy):
    runs = [
        [task(legacy), chunk(legacy, "1")],
        [task(legacy), chunk(legacy, "2", artifact="b")],
        [task(legacy), ended(legacy)],
    ]
    assert kinds(legacy, given(*runs)) == [
        *("submitted", "=a:1"),
        *("restart 1", "=a:", "=b:2"),
        *("restart 2", "=b:", "completed"),
    ]


@both
def test_a_run_that_takes_over_before_anything_was_given_out_begins_the_task(legacy):
    exchange, _ = opened()
    messages = [ours(seq, result_event(e), attempt=1) for seq, e in enumerate([task(legacy), chunk(legacy, "new")])]
    results = [json.loads(data)["result"] for data in data_of(feed_all(exchange, messages))]
    assert kinds(legacy, results) == ["submitted", "restart 1", "=a:new"]


@both
def test_nothing_is_said_after_the_end(legacy):
    """The run ended elsewhere before its last message was acked, and all that is left is to tell how."""
    whole = task(legacy, state="COMPLETED", artifacts=[{"artifactId": "a", "parts": []}])
    results = given([task(legacy), chunk(legacy, "old")], [whole])
    assert kinds(legacy, results) == ["submitted", "=a:old", "=a:", "completed"]
    exchange, _ = opened()
    assert kinds(
        legacy, [json.loads(data_of(feed_all(exchange, [ours(0, result_event(whole), attempt=2)]))[0])["result"]]
    ) == ["completed"]


@both
def test_a_task_that_ends_without_being_run_again_is_an_update_of_the_one_that_is_known(legacy):
    failed = task(legacy, state="FAILED")
    results = given([task(legacy), chunk(legacy, "old")], [failed])
    assert kinds(legacy, results) == ["submitted", "=a:old", "=a:", "failed"]
    update = results[-1] if legacy else results[-1]["statusUpdate"]
    assert (update["taskId"], update["contextId"]) == ("t", "c")
    if legacy:
        assert (update["kind"], update["final"]) == ("status-update", True)
    # Whoever says so may not know by which name the task was begun.
    [*_, renamed] = given([task(legacy), chunk(legacy, "old")], [task(legacy, task_id="u", state="FAILED")])
    assert renamed == results[-1]
    exchange, _ = opened()
    [data] = data_of(feed_all(exchange, [ours(0, result_event(failed), attempt=2)]))
    assert json.loads(data)["result"] == failed


@both
def test_a_worker_that_dies_after_the_end_of_its_task_leaves_nothing_to_add(legacy):
    """Its last message, which only says that the response is over, never came."""
    exchange, call = opened()
    cut = [task(legacy), chunk(legacy, "x"), ended(legacy)]
    texts = feed_all(exchange, [ours(seq, result_event(event)) for seq, event in enumerate(cut)])
    assert kinds(legacy, [json.loads(data)["result"] for data in data_of(texts)]) == ["submitted", "=a:x", "completed"]
    assert call.finished
    again = [ours(0, result_event(task(legacy)), attempt=1), ours(1, result_event(ended(legacy)), attempt=1, end=True)]
    assert feed_all(exchange, again) == []


@both
def test_a_run_that_goes_on_with_a_task_has_its_seam_too(legacy):
    """A follow-up begins with an update of its task, and not with the task."""
    again = {**IDS, "status": {"state": "working" if legacy else "TASK_STATE_WORKING"}}
    working = {"kind": "status-update", "final": False, **again} if legacy else {"statusUpdate": again}
    results = given([working, chunk(legacy, "old")], [working, chunk(legacy, "new"), ended(legacy)])
    assert kinds(legacy, results) == ["working", "=a:old", "restart 1", "=a:", "working", "=a:new", "completed"]


@both
def test_an_application_that_names_its_tasks_anew_has_two(legacy):
    results = given([task(legacy), chunk(legacy, "old")], [task(legacy, task_id="u"), ended(legacy)])
    assert kinds(legacy, results) == ["submitted", "=a:old", "submitted", "restart 1", "completed"]


@pytest.mark.parametrize("text", ['{"error": {"code": -32603}}', '{"result": {"message": {"parts": []}}}', "[]", "7"])
def test_what_is_no_task_passes_as_it_is(text):
    exchange, _ = opened()
    messages = [ours(0, result_event(task(legacy=False))), ours(0, text, attempt=1, end=True)]
    assert data_of(feed_all(exchange, messages))[1:] == [text]


def test_a_text_that_looks_like_a_mark_is_only_text():
    tricky = '"append": true, data: '
    results = given([task(False), chunk(False, tricky)], [task(False), ended(False)])
    assert kinds(legacy=False, results=results)[1:3] == [f"=a:{tricky}", "restart 1"]
    assert "=a:" in kinds(legacy=False, results=results)
    assert parse_events(render_event(tricky))[0].data == tricky


async def test_a_reader_is_told_of_the_new_run_and_has_each_text_once(quick, topic, counter):
    async with Keeper(quick, card_cache=None) as rocketmq:
        client = await rocketmq.client(card_for(quick, topic))
        with process("work", quick, topic, str(counter.ledger.path)) as worker:
            follower = Follower(client, "first 60")
            await follower.more(5)
            worker.kill()
        async with server_for(counter, quick, topic), follower:
            await follower.whole()
            assert follower.artifact == list(range(60))
            assert follower.numbers[:5] == list(range(5))
            assert len(follower.tasks) == 1
            assert follower.restarts == [1]
            # Any caller finds the task where it is now.
            async with Keeper(quick, card_cache=None) as another:
                stranger = await another.client(card_for(quick, topic))
                found = await stranger.get_task(GetTaskRequest(id=follower.tasks[0]))
                assert found.status.state == TaskState.TASK_STATE_COMPLETED
                assert counter.ledger.count("begin", "first") == 2


async def test_a_cancel_reaches_the_run_that_took_over(quick, topic, counter):
    async with Keeper(quick, card_cache=None) as rocketmq, Keeper(quick, card_cache=None) as another:
        client = await rocketmq.client(card_for(quick, topic))
        with process("work", quick, topic, str(counter.ledger.path)) as worker:
            follower = Follower(client, "endless")
            await follower.more(3)
            worker.kill()
        async with server_for(counter, quick, topic), follower:
            await follower.more(3)
            stranger = await another.client(card_for(quick, topic))
            cancelled = await stranger.cancel_task(CancelTaskRequest(id=follower.tasks[0]))
            assert cancelled.status.state == TaskState.TASK_STATE_CANCELED
            await follower.reading
            assert follower.states == ["TASK_STATE_CANCELED"]


async def test_the_final_message_of_an_a2a_agent_has_each_text_once(quick, topic, counter):
    async with Keeper(quick, card_cache=None) as rocketmq:
        agent = await rocketmq.agent(card_for(quick, topic))
        with process("work", quick, topic, str(counter.ledger.path)) as worker:
            stream = agent.reply_stream(UserMsg(name="user", content="first 40"), yield_final_msg=True)
            while not isinstance(event := (await take(stream, 1))[0], TextBlockDeltaEvent):
                pass
            worker.kill()
        async with server_for(counter, quick, topic):
            async for event in stream:
                last = event
            assert isinstance(last, Msg)
            assert last.get_text_content() == "".join(map(str, range(40)))
            assert len(last.get_content_blocks("text")) == 1
            assert last.finished_reason == "completed"
            answer = await agent.reply(UserMsg(name="user", content="second 3"))
            assert answer.get_text_content() == "012"
