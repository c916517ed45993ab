"""Conversations and tasks that live in one of several workers: found by any caller, and not lost with a worker."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import uuid
from contextlib import AsyncExitStack

import pytest
from a2a.types import CancelTaskRequest, GetTaskRequest, SubscribeToTaskRequest, TaskState

from agentscope_rocketmq import Timeouts
from agentscope_rocketmq.envelope import RequestEnvelope, ResponseEnvelope
from agentscope_rocketmq.handover import TAKEN_WITHIN
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.routes import (
    INSTANCE_HEADER,
)
from tests.agents import Gate, make_blocked_agent, scripted, user_texts
from tests.commanded import Commanded
from tests.faults import Follower, Wire, process
from tests.offers import asked, offering_to
from tests.services import Keeper, card_for, reply, request, server_for
from tests.waiting import LIMIT, until

WORKING, CANCELED = TaskState.TASK_STATE_WORKING, TaskState.TASK_STATE_CANCELED


def make_named_agent(name):
    """Answers with its worker's name and what it was told in this conversation."""

    def make(_session_id):
        async def script(messages):
            yield f"{name}: " + " | ".join(user_texts(messages))

        return scripted(script, name="agent")

    return make


def with_limits(config, **limits):
    return config.model_copy(update={"limits": config.limits.model_copy(update=limits)})


async def begun(client, text="wait"):
    """A stream that has begun, and the id of its task."""
    stream = client.send_message(request(text))
    async for event in stream:
        if event.HasField("artifact_update"):
            return stream, event.artifact_update.task_id
    raise AssertionError("the stream ended before it began")


async def test_follow_ups_are_leased_and_answered_by_the_worker_that_knows_the_conversation(config, topic, rocketmq):
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(server_for(make_named_agent(name), config, topic))
            for name in ("one", "two")
        ]
        clients = [await rocketmq.client(card_for(config, topic), session=f"s-{number}") for number in range(12)]
        workers = [(await reply(client, "a")).split(": ")[0] for client in clients]
        for turn in range(2):
            answers = await asyncio.gather(*(reply(client, f"b{turn}") for client in clients))
            told = " | ".join(["a", *(f"b{number}" for number in range(turn + 1))])
            assert answers == [f"{worker}: {told}" for worker in workers]
        counters = [server.bridges[0].counters for server in servers]
        # Each request was taken from the topic by some worker, and half of the follow-ups by the wrong one.
        await until(lambda: sum(each.answered for each in counters) == 36)
        assert sum(each.handed_over for each in counters) > 0
        assert sum(each.repeated for each in counters) == 0


async def test_another_client_of_the_process_reaches_the_conversation(config, topic, rocketmq):
    async with AsyncExitStack() as stack:
        for name in ("one", "two"):
            await stack.enter_async_context(server_for(make_named_agent(name), config, topic))
        for number in range(6):
            session = f"shared-{number}"
            first = await rocketmq.client(card_for(config, topic), session=session)
            second = await rocketmq.client(card_for(config, topic), session=session)
            worker = (await reply(first, "a")).split(": ")[0]
            assert await reply(second, "b") == f"{worker}: a | b"


async def test_a_restarted_caller_finds_its_task_although_every_worker_is_full(config, topic, rocketmq):
    small = with_limits(config, concurrency=1)
    gates = [Gate(), Gate()]
    async with AsyncExitStack() as stack:
        for gate in gates:
            await stack.enter_async_context(server_for(make_blocked_agent(gate), small, topic))
        tasks = []
        for number in range(2):
            client = await rocketmq.client(card_for(config, topic), session=f"full-{number}")
            tasks.append((await begun(client))[1])
        async with Keeper(config, card_cache=None) as restarted:
            client = await restarted.client(card_for(config, topic))
            for task in tasks:
                assert (await client.get_task(GetTaskRequest(id=task))).status.state == WORKING
                assert (await client.cancel_task(CancelTaskRequest(id=task))).status.state == CANCELED


