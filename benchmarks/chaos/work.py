"""Work under faults: what callers send, what workers do, and whether every call has its one end.

    scripts/chaos work [--engine embedded|apache|HOST:PORT] [--seconds 600] [--rate 30] [--seed 1] [--kills 5]

Three workers and two callers, each a process of its own behind a TCP proxy of its own. Every few seconds one of them is
killed with -9, paused for up to 40 s, or cut off (reset, refused, or silence); a broker that was launched for this is
killed too. At the end everything is mended, the callers finish, and an auditor reads what lies on the broker. Exits
non-zero when a number that must be 0 is not, or fewer than `--kills` workers died in the middle of a stream.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from agentscope_rocketmq import Limits, RocketMQConfig, Timeouts
from agentscope_rocketmq.dev import ApacheRocketMQ, EmbeddedRocketMQ
from agentscope_rocketmq.provision import apply, plan
from benchmarks.agent import card as make_card
from benchmarks.chaos.auditor import Run, read, runs_of
from benchmarks.engine import APACHE, EMBEDDED
from tests.faults import Wire

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

WORKERS, CALLERS = 3, 2
LEASE = 20.0
LONGEST_PAUSE = 40.0
STREAM = 20  # events that a stream has at least
LONGEST_TASK = 20.0
FINISH_SECONDS = 240.0
LIMITS = Limits(concurrency=64)
TIMEOUTS = Timeouts(lease=LEASE, ack=FINISH_SECONDS, idle=90.0, total=FINISH_SECONDS, drain=1.0, connect=60.0)


@dataclass
class Member:
    """A worker or caller that is started anew when it dies.

    Attributes:
        kind: `worker` or `caller`.
        number: Which one.
        wire: Its way to the broker.
        generation: How often it was started.
        process: It, now.
        busy: Whether something is being done to it.
    """

    kind: str
    number: int
    wire: Wire
    generation: int = 0
    process: subprocess.Popen[bytes] | None = None
    busy: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}{self.number}.{self.generation}"


@dataclass
class Chaos:
    """One run of it.

    Args:
        config: Topics and groups that exist.
        card: The agent's, without an endpoint that counts.
        folder: Where the processes write.
        seed: Of what is done, to whom and when.
        rate: Calls a second, by all callers together.
        seconds: How long calls are sent and faults made.
        pause: Longest pause of a process, in seconds.
        kill_broker: Kills the broker and starts it anew; None for one that others use too.
    """

    config: RocketMQConfig
    card: dict[str, Any]
    folder: Path
    seed: int
    rate: float
    seconds: float
    pause: float = LONGEST_PAUSE
    kill_broker: Callable[[], Awaitable[None]] | None = None
    faults: list[dict[str, Any]] = field(default_factory=list)

    async def run(self) -> Report:
        """Do it, and account for it."""
        self._chance = random.Random(self.seed)  # noqa: S311  (what is repeated with the same seed)
        async with contextlib.AsyncExitStack() as stack:
            self._members = [
                Member(kind, number, await stack.enter_async_context(Wire(self.config.endpoint)))
                for kind, count in (("worker", WORKERS), ("caller", CALLERS))
                for number in range(count)
            ]
            stack.callback(self._kill_all)
            self._end = time.monotonic() + self.seconds
            for member in self._members:
                self._start(member)
            await self._make_faults()
            await self._finish()
        return await account(self)

    def _start(self, member: Member) -> None:
        member.generation += 1
        settings = self.config.model_copy(
            update={"endpoint": member.wire.endpoint, "timeouts": TIMEOUTS, "limits": LIMITS}
        )
        topic = self.card["supportedInterfaces"][0]["url"].rpartition("/")[2]
        card = make_card(member.wire.endpoint, topic)
        arguments = [member.kind, member.name, settings.model_dump_json(exclude_defaults=True), json.dumps(card)]
        arguments.append(str(self.folder))
        if member.kind == "caller":
            left = max(0.0, self._end - time.monotonic())
            arguments += [str(self._chance.randrange(2**31)), str(self.rate / CALLERS), str(left)]
        with (self.folder / f"{member.kind}{member.number}.log").open("ab") as log:
            member.process = subprocess.Popen(  # noqa: S603  (this program's own)
                [sys.executable, "-m", "benchmarks.chaos.processes", *arguments],
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parents[2],
            )

    async def _make_faults(self) -> None:
        async with asyncio.TaskGroup() as under_way:
            under_way.create_task(self._one_fault(await self._streaming_worker(), self._kill))
            while time.monotonic() < self._end:
                await asyncio.sleep(self._chance.uniform(3.0, 7.0))
                member = self._chance.choice(
                    [m for m in self._members if m.kind == "worker" or self._chance.random() < 0.5]
                )
                idle_workers = [m for m in self._members if m.kind == "worker" and not m.busy]
                if member.busy or (member.kind == "worker" and len(idle_workers) < 2):
                    continue
                if self.kill_broker is not None and self._chance.random() < 0.05:
                    begun = time.time()
                    await self.kill_broker()
                    self.faults.append({"what": "kill broker", "who": "broker", "from": begun, "to": time.time()})
                    continue
                fault = self._chance.choices((self._kill, self._pause, self._cut), (4, 2, 2))[0]
                under_way.create_task(self._one_fault(member, fault))

    async def _streaming_worker(self) -> Member:
        """A worker in the middle of a stream."""
        async with asyncio.timeout(FINISH_SECONDS):
            while True:
                ledger = _lines(self.folder / "ledger")
                ended = {line["end"] for line in ledger if "end" in line}
                # One that began a second ago and has not ended is in the middle of it.
                before = time.time() - 1.0
                streams = (line for line in ledger if line.get("count", 0) >= STREAM and line["at"] < before)
                busy = {line["worker"] for line in streams if line["begin"] not in ended}
                for member in self._members:
                    if member.name in busy:
                        return member
                await asyncio.sleep(0.05)

    async def _one_fault(self, member: Member, fault: Callable[[Member], Awaitable[str]]) -> None:
        member.busy = True
        name, begun = member.name, time.time()
        entry = {"who": name, "from": begun, "to": float("inf"), "what": ""}
        self.faults.append(entry)
        entry["what"] = await fault(member)
        entry["to"] = time.time()
        member.busy = False

    async def _kill(self, member: Member) -> str:
        assert member.process is not None
        member.process.kill()
        await asyncio.to_thread(member.process.wait)
        await asyncio.sleep(self._chance.uniform(0.5, 4.0))
        self._start(member)
        return f"kill {member.kind}"

    async def _pause(self, member: Member) -> str:
        assert member.process is not None
        member.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self._chance.uniform(2.0, self.pause))
        member.process.send_signal(signal.SIGCONT)
        return f"pause {member.kind}"

    async def _cut(self, member: Member) -> str:
        how = self._chance.choice(("reset", "refused", "silence"))
        if how == "reset":
            member.wire.reset()
        elif how == "refused":
            member.wire.cut()
            await asyncio.sleep(self._chance.uniform(1.0, 15.0))
            await member.wire.mend()
        else:
            member.wire.blackhole()
            await asyncio.sleep(self._chance.uniform(1.0, 20.0))
            member.wire.pass_on()
        return f"{how} {member.kind}"

    async def _finish(self) -> None:
        """Wait for the callers, who have sent all, and for what the workers still do for those that were killed."""
        async with asyncio.timeout(FINISH_SECONDS + 60):
            for member in self._members:
                if member.kind == "caller" and member.process is not None:
                    await asyncio.to_thread(member.process.wait)
            while self._is_at_work():  # noqa: ASYNC110  (other processes write the files)
                await asyncio.sleep(1.0)

    def _is_at_work(self) -> bool:
        """Whether workers may still do something for callers that were killed."""
        calls, ledger = _lines(self.folder / "calls"), _lines(self.folder / "ledger")
        done = {line.get("over") for line in calls} | {line.get("end") for line in ledger}
        if {line["sent"] for line in calls if "sent" in line} <= done:
            return False
        # A lease may have to run out before a worker begins, which works for as long as a task takes.
        return time.time() < max((line["at"] for line in ledger), default=0.0) + LEASE + LONGEST_TASK

    def _kill_all(self) -> None:
        for member in self._members:
            if member.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    member.process.send_signal(signal.SIGCONT)
                member.process.kill()
                member.process.wait()


@dataclass
class Report:
    """What came of it.

    Attributes:
        figures: By name, in the order of the table.
        wrong: What must not be, in words.
        kills_in_streams: Workers that were killed while they streamed.
    """

    figures: dict[str, Any]
    wrong: list[str]
    kills_in_streams: int

    def print(self) -> None:
        table = Table("what", "number")
        for name, figure in self.figures.items():
            table.add_row(name, str(figure))
        Console().print(table)
        for line in self.wrong:
            print("WRONG:", line)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


async def account(chaos: Chaos) -> Report:
    """Compare what was sent, what was done, what the readers saw and what lies on the broker."""
    calls, ledger = _lines(chaos.folder / "calls"), _lines(chaos.folder / "ledger")
    sent = {line["sent"]: line for line in calls if "sent" in line}
    over = {line["over"]: line for line in calls if "over" in line}
    sessions = [line["session"] for line in calls if "session" in line]
    config = chaos.config
    logs = await read(config.endpoint, config.reply_topic, f"{config.reply_group}_OBSERVER", sessions)
    of_call: dict[str, list[Run]] = defaultdict(list)
    requests = runs_of(logs)
    for by_key in requests.values():
        # A run that was cut before its first text is known by the others of its request.
        names = {text.partition(":")[0] for run in by_key.values() for text in run.texts()}
        for name in names:
            of_call[name] += by_key.values()
    whole = {name: [run for run in runs if run.is_whole] for name, runs in of_call.items()}
    dead_callers = {name for fault in chaos.faults if fault["what"] == "kill caller" for name in (fault["who"],)}
    abandoned = [name for name, line in sent.items() if name not in over and line["caller"] in dead_callers]
    never = [name for name in sent if name not in over and name not in set(abandoned)]
    outcomes = Counter(line["outcome"] for line in over.values())
    kinds = Counter(fault["what"] for fault in chaos.faults)
    begins: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in ledger:
        if "begin" in line:
            begins[line["begin"]].append(line)
    ended = {(line["end"], line["worker"]) for line in ledger if "end" in line}
    repeated = {name: lines for name, lines in begins.items() if len(lines) > 1}
    killed = {fault["who"]: fault["from"] for fault in chaos.faults if fault["what"] == "kill worker"}
    in_streams = {
        line["worker"]
        for lines in begins.values()
        for line in lines
        if line["worker"] in killed
        and (line["begin"], line["worker"]) not in ended
        and line["count"] >= STREAM
        and line["at"] < killed[line["worker"]]
    }
    wrong = [f"call {name} never ended" for name in never]
    wrong += [
        f"call {name}: {line}" for name, line in over.items() if not _is_right(line, sent[name], begun=name in begins)
    ]
    # Without any text nobody can tell whose a response is.
    silent = {name for name, line in over.items() if line["outcome"] == "canceled" and not line["numbers"]}
    wrong += [
        f"call {name} has no whole response on the broker"
        for name in begins
        if not whole.get(name) and name not in silent
    ]
    for name, runs in whole.items():
        for run in runs:
            if len(run.ends()) != 1:
                wrong.append(f"a run of call {name} ends {run.ends()}")
            texts = run.texts()
            if texts != [f"{name}:{number}" for number in range(len(texts))]:
                wrong.append(f"a run of call {name} has lost, doubled or disordered events: {texts}")
    everything = [run for by_key in requests.values() for run in by_key.values()]
    holes = sum(run.holes for run in everything)
    wrong += [f"{holes} messages are missing before others"] if holes else []
    by_worker = {name for name, lines in repeated.items() if _is_explained(lines, chaos.faults)}
    # A send that was cut off before its answer came is repeated, and the broker may hold both.
    sent_twice = {
        name
        for name, lines in repeated.items()
        if name not in by_worker
        and _is_explained([{"at": sent[name]["at"], "worker": sent[name]["caller"]}, lines[-1]], chaos.faults)
    }
    unexplained = [name for name in repeated if name not in by_worker | sent_twice]
    wrong += [f"call {name} was executed {len(repeated[name])} times without a fault" for name in unexplained]
    figures: dict[str, Any] = {
        "seconds": chaos.seconds,
        "calls sent": len(sent),
        "completed": outcomes["completed"],
        "canceled": outcomes["canceled"],
        "failed": outcomes["failed"] + outcomes["error"] + outcomes["none"],
        "abandoned by a caller that was killed": len(abandoned),
        "never ended": len(never),
        "readers: lost, doubled or disordered": sum(not line["in_order"] for line in over.values()),
        "readers: not one end, or something after it": sum(
            line["outcome"] != "error" and (line["ends"] != 1 or line["after_end"] > 0) for line in over.values()
        ),
        "readers: runs that took over": sum(line["restarts"] for line in over.values()),
        "on the broker: messages missing": holes,
        "on the broker: messages twice (dropped by readers)": sum(run.doubled for run in everything),
        "executions": sum(map(len, begins.values())),
        "requests executed more than once": len(repeated),
        "of them after a fault of their worker or the broker": len(by_worker),
        "of them sent twice by a caller that was cut off": len(sent_twice),
        "of them without any fault": len(unexplained),
        "workers killed in the middle of a stream": len(in_streams),
        "faults": ", ".join(f"{count} {what}" for what, count in sorted(kinds.items())),
    }
    return Report(figures, wrong, len(in_streams))


def _is_right(line: dict[str, Any], sent: dict[str, Any], *, begun: bool) -> bool:
    """Whether what a reader saw of a call is what it must be, however it ended."""
    if not line["in_order"] or line["tasks"] > 1:
        return False
    if line["outcome"] == "completed":
        return bool(line["ends"] == 1 and line["numbers"] == sent["count"] and not line["after_end"])
    if line["outcome"] == "canceled":
        return bool(line["ends"] == 1 and not line["after_end"])
    # This agent never fails. A call may not have been sent, while the broker was away; one that was begun has its end.
    return bool(line["outcome"] == "error" and not line["ends"] and not line["numbers"] and not begun)


def _is_explained(lines: list[dict[str, Any]], faults: list[dict[str, Any]]) -> bool:
    """Whether each further execution follows a fault of the worker before, or of the broker."""
    return all(
        any(
            fault["who"] in (before["worker"], "broker")
            and fault["from"] <= after["at"]
            and fault["to"] >= before["at"]
            for fault in faults
        )
        for before, after in itertools.pairwise(lines)
    )


async def provisioned(endpoint: str, namesrv: str) -> tuple[RocketMQConfig, dict[str, Any]]:
    """Topics and groups of this run's own."""
    run = uuid.uuid4().hex[:8]
    config = RocketMQConfig(
        endpoint=endpoint,
        namesrv=namesrv,
        reply_topic=f"ChaosReply-{run}",
        reply_group=f"ChaosReplyGroup-{run}",
        state_topic=f"ChaosState-{run}",
        state_group=f"ChaosStateGroup-{run}",
    )
    card = make_card(endpoint, f"ChaosTask-{run}")
    await apply(plan([card], config), config)
    return config, card


