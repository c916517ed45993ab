"""The command line, run as users run it: as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from agentscope_rocketmq.cli import app, main
from tests.conftest import unique

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


def test_dev_prints_what_to_export_serves_it_and_ends_with_0_on_sigterm(tmp_path):
    with running("dev", "--port", "0", "--json") as dev:
        ready = json.loads(next_line(dev.stdout, START_TIMEOUT))
        assert ready["engine"] == "apache"
        assert ready["environment"] == {
            "ROCKETMQ_ENDPOINT": ready["endpoint"],
            "ROCKETMQ_NAMESRV": ready["namesrv"],
        }
        card = card_file(tmp_path, ready["endpoint"], "WeatherAgentTask")
        first = run("provision", card, "--json", environment=ready["environment"])
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
        second = run("provision", card, "--namesrv", ready["namesrv"])
        assert [line.split()[0] for line in second.stdout.splitlines()] == ["unchanged"] * 7
        java = children(dev.pid)
        assert len(java) == 3
        dev.terminate()
        assert dev.wait(STOP_TIMEOUT) == 0
        assert_gone(java)


def test_dev_killed_without_mercy_leaves_no_java_behind(tmp_path):
    # Its temporary folder, which a killed process can't remove, goes with this test's own.
    with running("dev", "--port", "0", environment={"TMPDIR": str(tmp_path)}) as dev:
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
    with running("dev", "--port", "0") as dev:
        while "Starting" not in next_line(dev.stderr, START_TIMEOUT):
            pass
        java: dict[int, int] = {}
        while not java:
            java = children(dev.pid)
        dev.send_signal(number)
        assert dev.wait(STOP_TIMEOUT) == 0
        assert_gone(java)
        assert dev.stdout.read() == ""


def test_a_port_in_use_is_one_line_and_exit_code_2(engine):
    port = engine.endpoint.rpartition(":")[2]
    failed = run("dev", "--port", port)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.splitlines()[-1].startswith(f"error: Port {port} can't be used")
    assert "Traceback" not in failed.stderr


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
