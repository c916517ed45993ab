"""Sessions with a history, for tests: made by hand or by agents, and read through the package's own doors.

python -m tests.sessions CONFIG NAME FILE     a listener in a process of its own, to be killed; it notes what it takes
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from agentscope_rocketmq import Cursor, RocketMQ, RocketMQConfig
from agentscope_rocketmq.envelope import ResponseEnvelope
from agentscope_rocketmq.errors import SessionTakenOver
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.sse import render_event
from tests.waiting import LIMIT
from tests.wires import chunk_event

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agentscope_rocketmq import Session, SessionEvent
    from agentscope_rocketmq.rocketmq.producer import Producer


TAKEN_OVER = 3  # exit status of a listener whose session another one opened


class Agent:
    """What an agent's server would write into a session, by hand: one response, numbered messages of one event each.

    Args:
        producer: Sends.
        config: Whose reply topic.
        lite_topic: Of the session.
        request_id: Of the request that is answered; None for a fresh one.
        attempt: Delivery of the request.
        run: Run of it; None for a fresh one.
    """

    def __init__(
        self,
        producer: Producer,
        config: RocketMQConfig,
        lite_topic: str,
        *,
        request_id: str | None = None,
        attempt: int = 0,
        run: str | None = None,
    ) -> None:
        self.request_id = request_id or uuid.uuid4().hex
        self.attempt = attempt
        self.run = run or uuid.uuid4().hex[:16]
        self._producer = producer
        self._topic = config.reply_topic
        self._lite_topic = lite_topic
        self._seq = 0

    async def say(self, *texts: object, end: bool = False) -> None:
        """One message for each text; the last one may end the response."""
        for number, text in enumerate(texts, start=1):
            await self.send([text], end=end and number == len(texts))

    async def send(self, texts: list[object], *, end: bool = False, seq: int | None = None) -> None:
        """One message with these texts, an event each."""
        if seq is None:
            seq = self._seq
            self._seq += 1
        envelope = ResponseEnvelope(
            request_id=self.request_id,
            body="".join(render_event(chunk_event(str(text))) for text in texts) or None,
            stream=True,
            end=end,
            seq=seq,
            attempt=self.attempt,
            run=self.run,
        )
        await self._producer.send(Message(topic=self._topic, lite_topic=self._lite_topic, body=envelope.encode()))


def text_of(event: SessionEvent) -> str:
    """The text of an artifact update made by `Agent` or by an agent."""
    return "".join(part["text"] for part in artifact_of(event).get("parts", []))


def artifact_of(event: SessionEvent) -> Any:
    result = json.loads(event.raw).get("result", {})
    return result.get("artifactUpdate", {}).get("artifact", {})


async def heard(session: Session, count: int | None = None, **where: Any) -> list[SessionEvent]:
    """So many events of a session from some place on, taken; None for all there are."""
    found: list[SessionEvent] = []
    options = where if count is not None else {"follow": False, **where}
    async with asyncio.timeout(LIMIT), contextlib.aclosing(session.events(**options)) as events:
        async for event in events:
            # One more than is wanted is asked for, so that the last one counts as taken.
            if count is not None and len(found) == count:
                break
            found.append(event)
            if count is not None and len(found) == count and where.get("follow") is not False:
                break
    return found


async def texts(session: Session, count: int | None = None, **where: Any) -> list[str]:
    """Their texts."""
    return [text_of(event) for event in await heard(session, count, **where)]


class Listening:
    """Listens to a session in a task of its own, which ends with `async with`.

    Attributes:
        events: What came.
        error: What ended it; None while it goes on.
    """

    def __init__(self, session: Session, **where: Any) -> None:
        self.events: list[SessionEvent] = []
        self.error: BaseException | None = None
        self._changed = asyncio.Condition()
        self._task = asyncio.create_task(self._listen(session, where))

    async def _listen(self, session: Session, where: dict[str, Any]) -> None:
        try:
            async with contextlib.aclosing(session.events(**where)) as events:
                async for event in events:
                    async with self._changed:
                        self.events.append(event)
                        self._changed.notify_all()
        except Exception as error:
            async with self._changed:
                self.error = error
                self._changed.notify_all()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def texts(self) -> list[str]:
        return [text_of(event) for event in self.events]

    async def until(self, condition: Any) -> None:
        """Until something holds of what came; raises what ended the listening before."""
        async with asyncio.timeout(LIMIT), self._changed:
            await self._changed.wait_for(lambda: self.error is not None or condition())
        if self.error is not None and not condition():
            raise self.error

    async def count(self, count: int) -> list[str]:
        """The texts, once there are so many."""
        await self.until(lambda: len(self.events) >= count)
        return self.texts

    async def ended(self) -> BaseException:
        """What ended it."""
        async with asyncio.timeout(LIMIT), self._changed:
            await self._changed.wait_for(lambda: self.error is not None)
        assert self.error is not None
        return self.error


class Notes:
    """What a listener in another process has taken: a line each, written before the next event is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def lines(self) -> list[str]:
        # The last line may be a torn one.
        return self.path.read_text(encoding="utf-8").split("\n")[:-1]

    def last(self) -> str:
        """What the last line says; empty before the first."""
        return self.lines()[-1].partition(" ")[2] if self.lines() else ""

    def taken(self) -> list[str]:
        """Each event once: what was repeated is known by its cursor, as an application would know it."""
        texts: list[str] = []
        newest = (-1, -1)
        for line in self.lines():
            cursor, _, text = line.partition(" ")
            if (place := Cursor.parse(cursor).place) > newest:
                newest = place
                texts.append(text)
        return texts


@contextlib.contextmanager
def listener(config: RocketMQConfig, name: str, notes: Notes) -> Iterator[subprocess.Popen[bytes]]:
    """A process that opens a session by its name alone; `kill()` on what is yielded is kill -9."""
    command = [sys.executable, "-m", "tests.sessions", config.model_dump_json(exclude_defaults=True), name]
    with subprocess.Popen([*command, str(notes.path)], cwd=Path(__file__).parent.parent) as running:
        try:
            yield running
        finally:
            running.kill()


async def _listen(config: RocketMQConfig, name: str, path: Path) -> int:
    with path.open("a", encoding="utf-8") as file:
        async with RocketMQ(config, card_cache=None) as rocketmq:
            try:
                async for event in rocketmq.session(name).events():
                    if text := text_of(event):
                        file.write(f"{event.cursor} {text}\n")
                        file.flush()
            except SessionTakenOver:
                return TAKEN_OVER
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_listen(RocketMQConfig.model_validate_json(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))))
