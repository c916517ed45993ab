"""Sessions under faults: readers that are killed, paused or outlived by their agents; agents that nobody stops."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import random
import signal
from typing import Any

import pytest
from pydantic import SecretStr

from agentscope_rocketmq import RocketMQ
from tests.contract.wire import Code, peer_of
from tests.faults import Counter, Ledger, process
from tests.services import card_for, request, server_for
from tests.sessions import TAKEN_OVER, Agent, Listening, Notes, artifact_of, heard, listener, text_of
from tests.waiting import LIMIT, until

KILLS = 10


@pytest.fixture
async def rocketmq(config):
    async with RocketMQ(config, card_cache=None) as rocketmq:
        yield rocketmq


async def audited(config, name):
    """The numbers in a session's LiteTopic, to the end of its one response: read with the bare protocol."""
    group, topic = f"{config.reply_group}_OBSERVER", config.reply_topic
    found: dict[int, Any] = {}
    async with peer_of(config, "LITE_PUSH_CONSUMER", group, topic) as peer:
        assert (await peer.sync(group, topic, "PARTIAL_ADD", [name], offset=0)).code == Code.OK
        async with asyncio.timeout(LIMIT):
            while True:
                messages = await peer.take(group, topic)
                await peer.ack(group, topic, messages)
                for said in map(_said, messages):
                    if "seq" not in said:
                        continue  # the session's own record
                    assert (said["attempt"], said["requestId"]) == (0, found.setdefault(-1, said["requestId"]))
                    found[said["seq"]] = _numbers(said.get("responseBody", ""))
                    if said["end"]:
                        assert sorted(found) == list(range(-1, said["seq"] + 1))
                        return [number for seq in range(said["seq"] + 1) for number in found[seq]]


def _said(message):
    body = message.body
    return json.loads(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)


def _numbers(body):
    results = [
        json.loads(line.removeprefix("data: "))["result"] for line in body.split("\n") if line.startswith("data: ")
    ]
    chunks = [result["artifactUpdate"]["artifact"] for result in results if "artifactUpdate" in result]
    return [part["text"] for chunk in chunks for part in chunk["parts"]]


async def test_a_supervisor_killed_ten_times_in_mid_stream_has_every_event_once_and_in_order(
    config, topic, rocketmq, tmp_path
):
    """It keeps no cursor: the broker knows where it was."""
    ledger, notes = Ledger(tmp_path / "ledger"), Notes(tmp_path / "notes")
    counter = Counter(ledger)
    counter.starts["work"] = asyncio.Event()
    async with server_for(counter, config, topic):
        # The caller dies too, before it takes a number; the agent goes on.
        with process("call-in", config, topic, "supervised work") as caller:
            await until(lambda: ledger.count("begin", "work") == 1)
            caller.kill()
            caller.wait(LIMIT)
        counter.starts["work"].set()
        for _ in range(KILLS):
            had = len(notes.lines())
            with listener(config, "supervised", notes) as supervisor:
                await until(lambda had=had: len(notes.lines()) >= had + random.randint(2, 20))
                supervisor.kill()
            assert ledger.count("end", "work") == 0  # killed in mid-stream
        counter.enough["work"].set()
        await until(lambda: ledger.count("end", "work") == 1)
        audit = await audited(config, "supervised")
        with listener(config, "supervised", notes) as last:
            # The agent has gone on all the time: there may be thousands left.
            await until(lambda: last.poll() is not None or notes.last() == audit[-1], limit=5 * LIMIT)
    assert notes.taken() == audit == [str(number) for number in range(len(audit))]
    assert ledger.count("begin", "work") == 1


