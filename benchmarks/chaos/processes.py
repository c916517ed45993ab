"""The processes that chaos is made of, to be killed and paused.

    python -m benchmarks.chaos.processes worker NAME CONFIG CARD FOLDER
    python -m benchmarks.chaos.processes caller NAME CONFIG CARD FOLDER SEED RATE SECONDS

Each writes what it did into FOLDER as lines of JSON, each line at once, so that nothing written is lost with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskUpdater
from a2a.types import CancelTaskRequest, Message, Part, Role, SendMessageRequest, Task, TaskState, TaskStatus

from agentscope_rocketmq import A2AServer, RocketMQ, RocketMQConfig
from agentscope_rocketmq.rerun import RESTART_EXTENSION

if TYPE_CHECKING:
    from a2a.client import Client
    from a2a.server.agent_execution import RequestContext
    from a2a.server.events import EventQueue

ENDS = {"TASK_STATE_COMPLETED": "completed", "TASK_STATE_CANCELED": "canceled", "TASK_STATE_FAILED": "failed"}
SESSIONS = 12
CANCELLED = 0.05  # part of the streams that their caller cancels


class Book:
    """A file of JSON lines that several processes append to."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def note(self, **what: Any) -> None:
        os.write(self._file, (json.dumps({"at": time.time(), **what}) + "\n").encode())


class Counting(AgentExecutor):
    """Answers `NAME COUNT SECONDS` with chunks `NAME:0`, `NAME:1`, … over that time."""

    def __init__(self, name: str, book: Book) -> None:
        self._name = name
        self._book = book

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        call, count, seconds = context.get_user_input().split()
        self._book.note(begin=call, worker=self._name, count=int(count))
        submitted = TaskStatus(state=TaskState.TASK_STATE_SUBMITTED)
        await event_queue.enqueue_event(Task(id=context.task_id, context_id=context.context_id, status=submitted))
        updater = TaskUpdater(event_queue, str(context.task_id), str(context.context_id))
        for number in range(int(count)):
            await asyncio.sleep(float(seconds) / int(count))
            part = Part(text=f"{call}:{number} ")
            await updater.add_artifact([part], artifact_id="a", append=number > 0, last_chunk=number + 1 == int(count))
        await updater.complete()
        self._book.note(end=call, worker=self._name)

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        await TaskUpdater(event_queue, str(context.task_id), str(context.context_id)).cancel()


async def work(name: str, config: RocketMQConfig, card: dict[str, Any], folder: Path) -> None:
    book = Book(folder / "ledger")
    await A2AServer.from_executor(Counting(name, book), card=card, config=config).serve(port=0)


class Caller:
    """Sends calls at a rate, and notes of each how it went."""

    def __init__(self, name: str, clients: list[Client], book: Book, chance: random.Random) -> None:
        self._name = name
        self._clients = clients
        self._book = book
        self._chance = chance

    async def run(self, rate: float, seconds: float) -> None:
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as calls:
            number = 0
            while time.monotonic() < end:
                calls.create_task(self._call(f"{self._name}-{number}"))
                number += 1
                await asyncio.sleep(self._chance.expovariate(rate))

    async def _call(self, call: str) -> None:
        streamed = self._chance.random() < 0.5
        count = self._chance.randint(20, 200) if streamed else self._chance.randint(1, 5)
        seconds = min(20.0, 0.1 * 200 ** self._chance.random() ** 2)
        cancels = streamed and self._chance.random() < CANCELLED
        client = self._chance.choice(self._clients)
        self._book.note(sent=call, count=count, streamed=streamed, caller=self._name)
        seen = Seen()
        try:
            text = f"{call} {count} {seconds:.2f}"
            async for event in client.send_message(_message(text)):
                seen.take(event)
                if cancels and seen.numbers and seen.task:
                    cancels = False
                    with contextlib.suppress(Exception):
                        await client.cancel_task(CancelTaskRequest(id=seen.task))
        except Exception as error:  # noqa: BLE001  (whatever it is, it is how the call went)
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            self._book.note(over=call, outcome="error", error=f"{type(cause).__name__}: {cause}", **seen.account(call))
        else:
            self._book.note(
                over=call, outcome=ENDS.get(seen.states[-1] if seen.states else "", "none"), **seen.account(call)
            )


class Seen:
    """What a reader saw of one call."""

    def __init__(self) -> None:
        self.task = ""
        self.tasks: set[str] = set()
        self.states: list[str] = []
        self.numbers: list[str] = []
        self.restarts = 0
        self.after_end = 0

    def take(self, event: Any) -> None:
        self.after_end += any(state in ENDS for state in self.states)
        kind = event.WhichOneof("payload")
        if kind == "task":
            self.task = event.task.id
            self.tasks.add(self.task)
            self._state(event.task.status.state)
            for artifact in event.task.artifacts:
                self.numbers = [part.text.strip() for part in artifact.parts if part.text]
        elif kind == "artifact_update":
            came = [part.text.strip() for part in event.artifact_update.artifact.parts if part.text]
            self.numbers = [*(self.numbers if event.artifact_update.append else ()), *came]
        elif kind == "status_update":
            self.restarts += RESTART_EXTENSION in event.status_update.metadata
            self._state(event.status_update.status.state)

    def _state(self, state: Any) -> None:
        self.states.append(TaskState.Name(state))

    def account(self, call: str) -> dict[str, Any]:
        """What is to be noted."""
        wanted = [f"{call}:{number}" for number in range(len(self.numbers))]
        return {
            "numbers": len(self.numbers),
            "in_order": self.numbers == wanted,
            "ends": sum(state in ENDS for state in self.states),
            "after_end": self.after_end,
            "tasks": len(self.tasks),
            "restarts": self.restarts,
        }


async def call(
    name: str, config: RocketMQConfig, card: dict[str, Any], folder: Path, seed: int, rate: float, seconds: float
) -> None:
    book = Book(folder / "calls")
    async with RocketMQ(config, card_cache=None) as rocketmq, contextlib.AsyncExitStack() as stack:
        clients = []
        for _ in range(SESSIONS):
            session = f"chaos-{uuid.uuid4().hex}"
            book.note(session=session)
            clients.append(await stack.enter_async_context(await rocketmq.client(card, session=session)))
        chance = random.Random(seed)  # noqa: S311  (what is repeated with the same seed)
        await Caller(name, clients, book, chance).run(rate, seconds)
        book.note(done=name)


def _message(text: str) -> SendMessageRequest:
    message = Message(message_id=uuid.uuid4().hex, role=Role.ROLE_USER, parts=[Part(text=text)])
    message.context_id = uuid.uuid4().hex  # a conversation of its own: none waits for another
    return SendMessageRequest(message=message)


def main() -> None:
    role, name, config, card, folder, *rest = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    settings = RocketMQConfig.model_validate_json(config)
    if role == "worker":
        asyncio.run(work(name, settings, json.loads(card), Path(folder)))
    else:
        seed, rate, seconds = rest
        asyncio.run(call(name, settings, json.loads(card), Path(folder), int(seed), float(rate), float(seconds)))


if __name__ == "__main__":
    main()
