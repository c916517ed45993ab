"""Clients of the embedded broker that vanish, stop reading or come in crowds: nobody else notices, nothing is left."""

from __future__ import annotations

import asyncio
import random

import pytest

from agentscope_rocketmq.dev import DevBroker
from agentscope_rocketmq.dev.embedded.clients import Client
from agentscope_rocketmq.dev.embedded.reading import Terms
from agentscope_rocketmq.dev.embedded.settings import Settings
from agentscope_rocketmq.rocketmq.protocol import service
from tests.contract.wire import Code, bodies, message, peer_of, resource
from tests.waiting import LIMIT, until

LITE_TOPICS = [f"s{number}" for number in range(5)]
LEASE = 1.0  # what was on its way to a poll that is cancelled comes again so many seconds later


def waiting(broker):
    """How many polls wait at the broker."""
    engine = broker._engine
    numbered = [waiters for groups in engine._waiters.values() for waiters in groups.values()]
    lite = [client.waiters for client in engine.subscriptions._clients.values()]
    return sum(map(len, numbered + lite))


@pytest.mark.parametrize("kind", ["SIMPLE_CONSUMER", "LITE_PUSH_CONSUMER"])
async def test_no_wake_up_is_lost_however_polls_come_and_go(kind):
    chance, topic, group = random.Random(4), "T", "G"
    async with (
        DevBroker(settings=Settings(min_invisible=LEASE)) as broker,
        peer_of(broker) as producer,
        peer_of(broker, kind, group, topic) as reader,
    ):
        if kind == "LITE_PUSH_CONSUMER":
            assert (await reader.sync(group, topic, "PARTIAL_ADD", LITE_TOPICS)).code == Code.OK
        polls: set[asyncio.Task] = set()

        def poll_more():
            while len(polls) < 3:
                polls.add(asyncio.create_task(reader.poll(group, topic, wait=20, count=1, invisible=LEASE)))

        for number in range(300):
            if polls and chance.random() < 0.5:
                await until(lambda: waiting(broker) > 0)
            for poll in chance.sample(sorted(polls, key=id), chance.randint(0, len(polls))):
                poll.cancel()
                polls.discard(poll)
            if chance.random() < 0.5:
                poll_more()
            lite = {"lite_topic": chance.choice(LITE_TOPICS)} if kind == "LITE_PUSH_CONSUMER" else {}
            assert (await producer.send(message(topic, str(number), **lite))).status.code == Code.OK
            came = False
            while not came:
                poll_more()
                done, polls = await asyncio.wait(polls, timeout=LIMIT, return_when=asyncio.FIRST_COMPLETED)
                for poll in done:
                    status, messages = poll.result()
                    # A poll whose wake-up is lost ends after its 20 s with "not found".
                    assert status.code == Code.OK
                    await reader.ack(group, topic, messages)
                    came = came or str(number) in bodies(messages)
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)
        await until(lambda: waiting(broker) == 0)


async def test_a_poll_that_is_woken_and_gone_passes_the_wake_up_on():
    async with DevBroker() as broker:
        engine, servicer = broker._engine, broker._servicer
        assert engine is not None
        assert servicer is not None
        reader = servicer._reader
        await broker.create_topic("T")
        await broker.create_group("LG", lite_bind_topic="L")
        group, lite_group = engine.catalog.group("G"), engine.catalog.group("LG")
        topic, lite_topic = engine.catalog.topic("T"), engine.catalog.topic("L")
        assert group is not None
        assert lite_group is not None
        client = engine.subscriptions.client("c", lite_group, "L")
        engine.subscriptions.add(client, "s", take_over=True)
        terms = Terms(count=32, invisible_ms=60_000, wait=20.0)
        for receive, sent in (
            (lambda: reader.receive(group, topic, terms), message("T")),
            (lambda: reader.receive_lite(client, lite_topic, terms), message("L", lite_topic="s")),
        ):
            first, second = asyncio.create_task(receive()), asyncio.create_task(receive())
            await until(lambda: waiting(broker) == 2)
            await engine.send([sent], peer="")  # wakes the first, which has no time to run before it ends
            first.cancel()
            assert len(await second) == 1
            assert first.cancelled()


