"""An AgentScope agent on the real a2a-sdk server, over real HTTP, and callers of every kind."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

import httpx
import pytest
import uvicorn
from a2a.auth.user import User
from a2a.client import Client, ClientCallContext, ClientConfig, ClientFactory
from a2a.client.service_parameters import ServiceParametersFactory, with_a2a_extensions
from a2a.helpers.proto_helpers import get_message_text
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.routes import create_jsonrpc_routes
from a2a.server.routes.common import DefaultServerCallContextBuilder
from a2a.server.tasks import InMemoryTaskStore
from a2a.types import (
    AgentCapabilities,
    AgentCard,
    AgentInterface,
    Message,
    Part,
    Role,
    SendMessageRequest,
    StreamResponse,
    Task,
    TaskState,
)
from agentscope.agent import A2AAgent, Agent
from starlette.applications import Starlette

from agentscope_rocketmq.events import AGENT_EVENTS_EXTENSION, agent_events_extension
from agentscope_rocketmq.executor import AgentScopeExecutor, MakeAgent

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

SUBMITTED = TaskState.TASK_STATE_SUBMITTED
WORKING = TaskState.TASK_STATE_WORKING
COMPLETED = TaskState.TASK_STATE_COMPLETED
FAILED = TaskState.TASK_STATE_FAILED
CANCELED = TaskState.TASK_STATE_CANCELED
INPUT_REQUIRED = TaskState.TASK_STATE_INPUT_REQUIRED
LIMIT = 20.0  # seconds; far beyond what any test takes

both_versions = pytest.mark.parametrize("version", ["1.0", "0.3"])


class _NamedUser(User):
    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def is_authenticated(self) -> bool:
        return True

    @property
    def user_name(self) -> str:
        return self._name


class _UserFromHeader(DefaultServerCallContextBuilder):
    def build_user(self, request):
        name = request.headers.get("x-user")
        return _NamedUser(name) if name else super().build_user(request)


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()
        self.stop = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self):
        yield

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def main_loop(self) -> None:
        await self.stop.wait()  # instead of looking ten times a second


@dataclass
class Service:
    """A running server and ways to talk to it."""

    url: str
    executor: AgentScopeExecutor
    handler: DefaultRequestHandler

    @property
    def only_agent(self) -> Agent:
        """The agent of the one conversation there is."""
        [conversation] = self.executor._conversations.values()
        assert conversation.agent is not None
        return conversation.agent

    def card(self, version: str) -> AgentCard:
        return AgentCard(
            name="agent",
            description="An agent under test.",
            version="1",
            default_input_modes=["text/plain"],
            default_output_modes=["text/plain"],
            capabilities=AgentCapabilities(streaming=True, extensions=[agent_events_extension()]),
            supported_interfaces=[AgentInterface(url=self.url, protocol_binding="JSONRPC", protocol_version=version)],
        )

    @contextlib.asynccontextmanager
    async def client(self, version: str = "1.0", *, streaming: bool = True) -> AsyncIterator[Client]:
        async with httpx.AsyncClient(timeout=LIMIT, headers={"A2A-Version": version}) as http:
            yield ClientFactory(ClientConfig(streaming=streaming, httpx_client=http)).create(self.card(version))

    @contextlib.asynccontextmanager
    async def agent(self, version: str = "1.0") -> AsyncIterator[A2AAgent]:
        async with self.client(version) as client:
            yield A2AAgent(self.card(version), client=client)


@contextlib.asynccontextmanager
async def serve(
    make_agent: MakeAgent, *, store: InMemoryTaskStore | None = None, max_contexts: int = 10_000
) -> AsyncIterator[Service]:
    service = Service("", AgentScopeExecutor(make_agent, max_contexts=max_contexts), None)  # type: ignore[arg-type]
    service.handler = DefaultRequestHandler(service.executor, store or InMemoryTaskStore(), service.card("1.0"))
    routes = create_jsonrpc_routes(service.handler, "/", context_builder=_UserFromHeader(), enable_v0_3_compat=True)
    config = uvicorn.Config(
        Starlette(routes=routes),
        host="127.0.0.1",
        port=0,
        log_config=None,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
    )
    server = _Uvicorn(config)
    async with asyncio.timeout(2 * LIMIT):
        running = asyncio.create_task(server.serve(), name="uvicorn")
        await server.ready.wait()
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        service.url = f"http://{host}:{port}/"
        try:
            yield service
        finally:
            await service.handler.aclose()
            server.stop.set()
            await running


def message(*parts: str | Part, context_id: str = "", task_id: str = "") -> Message:
    return Message(
        message_id=uuid4().hex,
        role=Role.ROLE_USER,
        context_id=context_id,
        task_id=task_id,
        parts=[Part(text=part) if isinstance(part, str) else part for part in parts],
    )


async def stream(
    client: Client, sent: Message, *, extension: bool = False, user: str | None = None
) -> AsyncGenerator[StreamResponse]:
    parameters = ServiceParametersFactory.create([with_a2a_extensions([AGENT_EVENTS_EXTENSION])] if extension else [])
    if user:
        parameters["x-user"] = user
    context = ClientCallContext(service_parameters=parameters)
    async for event in client.send_message(SendMessageRequest(message=sent), context=context):
        yield event


async def events_of(client: Client, sent: Message, **options) -> list[StreamResponse]:
    return [event async for event in stream(client, sent, **options)]


def states(events: list[StreamResponse]) -> list[TaskState]:
    """The states that a stream went through."""
    found = []
    for event in events:
        if event.HasField("task"):
            found.append(event.task.status.state)
        elif event.HasField("status_update"):
            found.append(event.status_update.status.state)
    return found


def text_of(events: list[StreamResponse]) -> str:
    return "".join(
        part.text
        for event in events
        if event.HasField("artifact_update")
        for part in event.artifact_update.artifact.parts
    )


def status_text(events: list[StreamResponse]) -> str:
    return get_message_text(events[-1].status_update.status.message)


async def ask(client: Client, sent: Message, **options) -> str:
    """Send a message, expect a completed task, return its text."""
    events = await events_of(client, sent, **options)
    assert states(events)[-1] == COMPLETED
    return text_of(events)


async def until_task(events: AsyncIterator[StreamResponse]) -> Task:
    """Read a stream up to its task."""
    async for event in events:
        if event.HasField("task"):
            return event.task
    raise AssertionError("no task in the stream")
