"""What is acknowledged is kept: kill -9 in the middle of traffic, and the system calls that put it on the disk."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections import defaultdict
from typing import Any

import grpc
import pytest

from agentscope_rocketmq.dev import DevBroker
from agentscope_rocketmq.rocketmq.protocol import service
from tests.contract.wire import Code, Peer, attempts, bodies, message, offsets, resource
from tests.waiting import LIMIT

PROGRAM = """
import sys
from pathlib import Path
from agentscope_rocketmq.dev.embedded.run import run_embedded
run_embedded(0, Path(sys.argv[1]), fsync=sys.argv[2] == "fsync", on_ready=lambda b: print(b.endpoint, flush=True))
"""
RUNS = 20
NORMAL, PRIORITY, FIFO, LITE = "T", "P", "F", "L"


@contextlib.contextmanager
def broker_process(data, *, fsync, before=()):
    """A broker in a process of its own and its endpoint; SIGKILL ends it."""
    command = [*before, sys.executable, "-c", PROGRAM, str(data), "fsync" if fsync else ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as running:
        assert running.stdout is not None
        try:
            endpoint = running.stdout.readline().strip()
            assert endpoint, f"it did not start: {command}"
            yield running, endpoint
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)


# ---- kill -9 in the middle of traffic ----


class Ledger:
    """What the clients know over all runs: what they asked for, and of that what was answered OK.

    What was asked for and not answered may have happened or not; a batch of messages as a whole.
    """

    def __init__(self):
        self.asked: dict[str, list[tuple[str, ...]]] = defaultdict(list)  # topic or LiteTopic -> requests
        self.sent: dict[str, list[str]] = defaultdict(list)
        self.may_be_done: dict[str, set[str]] = defaultdict(set)  # group -> messages
        self.done: dict[str, set[str]] = defaultdict(set)
        self.buried: set[str] = set()
        self.attempts: dict[tuple[str, str], int] = defaultdict(int)  # by group and message
        self.may_be_committed: dict[tuple[str, str], int] = defaultdict(int)  # by group and place
        self.committed: dict[tuple[str, str], int] = defaultdict(int)
        self.at: dict[tuple[str, int], str] = {}  # by place and offset
        self.held: dict[str, list[Any]] = defaultdict(list)  # topic -> messages with handles that may still be good

    def delivered(self, group, messages):
        """Check messages of a group whose messages are leased one by one."""
        for item, body, attempt in zip(messages, bodies(messages), attempts(messages), strict=True):
            assert body not in self.done[group]
            assert attempt > self.attempts[group, body]
            self.attempts[group, body] = attempt
            self.found(place_of(item), item)

    def delivered_in_order(self, group, messages):
        """Check messages of a group that reads in order, and give them by place."""
        places = {}
        for place, batch in itertools.groupby(messages, place_of):
            places[place] = found = list(batch)
            first = offsets(found)[0]
            assert self.committed[group, place] <= first <= self.may_be_committed[group, place]
            assert offsets(found) == list(range(first, first + len(found)))
            for item in found:
                self.found(place, item)
        return places

    def found(self, place, item):
        """Check that a message is where it was."""
        body = item.body.decode()
        assert self.at.setdefault((place, item.system_properties.queue_offset), body) == body


def place_of(item):
    system = item.system_properties
    return system.lite_topic or f"{item.topic.name}/{system.queue_id}"


class Traffic:
    """Clients that use a broker until it dies."""

    def __init__(self, ledger, chance, kill):
        self.ledger = ledger
        self.chance = chance
        self.kill = kill
        self.answers_left = chance.randint(40, 250)

    async def run(self, endpoint, number):
        async with contextlib.AsyncExitStack() as peers:

            async def peer(*settings):
                one = Peer(endpoint)
                peers.push_async_callback(one.aclose)
                await one.announce(*settings)
                return one

            producer = await peer("PRODUCER")
            names = ["s1", "s2", f"new-in-run-{number}"]
            consumers = {topic: await peer("SIMPLE_CONSUMER", f"{topic}G", topic) for topic in (NORMAL, PRIORITY, FIFO)}
            consumers[LITE] = await peer("LITE_PUSH_CONSUMER", f"{LITE}G", LITE)
            for topic, one in consumers.items():
                await self.ack_late(one, topic)
            await consumers[LITE].sync(f"{LITE}G", LITE, "PARTIAL_ADD", names)
            async with asyncio.timeout(LIMIT), asyncio.TaskGroup() as clients:
                for work, *arguments in (
                    (self.send, producer, NORMAL, NORMAL, 1),
                    (self.send, producer, NORMAL, NORMAL, 5),
                    (self.send, producer, PRIORITY, PRIORITY, 1),
                    *((self.send, producer, FIFO, name, 1) for name in ("g1", "g2")),
                    *((self.send, producer, LITE, name, 1) for name in names),
                    *((self.read, consumers[topic], topic) for topic in (NORMAL, PRIORITY)),
                    *((self.read_in_order, consumers[topic], topic) for topic in (FIFO, LITE)),
                ):
                    clients.create_task(self.until_it_dies(work, *arguments))

    async def until_it_dies(self, work, *arguments):
        with contextlib.suppress(grpc.aio.AioRpcError):
            while True:
                await work(*arguments)

    async def ok(self, call):
        """Await an answer, which must be OK. The last one kills the broker, while other calls are under way."""
        answer = await call
        assert answer.status.code == Code.OK, answer.status
        self.answers_left -= 1
        if self.answers_left == 0:
            asyncio.get_running_loop().call_later(self.chance.uniform(0, 0.01), self.kill)
        return answer

    async def send(self, peer, topic, key, count):
        made = tuple(uuid.uuid4().hex for _ in range(count))
        system = {
            NORMAL: {},
            PRIORITY: {"priority": self.chance.randint(0, 7)},
            FIFO: {"message_group": key},
            LITE: {"lite_topic": key},
        }[topic]
        self.ledger.asked[key].append(made)
        await self.ok(peer.send(*(message(topic, body, **system) for body in made)))
        self.ledger.sent[key].extend(made)

    async def ack_late(self, peer, topic):
        """Ack what came before the broker was killed. OK must mean what it says."""
        ledger, group, held = self.ledger, f"{topic}G", self.ledger.held.pop(topic, None)
        if not held:
            return
        ledger.may_be_done[group].update(bodies(held))
        answer = await peer.ack(group, topic, held)
        for item, entry in zip(held, answer.entries, strict=True):
            if entry.status.code != Code.OK:
                assert entry.status.code == Code.INVALID_RECEIPT_HANDLE
            elif topic in (FIFO, LITE):
                place, (offset,) = place_of(item), offsets([item])
                ledger.committed[group, place] = max(ledger.committed[group, place], offset + 1)
            else:
                ledger.done[group].update(bodies([item]))

    async def read(self, peer, topic):
        ledger, group = self.ledger, f"{topic}G"
        _, messages = await peer.poll(group, topic, count=self.chance.randint(1, 16), invisible=10)
        ledger.delivered(group, messages)
        fates = self.chance.choices(("ack", "hide", "bury", "leave"), (14, 3, 1, 2), k=len(messages))
        acked = [item for item, fate in zip(messages, fates, strict=True) if fate == "ack"]
        ledger.may_be_done[group].update(bodies(acked))
        if acked:
            await self.ok(peer.ack(group, topic, acked))
        ledger.done[group].update(bodies(acked))
        for item, fate in zip(messages, fates, strict=True):
            if fate == "hide":
                await self.ok(peer.hide(group, topic, item, 0))
            elif fate == "leave":
                ledger.held[topic].append(item)
            elif fate == "bury":
                ledger.may_be_done[group].update(bodies([item]))
                await self.ok(bury(peer, group, topic, item))
                ledger.done[group].update(bodies([item]))
                ledger.buried.update(bodies([item]))

    async def read_in_order(self, peer, topic):
        ledger, group = self.ledger, f"{topic}G"
        _, messages = await peer.poll(group, topic, count=self.chance.randint(1, 32))
        ledger.held[topic] = messages
        for place, batch in ledger.delivered_in_order(group, messages).items():
            share = len(batch) if self.chance.random() < 0.7 else self.chance.randrange(len(batch))
            acked, rest = batch[:share], batch[share:]
            if acked:
                ledger.may_be_committed[group, place] = offsets(acked)[-1] + 1
                await self.ok(peer.ack(group, topic, acked))
                ledger.committed[group, place] = offsets(acked)[-1] + 1
            for item in rest:
                await self.ok(peer.hide(group, topic, item, 0))


async def bury(peer, group, topic, item):
    request = service.ForwardMessageToDeadLetterQueueRequest(
        group=resource(group),
        topic=resource(topic),
        receipt_handle=item.system_properties.receipt_handle,
        message_id=item.system_properties.message_id,
    )
    return await peer.call("ForwardMessageToDeadLetterQueue", request)


async def test_what_was_acknowledged_survives_20_kills_in_the_middle_of_traffic(tmp_path):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    ledger, chance = Ledger(), random.Random(seed)
    for number in range(RUNS):
        with broker_process(tmp_path, fsync=number % 2 == 0) as (victim, endpoint):
            await Traffic(ledger, chance, victim.kill).run(endpoint, number)
            assert victim.wait(LIMIT) == -signal.SIGKILL
    async with DevBroker(data=tmp_path) as broker, asyncio.timeout(2 * LIMIT), asyncio.TaskGroup() as checks:
        for topic in (NORMAL, PRIORITY):
            checks.create_task(what_is_left_comes(broker.endpoint, ledger, topic))
        for topic in (FIFO, LITE):
            checks.create_task(places_are_as_they_were(broker.endpoint, ledger, topic))
        for topic, keys in ((NORMAL, {NORMAL}), (PRIORITY, {PRIORITY}), (FIFO, {"g1", "g2"})):
            checks.create_task(everything_is_there(broker.endpoint, ledger, topic, keys))
        for name in set(ledger.asked) - {NORMAL, PRIORITY, "g1", "g2"}:
            checks.create_task(everything_is_there(broker.endpoint, ledger, LITE, {name}))
        checks.create_task(dead_letters_are_there(broker.endpoint, ledger))


@contextlib.asynccontextmanager
async def consumer(endpoint, topic, group, names=()):
    peer = Peer(endpoint)
    try:
        await peer.announce("LITE_PUSH_CONSUMER" if topic == LITE else "SIMPLE_CONSUMER", group, topic)
        if names:
            assert (await peer.sync(group, topic, "PARTIAL_ADD", list(names))).code == Code.OK
        yield peer
    finally:
        await peer.aclose()


async def until_nothing_comes(peer, group, topic, expected):
    """What a group receives until all that is expected has come and a poll brings nothing more.

    What comes at all comes within the 10 s for which it was hidden before the last kill.
    """
    missing, empty_polls = set(expected), 0
    while missing or not empty_polls:
        _, messages = await peer.poll(group, topic, wait=5)
        if messages:
            yield messages
        missing.difference_update(bodies(messages))
        empty_polls = 0 if messages else empty_polls + 1
        assert empty_polls <= 4, f"{topic}: {len(missing)} of {len(expected)} messages are lost"


async def what_is_left_comes(endpoint, ledger, topic):
    """Every message comes that was not acked, and none that was."""
    group = f"{topic}G"
    left = set(ledger.sent[topic]) - ledger.may_be_done[group]
    async with consumer(endpoint, topic, group) as peer:
        async for messages in until_nothing_comes(peer, group, topic, left):
            ledger.delivered(group, messages)
            assert (await peer.ack(group, topic, messages)).status.code == Code.OK
            ledger.done[group].update(bodies(messages))


async def places_are_as_they_were(endpoint, ledger, topic):
    """The group goes on in every queue where it was."""
    group = f"{topic}G"
    names = set(ledger.asked) - {NORMAL, PRIORITY, "g1", "g2"} if topic == LITE else {"g1", "g2"}
    left = {body for name in names for body in ledger.sent[name]}
    ends = {place: ledger.committed[of, place] for of, place in list(ledger.committed) if of == group}
    left -= {body for (place, offset), body in ledger.at.items() if offset < ledger.may_be_committed[group, place]}
    assert ends
    async with consumer(endpoint, topic, group, names if topic == LITE else ()) as peer:
        async for messages in until_nothing_comes(peer, group, topic, left):
            for place, batch in ledger.delivered_in_order(group, messages).items():
                assert (await peer.ack(group, topic, batch)).status.code == Code.OK
                ledger.committed[group, place] = ledger.may_be_committed[group, place] = offsets(batch)[-1] + 1


async def everything_is_there(endpoint, ledger, topic, keys):
    """A group that never read before gets every acknowledged message once, and what came in one request whole."""
    group = f"new-{topic}G-{min(keys)}"
    sent, found = {body for key in keys for body in ledger.sent[key]}, []
    async with consumer(endpoint, topic, group, keys if topic == LITE else ()) as peer:
        async for messages in until_nothing_comes(peer, group, topic, sent):
            assert (await peer.ack(group, topic, messages)).status.code == Code.OK
            found += messages
    come = bodies(found)
    assert len(come) == len(set(come))
    requests = [made for key in keys for made in ledger.asked[key]]
    assert set(come) <= set(itertools.chain(*requests))
    assert all(len(set(made) & set(come)) in (0, len(made)) for made in requests)
    for item in found:
        ledger.found(place_of(item), item)
    for key in keys if topic in (FIFO, LITE) else ():
        mine = set(ledger.sent[key])
        assert [body for body in come if body in mine] == ledger.sent[key]
    if topic == LITE:
        assert offsets(found) == list(range(len(found)))


async def dead_letters_are_there(endpoint, ledger):
    assert ledger.buried
    for group in (f"{NORMAL}G", f"{PRIORITY}G"):
        topic, reader, found = f"%DLQ%{group}", f"reads-{group}", []
        async with consumer(endpoint, topic, reader) as peer:
            async for messages in until_nothing_comes(peer, reader, topic, ledger.buried & ledger.done[group]):
                found += bodies(messages)
        assert len(found) == len(set(found))
        assert set(found) <= ledger.may_be_done[group]


# ---- on the disk before the answer ----


class SystemCalls:
    """What strace saw of a broker's writes and syncs, up to now: it notes a call before the process goes on."""

    def __init__(self, log):
        self.log = log

    def command(self):
        strace = shutil.which("strace")
        assert strace is not None, "This test sees system calls with strace, on Linux: scripts/tools installs it."
        calls = "trace=fsync,fdatasync,sync_file_range,pwrite64,pwritev"
        return (strace, "-f", "-qq", "-y", "-s", "8192", "-e", calls, "-o", str(self.log))

    def syncs(self):
        return len(re.findall(SYNCED, self.log.read_text()))

    def synced_after_writing(self, body):
        """Whether those bytes were written to the database and synced after that."""
        text = self.log.read_text()
        written = text.find(body)
        assert "broker.db" in text[text.rfind("\n", 0, written) + 1 : written]
        return re.search(SYNCED, text[written:]) is not None


