"""The agent under chaos: counts slowly, and keeps a ledger of what it said.

python -m benchmarks.chaos.worker TOPIC LEDGER    (RocketMQ settings from the environment)
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskUpdater
from a2a.types import Part, Task, TaskState, TaskStatus

from agentscope_rocketmq import A2AServer, Limits, RocketMQConfig
from benchmarks.agent import card

if TYPE_CHECKING:
    from a2a.server.agent_execution import RequestContext
    from a2a.server.events import EventQueue

CONCURRENCY = 512


class Teller(AgentExecutor):
    """Asked `COUNT INTERVAL`, says that many numbers, one in each interval (seconds)."""

    def __init__(self, ledger: TextIO) -> None:
        self._ledger = ledger

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        assert context.message is not None
        assert context.task_id is not None
        assert context.context_id is not None
        count, interval = context.get_user_input().split()
        submitted = TaskStatus(state=TaskState.TASK_STATE_SUBMITTED)
        await event_queue.enqueue_event(
            Task(id=context.task_id, context_id=context.context_id, status=submitted, history=[context.message])
        )
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        for number in range(int(count)):
            await updater.add_artifact([Part(text=str(number))], artifact_id="numbers", append=number > 0)
            self._ledger.write(f"{context.context_id} {number}\n")
            await asyncio.sleep(float(interval))
        self._ledger.flush()
        await updater.complete()

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        raise NotImplementedError("Nobody cancels it.")


async def _serve(topic: str, ledger: Path) -> None:
    config = RocketMQConfig.from_env(limits=Limits(concurrency=CONCURRENCY))
    with ledger.open("a", encoding="utf-8") as file:
        server = A2AServer.from_executor(Teller(file), card=card(config.endpoint, topic), config=config)
        await server.serve(port=0)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], Path(sys.argv[2])))
