"""What is acknowledged is kept: kill -9 in the middle of traffic, and the fsync calls counted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import uuid
from typing import Any

import grpc
import pytest

from agentscope_rocketmq.dev import DevBroker
from tests.contract.wire import Code, Peer, bodies, message, offsets
from tests.waiting import LIMIT

PROGRAM = """
import sys
from pathlib import Path
from agentscope_rocketmq.dev.embedded.run import run_embedded
run_embedded(0, Path(sys.argv[1]), fsync=sys.argv[2] == "fsync", on_ready=lambda b: print(b.endpoint, flush=True))
"""
RUNS = 20


@contextlib.contextmanager
def process(data, *, fsync, before=()):
    """A broker process, killed with SIGKILL at the end if it is not gone by then."""
    command = [*before, sys.executable, "-c", PROGRAM, str(data), "fsync" if fsync else ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as running:
        assert running.stdout is not None
        try:
            yield running, running.stdout.readline().strip()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)


class Traffic:
    """Sends and acks until the broker dies; knows what was acknowledged."""

    def __init__(self):
        self.sent = {}
        self.acked = set()
        self.committed = {}

    async def run(self, endpoint, victim, after):
        peers = [Peer(endpoint) for _ in range(3)]
        try:
            await peers[0].announce("PRODUCER")
            await peers[1].announce("SIMPLE_CONSUMER", "G", "T")
            await peers[2].announce("LITE_PUSH_CONSUMER", "LG", "L")
            names = [f"s{number}" for number in range(3)]
            await peers[2].sync("LG", "L", "PARTIAL_ADD", names)
            asyncio.get_running_loop().call_later(after, victim.kill)
            async with asyncio.timeout(LIMIT):
                await asyncio.gather(
                    *(self._until_it_dies(self._send_normal, peers[0]) for _ in range(4)),
                    *(self._until_it_dies(self._send_lite, peers[0], name) for name in names),
                    self._until_it_dies(self._read_normal, peers[1]),
                    self._until_it_dies(self._read_lite, peers[2]),
                )
        finally:
            for peer in peers:
                await peer.aclose()

    async def _until_it_dies(self, work, *arguments):
        with contextlib.suppress(grpc.aio.AioRpcError):
            while True:
                await work(*arguments)

    async def _send_normal(self, peer):
        body = uuid.uuid4().hex
        assert (await peer.send(message("T", body))).status.code == Code.OK
        self.sent.setdefault("T", []).append(body)

    async def _send_lite(self, peer, name):
        body = uuid.uuid4().hex
        await peer.send_lite("L", name, body)
        self.sent.setdefault(name, []).append(body)

    async def _read_normal(self, peer):
        _, messages = await peer.poll("G", "T", count=random.randint(1, 32))
        chosen = [item for item in messages if random.random() < 0.7]
        if chosen:
            assert (await peer.ack("G", "T", chosen)).status.code == Code.OK
            self.acked.update(bodies(chosen))

    async def _read_lite(self, peer):
        _, messages = await peer.poll("LG", "L", count=16)
        if messages:
            assert (await peer.ack("LG", "L", messages)).status.code == Code.OK
            for item in messages:
                system = item.system_properties
                self.committed[system.lite_topic] = max(
                    self.committed.get(system.lite_topic, 0), system.queue_offset + 1
                )


async def test_what_was_acknowledged_survives_kill_9(tmp_path):
    traffic = Traffic()
    for run in range(RUNS):
        with process(tmp_path, fsync=run % 2 == 0) as (victim, endpoint):
            await traffic.run(endpoint, victim, after=random.uniform(0.1, 0.4))
            assert victim.wait(LIMIT) == -signal.SIGKILL
    assert len(traffic.sent["T"]) > 50
    assert len(traffic.acked) > 20
    async with DevBroker(data=tmp_path) as broker:
        peer, fresh = Peer(broker.endpoint), Peer(broker.endpoint)
        await peer.announce("LITE_PUSH_CONSUMER", "LG", "L")
        for name, committed in traffic.committed.items():
            # The place of the group is where it was, and every message is at an offset of its own.
            await peer.sync("LG", "L", "COMPLETE_ADD", [name])
            _, first = await peer.poll("LG", "L", count=1, wait=5)
            assert not first or offsets(first)[0] >= committed
            await peer.sync("LG", "L", "PARTIAL_REMOVE", [name])
            await peer.sync("LG", "L", "PARTIAL_ADD", [name], offset=0)
            found: list[Any] = []
            while len(set(bodies(found)) & set(traffic.sent[name])) < len(traffic.sent[name]):
                batch = await peer.take("LG", "L")
                await peer.ack("LG", "L", batch)
                found += batch
            assert offsets(found) == list(range(len(found)))
            stored = [body for body in bodies(found) if body in set(traffic.sent[name])]
            assert stored == traffic.sent[name]
            await peer.sync("LG", "L", "COMPLETE_REMOVE", [])
        await fresh.announce("SIMPLE_CONSUMER", "G", "T")
        expected = set(traffic.sent["T"]) - traffic.acked
        come: set[str] = set()
        async with asyncio.timeout(2 * LIMIT):
            while not expected <= come:
                messages = await fresh.take("G", "T")
                come.update(bodies(messages))
                await fresh.ack("G", "T", messages)
        assert come.isdisjoint(traffic.acked)
        for one in (peer, fresh):
            await one.aclose()


@pytest.mark.parametrize("fsync", [True, False])
async def test_each_acknowledged_send_has_its_fsync_unless_told_otherwise(tmp_path, fsync):
    strace = shutil.which("strace")
    assert strace is not None, "install strace: this test counts system calls"
    log = tmp_path / "strace.log"
    before = (strace, "-f", "-qq", "-e", "trace=fsync,fdatasync", "-o", str(log))

    def count():
        return len(re.findall(r"(?:fsync|fdatasync)\(", log.read_text()))

    with process(tmp_path / "data", fsync=fsync, before=before) as (_, endpoint):
        peer = Peer(endpoint)
        await peer.announce("PRODUCER")
        await peer.send(message("T"))
        calls = count()
        for _ in range(10):
            assert (await peer.send(message("T"))).status.code == Code.OK
        calls = count() - calls
        await peer.aclose()
    assert calls >= 10 if fsync else calls == 0