async def test_a_request_about_a_task_is_handed_over_by_whoever_gets_it(config, topic, rocketmq):
    """For callers that know nothing of instances."""
    gates = [Gate(), Gate()]
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(server_for(make_blocked_agent(gate), config, topic)) for gate in gates
        ]
        client = await rocketmq.client(card_for(config, topic))
        task = (await begun(client))[1]
        elsewhere = config.model_copy(update={"state_topic": "NoSuchStateTopic"})
        async with Keeper(elsewhere, card_cache=None) as stranger:
            client = await stranger.client(card_for(config, topic))
            for _ in range(8):
                assert (await client.get_task(GetTaskRequest(id=task))).status.state == WORKING
            counters = [server.bridges[0].counters for server in servers]
            assert sum(each.handed_over for each in counters) > 0
            subscribed = client.subscribe(SubscribeToTaskRequest(id=task))
            await anext(subscribed)
            gate = next(gate for gate in gates if gate.arrived.is_set())
            gate.open.set()
            last = [event async for event in subscribed][-1]
            assert last.status_update.status.state == TaskState.TASK_STATE_COMPLETED


async def test_a_follow_up_of_a_killed_worker_goes_to_another(config, topic, counter):
    config = config.model_copy(update={"timeouts": Timeouts(lease=10)})
    async with Keeper(config, card_cache=None) as rocketmq:
        client = await rocketmq.client(card_for(config, topic), session="long")
        with process("work", config, topic, str(counter.ledger.path)) as worker:
            assert await Follower(client, "first 3").whole() == [0, 1, 2]
            # A second worker, so that the follow-up may be leased by it and handed over to the first.
            async with server_for(counter, config, topic) as server:
                for name in ("second", "third", "fourth"):
                    async with Follower(client, f"{name} 20") as follower:
                        await follower.more(3)
                        if name == "fourth":
                            worker.kill()
                        numbers = await follower.whole()
                        assert numbers[-20:] == list(range(20))
                assert counter.ledger.count("begin", "fourth") == 2
                assert counter.ledger.count("end", "fourth") == 1
                assert (counter.ledger.count("begin", "second"), counter.ledger.count("begin", "third")) == (1, 1)
                assert await Follower(client, "fifth 3").whole() == [0, 1, 2]
                await until(lambda: server.bridges[0].counters.answered >= 2)


async def test_a_follow_up_whose_watcher_dies_is_not_run_again(config, topic, counter):
    config = config.model_copy(update={"timeouts": Timeouts(lease=10)})
    async with (
        Keeper(config, card_cache=None) as rocketmq,
        server_for(counter, config, topic) as server,
    ):
        client = await rocketmq.client(card_for(config, topic), session="watched")
        assert await Follower(client, "first 3").whole() == [0, 1, 2]
        watched = server.bridges[0].counters
        with process("work", config, topic, str(counter.ledger.path)) as watcher:
            while True:
                name = uuid.uuid4().hex
                follower = Follower(client, name)
                await follower.more(3)
                if _offered(server):  # the other worker has the lease of this one
                    break
                counter.enough[name].set()
                await follower.whole()
            watcher.kill()
            watcher.wait()
        # The broker gives the request to this worker when the lease of the dead one is over.
        await until(lambda: watched.repeated == 1)
        counter.enough[name].set()
        numbers = await follower.whole()
        assert numbers == list(range(len(numbers)))
        assert (counter.ledger.count("begin", name), counter.ledger.count("end", name)) == (1, 1)


async def test_a_follow_up_of_a_stopping_worker_goes_to_another_at_once(config, topic, counter, rocketmq):
    patient = config.model_copy(update={"timeouts": config.timeouts.model_copy(update={"drain": 0.5})})
    client = await rocketmq.client(card_for(config, topic), session="stopping")
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(server_for(counter, patient, topic))
        assert await Follower(client, "first 3").whole() == [0, 1, 2]
        await stack.enter_async_context(server_for(counter, config, topic))
        async with Follower(client, "second 60") as follower:
            await follower.more(3)
            await first.aclose()
            assert (await follower.whole(limit=20))[-60:] == list(range(60))
        assert await Follower(client, "third 3").whole() == [0, 1, 2]


