"""Many users of one session at random moments: whoever asks for events gets them, and nobody holds up another.

python -m tests.test_session_interleaving ENDPOINT NAMESRV SEED COUNT     looks for seeds that fail
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import traceback
from typing import TYPE_CHECKING, Any

import pytest
from a2a.client.errors import A2AClientError
from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskUpdater
from a2a.types import Part, Task, TaskState, TaskStatus

from agentscope_rocketmq.errors import ResyncRequired, SessionTakenOver
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.producer import Producer
from tests.conftest import Engine, new_config, new_topic
from tests.services import COMPLETED, Keeper, request, server_for
from tests.sessions import Agent, text_of
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine

    from a2a.types import StreamResponse

    from agentscope_rocketmq import A2AServer, RocketMQ, Session, SessionEvent

STEPS = 60
BUFFER = 5


class Numbers(AgentExecutor):
    """`LOW HIGH` says those numbers."""

    async def execute(self, context, event_queue):
        low, high = map(int, context.get_user_input().split())
        status = TaskStatus(state=TaskState.TASK_STATE_SUBMITTED)
        task = Task(id=context.task_id, context_id=context.context_id, status=status, history=[context.message])
        await event_queue.enqueue_event(task)
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        for number in range(low, high):
            await updater.add_artifact([Part(text=str(number))], artifact_id="a", append=number > low)
        await updater.complete()

    async def cancel(self, context, event_queue):
        raise NotImplementedError


class Reader:
    """Takes numbers of the session on command, and checks that each is the one that comes next.

    Args:
        events: From `Session.events`.
        due: The first one, or the least that it may be.
        exact: Whether it must be that.
    """

    def __init__(self, events: AsyncGenerator[SessionEvent], due: int, *, exact: bool = True) -> None:
        self.due = due
        self.events = events
        self.last: SessionEvent | None = None
        self._exact = exact

    async def take(self, count: int) -> None:
        async with asyncio.timeout(LIMIT):
            for _ in range(count):
                number = await self._next()
                assert number == self.due if self._exact else number >= self.due
                self._exact = True
                self.due = number + 1

    async def _next(self) -> int:
        while not text_of(event := await anext(self.events)):
            pass
        self.last = event
        return int(text_of(event))


class Application(Reader):
    """The one without a start: it may get again what it was not known to have taken."""

    async def take(self, count: int) -> None:
        until = self.due + count
        async with asyncio.timeout(LIMIT):
            while self.due < until:
                number = await self._next()
                assert number <= self.due
                self.due = max(self.due, number + 1)


class Call:
    """A call whose answer is left unread for a while."""

    def __init__(self, stream: AsyncGenerator[StreamResponse, None], low: int, high: int) -> None:
        self.stream = stream
        self.due = low
        self.high = high

    async def read(self, count: int | None = None) -> None:
        """So many numbers of it, or the rest."""
        until = self.high if count is None else self.due + count
        async with asyncio.timeout(LIMIT):
            while self.due < until:
                for part in (await anext(self.stream)).artifact_update.artifact.parts:
                    assert part.text == str(self.due)
                    self.due += 1
            if count is None:
                assert [event async for event in self.stream][-1].status_update.status.state == COMPLETED


class Play:
    """One session with an agent that writes numbers, and whoever reads it."""

    def __init__(self, rocketmqs: list[RocketMQ], agent: Agent, server: A2AServer, seed: int) -> None:
        self.random = random.Random(seed)
        self.agent = agent
        self.server = server
        self.answers = 0
        self.rocketmqs = rocketmqs
        self.sessions: list[Session] = [rocketmq.session("trip") for rocketmq in rocketmqs]
        self.at = 0  # which of them reads
        self.said = 0
        self.readers: list[Reader] = []
        self.calls: list[Call] = []
        self.application: Application | None = None
        self.due = 0  # for the application

    async def step(self) -> None:
        choices = [
            self.say,
            self.call,
            self.read,
            self.listen,
            self.listen,
            self.take,
            self.take,
            self.leave,
            self.apply,
        ]
        await self.random.choice([*choices, self.take_over] if self.random.random() < 0.3 else choices)()

    async def say(self) -> None:
        count = self.random.choice([1, 3, 40])
        await self.agent.say(*range(self.said, self.said + count))
        self.said += count

    async def call(self) -> None:
        """A call, read in full, in part, or left in the middle."""
        low, high = self.said, self.said + self.random.choice([3, 30])
        self.said = high
        client = await self.rocketmqs[self.at].client(self.server.card, session="trip")
        stream: Any = client.send_message(request(f"{low} {high}"))
        call = Call(stream, low, high)
        how = self.random.choice(["read", "keep", "leave"])
        await self.with_application(call.read(None if how == "read" else 1))
        if how == "keep":
            self.calls.append(call)
        else:
            await call.stream.aclose()
        self.answers += 1
        # What is said next comes behind its answer.
        await self.with_application(until(lambda: self.server.bridges[0].counters.answered == self.answers))
        self.due = high  # what others left before is passed by

    async def read(self) -> None:
        if self.calls:
            call = self.calls.pop(self.random.randrange(len(self.calls)))
            await self.with_application(call.read())
            await call.stream.aclose()

    async def with_application(self, work: Coroutine[Any, Any, None]) -> None:
        """The application sets the pace for all."""
        async with asyncio.TaskGroup() as group:
            if self.application is not None:
                group.create_task(self.application.take(self.said - self.application.due))
            await work

    async def listen(self) -> None:
        if self.said == 0:
            return
        session = self.sessions[self.at]
        known = [reader.last for reader in self.readers if reader.last is not None]
        match self.random.choice(["start", "tail", "after", "since"]):
            case "after" if known:
                event = self.random.choice(known)
                reader = Reader(session.events(after=event.cursor), int(text_of(event)) + 1)
            case "since" if known:
                event = self.random.choice(known)
                # Others may have been stored in the same millisecond.
                reader = Reader(session.events(since=event.store_time), 0, exact=False)
            case "tail":
                count = self.random.choice([5, 12])  # and not of numbers alone
                reader = Reader(session.events(tail=count), max(0, self.said - count), exact=False)
            case _:
                reader = Reader(session.events(from_start=True), 0)
        if reader.due < self.said:
            self.readers.append(reader)
            await self.one(reader, 1)

    async def take(self) -> None:
        if everyone := self.everyone():
            reader = self.random.choice(everyone)
            left = self.said - reader.due
            await self.one(reader, min(left, self.random.choice([1, 10, left])))

    async def one(self, reader: Reader, count: int) -> None:
        """Somebody takes so many, which nobody else may hinder."""
        if reader is self.application:
            await reader.take(count)
        else:
            await self.with_application(self.take_or_be_cut_off(reader, count))
        # What anybody took is taken, unless the application decides, and that does no more when it has left.
        self.due = max(self.due, *(each.due for each in self.everyone()), 0)

    async def take_or_be_cut_off(self, reader: Reader, count: int) -> None:
        try:
            await reader.take(count)
        except ResyncRequired:
            self.readers.remove(reader)
            await reader.events.aclose()

    async def leave(self) -> None:
        if self.readers:
            reader = self.readers.pop(self.random.randrange(len(self.readers)))
            await reader.events.aclose()

    async def apply(self) -> None:
        """The application begins, or ends."""
        if self.application is not None:
            await self.application.events.aclose()
            self.application = None
        elif self.said:
            self.application = Application(self.sessions[self.at].events(), self.due)
            if self.due == self.said:
                await self.say()  # it has nothing to begin with otherwise
            await self.one(self.application, 1)

    async def take_over(self) -> None:
        """Another process opens the session, and the readers of this one are told."""
        if not self.said:
            return
        before = self.everyone()
        self.readers, self.application, self.at = [], None, 1 - self.at
        self.readers.append(Reader(self.sessions[self.at].events(from_start=True), 0))
        await self.one(self.readers[0], 1)
        calls, self.calls = self.calls, []
        for call in calls:
            # Its answer may have been here in full.
            with contextlib.suppress(A2AClientError):
                await call.read()
            await call.stream.aclose()
        for reader in before:
            with contextlib.suppress(ResyncRequired):
                async with asyncio.timeout(LIMIT):
                    with pytest.raises(SessionTakenOver):
                        # What it was given before comes first.
                        while True:
                            await anext(reader.events)

    async def finish(self) -> None:
        while self.calls:
            await self.read()
        for reader in self.everyone():
            await self.one(reader, self.said - reader.due)

    def everyone(self) -> list[Reader]:
        return [*self.readers, *([self.application] if self.application else [])]


async def play(engine: Engine, seed: int) -> None:
    config = await new_config(engine)
    limits = config.limits.model_copy(update={"listener_buffer": BUFFER})
    config = config.model_copy(update={"limits": limits})
    topic = (await new_topic(engine)).topic
    async with (
        server_for(Numbers(), config, topic) as server,
        Keeper(config, card_cache=None) as one,
        Keeper(config, card_cache=None) as other,
        Connection(config.endpoint) as connection,
        Producer(connection) as producer,
    ):
        agent = Agent(producer, config, one.session("trip").lite_topic)
        game = Play([one, other], agent, server, seed)
        try:
            for _ in range(STEPS):
                await game.step()
            await game.finish()
        finally:
            for reader in game.everyone():
                await reader.events.aclose()
            for call in game.calls:
                await call.stream.aclose()


@pytest.mark.parametrize("seed", range(3))
async def test_whoever_listens_gets_what_it_asked_for_whatever_others_do(engine, seed):
    await play(engine, seed)


async def _search(endpoint: str, namesrv: str, seed: int, count: int) -> None:
    for number in range(seed, seed + count):
        try:
            await play(Engine(endpoint, namesrv), number)
            print(number, "plays", flush=True)
        except Exception:
            print(number, traceback.format_exc(), flush=True)


if __name__ == "__main__":
    asyncio.run(_search(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
