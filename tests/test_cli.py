"""The command line, run as users run it: as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from agentscope_rocketmq.cli import app, main
from tests.conftest import unique
from tests.waiting import take

COMMAND = [sys.executable, "-c", "from agentscope_rocketmq.cli import main; main()"]
START_TIMEOUT = 150
STOP_TIMEOUT = 30


@contextlib.contextmanager
def running(*arguments: str, environment: dict[str, str] | None = None):
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=STOP_TIMEOUT)


def run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT,
        env={**os.environ, **(environment or {})},
        check=False,
    )


def next_line(stream, timeout: float) -> str:
    readable, _, _ = select.select([stream], [], [], timeout)
    assert readable, f"nothing was printed within {timeout} s"
    return str(stream.readline())


def children(pid: int) -> dict[int, int]:
    """The child processes as pid -> a file descriptor that becomes readable when that very process ends."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return {int(child): os.pidfd_open(int(child)) for child in found}


def assert_gone(processes: dict[int, int]) -> None:
    for pid, descriptor in processes.items():
        ended, _, _ = select.select([descriptor], [], [], STOP_TIMEOUT)
        os.close(descriptor)
        assert ended, f"process {pid} is still there"


def card_file(folder, endpoint: str, topic: str) -> str:
    path = folder / "card.json"
    interface = {"url": f"http://{endpoint}//{topic}", "protocolBinding": "RocketMQ", "protocolVersion": "1.0"}
    path.write_text(
        json.dumps({"name": "Weather", "description": "", "version": "1", "supportedInterfaces": [interface]}),
        encoding="utf-8",
    )
    return str(path)


APACHE = ("dev", "--engine", "apache", "--port", "0")
EMBEDDED = ("dev", "--port", "0")


@contextlib.contextmanager
def ready(*arguments: str):
    """A running `dev`, and what it printed as JSON."""
    with running(*arguments, "--json") as process:
        yield process, json.loads(next_line(process.stdout, START_TIMEOUT))


@pytest.mark.parametrize(("arguments", "processes"), [(EMBEDDED, 0), (APACHE, 3)], ids=["embedded", "apache"])
def test_dev_prints_what_to_export_serves_it_and_ends_with_0_on_sigterm(tmp_path, arguments, processes):
    with ready(*arguments) as (dev, announced):
        assert announced["engine"] == ("apache" if processes else "embedded")
        assert announced["environment"] == {
            "ROCKETMQ_ENDPOINT": announced["endpoint"],
            "ROCKETMQ_NAMESRV": announced["namesrv"],
        }
        card = card_file(tmp_path, announced["endpoint"], "WeatherAgentTask")
        first = run("provision", card, "--json", environment=announced["environment"])
        assert first.returncode == 0, first.stderr
        assert {line["name"]: line["outcome"] for line in json.loads(first.stdout)} == {
            "WeatherAgentTask": "created",
            "WorkerAgentResponse": "created",
            "WorkerAgentResponseServer": "created",
            "WeatherAgentTaskConsumerGroup": "created",
            "CID_HOST_AGENT_LITE": "created",
            "CID_HOST_AGENT_LITE_OBSERVER": "created",
            "CID_HOST_AGENT_LITE_SERVER": "created",
        }
        second = run("provision", card, "--namesrv", announced["namesrv"])
        assert [line.split()[0] for line in second.stdout.splitlines()] == ["unchanged"] * 7
        children_of_dev = children(dev.pid)
        assert len(children_of_dev) == processes
        dev.terminate()
        assert dev.wait(STOP_TIMEOUT) == 0
        assert_gone(children_of_dev)