async def test_who_subscribed_at_a_stopping_worker_is_told(config, topic, counter, rocketmq):
    patient = config.model_copy(update={"timeouts": config.timeouts.model_copy(update={"drain": 0.1})})
    client = await rocketmq.client(card_for(config, topic))
    async with server_for(counter, patient, topic), Follower(client, "endless") as follower:
        await follower.more(3)
        subscribed = client.subscribe(SubscribeToTaskRequest(id=follower.tasks[0]))
        await anext(subscribed)
    with pytest.raises(Exception, match="server stops"):
        async with asyncio.timeout(LIMIT):
            async for _ in subscribed:
                pass


async def test_two_copies_of_a_request_are_one_answer(config, topic, counter, rocketmq):
    """A send that was repeated: two workers get a copy each, and both answer."""
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(server_for(counter, with_limits(config, concurrency=1), topic))
        client = await rocketmq.client(card_for(config, topic))
        await rocketmq.carrier(_address(rocketmq, client)).start()
        carrier = rocketmq.carrier(_address(rocketmq, client))
        carrier._started = _Twice(carrier.producer), carrier.replies
        for number in range(3):
            async with Follower(client, f"copied{number} 40") as follower:
                assert await follower.whole() == list(range(40))
                assert len(follower.tasks) == 1
        await until(lambda: sum(counter.ledger.count("end", f"copied{number}") for number in range(3)) == 6)


@pytest.mark.parametrize("answered", [True, False], ids=["it answered its copy", "it is at work at its copy"])
async def test_the_other_worker_that_has_a_copy_takes_over_when_the_one_that_was_heard_dies(
    config, make_topic, rocketmq, connection, producer, counter, answered
):
    """Its own answer was not listened to, since it was not the first."""
    names = await make_topic("NORMAL")
    client = await rocketmq.client(card_for(config, names.topic))
    await rocketmq.carrier(_address(rocketmq, client)).start()
    carrier = rocketmq.carrier(_address(rocketmq, client))
    carrier._started = _Twice(carrier.producer), carrier.replies
    async with (
        GroupConsumer(connection, names.topic, names.group, concurrency=1) as heard,
        Follower(client, "copied 5" if answered else "copied") as follower,
        asyncio.timeout(LIMIT),
    ):
        leased = await anext(aiter(heard.messages()))
        envelope = RequestEnvelope.decode(leased.message.body())
        opening = ResponseEnvelope(
            request_id=envelope.request_id, body=None, stream=True, end=False, seq=0, attempt=0, run="heard"
        )
        said = Message(topic=envelope.reply_topic, lite_topic=envelope.lite_topic, body=opening.encode())
        await producer.send(said)
        async with server_for(counter, config, names.topic) as server:
            bridge = server.bridges[0]
            await until(lambda: counter.ledger.count("end" if answered else "begin", "copied") == 1)
            if answered:
                await until(lambda: bridge.counters.answered == 1 and not bridge._running)
            assert follower.numbers == []
            await heard.stop()
            await heard.release(leased)
            if not answered:
                await follower.more(3)
                counter.enough["copied"].set()
            await follower.reading
    assert follower.artifact == list(range(len(follower.artifact)))
    assert len(follower.artifact) >= (5 if answered else 3)
    assert counter.ledger.count("begin", "copied") == 1