async def test_a_client_that_does_not_read_slows_nobody_and_loses_nothing():
    async with DevBroker() as broker, peer_of(broker) as producer:
        for _ in range(32):
            await producer.send(message("Big", bytes(1024 * 1024)))
        async with peer_of(broker, "SIMPLE_CONSUMER", "G", "Big") as stuck:
            request = service.ReceiveMessageRequest(group=resource("G"), batch_size=32)
            request.message_queue.topic.name, request.message_queue.id = "Big", -1
            request.invisible_duration.FromSeconds(3600)
            call = stuck.stub.ReceiveMessage(request, metadata=stuck.metadata)
            assert (await call.read()).status.code == Code.OK  # and reads no further
            async with peer_of(broker, "SIMPLE_CONSUMER", "Quick", "Small") as quick:
                for _ in range(50):
                    await producer.send(message("Small"))
                    await quick.ack("Quick", "Small", await quick.take("Quick", "Small"))
            # All that while the broker was waiting for the stuck one, which it gives up after 30 s.
            assert not call.done()
            call.cancel()
            async with peer_of(broker, "SIMPLE_CONSUMER", "G", "Big") as heir:
                # What had reached the stuck client's side stays leased to it; the rest comes at once.
                assert len(await heir.take("G", "Big", 20)) >= 20


def test_a_client_that_does_not_read_its_commands_is_cut_off_before_they_fill_the_memory():
    client = Client("deaf")
    for _ in range(50_000):
        client.tell(service.TelemetryCommand())
    queued = [client.outbox.get_nowait() for _ in range(client.outbox.qsize())]
    assert len(queued) == 20_001
    assert queued[-1] is None  # the end of its stream


async def test_messages_for_a_caller_who_is_gone_go_to_the_next():
    async with (
        DevBroker() as broker,
        peer_of(broker) as producer,
        peer_of(broker, "SIMPLE_CONSUMER", "G", "T") as reader,
    ):
        polls = [asyncio.create_task(reader.poll("G", "T", wait=20)) for _ in range(3)]
        await until(lambda: waiting(broker) == 3)
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)
        await until(lambda: waiting(broker) == 0)
        await producer.send(message("T"))
        status, messages = await reader.poll("G", "T", wait=20)
        assert (status.code, len(messages)) == (Code.OK, 1)


async def test_polls_and_timers_leave_nothing_behind():
    async with DevBroker(settings=Settings(min_long_poll=0.1)) as broker, peer_of(broker) as producer:
        engine = broker._engine
        assert engine is not None
        for number in range(20):
            async with peer_of(broker, "LITE_PUSH_CONSUMER", "LG", "L") as lite:
                await lite.sync("LG", "L", "PARTIAL_ADD", [f"s{number}"])
                await producer.send_lite("L", f"s{number}", 1)
                await lite.ack("LG", "L", await lite.take("LG", "L"))
                await lite.poll("LG", "L", wait=0.1)
            async with peer_of(broker, "SIMPLE_CONSUMER", f"G{number}", f"T{number}") as simple:
                await simple.poll(f"G{number}", f"T{number}", wait=0.1)
        await until(lambda: len(engine.subscriptions) == 0)
        assert engine.subscriptions._clients == {}
        assert engine._alarms == {}
        assert engine._waiters == {}


async def test_a_crowd_of_polls_shares_what_comes():
    async with (
        DevBroker() as broker,
        peer_of(broker, "SIMPLE_CONSUMER", "G", "T") as reader,
        peer_of(broker) as producer,
    ):
        polls = {asyncio.create_task(reader.poll("G", "T", wait=20)) for _ in range(300)}
        await until(lambda: waiting(broker) == 300)
        await producer.send(*(message("T", str(number)) for number in range(300)))
        got: list[str] = []
        async with asyncio.timeout(LIMIT):
            while len(got) < 300:
                done, polls = await asyncio.wait(polls, return_when=asyncio.FIRST_COMPLETED)
                for poll in done:
                    status, messages = await poll
                    assert status.code == Code.OK
                    got += bodies(messages)
        assert sorted(got, key=int) == [str(number) for number in range(300)]
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)
