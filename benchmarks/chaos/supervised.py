"""The supervisor under chaos: asks an agent in many sessions, or goes on with them by their names alone.

    python -m benchmarks.chaos.supervised ask|go-on CARD NOTES SESSIONS TEXT    (RocketMQ settings from the environment)

It notes each number it takes as a line `SESSION NUMBER CURSOR TIME`, and each session it opens as one with `-` for
number and cursor: that is what its application did, and all that is left of it when it is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from pathlib import Path

from a2a.types import Message, Part, Role, SendMessageRequest

from agentscope_rocketmq import CURSOR_EXTENSION, RocketMQ, cursor_of


class Supervisor:
    """Asks or goes on.

    Args:
        rocketmq: The cluster.
        notes: Descriptor of the file, open for appending.
    """

    def __init__(self, rocketmq: RocketMQ, notes: int) -> None:
        self._rocketmq = rocketmq
        self._notes = notes

    async def ask(self, card: str, session: str, text: str) -> None:
        """Ask in a session of that name, and take the answer."""
        self._note(session, "-", "-")
        message = Message(message_id=uuid.uuid4().hex, role=Role.ROLE_USER, parts=[Part(text=text)], context_id=session)
        agent_card = json.loads(Path(card).read_text(encoding="utf-8"))  # noqa: ASYNC240  (small)
        async with await self._rocketmq.client(agent_card, session=session, extensions=[CURSOR_EXTENSION]) as client:
            async for event in client.send_message(SendMessageRequest(message=message)):
                self._take(session, event, str(cursor_of(event)))

    async def go_on(self, session: str) -> None:
        """Take what nobody took yet, then what comes."""
        self._note(session, "-", "-")
        async for event in self._rocketmq.session(session).events():
            self._take(session, event.payload, str(event.cursor))

    def _take(self, session: str, event: object, cursor: str) -> None:
        update = getattr(event, "artifact_update", None)
        for part in update.artifact.parts if update is not None else ():
            self._note(session, part.text, cursor)

    def _note(self, session: str, number: str, cursor: str) -> None:
        os.write(self._notes, f"{session} {number} {cursor} {time.time()}\n".encode())


async def _main(role: str, card: str, notes: str, sessions: int, text: str) -> None:
    descriptor = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    async with RocketMQ(card_cache=None) as rocketmq, asyncio.TaskGroup() as group:
        supervisor = Supervisor(rocketmq, descriptor)
        for number in range(sessions):
            session = f"supervised-{number}"
            work = supervisor.ask(card, session, text) if role == "ask" else supervisor.go_on(session)
            group.create_task(work, name=session)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]))
