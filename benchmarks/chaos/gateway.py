"""Streams through two gateways, of which the one that has them is killed with -9, again and again.

    scripts/chaos gateway [--engine embedded|apache|HOST:PORT] [--sessions 200] [--events 500] [--kills 10]
                          [--interval 0.4] [--seed 1]

Each client asks once and follows its answer; when its gateway dies it goes on at the other one with the id of the last
event it has. An auditor then compares what each client got with the raw LiteTopics and with the agent's own ledger.
Exits non-zero when an event was lost, doubled or out of order, when too few streams were in flight at a kill, or when
it took 3 s from a kill to the next event.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from agentscope_rocketmq.dev.ports import Ports
from agentscope_rocketmq.session import lite_topic_name
from benchmarks.agent import card
from benchmarks.chaos import audit
from benchmarks.chaos.clients import Client
from benchmarks.engine import EMBEDDED, provisioned

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from agentscope_rocketmq import RocketMQConfig

__all__ = ["Report", "run"]

IN_FLIGHT = 0.8
"""Share of the streams that must be in flight at each kill."""

LONGEST_GAP = 3.0
"""Seconds from a kill to the next event, the client's own reconnect delay taken out."""

_READY_SECONDS = 120.0
_ROOT = Path(__file__).parents[2]


@dataclass
class Report:
    """What happened.

    Attributes:
        delivered: Numbers that clients got.
        wrong: What was lost, doubled or out of order, in words; empty when all is well.
        in_flight: For each kill, the share of the streams that were in flight.
        opening: Seconds from the request at the new gateway to the first event that was there for it.
        gaps: Seconds from the kill to that, the client's delay taken out.
    """

    delivered: int = 0
    wrong: list[str] = field(default_factory=list)
    in_flight: list[float] = field(default_factory=list)
    opening: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


class _Process:
    """A process of this run, with its output in a file."""

    def __init__(self, name: str, command: Sequence[str], environ: dict[str, str], folder: Path) -> None:
        self._command = command
        self._environ = environ
        self._log = folder / f"{name}.log"
        self._running: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._running = await asyncio.create_subprocess_exec(
                sys.executable, *self._command, cwd=_ROOT, env=self._environ, stdout=log, stderr=log
            )

    async def kill(self) -> None:
        if self._running is not None and self._running.returncode is None:
            self._running.kill()
            await self._running.wait()


async def run(
    config: RocketMQConfig, *, topic: str, sessions: int, events: int, kills: int, interval: float, seed: int
) -> Report:
    """Run it.

    Args:
        config: The cluster; topics and groups exist.
        topic: The agent's topic.
        sessions: Clients, each with a session of its own.
        events: Numbers in each answer.
        kills: How often a gateway is killed.
        interval: Seconds between two numbers of an answer.
        seed: Of the moments at which gateways are killed.
    """
    secret = secrets.token_hex(16)
    config = config.model_copy(update={"a2a_secret": SecretStr(secret)})
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        ledger = folder / "ledger"
        async with _processes(config, secret, topic, folder, ledger) as gateways:
            clients, killed_at, report = await _stream(gateways, sessions, events, kills, interval, seed)
        names = {
            client.session: lite_topic_name(client.session, owner="anonymous", secret=secret) for client in clients
        }
        raw = await audit.stored(config, list(names.values()), expected=events)
        said = audit.ledger(ledger)
    for client in clients:
        _compare(client, said.get(client.session, []), raw[names[client.session]], events, report)
        _time(client, dict(raw[names[client.session]]), killed_at, report)
    return report