async def test_work_sent_to_an_instance_itself_is_done_under_a_lease(config, topic, rocketmq, producer):
    """As a caller of the Java reference may send it."""
    async with server_for(make_named_agent("one"), config, topic) as server:
        bridge = server.bridges[0]
        envelope = asked(config, topic, "hello", {"A2A-Version": "1.0"})
        await producer.send(Message(topic=config.state_topic, lite_topic=server._instance, body=envelope.encode()))
        await until(lambda: bridge.counters.answered == 1)
        # The same from the topic is the copy that it is.
        sent = dataclasses.replace(envelope, headers={**envelope.headers, INSTANCE_HEADER: server._instance})
        await producer.send(Message(topic=topic, body=sent.encode()))
        await until(lambda: bridge.counters.repeated == 1)
        assert bridge.counters.taken == 1


async def test_offered_work_keeps_to_the_limit(config, topic, rocketmq):
    """Two workers with one slot each: five conversations of one worker never run at once."""
    small = with_limits(config, concurrency=1)
    running, most = 0, 0

    def make(_session_id):
        async def script(messages):
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.05)
            yield " | ".join(user_texts(messages))
            running -= 1

        return scripted(script)

    async with server_for(make, small, topic):
        clients = [await rocketmq.client(card_for(config, topic), session=f"few-{number}") for number in range(5)]
        assert await asyncio.gather(*(reply(client, "a") for client in clients)) == ["a"] * 5
        async with server_for(make_named_agent("other"), small, topic):
            assert await asyncio.gather(*(reply(client, "b") for client in clients)) == ["a | b"] * 5
    assert most == 1


def _offered(server):
    return any(delivery.offer for run in server.bridges[0]._running.values() for delivery in run.deliveries)


def _address(rocketmq, client):
    from agentscope_rocketmq.card import Address

    return Address.parse(rocketmq.choice(client).url)


async def test_a_worker_that_wakes_up_does_not_take_back_a_task_that_another_one_has_completed(config, topic, counter):
    config = config.model_copy(update={"timeouts": Timeouts(lease=10)})
    async with Keeper(config, card_cache=None) as rocketmq:
        client = await rocketmq.client(card_for(config, topic))
        asking = await rocketmq.client(card_for(config, topic))
        with process("work", config, topic, str(counter.ledger.path)) as first:
            async with Follower(client, "paused 100") as follower:
                await follower.more(3)
                first.send_signal(signal.SIGSTOP)
                async with server_for(counter, config, topic) as server:
                    await follower.whole(limit=2 * LIMIT)
                    [task] = follower.tasks
                    first.send_signal(signal.SIGCONT)
                    # It goes on, and comes to the end that nobody hears.
                    async with asyncio.timeout(LIMIT):
                        while counter.ledger.count("end", "paused") < 2:
                            found = await asking.get_task(GetTaskRequest(id=task))
                            assert found.status.state == TaskState.TASK_STATE_COMPLETED
                    assert server.bridges[0]._task_channels.keeps(task)


async def test_a_message_to_a_task_that_comes_back_to_its_run_is_in_it(engine, config, topic, connection):
    """Its worker was cut off for longer than the lease, and who had it meanwhile gave it back."""
    config = config.model_copy(update={"timeouts": Timeouts(lease=10)})
    executor = Commanded()
    async with Keeper(config, card_cache=None) as rocketmq, Wire(engine.endpoint) as wire:
        behind = config.model_copy(update={"endpoint": wire.endpoint})
        async with server_for(executor, behind, topic) as server:
            client = await rocketmq.client(card_for(config, topic), session="cut")
            [task] = [event.task.id async for event in client.send_message(request("ask")) if event.HasField("task")]
            answering = asyncio.create_task(reply(client, "wait gate", task_id=task))
            await until(lambda: "gate" in executor.gates)
            wire.blackhole()
            group = f"{topic}ConsumerGroup"
            async with (
                GroupConsumer(connection, topic, group, concurrency=1, lease=10) as other,
                asyncio.timeout(LIMIT),
            ):
                leased = await anext(aiter(other.messages()))
                assert leased.message.attempt > 1
                await other.stop()
                await other.release(leased)
            wire.pass_on()
            counters = server.bridges[0].counters
            await until(lambda: counters.repeated == 1)
            executor.open("gate")
            assert await answering == "waited"
            assert [context.get_user_input() for context in executor.requests] == ["ask", "wait gate"]


