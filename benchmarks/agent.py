"""The agent under measurement: answers with as many chunks as it is asked for, and does nothing else."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskUpdater
from a2a.types import Message, Part, Role, SendMessageRequest, Task, TaskState, TaskStatus

if TYPE_CHECKING:
    from a2a.server.agent_execution import RequestContext
    from a2a.server.events import EventQueue


class CountingExecutor(AgentExecutor):
    """Asked for N, streams the numbers 0 to N-1 as chunks of one artifact."""

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        assert context.message is not None
        assert context.task_id is not None
        assert context.context_id is not None
        count = int(context.get_user_input())
        await event_queue.enqueue_event(
            Task(
                id=context.task_id,
                context_id=context.context_id,
                status=TaskStatus(state=TaskState.TASK_STATE_SUBMITTED),
                history=[context.message],
            )
        )
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        for number in range(count):
            await updater.add_artifact(
                [Part(text=str(number))], artifact_id="numbers", append=number > 0, last_chunk=number == count - 1
            )
        await updater.complete()

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        raise NotImplementedError("A run is over before it could be cancelled.")


def question(count: int) -> SendMessageRequest:
    """Ask for that many chunks."""
    return SendMessageRequest(
        message=Message(message_id=uuid.uuid4().hex, role=Role.ROLE_USER, parts=[Part(text=str(count))])
    )


def numbers(events: list[Any]) -> list[int]:
    """The numbers in a response, in the order in which they came, streamed or not."""
    found: list[int] = []
    for event in events:
        kind = event.WhichOneof("payload")
        if kind == "artifact_update":
            found += [int(part.text) for part in event.artifact_update.artifact.parts]
        elif kind == "task":
            found += [int(part.text) for artifact in event.task.artifacts for part in artifact.parts]
    return found


def card(endpoint: str, topic: str) -> dict[str, Any]:
    """Its card."""
    return {
        "name": "counter",
        "description": "Counts.",
        "version": "1",
        "capabilities": {"streaming": True},
        "defaultInputModes": ["text/plain"],
        "defaultOutputModes": ["text/plain"],
        "skills": [{"id": "count", "name": "count", "description": "Counts.", "tags": ["benchmark"]}],
        "supportedInterfaces": [
            {"url": f"http://{endpoint}//{topic}", "protocolBinding": "RocketMQ", "protocolVersion": "1.0"}
        ],
    }
