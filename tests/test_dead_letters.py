"""Requests that no worker can serve: a failed task for their callers, a dead letter for those who run the agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import uuid

import pytest
from a2a.types import GetTaskRequest, TaskState
from a2a.utils.errors import InternalError
from agentscope.message import UserMsg

from agentscope_rocketmq import A2AServer, RocketMQ
from agentscope_rocketmq.config import Limits, Timeouts
from agentscope_rocketmq.deadletters import DeadLetters, bury, dead_letter_topic
from agentscope_rocketmq.envelope import RequestEnvelope
from agentscope_rocketmq.errors import ConfigurationError
from agentscope_rocketmq.owners import OWNER_HEADER
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from agentscope_rocketmq.rocketmq.lite import LiteConsumer
from agentscope_rocketmq.rocketmq.message import LITE_TOPIC_NAME, Message
from tests.agents import make_echo_agent
from tests.faults import Ledger, process
from tests.services import card_for, reply, request, server_for
from tests.waiting import LIMIT, until


@pytest.fixture
async def names(make_topic):
    return await make_topic("NORMAL")


@pytest.fixture
async def config(config):
    return config.model_copy(update={"limits": Limits(attempts=2)})


@contextlib.asynccontextmanager
async def dead_letters(config, connection, producer, topic):
    async with LiteConsumer(connection, config.state_topic, config.state_group) as consumer:
        yield DeadLetters(producer, consumer, topic)


async def fails(connection, names, *, times):
    """A worker that has a request so many times and never answers it."""
    async with GroupConsumer(connection, names.topic, names.group) as consumer:
        async for leased in consumer.messages():
            await consumer.release(leased)
            if leased.message.attempt == times:
                return


async def command(config, *arguments):
    """Run `agentscope-rocketmq dead-letters`; its status, and what it wrote."""
    environment = {
        "ROCKETMQ_ENDPOINT": config.endpoint,
        "ROCKETMQ_STATE_TOPIC": config.state_topic,
        "ROCKETMQ_STATE_GROUP": config.state_group,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from agentscope_rocketmq.cli import main; main()", "dead-letters", *arguments),
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(LIMIT):
        out, error = await process.communicate()
    return process.returncode, out.decode(), error.decode()


def in_version(card, version):
    [interface] = card["supportedInterfaces"]
    return card | {"supportedInterfaces": [interface | {"protocolVersion": version}]}


async def ended(client, text):
    """The task that a message began, as it ended."""
    task_id = None
    async for event in client.send_message(request(text)):
        task_id = event.task.id if event.HasField("task") else task_id
    assert task_id is not None
    return await client.get_task(GetTaskRequest(id=task_id))


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_request_that_no_worker_serves_is_a_failed_task_and_a_dead_letter_and_can_be_tried_again_once(
    config, names, connection, producer, streaming
):
    async with (
        RocketMQ(config) as rocketmq,
        await rocketmq.client(card_for(config, names.topic), session="s") as client,
    ):
        client._config.streaming = streaming  # type: ignore[attr-defined]
        call = asyncio.create_task(ended(client, "deadly"))
        async with asyncio.timeout(LIMIT):
            await fails(connection, names, times=2)
        async with server_for(make_echo_agent, config, names.topic) as server:
            async with asyncio.timeout(LIMIT):
                task = await call
            assert task.status.state == TaskState.TASK_STATE_FAILED
            assert re.search(r"given up after \d+ deliveries", task.status.message.parts[0].text)
            assert [message.parts[0].text for message in task.history] == ["deadly"]
            assert await reply(client, "harmless") == "echo:harmless"
            async with dead_letters(config, connection, producer, names.topic) as box:
                [letter] = await box.list()
                assert "deadly" in letter.request.body
                assert (letter.topic, letter.retried) == (names.topic, False)
                assert letter.attempts > 2  # its polls had it once more, maybe
                answered = server.bridges[0].counters.answered
                request_id = await box.retry(letter.id)
                assert request_id != letter.request.request_id
                await until(lambda: server.bridges[0].counters.answered == answered + 1)
                [again] = await box.list()
                assert (again.id, again.retried) == (letter.id, True)
                with pytest.raises(ConfigurationError, match="put back before"):
                    await box.retry(letter.id)
                with pytest.raises(ConfigurationError, match="no dead letter 999"):
                    await box.find(999)


@pytest.mark.parametrize("version", ["1.0", "0.3"])
async def test_a_request_that_kills_its_workers_ends_as_one_failed_task(config, names, tmp_path, version):
    config = config.model_copy(update={"timeouts": Timeouts(lease=10), "limits": Limits(attempts=3)})
    ledger = Ledger(tmp_path / "ledger")
    async with (
        RocketMQ(config) as rocketmq,
        await rocketmq.client(in_version(card_for(config, names.topic), version), session="s") as client,
    ):

        async def follow():
            return [event async for event in client.send_message(request("deadly 3 dies"))]

        following = asyncio.create_task(follow())
        for number in range(3):
            with process("work", config, names.topic, str(ledger.path)) as worker:
                assert await asyncio.to_thread(worker.wait, LIMIT) == -signal.SIGKILL
            assert ledger.count("begin", "deadly") == number + 1
        with process("work", config, names.topic, str(ledger.path)):
            # It costs nobody else anything, and is not begun once more.
            assert await reply(client, "harmless 3") == "012"
            async with asyncio.timeout(LIMIT):
                events = await following
            [task_id] = {event.task.id for event in events if event.HasField("task")}
            task = await client.get_task(GetTaskRequest(id=task_id))
        assert ledger.count("begin", "deadly") == 3
        # Of the numbers that the cut runs gave out none is left.
        last = events[-1].task if events[-1].HasField("task") else events[-1].status_update
        assert (task.status.state, last.status.state) == (TaskState.TASK_STATE_FAILED,) * 2
        assert "given up" in last.status.message.parts[0].text
        assert not task.artifacts
        status, out, _ = await command(config, "list", names.topic, "--json")
        letters = json.loads(out)
        assert status == 0
        assert letters  # a delivery that was given up may come once more
        for letter in letters:
            status, out, _ = await command(config, "show", names.topic, str(letter["id"]))
            assert status == 0
            assert "deadly 3 dies" in out


async def test_an_agentscope_agent_is_told_why_its_request_failed(config, names, connection):
    async with (
        RocketMQ(config) as rocketmq,
        await rocketmq.agent(card_for(config, names.topic), session="s") as agent,
    ):
        call = asyncio.create_task(agent.reply(UserMsg("user", "deadly")))
        async with asyncio.timeout(LIMIT):
            await fails(connection, names, times=2)
            async with server_for(make_echo_agent, config, names.topic):
                answer = await call
        assert "given up after" in (answer.get_text_content() or "")


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("version", ["1.0", "0.3"])
async def test_the_task_of_an_app_of_others_has_failed_too_and_the_app_is_not_asked(
    config, names, connection, version, streaming
):
    card = in_version(card_for(config, names.topic, capabilities={"streaming": streaming}), version)
    async with (
        RocketMQ(config) as rocketmq,
        await rocketmq.client(card, session="s") as client,
    ):

        async def follow():
            return [event async for event in client.send_message(request("deadly", context_id="mine"))]

        call = asyncio.create_task(follow())
        async with asyncio.timeout(LIMIT):
            await fails(connection, names, times=2)
            asked = []

            async def app(scope, _receive, _send):
                asked.append(scope["type"])

            async with A2AServer.from_app(app, card=card, config=config):
                [event] = await call
            assert "http" not in asked
        assert event.task.status.state == TaskState.TASK_STATE_FAILED
        assert re.search(r"given up after \d+ deliveries", event.task.status.message.parts[0].text)
        assert event.task.id
        assert event.task.context_id == "mine"


async def test_a_question_that_no_worker_answers_is_an_error(config, names, connection):
    async with (
        RocketMQ(config) as rocketmq,
        await rocketmq.client(card_for(config, names.topic), session="s") as client,
    ):
        call = asyncio.create_task(client.get_task(GetTaskRequest(id="unknown")))
        async with asyncio.timeout(LIMIT):
            await fails(connection, names, times=2)
            async with server_for(make_echo_agent, config, names.topic):
                with pytest.raises(InternalError, match=r"given up after \d+ deliveries"):
                    await call


async def test_a_message_that_is_given_up_twice_is_one_letter(config, names, connection, producer):
    for body in (b"one", b"two"):
        await producer.send(Message(topic=names.topic, body=body))
    async with (
        GroupConsumer(connection, names.topic, names.group) as consumer,
        dead_letters(config, connection, producer, names.topic) as box,
    ):
        delivered: dict[bytes, int] = {}
        async with asyncio.timeout(LIMIT):
            async for leased in consumer.messages():
                message = leased.message
                delivered[message.body()] = message.attempt
                await bury(producer, config.state_topic, message, "again", agent=names.topic, timeout=10.0)
                await consumer.release(leased)
                if len(delivered) == 2 and min(delivered.values()) > 1:
                    break
        letters = await box.list()
        assert {letter.body: letter.attempts for letter in letters} == delivered
        assert len(letters) == 2
        assert (await box.find(letters[1].id)).body == letters[1].body


async def test_what_is_no_request_and_what_names_a_forbidden_topic_are_dead_letters(
    config, names, connection, producer
):
    forbidden = RequestEnvelope(
        request_id=uuid.uuid4().hex, body="{}", dest_topic=None, reply_topic="Elsewhere", lite_topic="x"
    )
    asserted = RequestEnvelope(
        request_id=uuid.uuid4().hex,
        body="{}",
        headers={OWNER_HEADER: "x"},
        dest_topic=None,
        reply_topic="Elsewhere",
        lite_topic="x",
    )
    async with server_for(make_echo_agent, config, names.topic) as server:
        for number, body in enumerate((b"\xff no request", forbidden.encode(), asserted.encode()), start=1):
            await producer.send(Message(topic=names.topic, body=body))
            await until(lambda number=number: server.bridges[0].counters.refused == number)
    async with dead_letters(config, connection, producer, names.topic) as box:
        letters = await box.list()
        assert [letter.body for letter in letters] == [b"\xff no request", forbidden.encode(), asserted.encode()]
        assert "not an envelope" in letters[0].reason
        assert "Elsewhere" in letters[1].reason
        for letter, problem in ((letters[0], "is no request"), (letters[2], "through the gateway")):
            with pytest.raises(ConfigurationError, match=problem):
                await box.retry(letter.id)


async def test_the_command_lists_shows_and_retries(config, names, producer):
    request = RequestEnvelope(
        request_id=uuid.uuid4().hex, body='{"é": 1}', dest_topic=None, reply_topic="Elsewhere", lite_topic="x"
    )
    async with server_for(make_echo_agent, config, names.topic) as server:
        await producer.send(Message(topic=names.topic, body=request.encode()))
        await until(lambda: server.bridges[0].counters.refused == 1)

    status, out, _ = await command(config, "list", names.topic, "--json")
    [letter] = json.loads(out)
    assert (status, letter["requestId"], letter["retried"]) == (0, request.request_id, False)
    status, out, _ = await command(config, "show", names.topic, str(letter["id"]))
    assert status == 0
    assert '{\\"é\\": 1}' in out
    status, out, _ = await command(config, "retry", names.topic, str(letter["id"]), "--json")
    assert (status, set(json.loads(out))) == (0, {"requestId"})
    status, out, error = await command(config, "retry", names.topic, str(letter["id"]))
    assert (status, out) == (2, "")
    assert "put back before" in error
    status, out, _ = await command(config, "list", names.topic)
    assert status == 0
    assert "yes" in out


def test_every_topic_has_a_legal_lite_topic_of_its_own():
    topics = ["Weather", "w" * 62, "w" * 63, "w" * 64, "a|b", "a%b"]
    found = [dead_letter_topic(topic) for topic in topics]
    assert found[:2] == ["d-Weather", "d-" + "w" * 62]
    assert all(LITE_TOPIC_NAME.fullmatch(name) for name in found)
    assert len(set(found)) == len(topics)
