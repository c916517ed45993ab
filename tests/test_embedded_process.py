"""The embedded broker in a process of its own: started, killed, frozen, started again, and never left behind."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agentscope_rocketmq.dev import EmbeddedRocketMQ
from agentscope_rocketmq.errors import BrokerUnreachable, ClosedError, ConfigurationError
from agentscope_rocketmq.rocketmq.admin import Admin
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.lite import LiteConsumer, Position
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from tests.waiting import LIMIT, take


async def send(broker, body):
    async with Connection(broker.endpoint) as connection, Producer(connection) as producer:
        await producer.send(Message(topic="L", lite_topic="s", body=body))


async def received(broker, count):
    async with Connection(broker.endpoint) as connection, LiteConsumer(connection, "L", "G") as reader:
        await reader.subscribe(["s"], at=Position.first())
        bodies: list[bytes] = []
        while len(bodies) < count:
            [batch] = await take(reader.batches(), 1)
            bodies += [message.body() for message in batch.messages]
            await reader.ack(batch.messages)
        return bodies


@pytest.mark.parametrize("end", ["kill", "terminate"])
async def test_it_comes_back_on_the_same_ports_with_what_it_had(tmp_path, end):
    with EmbeddedRocketMQ(data=tmp_path) as broker:
        addresses, pid = (broker.endpoint, broker.namesrv), broker.pid
        await send(broker, b"1")
        getattr(broker, end)()
        assert broker.pid is None
        broker.start()
        assert (broker.endpoint, broker.namesrv) == addresses
        assert broker.pid not in (None, pid)
        await send(broker, b"2")
        assert await received(broker, 2) == [b"1", b"2"]
        async with Admin(broker.namesrv) as admin:
            assert list(await admin.brokers()) == ["embedded"]


def test_it_rests_in_little_memory():
    with EmbeddedRocketMQ() as broker:
        status = Path(f"/proc/{broker.pid}/status").read_text(encoding="ascii")
    assert int(status.split("VmRSS:")[1].split()[0]) < 120 * 1024


async def test_without_a_data_folder_a_restart_forgets():
    with EmbeddedRocketMQ() as broker:
        await send(broker, b"forgotten")
        broker.kill()
        broker.start()
        await send(broker, b"new")
        assert await received(broker, 1) == [b"new"]


async def test_a_frozen_one_answers_when_it_goes_on():
    with EmbeddedRocketMQ() as broker:
        host, _, port = broker.namesrv.rpartition(":")
        broker.pause()
        with socket.create_connection((host, int(port)), timeout=LIMIT) as connection:
            connection.sendall(b"\0\0\0\1")
            connection.shutdown(socket.SHUT_WR)
            assert select.select([connection], [], [], 0.5)[0] == []
            broker.resume()
            assert connection.recv(1) == b""


def test_a_start_that_fails_quotes_it_and_leaves_nothing_behind(tmp_path):
    with EmbeddedRocketMQ(data=tmp_path):
        second = EmbeddedRocketMQ(data=tmp_path)
        with pytest.raises(BrokerUnreachable, match=r"ended\.\nerror: .*another broker may have it open"):
            second.start()
        assert second.pid is None
        with pytest.raises(ClosedError):
            second.kill()
        second.stop()


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"Port {port} can't be used"):
            EmbeddedRocketMQ(port).start()


def test_it_dies_with_the_program_that_started_it():
    program = (
        "import os, signal\n"
        "from agentscope_rocketmq.dev import EmbeddedRocketMQ\n"
        "broker = EmbeddedRocketMQ()\n"
        "broker.start()\n"
        "print(broker.pid, flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
    try:
        assert select.select([child], [], [], LIMIT)[0] == [child]
    finally:
        os.close(child)
