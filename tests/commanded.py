"""An a2a-sdk executor that does what it is told."""

from __future__ import annotations

import asyncio
import uuid

from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskUpdater
from a2a.types import Message, Part, Role, Task, TaskState, TaskStatus


class Commanded(AgentExecutor):
    """Does what the message says: the whole of the a2a-sdk's executor interface, on command.

    `held GATE COMMAND` does so when that gate was opened, and not a word before.
    """

    def __init__(self) -> None:
        self.gates: dict[str, asyncio.Event] = {}
        self.requests: list = []

    async def execute(self, context, event_queue):
        self.requests.append(context)
        command, _, rest = context.get_user_input().partition(" ")
        if command == "held":
            gate, _, text = rest.partition(" ")
            await self._gate(gate).wait()
            command, _, rest = text.partition(" ")
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        if command == "message":
            await event_queue.enqueue_event(
                Message(message_id=uuid.uuid4().hex, role=Role.ROLE_AGENT, parts=[Part(text=rest)])
            )
            return
        if context.current_task is None:
            await event_queue.enqueue_event(
                Task(
                    id=context.task_id,
                    context_id=context.context_id,
                    status=TaskStatus(state=TaskState.TASK_STATE_SUBMITTED),
                    history=[context.message],
                )
            )
        match command:
            case "count":
                for number in range(int(rest)):
                    last = number == int(rest) - 1
                    await updater.add_artifact(
                        [Part(text=f"{number},")], artifact_id="a", append=number > 0, last_chunk=last
                    )
                await updater.complete()
            case "raise":
                raise ValueError(rest)
            case "ask":
                await updater.requires_input()
            case "headers":
                headers = context.call_context.state["headers"]
                await updater.add_artifact([Part(text=headers.get(rest, "absent"))])
                await updater.complete()
            case "wait":
                await updater.start_work()
                await self._gate(rest).wait()
                await updater.add_artifact([Part(text="waited")])
                await updater.complete()
            case _:
                await updater.add_artifact([Part(text=f"said {command} {rest}")])
                await updater.complete()

    async def cancel(self, context, event_queue):
        await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()

    def open(self, gate: str) -> None:
        """Let go on what waits at a gate, or comes to it later."""
        self._gate(gate).set()

    def _gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())


class Gated(AgentExecutor):
    """Notes what it begins, and ends it when its gate is open."""

    def __init__(self):
        self.begun = []
        self.gate = asyncio.Event()

    async def execute(self, context, event_queue):
        self.begun.append(context.get_user_input())
        status = TaskStatus(state=TaskState.TASK_STATE_SUBMITTED)
        await event_queue.enqueue_event(Task(id=context.task_id, context_id=context.context_id, status=status))
        await self.gate.wait()
        await TaskUpdater(event_queue, context.task_id, context.context_id).complete()

    async def cancel(self, context, event_queue):
        raise NotImplementedError