@contextlib.asynccontextmanager
async def _processes(
    config: RocketMQConfig, secret: str, topic: str, folder: Path, ledger: Path
) -> AsyncIterator[dict[str, _Process]]:
    """The agent and two gateways, by URL."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ROCKETMQ_")}
    for setting in ("endpoint", "reply_topic", "reply_group", "state_topic", "state_group"):
        environ[f"ROCKETMQ_{setting.upper()}"] = getattr(config, setting)
    environ["ROCKETMQ_A2A_SECRET"] = secret
    (folder / "card.json").write_text(json.dumps(card(config.endpoint, topic)), encoding="utf-8")
    command_line = "from agentscope_rocketmq.cli import main; main()"
    with contextlib.closing(Ports()) as ports:
        gateways = {}
        for number in range(2):
            port = ports.choose()
            command = ["-c", command_line, "gateway", "--agent", str(folder / "card.json"), "--port", str(port)]
            gateways[f"http://127.0.0.1:{port}"] = _Process(f"gateway-{number}", command, environ, folder)
        worker = _Process("worker", ["-m", "benchmarks.chaos.worker", topic, str(ledger)], environ, folder)
        everything = [worker, *gateways.values()]
        try:
            for process in everything:
                await process.start()
            await asyncio.gather(*(_ready(url) for url in gateways))
            yield gateways
        finally:
            await asyncio.gather(*(process.kill() for process in everything))


async def _ready(url: str) -> None:
    async with asyncio.timeout(_READY_SECONDS), httpx.AsyncClient() as http:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get(f"{url}/readyz")).status_code == 200:
                    return
            await asyncio.sleep(0.1)


async def _stream(
    gateways: dict[str, _Process], sessions: int, events: int, kills: int, interval: float, seed: int
) -> tuple[list[Client], list[float], Report]:
    """Have all clients follow their answers while gateways die."""
    report, killed_at, chance = Report(), [], random.Random(seed)  # noqa: S311  (moments)
    first, second = gateways
    clients = [Client([first, second], f"{events} {interval}") for _ in range(sessions)]
    timeout = httpx.Timeout(60.0, read=60.0)
    unbounded = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=timeout, limits=unbounded) as http, asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.run(http))
        active, other = first, second
        for _ in range(kills):
            await _all_at(clients, active)
            await _ready(other)
            await asyncio.sleep(chance.uniform(0.2, 5 * interval))
            report.in_flight.append(sum(client.at == active for client in clients) / sessions)
            killed_at.append(time.time())
            await gateways[active].kill()
            await gateways[active].start()
            active, other = other, active
    return clients, killed_at, report


async def _all_at(clients: list[Client], url: str) -> None:
    async with asyncio.timeout(_READY_SECONDS):
        while any(client.at != url and not client.over for client in clients):  # noqa: ASYNC110  (all of many)
            await asyncio.sleep(0.05)


def _compare(client: Client, said: list[int], raw: list[tuple[int, float]], events: int, report: Report) -> None:
    heard = [each.number for each in client.heard]
    report.delivered += len(heard)
    for what, numbers in (("client", heard), ("ledger", said), ("LiteTopic", [number for number, _ in raw])):
        if numbers != list(range(events)):
            lost, doubled = events - len(set(numbers)), len(numbers) - len(set(numbers))
            report.wrong.append(f"session {client.session}, {what}: {lost} lost, {doubled} doubled, or out of order")
    if len({each.cursor for each in client.heard}) != len(client.heard):
        report.wrong.append(f"session {client.session}: a cursor came twice")


def _time(client: Client, stored_at: dict[int, float], killed_at: list[float], report: Report) -> None:
    for move in client.moves:
        first = client.heard[move.first]
        there = stored_at.get(first.number, 0.0)
        killed = max((moment for moment in killed_at if moment <= move.left_at), default=move.left_at)
        # What the agent had not said yet nobody could deliver.
        report.opening.append(first.at - max(move.asked_at, there))
        report.gaps.append(first.at - max(killed + move.delay, there))


def _table(report: Report, options: argparse.Namespace) -> Table:
    table = Table(title=f"{options.sessions} sessions, {options.events} events each, {options.kills} kills -9")
    table.add_column("what")
    table.add_column("figure", justify="right")
    cuts = statistics.quantiles(report.opening, n=100)
    for what, figure in (
        ("events delivered, in order, once", str(report.delivered)),
        ("sessions with anything lost, doubled or out of order", str(len(report.wrong))),
        ("streams in flight at a kill, least", f"{min(report.in_flight):.0%}"),
        ("goings on at the other gateway", str(len(report.opening))),
        ("request there to first event, p50", f"{cuts[49] * 1000:.0f} ms"),
        ("request there to first event, p99", f"{cuts[98] * 1000:.0f} ms"),
        ("kill to first event, client's delay taken out, p50", f"{statistics.median(report.gaps) * 1000:.0f} ms"),
        ("kill to first event, client's delay taken out, max", f"{max(report.gaps) * 1000:.0f} ms"),
    ):
        table.add_row(what, figure)
    return table


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="chaos gateway", description=__doc__)
    parser.add_argument("--engine", default=EMBEDDED, metavar="embedded|apache|HOST:PORT")
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--events", type=int, default=500)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--interval", type=float, default=0.4, help="seconds between two events of a stream")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    async def measure() -> Report:
        async with provisioned(options.engine, card) as (config, agent_card):
            topic: Any = agent_card["supportedInterfaces"][0]["url"].rpartition("/")[2]
            return await run(
                config,
                topic=topic,
                sessions=options.sessions,
                events=options.events,
                kills=options.kills,
                interval=options.interval,
                seed=options.seed,
            )

    report = asyncio.run(measure())
    Console().print(_table(report, options))
    for wrong in report.wrong[:20]:
        print(wrong)
    sound = not report.wrong and min(report.in_flight) >= IN_FLIGHT and max(report.gaps) < LONGEST_GAP
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
