"""Long streams whose readers die: their agent, and the account of what was read against what was said and stored."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.table import Table

from agentscope_rocketmq.session import lite_topic_name
from benchmarks.agent import card
from benchmarks.chaos import auditor
from benchmarks.engine import EMBEDDED, provisioned

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from agentscope_rocketmq import RocketMQConfig

__all__ = [
    "IN_FLIGHT",
    "LONGEST_GAP",
    "Heard",
    "Move",
    "Process",
    "Reader",
    "Report",
    "account",
    "agent",
    "command_line",
    "environment",
    "written_card",
]

IN_FLIGHT = 0.8
"""Share of the streams that must be in flight at each kill."""

LONGEST_GAP = 3.0
"""Seconds from a kill to the next event, the reader's own delay taken out."""

_STOP_SECONDS = 60.0
_ROOT = Path(__file__).parents[2]


@dataclass(slots=True)
class Heard:
    """A number as it arrived.

    Attributes:
        number: The number.
        cursor: The cursor of its event.
        at: When, seconds since 1970.
    """

    number: int
    cursor: str
    at: float


@dataclass(slots=True)
class Move:
    """One going on, after what it was read by had ended.

    Attributes:
        left_at: When that had ended.
        delay: Seconds that were no wait for the session: before a client comes back, or until a process is there.
        asked_at: When the session was asked for.
        first: Index in `Reader.heard` of the first number after it.
    """

    left_at: float
    delay: float
    asked_at: float
    first: int


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything.

    Attributes:
        sessions: Sessions, each with one answer.
        events: Numbers in each answer.
        kills: How often what reads them ends.
        interval: Seconds between two numbers of an answer.
        seed: Of the moments at which it ends.
    """

    sessions: int = 200
    events: int = 500
    kills: int = 10
    interval: float = 0.4
    seed: int = 1

    @property
    def question(self) -> str:
        """What the agent is asked."""
        return f"{self.events} {self.interval}"


class Reader(Protocol):
    """Whoever reads one session."""

    session: str
    heard: list[Heard]
    moves: list[Move]


@dataclass
class Report:
    """What happened.

    Attributes:
        delivered: Numbers that readers got.
        repeated: Numbers that came once more with the cursor that they had before.
        wrong: What was lost, doubled or out of order, in words; empty when all is well.
        in_flight: For each kill, the share of the streams that were in flight.
        opening: Seconds from the request for a session to the first event that was there for it.
        gaps: Seconds from the kill to that, the reader's own delay taken out.
        delays: Those delays, in seconds.
    """

    delivered: int = 0
    repeated: int = 0
    wrong: list[str] = field(default_factory=list)
    in_flight: list[float] = field(default_factory=list)
    opening: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether all of it is as it should be."""
        return not self.wrong and min(self.in_flight) >= IN_FLIGHT and max(self.gaps) < LONGEST_GAP

    def table(self, title: str) -> Table:
        """It, to be printed."""
        table = Table(title=title)
        table.add_column("what")
        table.add_column("figure", justify="right")
        opening, gaps = (statistics.quantiles(times, n=100) for times in (self.opening, self.gaps))
        for what, figure in (
            ("events delivered, in order, once", str(self.delivered)),
            ("sessions with anything lost, doubled or out of order", str(len(self.wrong))),
            ("events that came again with the cursor they had", str(self.repeated)),
            ("streams in flight at a kill, least", f"{min(self.in_flight):.0%}"),
            ("sessions gone on with", str(len(self.opening))),
            ("asked for to first event, p50", f"{opening[49] * 1000:.0f} ms"),
            ("asked for to first event, p99", f"{opening[98] * 1000:.0f} ms"),
            ("kill to first event, the reader's delay taken out, p50", f"{gaps[49] * 1000:.0f} ms"),
            ("kill to first event, the reader's delay taken out, max", f"{max(self.gaps) * 1000:.0f} ms"),
            ("the reader's delay, p50", f"{statistics.median(self.delays) * 1000:.0f} ms"),
        ):
            table.add_row(what, figure)
        return table


class Process:
    """A process of a run, with its output in a file.

    Args:
        name: Of the file.
        command: Arguments for the interpreter.
        environ: Its environment.
        folder: Where the file is.
    """

    def __init__(self, name: str, command: Sequence[str], environ: dict[str, str], folder: Path) -> None:
        self._command = command
        self._environ = environ
        self._log = folder / f"{name}.log"
        self._running: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it, once more too."""
        with self._log.open("ab") as log:
            self._running = await asyncio.create_subprocess_exec(
                sys.executable, *self._command, cwd=_ROOT, env=self._environ, stdout=log, stderr=log
            )

    async def kill(self) -> None:
        """End it with SIGKILL."""
        if self._running is not None and self._running.returncode is None:
            self._running.kill()
            await self._running.wait()

    def memory(self) -> int:
        """Its resident memory, in bytes."""
        assert self._running is not None
        return int(Path(f"/proc/{self._running.pid}/statm").read_text(encoding="ascii").split()[1]) * 4096

    async def stop(self) -> None:
        """Ask it to end (SIGTERM), and wait until it did.

        Raises:
            TimeoutError: It does not.
        """
        assert self._running is not None
        self._running.send_signal(signal.SIGTERM)
        await asyncio.wait_for(self._running.wait(), _STOP_SECONDS)


def environment(config: RocketMQConfig) -> dict[str, str]:
    """The environment of a process that uses this configuration."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ROCKETMQ_")}
    for setting in ("endpoint", "reply_topic", "reply_group", "state_topic", "state_group"):
        environ[f"ROCKETMQ_{setting.upper()}"] = getattr(config, setting)
    if config.a2a_secret is not None:
        environ["ROCKETMQ_A2A_SECRET"] = config.a2a_secret.get_secret_value()
    return environ


