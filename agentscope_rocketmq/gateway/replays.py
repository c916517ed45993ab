"""Going on with a session or a task: what happened after a cursor, then what happens, on any gateway."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import datetime
from typing import TYPE_CHECKING, Any

from a2a.compat.v0_3.conversions import to_compat_stream_response
from a2a.types import StreamResponse
from google.protobuf.json_format import MessageToDict

from agentscope_rocketmq.errors import AgentScopeRocketMQError
from agentscope_rocketmq.gateway.calls import LAST_EVENT_ID, made_up
from agentscope_rocketmq.gateway.cursors import Place
from agentscope_rocketmq.gateway.refusal import Refusal
from agentscope_rocketmq.gateway.streams import EventStream, retry
from agentscope_rocketmq.jsonrpc import Progress, progress, read_json
from agentscope_rocketmq.sse import render_event

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

    from agentscope_rocketmq.gateway.agents import Agent
    from agentscope_rocketmq.gateway.calls import Calls
    from agentscope_rocketmq.gateway.conversations import Conversation, Conversations
    from agentscope_rocketmq.gateway.cursors import Cursors
    from agentscope_rocketmq.gateway.questions import Question
    from agentscope_rocketmq.gateway.streams import Streams
    from agentscope_rocketmq.replay import SessionEvent

__all__ = ["Replays", "start_of"]

logger = logging.getLogger(__name__)

# What was asked for is known to be there, or not to be, long before this where the broker answers.
_FIRST_SECONDS = 6.0
# A task that came to wait: its agent's server may end the stream there, and then nothing more comes.
_QUIET_SECONDS = 1.0
# What a task does may not all be in its session (a call that did not wait for it has its first answer there): when
# nothing came for this long the agent is asked whether it has ended.
_ASK_AGAIN_SECONDS = 10.0
_FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


class Replays:
    """Streams of events from a place on.

    Args:
        conversations: The sessions in use.
        calls: Asks agents for tasks.
        streams: The open streams.
        cursors: Reads what clients show, and writes what they go on from.
    """

    def __init__(self, *, conversations: Conversations, calls: Calls, streams: Streams, cursors: Cursors) -> None:
        self._conversations = conversations
        self._calls = calls
        self._streams = streams
        self._cursors = cursors

    async def session(self, name: str, owner: str, query: Mapping[str, str], last_event_id: str | None) -> EventStream:
        """The events of a session: `GET /sessions/{name}/events`.

        Args:
            name: Name of the session.
            owner: Who asks.
            query: `after` (a cursor), `since` (a time), `from_start`, `tail` (a number), `follow`, `observe`.
            last_event_id: The request's header, which wins over `after`.

        Raises:
            Refusal: 400, the query is wrong; 403, the cursor is; 404, there is no such session.
            AgentScopeRocketMQError: `ReplayGapError`, `WrongOwner` and others.
        """
        start = start_of(query)
        shown = last_event_id or start.pop("after", None)
        if shown:
            start = {"follow": start["follow"], "observe": start["observe"]} | self._after(name, owner, shown)
        conversation = self._conversations.of(name, owner)
        events = await self._events(conversation, start, known=bool(shown))

        async def rendered() -> AsyncGenerator[str, None]:
            first = retry()
            while (event := await events.take()) is not None:
                yield first + self._render(event.raw, event, conversation)
                first = ""

        return EventStream(rendered(), streams=self._streams, on_end=events.aclose)

    async def task(
        self, agent: Agent, question: Question, headers: Mapping[str, str], owner: str, last_event_id: str
    ) -> Any:
        """A task, then every event of it after a cursor, also when it has ended meanwhile.

        Raises:
            Refusal: 403, the cursor is wrong, or of another session than the task.
            AgentScopeRocketMQError: `ReplayGapError`, `WrongOwner` and others.
        """
        place = self._cursors.read(last_event_id, owner=owner)
        conversation = self._conversations.of(place.session, owner)
        status, text, answer = await self._calls.task(agent, question, headers, owner)
        task = answer.get("result")
        if status != 200 or not isinstance(task, dict):  # noqa: PLR2004  (HTTP's)
            return self._calls.answer(status, json.dumps({**answer, "id": question.rpc.id}) if answer else text)
        snapshot = _shown(task, question)
        context_id = task.get("contextId")
        if isinstance(context_id, str) and context_id != place.session and not made_up(place.session):
            raise Refusal(403, "bad-cursor", "This cursor (Last-Event-ID) is one of another session than the task's.")
        # Of a task that has ended, or that waits, nothing comes that is not there.
        follow = progress(snapshot) is Progress.OPEN
        events = await self._events(conversation, {**_from(place), "follow": follow}, known=True)

        def ask() -> Awaitable[str | None]:
            return self._snapshot(agent, question, headers, owner)

        async def rendered() -> AsyncGenerator[str, None]:
            yield retry() + render_event(snapshot, event_id=last_event_id)
            async for event in _of_task(events, snapshot, question, ask, follow=follow):
                if isinstance(event, str):
                    yield render_event(event)
                else:
                    yield self._render(_said(_result(event.raw), event, question), event, conversation)

        return EventStream(
            rendered(),
            streams=self._streams,
            headers={LAST_EVENT_ID: last_event_id},
            rpc_id=question.rpc.id,
            on_end=events.aclose,
        )

    async def _snapshot(self, agent: Agent, question: Question, headers: Mapping[str, str], owner: str) -> str | None:
        """The task as the agent has it now; None where it does not say."""
        try:
            _, _, answer = await self._calls.task(agent, question, headers, owner)
        except AgentScopeRocketMQError as error:
            logger.info("Task %s could not be asked for: %s", question.task_id, error)
            return None
        task = answer.get("result")
        return _shown(task, question) if isinstance(task, dict) else None

    async def _events(self, conversation: Conversation, start: dict[str, Any], *, known: bool) -> _Ahead:
        """Events from a start that is there.

        Args:
            conversation: The session.
            start: Arguments of `Session.events`.
            known: Whether the session surely was there once.
        """
        name, session = conversation.name, conversation.session
        if known and self._cursors.signed:
            # A new gateway has no time to lose: the cursor says all that a look into the session would.
            session.trust()
        if not await session.recorded():
            # Nobody makes a session by asking for it.
            if known:
                raise Refusal(410, "gap", f"Nothing is kept of session {name!r} any more.")
            raise Refusal(404, "no-such-session", f"There is no session {name!r} of yours.")
        found = asyncio.Event()
        events = _Ahead(session.events(**start, on_listening=found.set))
        try:
            # What is wrong with the place is known before the answer begins.
            await events.begin(found, _FIRST_SECONDS)
        except BaseException:
            await events.aclose()
            raise
        return events

    def _after(self, name: str, owner: str, shown: str) -> dict[str, Any]:
        place = self._cursors.read(shown, owner=owner)
        if place.session != name:
            raise Refusal(403, "bad-cursor", "This cursor (Last-Event-ID, after) is one of another session.")
        return _from(place)

    def _render(self, data: str, event: SessionEvent, conversation: Conversation) -> str:
        conversation.position = str(event.cursor)
        place = Place(conversation.name, conversation.position)
        return render_event(data, event_id=self._cursors.write(place, owner=conversation.owner))


def start_of(query: Mapping[str, str]) -> dict[str, Any]:
    """Read where a replay begins from a query string, as arguments of `Session.events`.

    Raises:
        Refusal: 400, something in it can't be read, or it has two starts.
    """
    start: dict[str, Any] = {"follow": _flag(query, "follow", default=True), "observe": _flag(query, "observe")}
    if "after" in query:
        start["after"] = query["after"]
    if "since" in query:
        try:
            # A "+" that was not escaped arrives as a space.
            since = datetime.fromisoformat(query["since"].replace(" ", "+"))
        except ValueError:
            raise _bad("since", query["since"], "a time as 2026-01-31T12:00:00Z") from None
        if since.tzinfo is None:
            raise _bad("since", query["since"], "a time with its zone, as 2026-01-31T12:00:00Z")
        start["since"] = since
    if "tail" in query:
        number = query["tail"]
        if not (number.isascii() and number.isdigit() and len(number) < 10):  # noqa: PLR2004
            raise _bad("tail", number, "a number of events")
        start["tail"] = int(number)
    if _flag(query, "from_start"):
        start["from_start"] = True
    if sum(name in start for name in ("after", "since", "tail", "from_start")) > 1:
        raise Refusal(400, "bad-request", "Give one start: after, since, tail or from_start.")
    return start


def _flag(query: Mapping[str, str], name: str, *, default: bool = False) -> bool:
    text = query.get(name)
    if text is None:
        return default
    if text.lower() not in _FLAGS:
        raise _bad(name, text, "true or false")
    return _FLAGS[text.lower()]


def _bad(name: str, value: str, wanted: str) -> Refusal:
    return Refusal(400, "bad-request", f"{name}={value[:64]!r} can't be read: give {wanted}.")


def _from(place: Place) -> dict[str, Any]:
    return {"after": place.cursor} if place.cursor else {"from_start": True}


class _Ahead:
    """Events that can be waited for without being lost when the waiting ends."""

    def __init__(self, events: AsyncGenerator[SessionEvent, None]) -> None:
        self._events = events
        self._coming: asyncio.Task[SessionEvent | None] | None = None

    async def begin(self, found: asyncio.Event, seconds: float) -> None:
        """Wait until the start is found, or an event is there, or the end; raises what went wrong instead.

        Args:
            found: Set when the start is found.
            seconds: But no longer than this.
        """
        finding = asyncio.create_task(found.wait(), name="gateway.replay.found")
        coming = self._next()
        try:
            await asyncio.wait({finding, coming}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            finding.cancel()
            await asyncio.gather(finding, return_exceptions=True)
        if coming.done():
            coming.result()

    async def take(self, seconds: float | None = None) -> SessionEvent | None:
        """The next event; None at the end, or when none comes in that time."""
        coming = self._next()
        await asyncio.wait({coming}, timeout=seconds)
        if not coming.done():
            return None
        self._coming = None
        return coming.result()

    def _next(self) -> asyncio.Task[SessionEvent | None]:
        if self._coming is None:
            self._coming = asyncio.create_task(_next(self._events), name="gateway.replay.next")
        return self._coming

    async def aclose(self) -> None:
        """End it."""
        if self._coming is not None:
            self._coming.cancel()
            await asyncio.gather(self._coming, return_exceptions=True)
        await self._events.aclose()


async def _next(events: AsyncGenerator[SessionEvent, None]) -> SessionEvent | None:
    return await anext(events, None)


async def _of_task(
    events: _Ahead, snapshot: str, question: Question, ask: Callable[[], Awaitable[str | None]], *, follow: bool
) -> AsyncGenerator[SessionEvent | str, None]:
    """The events of a task among those of its session, until it ends; the task itself where its end is not there."""
    state = progress(snapshot)
    patience = {Progress.OPEN: _ASK_AGAIN_SECONDS, Progress.INTERRUPTED: _QUIET_SECONDS if follow else None}
    ended = None if follow else snapshot
    while True:
        told = follow and ended is not None
        event = await events.take(_QUIET_SECONDS if told else patience.get(state))
        if event is not None:
            if _task_of(_result(event.raw)) != question.task_id:
                continue
            yield event
            state = progress(event.raw)
            if state is Progress.ENDED:
                return
            if follow and state is Progress.INTERRUPTED:
                ended = None
        elif state is Progress.OPEN and ended is None:
            # Its last events may come, or set out, while the agent is asked.
            ended = await ask()
            if ended is not None and progress(ended) is Progress.OPEN:
                ended = None
        else:
            if state is Progress.OPEN and ended is not None:
                yield ended
            return


def _shown(task: dict[str, Any], question: Question) -> str:
    """A task as an event of the answer to this request."""
    shown = task if question.old else {"task": task}
    return json.dumps({"jsonrpc": "2.0", "id": question.rpc.id, "result": shown}, ensure_ascii=False)


def _result(raw: str) -> dict[str, Any]:
    try:
        response = read_json(raw)
    except ValueError:
        return {}
    result = response.get("result") if isinstance(response, dict) else None
    return result if isinstance(result, dict) else {}


def _task_of(result: Mapping[str, Any]) -> str | None:
    """The task that an event is about, in both versions' words."""
    if isinstance(task := result.get("task"), dict):
        return task.get("id")
    if result.get("kind") == "task":
        return result.get("id")
    for name in ("statusUpdate", "artifactUpdate"):
        if isinstance(update := result.get(name), dict):
            return update.get("taskId")
    return result.get("taskId") if result.get("kind") in ("status-update", "artifact-update") else None


def _said(result: dict[str, Any], event: SessionEvent, question: Question) -> str:
    """An event as the answer to this request: with its id, in its version's words."""
    payload = event.payload if ("kind" in result) is not question.old else None
    if isinstance(payload, StreamResponse):
        if question.old:
            compat = to_compat_stream_response(payload, request_id="")
            result = compat.model_dump(mode="json", by_alias=True, exclude_none=True)["result"]
        else:
            result = MessageToDict(payload)
    return json.dumps({"jsonrpc": "2.0", "id": question.rpc.id, "result": result}, ensure_ascii=False)
