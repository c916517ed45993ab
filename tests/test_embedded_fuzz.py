"""Random requests: whatever is sent, the broker answers, forgets what it should, and goes on.

Hypothesis chooses the seeds; from each of them come a hundred requests whose every field is random, sent at once by three
clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import resource
import string
from pathlib import Path

import grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentscope_rocketmq.dev import DevBroker
from agentscope_rocketmq.dev.embedded.clients import Client
from agentscope_rocketmq.dev.embedded.consumption import Delivery
from agentscope_rocketmq.dev.embedded.lite import LiteClient
from agentscope_rocketmq.dev.embedded.reading import Received
from agentscope_rocketmq.dev.embedded.settings import Settings
from agentscope_rocketmq.rocketmq.protocol import service
from tests.contract.wire import Code, Peer, bodies, message
from tests.waiting import until

EXAMPLES, REQUESTS = 200, 100
METHODS = [
    method for method in service.DESCRIPTOR.services_by_name["MessagingService"].methods if method.name != "Telemetry"
]
UNIMPLEMENTED = {"PullMessage", "UpdateOffset", "GetOffset", "QueryOffset"}
# Names that make requests meet each other.
WORDS = ["T", "L", "G", "LG", "s1", "s2", "*", "", " ", "a b", "ä\x00", "x" * 200, "1.2.3.4.5.6", "T1"]
# What a call makes and its end should free.
PASSING = (Client, LiteClient, Received, Delivery)
SHORTEST = Settings(min_long_poll=0.0, max_long_poll=0.02, min_invisible=0.0)


def value(chance, field):
    """A random value for a scalar field."""
    kind = field.cpp_type
    if field.type == field.TYPE_BYTES:
        return chance.randbytes(chance.choice([0, 1, 10, 1000]))
    if kind == field.CPPTYPE_STRING:
        return chance.choice([*WORDS, "".join(chance.choices(string.printable, k=5))])
    if kind == field.CPPTYPE_ENUM:
        return chance.choice([*field.enum_type.values_by_number, 0])
    if kind in (field.CPPTYPE_BOOL, field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return chance.choice([0, 1])
    bits = 31 if kind in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 63
    lowest = 0 if kind in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64) else -(2**bits)
    return chance.choice([0, 1, 2, 5, 32, 1000, lowest, 2**bits - 1])


def fill(chance, made, depth=0):
    """Random content for a protocol message."""
    for field in made.DESCRIPTOR.fields:
        if chance.random() < 0.25:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for _ in range(chance.randint(0, 2)):
                getattr(made, field.name)[chance.choice(WORDS)] = chance.choice(WORDS)
        elif field.is_repeated:
            for _ in range(chance.randint(0, 3)):
                if field.message_type is not None:
                    fill(chance, getattr(made, field.name).add(), depth + 1)
                else:
                    getattr(made, field.name).append(value(chance, field))
        elif field.message_type is not None:
            if depth < 4:
                getattr(made, field.name).SetInParent()
                fill(chance, getattr(made, field.name), depth + 1)
        else:
            setattr(made, field.name, value(chance, field))
    return made


async def ask(peer, chance, handles):
    method = chance.choice(METHODS)
    request = fill(chance, getattr(service, method.input_type.name)())
    if handles and hasattr(request, "receipt_handle") and chance.random() < 0.5:
        request.receipt_handle = chance.choice(handles)
    metadata = peer.metadata if chance.random() < 0.95 else ()
    call = getattr(peer.stub, method.name)(request, metadata=metadata, timeout=30)
    if method.name in UNIMPLEMENTED:
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
    elif not method.server_streaming:
        assert (await call).status.code != Code.CODE_UNSPECIFIED
    else:
        async for answer in call:
            if answer.WhichOneof("content") == "message":
                handles.append(answer.message.system_properties.receipt_handle)
                del handles[:-20]


async def telemetry(endpoint, chance):
    peer = Peer(endpoint)
    stream = peer.stub.Telemetry(metadata=peer.metadata)
    # The broker may end the stream at the first of them.
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        for _ in range(3):
            await stream.write(fill(chance, service.TelemetryCommand()))
        await stream.done_writing()
        while await stream.read() is not grpc.aio.EOF:
            continue
    assert await stream.code() in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT)
    await peer.aclose()


def rss():
    """Resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 2**20


async def attack(seeds):
    tasks = asyncio.all_tasks()
    async with DevBroker(settings=SHORTEST) as broker:
        peers = [Peer(broker.endpoint) for _ in range(3)]
        await peers[0].announce("PRODUCER")
        await peers[1].announce("SIMPLE_CONSUMER", "G", "T")
        await peers[2].announce("LITE_PUSH_CONSUMER", "LG", "L")
        resident = []
        while (seed := await seeds.get()) is not None:
            chance = random.Random(seed)
            handles: list[str] = []
            await asyncio.gather(*(ask(chance.choice(peers), chance, handles) for _ in range(REQUESTS)))
            await telemetry(broker.endpoint, chance)
            resident.append(rss())
        assert (await peers[0].send(message("Afterwards", "still here"))).status.code == Code.OK
        last = Peer(broker.endpoint)
        await last.announce("SIMPLE_CONSUMER", "AfterwardsGroup", "Afterwards")
        assert bodies(await last.take("AfterwardsGroup", "Afterwards")) == ["still here"]
        for peer in (*peers, last):
            await peer.aclose()
        engine, store = broker._engine, broker._store
        assert engine is not None
        await until(lambda: len(engine.subscriptions) == 0)
        await until(
            lambda: not [task for task in asyncio.all_tasks() - tasks if task.get_name().startswith("telemetry")]
        )
        await store.written()
        # What is left is topics, groups and messages, which random names make, and nothing of the calls themselves.
        assert engine._waiters == {}
        assert engine.subscriptions._clients == {}
        assert (store._unwritten, store.unwritten_bytes) == ({}, 0)
        assert engine.log._bytes == sum(map(len, engine.log._cache.values())) <= SHORTEST.cache_bytes
        assert len(engine._alarms) <= sum(len(queue.consumers) for queue in engine.catalog.queues.values())
        gc.collect()
        left = [type(found).__name__ for found in gc.get_objects() if isinstance(found, PASSING)]
        assert left == []
        # Generous: what 10,000 of them leave in memory is far less than what they are.
        assert resident[-1] - resident[len(resident) // 2] < 100
    assert asyncio.all_tasks() <= tasks


async def test_20000_random_requests_are_all_answered(caplog):
    caplog.set_level(logging.ERROR)
    found = []

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**63))
    def gather(seed):
        found.append(seed)

    gather()
    assert len(found) * REQUESTS >= 20_000
    seeds: asyncio.Queue[int | None] = asyncio.Queue()
    for seed in [*found, None]:
        seeds.put_nowait(seed)
    await attack(seeds)
    assert [record.message for record in caplog.records if "embedded broker failed" in record.message] == []