@contextlib.asynccontextmanager
async def agent(config: RocketMQConfig, topic: str, folder: Path) -> AsyncIterator[Path]:
    """The agent in a process of its own; where it writes what it said."""
    ledger = folder / "ledger"
    ledger.touch()
    command = ["-m", "benchmarks.chaos.worker", topic, str(ledger)]
    worker = Process("worker", command, environment(config), folder)
    await worker.start()
    try:
        yield ledger
    finally:
        await worker.kill()


async def account(
    config: RocketMQConfig,
    readers: Sequence[Reader],
    report: Report,
    *,
    ledger: Path,
    events: int,
    killed_at: Sequence[float],
) -> None:
    """Compare what each reader got with the raw LiteTopics and with what the agent says that it said.

    Args:
        config: The cluster.
        readers: Each with the one response of its session.
        report: Gets what is found.
        ledger: The agent's.
        events: Numbers in each response.
        killed_at: The kills, seconds since 1970.
    """
    secret = None if config.a2a_secret is None else config.a2a_secret.get_secret_value()
    names = [lite_topic_name(reader.session, secret=secret) for reader in readers]
    group = f"{config.reply_group}_OBSERVER"
    logs = await auditor.read(config.endpoint, config.reply_topic, group, names)
    said: dict[str, list[int]] = defaultdict(list)
    lines = await asyncio.to_thread(ledger.read_text, encoding="utf-8")
    for line in lines.splitlines():
        context, number = line.split()
        said[context].append(int(number))
    for reader, log in zip(readers, logs, strict=True):
        runs = [run for by_key in auditor.runs_of([log]).values() for run in by_key.values()]
        stored_at = {number: at for run in runs for number, at in _stored(run)}
        if len(runs) != 1 or not runs[0].is_whole or runs[0].doubled or runs[0].disordered:
            report.wrong.append(f"session {reader.session}: {len(runs)} runs lie on the broker, or not one whole")
        compare(reader, said[reader.session], list(stored_at), events, report)
        time_moves(reader, stored_at, killed_at, report)


def _stored(run: auditor.Run) -> list[tuple[int, float]]:
    """The numbers of a run, each with the time at which the broker stored it."""
    return [
        (int(text), message["storedAt"])
        for place, message in sorted(run.messages.items())
        for text in auditor.Run({place: message}).texts()
    ]


def compare(reader: Reader, said: list[int], stored: list[int], events: int, report: Report) -> None:
    """Report what is not 0, 1, 2, … in what was heard, said and stored."""
    heard = [each.number for each in reader.heard]
    report.delivered += len(heard)
    for what, numbers in (("reader", heard), ("ledger", said), ("LiteTopic", stored)):
        if numbers != list(range(events)):
            lost, doubled = events - len(set(numbers)), len(numbers) - len(set(numbers))
            report.wrong.append(f"session {reader.session}, {what}: {lost} lost, {doubled} doubled, or out of order")
    if len({each.cursor for each in reader.heard}) != len(reader.heard):
        report.wrong.append(f"session {reader.session}: a cursor came twice")


def time_moves(reader: Reader, stored_at: dict[int, float], killed_at: Sequence[float], report: Report) -> None:
    """Report how long each going on took."""
    for move in reader.moves:
        first = reader.heard[move.first]
        there = stored_at.get(first.number, 0.0)
        killed = max((moment for moment in killed_at if moment <= move.left_at), default=move.left_at)
        # What the agent had not said yet nobody could deliver.
        report.opening.append(first.at - max(move.asked_at, there))
        report.gaps.append(first.at - max(killed + move.delay, there))
        report.delays.append(move.delay)


def written_card(config: RocketMQConfig, topic: str, folder: Path) -> Path:
    """The agent's card in a file."""
    path = folder / "card.json"
    path.write_text(json.dumps(card(config.endpoint, topic)), encoding="utf-8")
    return path


def command_line(
    name: str, description: str | None, run: Callable[..., Coroutine[Any, Any, Report]], *flags: str
) -> int:
    """Run it as the command line says.

    Args:
        name: Of the command.
        description: For `--help`.
        run: Configuration, topic of the agent and size, and the flags by name -> what happened.
        flags: More switches that the run takes, each with its help: `rolling: they are told to end`.
    """
    parser = argparse.ArgumentParser(prog=name, description=description)
    parser.add_argument("--engine", default=EMBEDDED, metavar="embedded|apache|HOST:PORT")
    for each in fields(Size):
        text = "seconds between two events of a stream" if each.name == "interval" else None
        parser.add_argument(f"--{each.name}", type=type(each.default), default=each.default, help=text)
    for flag in flags:
        switch, _, help_text = flag.partition(": ")
        parser.add_argument(f"--{switch}", action="store_true", help=help_text)
    options = vars(parser.parse_args())
    engine = options.pop("engine")
    size = Size(**{each.name: options.pop(each.name) for each in fields(Size)})

    async def measure() -> Report:
        async with provisioned(engine, card) as (config, agent_card):
            topic: Any = agent_card["supportedInterfaces"][0]["url"].rpartition("/")[2]
            return await run(config, topic, size, **options)

    report = asyncio.run(measure())
    Console().print(report.table(f"{name}: {size} {options or ''}"))
    for wrong in report.wrong[:20]:
        print(wrong)
    return 0 if report.is_sound else 1
