"""Calls that pass through a gateway: from an HTTP request to an agent's topic, and back from a reply channel."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import re
import uuid
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from agentscope_rocketmq.card import large_bodies
from agentscope_rocketmq.cursor import Cursor
from agentscope_rocketmq.envelope import RequestEnvelope
from agentscope_rocketmq.errors import AgentScopeRocketMQError
from agentscope_rocketmq.gateway.cursors import Place
from agentscope_rocketmq.gateway.streams import EventStream, retry
from agentscope_rocketmq.jsonrpc import encoded, read_json
from agentscope_rocketmq.owners import ANONYMOUS, CONTEXT_HEADER, OWNER_HEADER, make_assertion
from agentscope_rocketmq.sse import Event, parse_events, render_event
from agentscope_rocketmq.times import CallTimes

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from agentscope_rocketmq.carrier import Carrier
    from agentscope_rocketmq.config import Timeouts
    from agentscope_rocketmq.gateway.agents import Agent
    from agentscope_rocketmq.gateway.conversations import Conversation, Conversations
    from agentscope_rocketmq.gateway.cursors import Cursors
    from agentscope_rocketmq.gateway.questions import Question
    from agentscope_rocketmq.gateway.streams import Streams
    from agentscope_rocketmq.pending import PendingResponse
    from agentscope_rocketmq.session import Session

__all__ = ["LAST_EVENT_ID", "Asked", "Calls", "made_up"]

logger = logging.getLogger(__name__)

LAST_EVENT_ID = "last-event-id"
"""Header of a stream's response: what to send as the request's `Last-Event-ID` where no event came yet."""

# How long an answer may take to begin before the stream is begun without it: what comes then can't change the form.
_HEAD_SECONDS = 5.0
# Calls that belong to no session and are answered with a document, which is taken as soon as it comes, are answered on
# so many LiteTopics of the gateway's own.
_CHANNELS = 8
# Leaving a LiteTopic has its own time limits; at the end of a gateway it may take this long.
_LEAVE_SECONDS = 5.0
_MADE_UP = re.compile(r"[0-9a-f]{32}")
# An assertion of a call without a total timeout.
_LONGEST_WAIT = 24 * 3600.0


@dataclasses.dataclass(slots=True, eq=False)
class Asked:
    """A call on its way.

    Attributes:
        envelope: The request as it was sent.
        pending: Its response.
        carrier: Where it goes.
        resources: What it holds until it ends.
    """

    envelope: RequestEnvelope
    pending: PendingResponse
    carrier: Carrier
    resources: contextlib.AsyncExitStack

    async def aclose(self) -> None:
        """Nobody waits for it any more. The agent goes on."""
        await self.resources.aclose()

    async def document(self) -> str:
        """The whole body of a response that is no stream."""
        return "".join([piece.text async for piece in self.pieces()])

    async def pieces(self) -> AsyncGenerator[Any, None]:
        """The body, piece by piece; the carrier learns from the first one which instance answers."""
        first = True
        async for piece in self.pending.pieces():
            if first:
                self.carrier.note(self.envelope, self.pending, piece.text)
                first = False
            yield piece


class Calls:
    """Sends calls to agents.

    Args:
        carrier: The cluster.
        conversations: The sessions in use.
        own: Makes a session of the gateway's own, for calls that belong to none.
        streams: The open streams.
        cursors: Writes what clients go on from.
        secret: Secret of the deployment; None where owners are not told to agents.
        timeouts: Those of a call.
    """

    def __init__(
        self,
        carrier: Carrier,
        *,
        conversations: Conversations,
        own: Callable[[], Session],
        streams: Streams,
        cursors: Cursors,
        secret: str | None,
        timeouts: Timeouts,
    ) -> None:
        self._carrier = carrier
        self._conversations = conversations
        self._own = own
        self._opened: set[Session] = set()
        self._next = itertools.cycle([own() for _ in range(_CHANNELS)])
        self._leaving: set[asyncio.Task[None]] = set()
        self._streams = streams
        self._cursors = cursors
        self._secret = secret
        self._timeouts = timeouts

    async def pass_on(self, agent: Agent, question: Question, headers: Mapping[str, str], owner: str) -> Any:
        """Ask the agent, and answer as it does.

        Returns:
            The response, an ASGI app.

        Raises:
            AgentScopeRocketMQError: The agent could not be asked, or did not answer.
        """
        conversation, headers = await self._conversation(agent, question, headers, owner)
        # Before it is asked: from here on everything is its answer.
        position = None if conversation is None else conversation.position
        asked = await self.ask(
            agent, question.body, headers, owner, conversation=conversation, stream=question.rpc.wants_stream
        )
        try:
            head = await _within(_HEAD_SECONDS if question.rpc.wants_stream else None, asked.pending)
            if head is not None and not head.stream:
                body = await asked.document()
                await asked.aclose()
                return self.answer(head.status, body, head.headers)
        except BaseException:
            await asked.aclose()
            raise
        first = {}
        if conversation is not None and position is not None:
            if _began_anew(position, asked.pending):
                position = ""
            first[LAST_EVENT_ID] = self._cursors.write(Place(conversation.name, position), owner=owner)
        return EventStream(
            self._events(asked, conversation, owner),
            streams=self._streams,
            headers=first | ({} if head is None else dict(head.headers)),
            rpc_id=question.rpc.id,
            on_end=asked.aclose,
        )

    async def ask(
        self,
        agent: Agent,
        body: str,
        headers: Mapping[str, str],
        owner: str,
        *,
        conversation: Conversation | None = None,
        stream: bool = False,
    ) -> Asked:
        """Send a request; its answer comes on the conversation's reply channel, or on one of the gateway's own.

        Args:
            agent: Who is asked.
            body: The JSON-RPC request.
            headers: What goes along.
            owner: For whom.
            conversation: Where the answer belongs; None for nowhere.
            stream: Whether the answer may be a stream. What nobody reads of one holds up whatever else comes on its
                reply channel, so where it belongs nowhere it has one for itself.

        Raises:
            AgentScopeRocketMQError: It could not be sent.
        """
        request_id = uuid.uuid4().hex
        timeouts = self._timeouts
        text, large, times = await self._carrier.put(
            request_id,
            body.encode(),
            large_bodies(agent.card),
            each=timeouts.send,
            times=CallTimes(ack=timeouts.ack, idle=timeouts.idle, total=timeouts.total),
        )
        headers = {**headers, **self._carrier.abilities, **times.headers()}
        async with contextlib.AsyncExitStack() as stack:
            if conversation is not None:
                await stack.enter_async_context(self._conversations.calling(conversation))
                session = conversation.session
            elif stream:
                session = self._own()
                await session.open()
                stack.callback(self._leave, session)
            else:
                session = await self._shared_session()
            replies = self._carrier.replies
            if owner != ANONYMOUS and self._secret is not None:
                headers[OWNER_HEADER] = make_assertion(
                    owner,
                    secret=self._secret,
                    audience=agent.address.topic,
                    request_id=request_id,
                    body=body,
                    reply=f"{replies.topic} {session.lite_topic}",
                    lifetime=timeouts.total or _LONGEST_WAIT,
                )
            envelope = RequestEnvelope(
                request_id=request_id,
                body=text,
                large=large,
                headers=headers,
                dest_topic=agent.address.topic,
                reply_topic=replies.topic,
                lite_topic=session.lite_topic,
            )
            pending = replies.expect(session.lite_topic, request_id, **times._asdict(), agent=agent.address.topic)
            stack.callback(replies.forget, pending)
            await self._carrier.request(envelope, pending, timeout=timeouts.send)
            return Asked(envelope, pending, self._carrier, stack.pop_all())
        raise AssertionError

    def answer(self, status: int, body: str, headers: Mapping[str, str] | None = None) -> Response:
        """A whole answer to a client."""
        response = Response(encoded(body), status_code=status, media_type="application/json")
        for name, value in (headers or {}).items():
            response.headers[name] = value.encode("latin-1", "replace").decode("latin-1")
        return response

    async def _shared_session(self) -> Session:
        session = next(self._next)
        if session not in self._opened:
            await session.open()
            if session in self._opened:
                await session.close()
            self._opened.add(session)
        return session

    def _leave(self, session: Session) -> None:
        """Close it; whoever had it does not wait for that, nor can cut it short."""
        task = asyncio.create_task(_close(session), name="gateway.call.leave")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def aclose(self) -> None:
        """Wait for reply channels that are being left; those that are left open end with their connection."""
        if self._leaving:
            _, late = await asyncio.wait(self._leaving, timeout=_LEAVE_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _conversation(
        self, agent: Agent, question: Question, headers: Mapping[str, str], owner: str
    ) -> tuple[Conversation | None, Mapping[str, str]]:
        """The conversation that a call belongs to, if any, and its headers."""
        if not question.rpc.runs_agent:
            return None, headers
        if question.context_id:
            return self._conversations.of(question.context_id, owner), headers
        if question.task_id:
            context_id = await self._context_of(agent, question, headers, owner)
            return (self._conversations.of(context_id, owner) if context_id else None), headers
        context_id = uuid.uuid4().hex  # as `made_up` knows it
        conversation = self._conversations.of(context_id, owner)
        conversation.position = ""
        return conversation, {**headers, CONTEXT_HEADER: context_id}

    async def _context_of(self, agent: Agent, question: Question, headers: Mapping[str, str], owner: str) -> str:
        """The context of a task that a message goes on with; empty where the agent knows no such task."""
        task = await self.task(agent, question, headers, owner)
        result = task[2].get("result")
        context_id = result.get("contextId") if isinstance(result, dict) else None
        return context_id if isinstance(context_id, str) else ""

    async def task(
        self, agent: Agent, question: Question, headers: Mapping[str, str], owner: str
    ) -> tuple[int, str, dict[str, Any]]:
        """Ask for the task that a call names, in the call's own words.

        Returns:
            HTTP status, text and fields of the JSON-RPC response.
        """
        asked = await self.ask(agent, question.about(question.task_id), headers, owner)
        try:
            head = await asked.pending.head()
            text = await asked.document()
        finally:
            await asked.aclose()
        try:
            fields = read_json(text)
        except ValueError:
            fields = {}
        return head.status, text, fields if isinstance(fields, dict) else {}

    async def _events(self, asked: Asked, conversation: Conversation | None, owner: str) -> AsyncGenerator[str, None]:
        """The events of a streamed answer, each with the cursor to go on from."""
        first = retry()
        async for piece in asked.pieces():
            event_id = None
            if conversation is not None:
                conversation.position = str(piece.cursor)
                event_id = self._cursors.write(Place(conversation.name, conversation.position), owner=owner)
            # An answer that is one document, where a stream was begun already, is its only event.
            head = asked.pending.call.head
            events = parse_events(piece.text) if head is not None and head.stream else [Event(data=piece.text)]
            for event in events:
                yield first + render_event(event.data, name=event.name, event_id=event_id)
                first = ""


async def _close(session: Session) -> None:
    try:
        await session.close()
    except AgentScopeRocketMQError as error:
        logger.info("LiteTopic %s could not be let go of: %s", session.lite_topic, error)


def made_up(session: str) -> bool:
    """Whether a session's name may be one that a gateway made up: not every agent's server takes it for the context."""
    return _MADE_UP.fullmatch(session) is not None


def _began_anew(position: str, pending: PendingResponse) -> bool:
    """Whether an answer comes before what was in its session when it was asked for: the session expired meanwhile."""
    return bool(position) and pending.newest is not None and pending.newest.offset <= Cursor.parse(position).offset


async def _within(seconds: float | None, pending: PendingResponse) -> Any:
    """The head of a response; None when it does not come in that time."""
    try:
        async with asyncio.timeout(seconds) as bound:
            return await pending.head()
    except TimeoutError:
        if not bound.expired():
            raise
        return None
