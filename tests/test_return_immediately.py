"""A send that is answered before its work is done (`return_immediately`): the work is under its lease all the same."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from a2a.types import GetTaskRequest, SendMessageConfiguration, TaskState

from agentscope_rocketmq import Timeouts, call_context
from tests.faults import Counter, Ledger, process
from tests.services import Keeper, card_for, request, server_for
from tests.waiting import LIMIT, until

SUBMITTED, COMPLETED = TaskState.TASK_STATE_SUBMITTED, TaskState.TASK_STATE_COMPLETED


@pytest.fixture
async def topic(make_topic):
    return (await make_topic("NORMAL")).topic


@pytest.fixture
async def rocketmq(config):
    async with Keeper(config, card_cache=None) as rocketmq:
        yield rocketmq


@pytest.fixture
def counter(tmp_path):
    return Counter(Ledger(tmp_path / "ledger"))


async def client_of(rocketmq, config, topic, **options):
    client = await rocketmq.client(card_for(config, topic), **options)
    client._config.streaming = False
    return client


async def begun(client, text, context=None):
    """Ask for it; the id of the task, which is at work when the answer comes."""
    asked = request(text)
    asked.configuration.CopyFrom(SendMessageConfiguration(return_immediately=True))
    [answer] = [event async for event in client.send_message(asked, context=context)]
    assert answer.task.status.state == SUBMITTED
    return answer.task.id


async def completed(client, task):
    """Wait until it is, and give what it made."""
    async with asyncio.timeout(LIMIT):
        while (found := await client.get_task(GetTaskRequest(id=task))).status.state != COMPLETED:
            pass
    return [part.text for artifact in found.artifacts for part in artifact.parts]


async def test_what_goes_on_behind_its_answer_keeps_its_place(config, topic, rocketmq, counter):
    limits = config.limits.model_copy(update={"concurrency": 1})
    client = await client_of(rocketmq, config, topic)
    async with server_for(counter, config.model_copy(update={"limits": limits}), topic) as server:
        first = await begun(client, "first")
        second = asyncio.create_task(begun(client, "second 2"))
        counters = server.bridges[0].counters
        for answered in range(1, 6):
            assert (await client.get_task(GetTaskRequest(id=first))).id == first
            await until(lambda answered=answered: counters.answered == answered)  # of the questions each, no other
        assert counter.ledger.count("begin", "second") == 0
        assert not second.done()
        counter.enough["first"].set()
        assert await completed(client, first)
        assert await completed(client, await second) == ["0", "1"]


async def test_it_is_not_lost_with_its_worker(config, topic, counter):
    """Nor when the caller's times, which its answer was in, are over by then."""
    config = config.model_copy(update={"timeouts": Timeouts(lease=10)})
    async with Keeper(config, card_cache=None) as rocketmq:
        client = await client_of(rocketmq, config, topic, session="left")
        with process("work", config, topic, str(counter.ledger.path)) as worker:
            task = await begun(client, "long", call_context(total=5.0))
            await until(lambda: counter.ledger.count("begin", "long") == 1)
            worker.kill()
            worker.wait()
        async with server_for(counter, config, topic) as server:
            await until(lambda: counter.ledger.count("begin", "long") == 2)
            counter.enough["long"].set()
            texts = await completed(client, task)
            assert texts == [str(number) for number in range(len(texts))]
            await until(lambda: server.bridges[0].counters.answered >= 1)
            assert counter.ledger.count("end", "long") == 1
        async with asyncio.timeout(LIMIT):
            events = [event async for event in rocketmq.session("left").events(from_start=True, follow=False)]
        # Its one answer; what the second run says of it nobody waits for.
        answers = [event.payload.task.id for event in events if event.payload and hasattr(event.payload, "task")]
        assert answers == [task]


async def test_a_server_that_stops_gives_it_to_another(config, topic, rocketmq, counter):
    patient = config.model_copy(update={"timeouts": config.timeouts.model_copy(update={"drain": 0.5})})
    client = await client_of(rocketmq, config, topic)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(server_for(counter, patient, topic))
        task = await begun(client, "moved")
        await stack.enter_async_context(server_for(counter, config, topic))
        await first.aclose()
        await until(lambda: counter.ledger.count("begin", "moved") == 2)
        counter.enough["moved"].set()
        assert await completed(client, task)
        assert counter.ledger.count("end", "moved") == 1


async def test_a_server_that_stops_lets_it_end(config, topic, rocketmq, counter):
    patient = config.model_copy(update={"timeouts": config.timeouts.model_copy(update={"drain": LIMIT})})
    client = await client_of(rocketmq, config, topic)
    async with server_for(counter, patient, topic) as server:
        counters = server.bridges[0].counters
        await begun(client, "drained 40")
        assert counters.answered == 0
    assert counters.answered == 1
    assert counter.ledger.count("end", "drained") == 1