def test_dev_killed_without_mercy_leaves_no_java_behind(tmp_path):
    # Its temporary folder, which a killed process can't remove, goes with this test's own.
    with running(*APACHE, environment={"TMPDIR": str(tmp_path)}) as dev:
        announced = next_line(dev.stdout, START_TIMEOUT)
        assert "RocketMQ is ready: endpoint 127.0.0.1:" in announced
        assert "asks for no credentials" in announced
        java = children(dev.pid)
        assert len(java) == 3
        dev.kill()
        assert dev.wait(STOP_TIMEOUT) == -signal.SIGKILL
        assert_gone(java)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_dev_interrupted_while_starting_ends_with_0_and_leaves_no_java_behind(number):
    with running(*APACHE) as dev:
        while "Starting" not in next_line(dev.stderr, START_TIMEOUT):
            pass
        java: dict[int, int] = {}
        while not java:
            java = children(dev.pid)
        dev.send_signal(number)
        assert dev.wait(STOP_TIMEOUT) == 0
        assert_gone(java)
        assert dev.stdout.read() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_embedded_dev_says_what_it_is_and_ends_with_0_while_clients_wait(number):
    with running(*EMBEDDED) as dev:
        banner = next_line(dev.stdout, START_TIMEOUT)
        for words in ("endpoint 127.0.0.1:", "in memory", "first use", "this machine alone", "no credentials"):
            assert words in banner
        dev.stdout.readline()
        exported = dict(dev.stdout.readline().split()[1].split("=") for _ in range(2))
        assert list(exported) == ["ROCKETMQ_ENDPOINT", "ROCKETMQ_NAMESRV"]
        with waiting_client(exported["ROCKETMQ_ENDPOINT"]):
            dev.send_signal(number)
            assert dev.wait(STOP_TIMEOUT) == 0
        assert dev.stderr.read() == ""


@contextlib.contextmanager
def waiting_client(endpoint: str):
    """A client with an open telemetry stream and a long poll, which nothing will answer."""
    import grpc

    from agentscope_rocketmq.rocketmq.protocol import MessagingServiceStub, definition, service

    with grpc.insecure_channel(endpoint) as channel:
        stub, metadata = MessagingServiceStub(channel), (("x-mq-client-id", "waiting"),)
        settings = definition.Settings(client_type=definition.ClientType.SIMPLE_CONSUMER)
        settings.subscription.group.name = "G"
        commands: queue.SimpleQueue = queue.SimpleQueue()
        commands.put(service.TelemetryCommand(settings=settings))
        stream = stub.Telemetry(iter(commands.get, None), metadata=metadata)
        next(stream)
        request = service.ReceiveMessageRequest(group=definition.Resource(name="G"), batch_size=1)
        request.message_queue.topic.name, request.message_queue.id = "T", -1
        request.invisible_duration.FromSeconds(30)
        poll = stub.ReceiveMessage(request, metadata=metadata)
        try:
            yield
        finally:
            commands.put(None)
            poll.cancel()


async def send(endpoint: str, message, *, timeout: float = 10.0):
    from agentscope_rocketmq.rocketmq.connection import Connection
    from agentscope_rocketmq.rocketmq.producer import Producer

    async with Connection(endpoint) as connection, Producer(connection) as producer:
        return await producer.send(message, timeout=timeout)


async def test_the_embedded_dev_keeps_what_it_was_given_in_its_data_folder(tmp_path):
    from agentscope_rocketmq.rocketmq.connection import Connection
    from agentscope_rocketmq.rocketmq.lite import LiteConsumer, Position
    from agentscope_rocketmq.rocketmq.message import Message

    for folder, options in ((tmp_path / "synced", ()), (tmp_path / "quick", ("--no-fsync",))):
        with ready(*EMBEDDED, "--data", str(folder), *options) as (dev, announced):
            await send(announced["endpoint"], Message(topic="Kept", lite_topic="s", body=b"kept"))
            dev.terminate()
            assert dev.wait(STOP_TIMEOUT) == 0
        with ready(*EMBEDDED, "--data", str(folder), *options) as (_, announced):
            async with (
                Connection(announced["endpoint"]) as connection,
                LiteConsumer(connection, "Kept", "KeptGroup") as reader,
            ):
                await reader.subscribe(["s"], at=Position.first())
                [batch] = await take(reader.batches(), 1)
                assert [message.body() for message in batch.messages] == [b"kept"]


async def test_limits_and_strictness_reach_the_embedded_dev():
    from agentscope_rocketmq.errors import TopicNotFound
    from agentscope_rocketmq.rocketmq.message import Message
    from tests.contract.wire import Code, Peer, message

    limits = ("--strict", "--max-body-bytes", "1000", "--max-lite-topic-length", "5", "--lite-quota", "2")
    with ready(*EMBEDDED, *limits) as (_, announced), pytest.raises(TopicNotFound):
        await send(announced["endpoint"], Message(topic="NeverMade", body=b"x"))
    with ready(*EMBEDDED, *limits[1:]) as (_, announced):
        peer = Peer(announced["endpoint"])
        settings = await peer.announce("LITE_PUSH_CONSUMER", "G", "L")
        assert (settings.subscription.max_lite_topic_size, settings.subscription.lite_subscription_quota) == (5, 2)
        for sent, code in (
            (message("T", bytes(1000)), Code.OK),
            (message("T", bytes(1001)), Code.MESSAGE_BODY_TOO_LARGE),
            (message("L", lite_topic="12345"), Code.OK),
            (message("L", lite_topic="123456"), Code.ILLEGAL_LITE_TOPIC),
        ):
            assert (await peer.send(sent)).status.code == code
        assert (await peer.sync("G", "L", "PARTIAL_ADD", ["a", "b"])).code == Code.OK
        assert (await peer.sync("G", "L", "PARTIAL_ADD", ["c"])).code == Code.LITE_SUBSCRIPTION_QUOTA_EXCEEDED
        await peer.aclose()