class _Twice:
    """A producer each of whose sends is repeated, as one whose answer was lost is."""

    def __init__(self, producer):
        self._producer = producer

    async def send(self, message, **options):
        await self._producer.send(message, **options)
        return await self._producer.send(message, **options)

    async def aclose(self):
        await self._producer.aclose()


async def test_an_offer_is_begun_at_the_word_to_go_and_not_when_that_comes_late(config, topic, connection, producer):
    """Spoken to in the bare protocol, by an instance that offers two requests and gives the first one up."""
    executor = Commanded()
    async with (
        server_for(executor, config, topic) as server,
        offering_to(server._instance, config, connection, producer) as other,
    ):
        for name in ("given-up", "meant"):
            await other.offer(asked(config, topic, name, {"A2A-Version": "1.0"}), name)
            assert await other.heard() == f"{name} taken"
            assert executor.requests == []
            if name == "given-up":
                assert await other.heard() == "given-up failed"
            await other.go(name)
        assert await other.heard() == "meant done"
        assert [context.get_user_input() for context in executor.requests] == ["meant"]
        assert server.bridges[0].counters.taken == 1


async def test_an_instance_that_stops_takes_messages_to_its_tasks_and_no_other_work(
    config, topic, rocketmq, connection, producer
):
    """Others can go on with a conversation, and with no task of its."""
    executor = Commanded()
    patient = config.model_copy(update={"timeouts": Timeouts(drain=LIMIT)})
    client = await rocketmq.client(card_for(config, topic))
    server = server_for(executor, patient, topic)
    async with server, offering_to(server._instance, config, connection, producer) as other:
        [waits] = [event.task.id async for event in client.send_message(request("ask")) if event.HasField("task")]
        working = asyncio.create_task(reply(client, "wait busy"))
        await until(lambda: "busy" in executor.gates)
        stopping = asyncio.create_task(server.aclose())
        await until(lambda: server.bridges[0]._stopping)
        version = {"A2A-Version": "1.0"}
        await other.offer(asked(config, topic, "count 1", version), "work")
        assert await other.heard() == "work failed"
        await other.offer(asked(config, topic, "count 1", version, taskId=waits), "answer")
        assert await other.heard() == "answer taken"
        await other.go("answer")
        assert await other.heard() == "answer done"
        executor.gates["busy"].set()
        await working
        await stopping
    assert [context.get_user_input() for context in executor.requests] == ["ask", "wait busy", "count 1"]


async def test_a_message_to_a_task_waits_for_an_instance_that_is_silent_for_less_than_a_lease(
    engine, config, topic, rocketmq
):
    first, second = Commanded(), Commanded()
    async with Wire(engine.endpoint) as wire, AsyncExitStack() as stack:
        behind = with_limits(config.model_copy(update={"endpoint": wire.endpoint}), concurrency=1)
        await stack.enter_async_context(server_for(first, behind, topic))
        client = await rocketmq.client(card_for(config, topic), session="asked")
        tasks = [event.task.id async for event in client.send_message(request("ask")) if event.HasField("task")]
        # A full one takes nothing from the topic.
        busy = asyncio.create_task(reply(await rocketmq.client(card_for(config, topic)), "wait busy"))
        await until(lambda: "busy" in first.gates)
        server = await stack.enter_async_context(server_for(second, config, topic))
        wire.blackhole()
        answering = asyncio.create_task(reply(client, "yes", task_id=tasks[0]))
        await until(lambda: server.bridges[0]._watched)
        await asyncio.sleep(TAKEN_WITHIN + 1)  # a time of silence is the fault
        wire.pass_on()
        first.open("busy")
        assert await busy == "waited"
        assert "said yes" in await answering
        assert [context.get_user_input() for context in first.requests] == ["ask", "wait busy", "yes"]
        assert second.requests == []
