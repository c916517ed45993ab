"""The gateway: an ASGI app in front of agents on RocketMQ, for A2A clients that speak nothing but HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import uuid
from typing import TYPE_CHECKING, Any, Self

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agentscope_rocketmq.client import RocketMQ
from agentscope_rocketmq.config import RocketMQConfig
from agentscope_rocketmq.errors import (
    AgentScopeRocketMQError,
    BrokerError,
    ConfigurationError,
    Unauthenticated,
)
from agentscope_rocketmq.gateway.agents import Agents, served_card
from agentscope_rocketmq.gateway.calls import Calls
from agentscope_rocketmq.gateway.conversations import Conversations
from agentscope_rocketmq.gateway.cursors import Cursors
from agentscope_rocketmq.gateway.questions import RESUME_METHODS, Question, carried_headers
from agentscope_rocketmq.gateway.refusal import Refusal, refusal_of
from agentscope_rocketmq.gateway.replays import Replays
from agentscope_rocketmq.gateway.streams import Streams
from agentscope_rocketmq.httpserver import listen, serve_http, stop_signals
from agentscope_rocketmq.owners import ANONYMOUS, owner_name
from agentscope_rocketmq.rocketmq.lifecycle import Closing, Home
from agentscope_rocketmq.session import Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
    from pathlib import Path

    from agentscope_rocketmq.client import AgentSource
    from agentscope_rocketmq.jsonrpc import RpcId

__all__ = ["Gateway", "create_gateway"]

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 15.0
"""Seconds without an event after which a stream is sent a comment, so that everybody on the way sees it is alive."""

# Who verifies tokens may ask somebody else; it may not make everybody wait.
_VERIFY_SECONDS = 10.0
_CLOSE_SECONDS = 40.0
_CONNECT_PAUSE = 2.0
_CARD_PATH = "/.well-known/agent-card.json"


def create_gateway(
    config: RocketMQConfig | None = None,
    agents: Mapping[str, AgentSource] | Sequence[AgentSource] = (),
    *,
    verify: Callable[[str], Awaitable[str]] | None = None,
    public_url: str | None = None,
    keep_alive: float = KEEP_ALIVE_SECONDS,
    card_cache: Path | None = None,
) -> Gateway:
    """Make a gateway: plain A2A clients over HTTP and SSE in front of agents on RocketMQ, as an ASGI app.

    Each agent is served at `/NAME`, the only one of a gateway at `/` too, with its card at
    `/NAME/.well-known/agent-card.json`. A session's events are replayed and followed at `/sessions/ID/events`; each
    event carries as SSE id a cursor to go on from, at this gateway or another one. docs/gateway.md says it all.

    The app starts with its ASGI lifespan; where that is not served (mounted in another app), use `async with`.

    Args:
        config: RocketMQ settings; None reads the environment. With `a2a_secret`, names of LiteTopics can't be guessed,
            cursors can't be forged, and agents are told for whom a call is made.
        agents: URLs or cards of the agents, or names (their part of the path) and those.
        verify: Bearer token -> name of its owner; raises `Unauthenticated` for one that is not good. `TokenVerifier`
            is the built-in one. None lets everybody in, as `anonymous`.
        public_url: URL at which clients reach this gateway, for the cards; None takes each request's own.
        keep_alive: Seconds without an event after which a stream is sent a comment.
        card_cache: Folder in which fetched cards are kept for a start while their agents are down; None keeps them in
            memory only.

    Raises:
        ConfigurationError: No agents, a name that makes no path, or `verify` without a secret.
    """
    return Gateway(
        RocketMQConfig.from_env() if config is None else config,
        agents,
        verify=verify,
        public_url=public_url,
        keep_alive=keep_alive,
        card_cache=card_cache,
    )


class Gateway:
    """A gateway; made by `create_gateway`.

    Attributes:
        streams: The streams that are open now.
    """

    def __init__(
        self,
        config: RocketMQConfig,
        agents: Mapping[str, AgentSource] | Sequence[AgentSource],
        *,
        verify: Callable[[str], Awaitable[str]] | None,
        public_url: str | None,
        keep_alive: float,
        card_cache: Path | None,
    ) -> None:
        if verify is not None and config.a2a_secret is None:
            raise ConfigurationError(
                "A gateway that verifies tokens needs a secret: agents are told for whom a call is made by an "
                "assertion that is signed with it. Set ROCKETMQ_A2A_SECRET, here and for the agents' servers."
            )
        secret = None if config.a2a_secret is None else config.a2a_secret.get_secret_value()
        self._config = config
        self._verify = verify
        self._public_url = public_url and public_url.rstrip("/")
        self._rocketmq = RocketMQ(config, card_cache=card_cache)
        self._agents = Agents(agents, read=self._rocketmq.card, config=config)
        self.streams = Streams(keep_alive=keep_alive, stall=config.timeouts.stall)
        self._cursors = Cursors(secret)
        self._secret = secret
        self._conversations = Conversations(self._session)
        self._calls: Calls | None = None
        self._replays: Replays | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._answering: set[asyncio.Task[Any]] = set()
        self._home = Home("This gateway")
        self._closing = Closing(limit=config.timeouts.drain + _CLOSE_SECONDS, name="gateway.close")
        events = Route("/sessions/{session:path}/events", self._events)
        events.path_regex = re.compile(events.path_regex.pattern, re.DOTALL)  # a name may have any character
        events.methods = {"GET"}  # and no HEAD, which Starlette adds: it would take events that nobody sees
        self._app = Starlette(
            routes=[
                Route("/healthz", self._healthz),
                Route("/readyz", self._readyz),
                Route(_CARD_PATH, self._card),
                events,
                Route("/{agent}" + _CARD_PATH, self._card),
                Route("/{agent}", self._call, methods=["POST"]),
                Route("/", self._call, methods=["POST"]),
            ],
            lifespan=self._lifespan,
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one ASGI connection."""
        await self._app(scope, receive, send)

    @property
    def ready(self) -> bool:
        """Whether it can serve: connected to RocketMQ, every agent's card known, not stopping."""
        return self._calls is not None and self._agents.complete and not self.streams.ending.is_set()

    async def start(self) -> None:
        """Read the agents' cards and begin to connect. RocketMQ may come later: until then `/readyz` says no.

        Raises:
            CardError: A card that is given can't be read, or its agent is on another cluster.
            ConfigurationError: Two agents have the same path.
        """
        self._home.check()
        await self._agents.start()
        self._conversations.start()
        self._connecting = asyncio.create_task(self._connect(), name="gateway.connect")
        self._connecting.add_done_callback(_connected)

    async def serve(self, *, host: str = "127.0.0.1", port: int = 8000) -> None:
        """Serve HTTP until SIGTERM or SIGINT comes or the calling task is cancelled, then drain and stop.

        Args:
            host: Address to serve on.
            port: Port; 0 lets the kernel choose one, which a line of the log names.

        Raises:
            ConfigurationError: The address can't be served on, or two agents have the same path.
            CardError: A card that is given can't be read, or its agent is on another cluster.
        """
        listening = listen(host, port)
        with contextlib.closing(listening), stop_signals() as stopped:
            async with self, serve_http(self, listening, self._config.timeouts.drain):
                logger.info("The gateway serves http://%s:%d", *listening.getsockname()[:2])
                try:
                    await stopped.wait()
                finally:
                    # While HTTP is still served: the clients hear it.
                    await self.drain()

    async def drain(self) -> None:
        """Take no new work, tell the clients of all streams to connect elsewhere, let the other calls end.

        It takes `Timeouts.drain` at most. A server that stops should call it first: it waits for its connections.
        """
        self.streams.ending.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.timeouts.drain):
                await self.streams.drain()
                if self._answering:
                    await asyncio.wait(self._answering)

    async def aclose(self) -> None:
        """Drain, then leave RocketMQ. The agents go on with what they were asked. Repeated calls are safe."""
        await self._closing(self._aclose)

    async def _aclose(self) -> None:
        try:
            await self.drain()
        finally:
            if self._connecting is not None:
                self._connecting.cancel()
                await asyncio.gather(self._connecting, return_exceptions=True)
            await self._agents.aclose()
            await self._conversations.aclose()
            if self._calls is not None:
                await self._calls.aclose()
            await self._rocketmq.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        if self._connecting is not None:
            # Started by `serve` or `async with`, which stop it too.
            yield
            return
        async with self:
            yield

    async def _connect(self) -> None:
        carrier = self._rocketmq.carrier(None)
        while True:
            try:
                await carrier.start()
                break
            except BrokerError as error:
                logger.warning("The gateway is not ready: %s", error)
                await asyncio.sleep(_CONNECT_PAUSE)
        calls = Calls(
            carrier,
            conversations=self._conversations,
            own=lambda: Session(uuid.uuid4().hex, carrier=carrier, name=None, owner=None),
            streams=self.streams,
            cursors=self._cursors,
            secret=self._secret,
            timeouts=self._config.timeouts,
        )
        self._replays = Replays(
            conversations=self._conversations, calls=calls, streams=self.streams, cursors=self._cursors
        )
        self._calls = calls

    def _session(self, name: str, owner: str) -> Session:
        return self._rocketmq.session(name, owner=owner)

    # What is served

    async def _healthz(self, _request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def _readyz(self, _request: Request) -> Response:
        checks = {
            "rocketmq": self._calls is not None,
            "cards": self._agents.complete,
            "serving": not self.streams.ending.is_set(),
        }
        return JSONResponse(
            {"status": "ready" if self.ready else "not ready", "checks": checks}, status_code=200 if self.ready else 503
        )

    async def _card(self, request: Request) -> Response:
        name = request.path_params.get("agent", "")
        try:
            agent = self._agents.find(name)
        except Refusal as refusal:
            return refusal.response()
        # Not the base_url of an app that this one is mounted in.
        here = request.base_url.replace(path=request.scope.get("root_path", ""))
        base = self._public_url or str(here).rstrip("/")
        card = served_card(agent.card, url=f"{base}/{agent.name}", authenticates=self._verify is not None)
        return JSONResponse(card, headers={"cache-control": "public, max-age=60"})

    async def _call(self, request: Request) -> Any:
        rpc_id: RpcId = None
        try:
            calls, replays = self._ready()
            agent = self._agents.find(request.path_params.get("agent", ""))
            owner = await self._owner(request)
            question = Question.read(await self._body(request))
            rpc_id = question.rpc.id
            headers = carried_headers(request.headers.items())
            last_event_id = request.headers.get("last-event-id")
            if last_event_id and question.task_id and question.rpc.method in RESUME_METHODS:
                answer = replays.task(agent, question, headers, owner, last_event_id)
            else:
                answer = calls.pass_on(agent, question, headers, owner)
            return await self._unless_left(request, answer)
        except Refusal as refusal:
            return refusal.response(rpc_id)
        except AgentScopeRocketMQError as error:
            logger.info("A call is refused: %s", error)
            return refusal_of(error).response(rpc_id)
        except ClientDisconnect:
            return _nobody_reads()

    async def _events(self, request: Request) -> Any:
        try:
            _, replays = self._ready()
            owner = await self._owner(request)
            last_event_id = request.headers.get("last-event-id")
            answer = replays.session(request.path_params["session"], owner, request.query_params, last_event_id)
            return await self._unless_left(request, answer)
        except Refusal as refusal:
            return refusal.response()
        except AgentScopeRocketMQError as error:
            logger.info("A replay is refused: %s", error)
            return refusal_of(error).response()

    def _ready(self) -> tuple[Calls, Replays]:
        if self.streams.ending.is_set():
            raise Refusal(503, "draining", "This gateway stops: ask another one, or this one again.")
        if self._calls is None or self._replays is None:
            raise Refusal(503, "unreachable", "This gateway is not connected to RocketMQ yet. Ask again.")
        return self._calls, self._replays

    async def _owner(self, request: Request) -> str:
        if self._verify is None:
            return ANONYMOUS
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthenticated("This gateway asks for a bearer token: send it as `Authorization: Bearer TOKEN`.")
        try:
            async with asyncio.timeout(_VERIFY_SECONDS):
                verified = await self._verify(token.strip())
        except Unauthenticated:
            raise
        except Exception as error:  # noqa: BLE001  (somebody else's code)
            # What it says may have the token in it.
            logger.error("A token could not be verified: the verifier failed with %s", type(error).__name__)  # noqa: TRY400
            raise Refusal(503, "unverified", "The token could not be verified now. Ask again.") from None
        try:
            return owner_name(verified)
        except ConfigurationError as error:
            raise Unauthenticated("The bearer token names nobody.") from error

    async def _body(self, request: Request) -> bytes:
        most = self._config.limits.request_bytes
        chunks: list[bytes] = []
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                raise Refusal(413, "too-large", f"A request has at most {most} bytes here. Send less.")
            chunks.append(chunk)
        return b"".join(chunks)

    async def _unless_left(self, request: Request, work: Coroutine[Any, Any, Any]) -> Any:
        """Do it, unless the client leaves meanwhile: then nobody waits for it any more."""
        working = asyncio.create_task(work, name="gateway.answer")
        leaving = asyncio.create_task(_left(request), name="gateway.left")
        self._answering.add(working)
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)
            self._answering.discard(working)
        if working.cancelled():
            return _nobody_reads()
        return working.result()


def _nobody_reads() -> Response:
    # The status is for logs.
    return Response(status_code=499)


def _connected(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("The gateway will never be ready", exc_info=error)


async def _left(request: Request) -> None:
    with contextlib.suppress(ClientDisconnect):
        while (await request.receive())["type"] != "http.disconnect":
            pass