async def _run(options: argparse.Namespace, folder: Path) -> Report:
    with contextlib.ExitStack() as stack:
        kill = None
        if options.engine in (EMBEDDED, APACHE):
            launched: ApacheRocketMQ | EmbeddedRocketMQ
            is_embedded = options.engine == EMBEDDED
            launched = EmbeddedRocketMQ(data=folder / "broker") if is_embedded else ApacheRocketMQ(on_progress=print)
            await asyncio.to_thread(launched.start)
            stack.callback(launched.stop)
            endpoint, namesrv = launched.endpoint, launched.namesrv

            async def kill() -> None:
                broker = launched
                kill_it, start_it = (
                    (broker.kill, broker.start)
                    if isinstance(broker, EmbeddedRocketMQ)
                    else (broker.kill_broker, broker.start_broker)
                )
                await asyncio.to_thread(kill_it)
                await asyncio.sleep(3)
                await asyncio.to_thread(start_it)
        else:
            endpoint, namesrv = options.engine, os.environ.get("ROCKETMQ_NAMESRV", "127.0.0.1:9876")
        config, card = await provisioned(endpoint, namesrv)
        chaos = Chaos(
            config, card, folder, seed=options.seed, rate=options.rate, seconds=options.seconds, kill_broker=kill
        )
        return await chaos.run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos work", description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--engine", default=APACHE, metavar="embedded|apache|HOST:PORT")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rate", type=float, default=30.0, help="calls a second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=5, help="workers that must die in the middle of a stream")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the processes end with this one
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"What the processes write is in {folder}")
    report = asyncio.run(_run(options, folder))
    report.print()
    if report.kills_in_streams < options.kills:
        print(f"WRONG: {report.kills_in_streams} workers died in the middle of a stream, not {options.kills}")
    return int(bool(report.wrong) or report.kills_in_streams < options.kills)


if __name__ == "__main__":
    sys.exit(main())
