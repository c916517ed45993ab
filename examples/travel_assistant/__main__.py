"""Start everything: a broker where none is given, the topics and groups, the agents, and a terminal."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from agentscope_rocketmq.config import RocketMQConfig
from agentscope_rocketmq.dev import ApacheRocketMQ, EmbeddedRocketMQ
from agentscope_rocketmq.dev.folders import temporary_folder
from agentscope_rocketmq.dev.ports import Ports
from agentscope_rocketmq.dev.process import Process, Starter, tied
from agentscope_rocketmq.errors import AgentScopeRocketMQError, ConfigurationError
from agentscope_rocketmq.provision import apply, plan
from examples.travel_assistant.cards import SUPERVISOR_CARD, TRAVEL_CARD, WEATHER_CARD

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

START_TIMEOUT = 120.0
"""Seconds until the workers must answer."""
STOP_TIMEOUT = 15.0
"""Seconds that a process may take to end when it is told to."""
LEAVE_TIMEOUT = 5.0
"""Seconds that the supervisor may take to end after a Ctrl-C."""

# Each with the environment variable of its port.
_AGENTS = (
    ("weather_agent", "WEATHER_PORT"),
    ("travel_agent", "TRAVEL_PORT"),
    ("supervisor_agent", "SUPERVISOR_PORT"),
)
_COMMAND_LINE = "from agentscope_rocketmq.cli import main; main()"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the whole travel assistant.

    Args:
        arguments: Command line; None takes that of the process.

    Returns:
        The supervisor's exit code, or 1 where it could not be started.
    """
    parser = argparse.ArgumentParser(prog="demo", description="The travel assistant over RocketMQ.")
    parser.add_argument(
        "--engine",
        default="embedded",
        metavar="embedded|apache|HOST:PORT",
        help="start the embedded broker (the default), start Apache RocketMQ, or use the one whose endpoint is there; then "
        "ROCKETMQ_NAMESRV names the name server that topics and groups are made through, and without it they must exist",
    )
    parser.add_argument("--ask", metavar="TEXT", help="answer this one question, without a prompt")
    parser.add_argument("--session", help="name of the conversation (default: a random one)")
    parser.add_argument(
        "--gateways",
        type=int,
        default=0,
        metavar="N",
        help="put the supervisor behind N gateways and talk to it through them: kill -9 the one that answers, and go on",
    )
    options = parser.parse_args(arguments)
    passed_on = [
        part
        for name in ("ask", "session")
        if (value := getattr(options, name)) is not None
        for part in (f"--{name}", value)
    ]
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _frame: sys.exit(128 + number))
    try:
        with ExitStack() as running:
            running.enter_context(_broker(options.engine))
            processes = running.enter_context(_processes())
            if not options.gateways:
                processes.run(_AGENTS[:2])
                return _run_terminal("supervisor", passed_on)
            processes.run(_AGENTS)
            gateways = processes.run_gateways(options.gateways)
            chosen = [part for url in gateways for part in ("--gateway", url)]
            return _run_terminal("gateway_terminal", [*chosen, "--show-moves", *passed_on])
    except AgentScopeRocketMQError as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


@contextmanager
def _broker(engine: str) -> Iterator[None]:
    """Have a broker with all topics and groups; its address goes to the environment, from where the processes take it."""
    with ExitStack() as running:
        if engine in ("embedded", "apache"):
            broker: ApacheRocketMQ | EmbeddedRocketMQ
            broker = EmbeddedRocketMQ() if engine == "embedded" else ApacheRocketMQ(on_progress=_say)
            running.enter_context(broker)
            os.environ |= {"ROCKETMQ_ENDPOINT": broker.endpoint, "ROCKETMQ_NAMESRV": broker.namesrv}
        else:
            os.environ["ROCKETMQ_ENDPOINT"] = engine
        config = RocketMQConfig.from_env()
        if config.namesrv is not None:
            _say("Making topics and groups …")
            asyncio.run(apply(plan([WEATHER_CARD, TRAVEL_CARD, SUPERVISOR_CARD], config), config))
        yield


class _Processes:
    """The agents and gateways of this run."""

    def __init__(self, folder: Path, starter: Starter, ports: Ports) -> None:
        self._folder = folder
        self._starter = starter
        self._ports = ports
        self._running: list[Process] = []

    def run(self, agents: Sequence[tuple[str, str]]) -> None:
        """Run agents, and wait until they answer."""
        _say(f"Starting {', '.join(name for name, _ in agents)} …")
        urls = {}
        for name, variable in agents:
            os.environ[variable] = str(self._ports.choose())
            urls[name] = f"http://127.0.0.1:{os.environ[variable]}/.well-known/agent-card.json"
        started = [self._start(name, ["-m", f"examples.travel_assistant.{name}"]) for name, _ in agents]
        deadline = time.monotonic() + START_TIMEOUT
        for process in started:
            _wait_until_answering(process, urls[process.name], deadline)

    def run_gateways(self, count: int) -> list[str]:
        """Run gateways before the supervisor, and wait until they are ready; their URLs."""
        urls = []
        for number in range(1, count + 1):
            port = self._ports.choose()
            command = ["-c", _COMMAND_LINE, "gateway", "--agent", str(SUPERVISOR_CARD), "--port", str(port)]
            process = self._start(f"gateway-{number}", command)
            urls.append(f"http://127.0.0.1:{port}")
            _wait_until_answering(process, f"{urls[-1]}/readyz", time.monotonic() + START_TIMEOUT)
            _say(f"Gateway {number} is {urls[-1]}, process {process.pid}.")
        return urls

    def stop(self) -> None:
        """Stop all at once: each first ends what it is working on."""
        with ThreadPoolExecutor() as pool:
            for process in self._running:
                pool.submit(process.stop, timeout=STOP_TIMEOUT)

    def _start(self, name: str, command: Sequence[str]) -> Process:
        process = Process(name, [sys.executable, *command], folder=self._folder / name, starter=self._starter)
        self._running.append(process)
        process.start()
        return process


@contextmanager
def _processes() -> Iterator[_Processes]:
    """Processes that run until the end."""
    root = Path(__file__).parents[2]
    with ExitStack() as running:
        folder = running.enter_context(temporary_folder("travel-assistant-"))
        starter = Starter()
        running.callback(starter.close)
        ports = Ports()
        running.callback(ports.close)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        processes = _Processes(folder, starter, ports)
        running.callback(processes.stop)
        yield processes


def _wait_until_answering(worker: Process, url: str, deadline: float) -> None:
    while True:
        try:
            if httpx.get(url, timeout=2.0, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        if not worker.running or time.monotonic() > deadline:
            happened = "does not answer" if worker.running else "ended"
            raise ConfigurationError(f"{worker.name} {happened}. Its last words:\n{worker.output_tail()}")
        time.sleep(0.1)


def _run_terminal(module: str, arguments: Sequence[str]) -> int:
    """Run what talks to the user on this terminal until that one leaves; stop it when something else ends this program."""
    command = [sys.executable, "-m", f"examples.travel_assistant.{module}", *arguments]
    supervisor = subprocess.Popen(tied(command))
    try:
        return supervisor.wait()
    except KeyboardInterrupt:
        # A terminal sends the Ctrl-C to the supervisor as well: it is about to leave.
        with suppress(subprocess.TimeoutExpired):
            return supervisor.wait(LEAVE_TIMEOUT)
        raise
    finally:
        if supervisor.poll() is None:
            supervisor.terminate()
            try:
                supervisor.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                supervisor.kill()
                supervisor.wait()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