async def test_a_paused_listener_that_wakes_after_a_take_over_is_harmless(config, producer, rocketmq, tmp_path):
    agent, notes = Agent(producer, config, "paused"), Notes(tmp_path / "notes")
    await agent.say(*range(10))
    with listener(config, "paused", notes) as paused:
        await until(lambda: len(notes.lines()) == 10)
        os.kill(paused.pid, signal.SIGSTOP)
        async with Listening(rocketmq.session("paused")) as heir:
            await agent.say(*range(10, 20))
            await heir.until(lambda: heir.texts[-1:] == ["19"])
            os.kill(paused.pid, signal.SIGCONT)
            async with asyncio.timeout(LIMIT):
                while paused.poll() is None:
                    await agent.say("more")
                    await asyncio.sleep(0.1)
            await agent.say("end")
            await heir.until(lambda: heir.texts[-1] == "end")
            assert heir.error is None
            heirs = heir.texts
        assert paused.returncode == TAKEN_OVER
    assert notes.taken() == [str(number) for number in range(10)]
    # The last one that the paused one took may not have been acked yet.
    assert heirs[heirs.index("10") :][:10] == [str(number) for number in range(10, 20)]
    assert set(heirs[heirs.index("19") + 1 :]) <= {"more", "end"}


@pytest.mark.parametrize("how", ["closes its stream", "is cancelled", "is killed"])
async def test_a_caller_that_goes_away_does_not_stop_the_agent_and_its_session_has_the_answer(
    config, topic, rocketmq, tmp_path, how
):
    ledger = Ledger(tmp_path / "ledger")
    async with server_for(Counter(ledger), config, topic):
        if how == "is killed":
            with process("call-in", config, topic, "left work 30") as caller:
                await until(lambda: ledger.count("begin", "work") == 1)
                caller.kill()
        else:
            async with await rocketmq.client(card_for(config, topic), session="left") as client:
                await _goes_away(client, how)
        await until(lambda: ledger.count("end", "work") == 1)
        session = rocketmq.session("left")
        events = await heard(session, from_start=True, observe=True)
        assert [text_of(event) for event in events if artifact_of(event)] == [str(number) for number in range(30)]
        assert events[-1].ends
        if how == "is killed":
            # What it did not take is what the next one gets.
            rest = await heard(session)
            assert rest
            assert [event.cursor for event in rest] == [event.cursor for event in events][-len(rest) :]


async def _goes_away(client, how):
    if how == "closes its stream":
        stream = client.send_message(request("work 30"))
        await anext(stream)
        await stream.aclose()
        return

    async def call():
        async for _ in client.send_message(request("work 30")):
            begun.set()

    begun = asyncio.Event()
    calling = asyncio.create_task(call())
    await begun.wait()
    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)


async def test_a_hundred_sessions_at_random_hear_their_own_and_nothing_else(config, producer, rocketmq):
    """With names that collide under careless mapping."""
    awkward = [
        "a b",
        "a_b",
        "a-b",
        "A",
        "a",
        "a/b",
        "a%20b",
        "ä",
        "a\u0308",
        "h-",
        "s-a",
        "x" * 64,
        "x" * 65,
        " a",
        "a ",
    ]
    names = [*awkward, *(f"session-{number}" for number in range(100 - len(awkward)))]
    sessions = [rocketmq.session(name) for name in names]
    assert len({session.lite_topic for session in sessions}) == len(names)
    agents = [Agent(producer, config, session.lite_topic) for session in sessions]
    turns = [index for index in range(len(names)) for _ in range(5)]
    random.shuffle(turns)
    said = [0] * len(names)
    async with contextlib.AsyncExitStack() as stack:
        ears = [await stack.enter_async_context(Listening(session)) for session in sessions]
        for index in turns:
            await agents[index].say(f"{names[index]} {said[index]}")
            said[index] += 1
        for name, ear in zip(names, ears, strict=True):
            assert await ear.count(5) == [f"{name} {number}" for number in range(5)]


async def test_equal_names_of_two_owners_are_two_sessions_where_names_are_secret(config):
    async with RocketMQ(config.model_copy(update={"a2a_secret": SecretStr("s3cret")})) as rocketmq:
        names = {rocketmq.session("trip", owner=owner).lite_topic for owner in ("ann", "bob", None)}
    assert len(names) == 3
    assert "trip" not in "".join(names)
