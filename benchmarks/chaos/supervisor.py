"""A supervisor that is killed with -9 while its agents answer, again and again, and goes on by the names of sessions.

    scripts/chaos supervisor [--engine embedded|apache|HOST:PORT] [--sessions 200] [--events 500] [--kills 10]
                             [--interval 0.4] [--seed 1]

One process asks in all sessions; after each kill another one opens them by their names, without any cursor. What was
in the hands of a killed one comes again with the cursor it had: such events are counted, and dropped as an application
would that must not do a thing twice. An auditor then compares what was taken with the raw LiteTopics and with the
agent's own ledger. Exits non-zero when an event was lost, doubled with another cursor or out of order, when too few
streams were in flight at a kill, or when it took 3 s from the start of a supervisor to its next event.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.chaos import streams
from benchmarks.chaos.streams import Heard, Move, Process, Report, Size

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentscope_rocketmq import RocketMQConfig

__all__ = ["run"]

_TAKEN_SECONDS = 120.0


@dataclass(slots=True)
class _Session:
    """What supervisors took of a session.

    Attributes:
        heard: Each number once, in the order in which it was taken.
        moves: The goings on.
        opened: How often it was opened.
        taken: Whether something new was taken since.
    """

    session: str
    heard: list[Heard] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    opened: int = 0
    taken: bool = False
    _opened_at: float = 0.0
    _cursors: set[str] = field(default_factory=set)

    def note(self, line: list[str], killed_at: list[float]) -> bool:
        """Take a note; whether it is of an event that was noted before."""
        number, cursor, at = line[0], line[1], float(line[2])
        if number == "-":
            self.opened, self.taken, self._opened_at = self.opened + 1, False, at
            return False
        if cursor in self._cursors:
            return True
        if not self.taken and self.opened > 1:
            killed = killed_at[-1]
            self.moves.append(Move(killed, self._opened_at - killed, self._opened_at, len(self.heard)))
        self.taken = True
        self._cursors.add(cursor)
        self.heard.append(Heard(int(number), cursor, at))
        return False


class _Notes:
    """The file of notes, read while it grows."""

    def __init__(self, path: Path, sessions: int, events: int, report: Report) -> None:
        path.touch()
        self._events = events
        self.sessions = {name: _Session(name) for name in (f"supervised-{number}" for number in range(sessions))}
        self.killed_at: list[float] = []
        self._file = path.open(encoding="utf-8")
        self._half = ""
        self._report = report

    def close(self) -> None:
        """Close it."""
        self._file.close()

    def read(self) -> None:
        """What came since."""
        *lines, self._half = (self._half + self._file.read()).split("\n")
        for line in lines:
            name, *rest = line.split(" ")
            self._report.repeated += self.sessions[name].note(rest, self.killed_at)

    async def until(self, holds: Callable[[_Session], bool], seconds: float) -> None:
        """Wait until it holds for all sessions.

        Raises:
            TimeoutError: It does not in that time.
        """
        async with asyncio.timeout(seconds):
            while not all(map(holds, self.sessions.values())):
                await asyncio.sleep(0.05)
                self.read()

    def note_kill(self) -> float:
        """Note that all readers are dead now; the share of the sessions whose answer had not come to its end."""
        self.read()
        self.killed_at.append(time.time())
        for session in self.sessions.values():
            session.taken = False
        return sum(len(session.heard) < self._events for session in self.sessions.values()) / len(self.sessions)


async def run(config: RocketMQConfig, topic: str, size: Size) -> Report:
    """Run it.

    Args:
        config: The cluster; topics and groups exist.
        topic: The agent's topic.
        size: How much of everything; what ends is the supervisor, which has all sessions.
    """
    report, chance = Report(), random.Random(size.seed)  # noqa: S311  (moments)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        notes = _Notes(folder / "notes", size.sessions, size.events, report)
        arguments = [str(streams.written_card(config, topic, folder)), str(folder / "notes")]
        arguments += [str(size.sessions), size.question]
        asking, going_on = (
            Process(role, ["-m", "benchmarks.chaos.supervised", role, *arguments], streams.environment(config), folder)
            for role in ("ask", "go-on")
        )
        async with streams.agent(config, topic, folder) as ledger:
            supervisor = asking
            try:
                await supervisor.start()
                for _ in range(size.kills):
                    await notes.until(lambda session: session.taken, _TAKEN_SECONDS)
                    await asyncio.sleep(chance.uniform(0.2, 5 * size.interval))
                    await supervisor.kill()
                    report.in_flight.append(notes.note_kill())
                    supervisor = going_on
                    await supervisor.start()
                whole = size.events * size.interval + _TAKEN_SECONDS
                await notes.until(lambda session: len(session.heard) >= size.events, whole)
            finally:
                await supervisor.kill()
                notes.close()
            readers = list(notes.sessions.values())
            await streams.account(config, readers, report, ledger=ledger, events=size.events, killed_at=notes.killed_at)
    return report


if __name__ == "__main__":
    sys.exit(streams.command_line("chaos supervisor", __doc__, run))
