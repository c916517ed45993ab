"""A send that is answered before its work is done (`return_immediately`): the work is under its lease all the same."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack

from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskUpdater
from a2a.types import GetTaskRequest, SendMessageConfiguration, Task, TaskState, TaskStatus

from agentscope_rocketmq import A2AServer, Timeouts, call_context
from tests.faults import process
from tests.services import Keeper, card_for, request, server_for
from tests.waiting import LIMIT, until

SUBMITTED, COMPLETED = TaskState.TASK_STATE_SUBMITTED, TaskState.TASK_STATE_COMPLETED


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


class Authenticated(AgentExecutor):
    """Has to be let in before it works, and goes on by itself when it is: a unary send is answered meanwhile."""

    def __init__(self):
        self.begun = []
        self.let_in = asyncio.Event()

    async def execute(self, context, event_queue):
        self.begun.append(context.get_user_input())
        status = TaskStatus(state=SUBMITTED)
        await event_queue.enqueue_event(Task(id=context.task_id, context_id=context.context_id, status=status))
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        await updater.requires_auth()
        await self.let_in.wait()
        await updater.complete()

    async def cancel(self, context, event_queue):
        raise NotImplementedError


async def test_an_executor_that_waits_to_be_let_in_keeps_its_place(config, topic, rocketmq):
    executor = Authenticated()
    limits = config.limits.model_copy(update={"concurrency": 1})
    client = await client_of(rocketmq, config, topic)
    async with server_for(executor, config.model_copy(update={"limits": limits}), topic) as server:
        [answer] = [event async for event in client.send_message(request("first"))]
        assert answer.task.status.state == TaskState.TASK_STATE_AUTH_REQUIRED
        second = asyncio.create_task(anext(client.send_message(request("second"))))
        counters = server.bridges[0].counters
        for answered in range(1, 6):
            assert (await client.get_task(GetTaskRequest(id=answer.task.id))).id == answer.task.id
            await until(lambda answered=answered: counters.answered == answered)
        assert executor.begun == ["first"]
        executor.let_in.set()
        await second
        assert executor.begun == ["first", "second"]


async def answers_and_waits_for_the_disconnect(scope, receive, send):
    """An ASGI app that ends when it hears that its client has all, as the specification has it."""
    if scope["type"] != "http":
        return
    body = b""
    while (event := await receive())["more_body"]:
        body += event["body"]
    rpc_id = json.loads(body + event["body"])["id"]
    result = {"message": {"messageId": "m", "role": "ROLE_AGENT", "parts": [{"text": "hello"}]}}
    answer = json.dumps({"jsonrpc": "2.0", "id": rpc_id, "result": result}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": answer})
    assert (await receive())["type"] == "http.disconnect"


async def test_an_app_hears_of_a_disconnect_when_its_response_is_complete(config, topic, rocketmq):
    small = config.model_copy(update={"limits": config.limits.model_copy(update={"concurrency": 1})})
    client = await client_of(rocketmq, config, topic)
    async with (
        A2AServer.from_app(answers_and_waits_for_the_disconnect, card=card_for(config, topic), config=small) as server,
        asyncio.timeout(LIMIT),
    ):
        for _ in range(3):
            [answer] = [event async for event in client.send_message(request("hello"))]
            assert answer.message.parts[0].text == "hello"
        await until(lambda: server.bridges[0].counters.answered == 3)