# A call that other threads' calls overlap is noted in two lines. One thread writes and syncs.
SYNCED = re.compile(r"(?:fsync|fdatasync)(?:\(\d+<[^>]*/broker\.db[^>]*>| resumed>)\) += 0")


@pytest.fixture
def system_calls(tmp_path):
    return SystemCalls(tmp_path / "strace.log")


async def test_what_is_answered_is_on_the_disk(tmp_path, system_calls):
    with broker_process(tmp_path / "data", fsync=True, before=system_calls.command()) as (_, endpoint):
        async with consumer(endpoint, NORMAL, "G") as peer:
            for count in (1, 5):
                for _ in range(10):
                    sent = [uuid.uuid4().hex for _ in range(count)]
                    assert (await peer.send(*(message(NORMAL, body) for body in sent))).status.code == Code.OK
                    assert all(map(system_calls.synced_after_writing, sent))
            left = 60
            while left:
                before = system_calls.syncs()
                messages = await peer.take("G", NORMAL, count=7)
                leased = system_calls.syncs()
                assert leased > before
                assert (await peer.ack("G", NORMAL, messages)).status.code == Code.OK
                assert system_calls.syncs() > leased
                left -= len(messages)
            # Of those that come at the same time each waits for a sync that begins after it was written.
            sent = [uuid.uuid4().hex for _ in range(100)]

            async def send(body):
                assert (await peer.send(message(NORMAL, body))).status.code == Code.OK
                assert system_calls.synced_after_writing(body)

            async with asyncio.TaskGroup() as sending:
                for body in sent:
                    sending.create_task(send(body))


async def test_the_faster_mode_leaves_syncing_to_the_operating_system(tmp_path, system_calls):
    with broker_process(tmp_path / "data", fsync=False, before=system_calls.command()) as (_, endpoint):
        async with consumer(endpoint, NORMAL, "G") as peer:
            for _ in range(20):
                assert (await peer.send(message(NORMAL, body := uuid.uuid4().hex))).status.code == Code.OK
                assert not system_calls.synced_after_writing(body)
    assert "sync" not in system_calls.log.read_text()