def test_what_only_the_embedded_engine_has_is_refused_for_apache():
    failed = run(*APACHE, "--strict", "--no-fsync")
    assert failed.returncode == 2
    assert failed.stderr == (
        "error: --fsync, --strict: only the embedded engine has that. Leave it out, or --engine.\n"
    )


@pytest.mark.parametrize("option", ["--port", "--namesrv-port"])
@pytest.mark.parametrize("kind", ["embedded", "apache"])
def test_a_port_in_use_is_one_line_and_exit_code_2(kind, option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        failed = run("dev", "--engine", kind, *(("--port", "0") if option == "--namesrv-port" else ()), option, port)
    assert failed.returncode == 2
    assert failed.stdout == ""
    *progress, last = failed.stderr.splitlines()
    assert last.startswith("error: ")
    assert port in last
    assert "choose another port" in last
    assert kind == "apache" or progress == []
    assert "Traceback" not in failed.stderr


def test_a_data_folder_that_a_broker_has_open_is_one_line_and_exit_code_2(tmp_path):
    with ready(*EMBEDDED, "--data", str(tmp_path)):
        failed = run(*EMBEDDED, "--data", str(tmp_path))
    assert (failed.returncode, failed.stdout) == (2, "")
    assert "another broker may have it open" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1


def test_a_name_server_that_does_not_answer_is_one_line_and_exit_code_1():
    failed = run("provision", "--namesrv", "127.0.0.1:1")
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1
    assert "127.0.0.1:1" in failed.stderr


def test_provision_prints_mqadmin_lines_without_any_rocketmq(tmp_path):
    topic = unique("Weather")
    printed = run("provision", card_file(tmp_path, "rocketmq.example:8081", topic), "--print", "--retention", "60")
    assert printed.returncode == 0, printed.stderr
    lines = printed.stdout.splitlines()
    assert lines[0] == (
        f"mqadmin updateTopic -n 127.0.0.1:9876 -c DefaultCluster -t {topic} -r 8 -w 8 -a +message.type=NORMAL"
    )
    assert lines[1] == (
        "mqadmin updateTopic -n 127.0.0.1:9876 -c DefaultCluster -t WorkerAgentResponse -r 8 -w 8 "
        "-a +message.type=LITE,+lite.topic.expiration=60"
    )
    assert lines[4] == (
        "mqadmin updateSubGroup -n 127.0.0.1:9876 -c DefaultCluster -g CID_HOST_AGENT_LITE --attributes "
        "+lite.bind.topic=WorkerAgentResponse,+lite.sub.model=Exclusive,+lite.sub.client.max.event.cnt=20000,"
        "+lite.sub.client.quota=20000"
    )
    assert len(lines) == 7


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["provision", "/no/such/card.json"], "/no/such/card.json"),
        (["provision", "--retention", "1"], "1 minutes"),
        (["provision"], "ROCKETMQ_NAMESRV"),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_no_traceback(arguments, problem):
    failed = run(*arguments, environment={"ROCKETMQ_NAMESRV": ""})
    assert failed.returncode in (1, 2)
    assert len(failed.stderr.splitlines()) == 1
    assert problem in failed.stderr


def test_an_unknown_engine_is_refused_by_name():
    result = CliRunner().invoke(app, ["dev", "--engine", "kafka"])
    assert result.exit_code == 2
    assert "embedded" in result.output
    assert "apache" in result.output


def test_the_help_names_the_commands_and_loads_nothing_heavy():
    program = (
        "import sys; sys.argv = ['agentscope-rocketmq', '--help']\n"
        "from agentscope_rocketmq.cli import main\n"
        "try: main()\n"
        "finally: print([name for name in ('agentscope', 'grpc', 'a2a', 'httpx') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "provision" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_installed_command_is_this_one():
    from importlib.metadata import entry_points

    (command,) = entry_points(group="console_scripts", name="agentscope-rocketmq")
    assert command.load() is main
