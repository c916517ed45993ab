"""A2AServer: one agent over HTTP JSON-RPC and over RocketMQ at once, with a well-known card that lists both."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import uuid
import warnings
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from agentscope_rocketmq.asgi import OwnerGuard
from agentscope_rocketmq.bridge import Bridge
from agentscope_rocketmq.card import (
    Address,
    LargeBodies,
    card_to_dict,
    complete_card,
    jsonrpc_url,
    parse_card,
    priority_topics,
    read_card,
    rocketmq_addresses,
)
from agentscope_rocketmq.config import RocketMQConfig
from agentscope_rocketmq.errors import CardError, ClosedError
from agentscope_rocketmq.httpserver import EVERY_ADDRESS, base_url, listen, reachable, serve_http, shown, stop_signals
from agentscope_rocketmq.priority import Tier
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from agentscope_rocketmq.rocketmq.lifecycle import Closing, Home
from agentscope_rocketmq.rocketmq.lite import LiteConsumer
from agentscope_rocketmq.rocketmq.producer import Producer
from agentscope_rocketmq.rocketmq.rate import RateLimit
from agentscope_rocketmq.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from a2a.server.agent_execution import AgentExecutor
    from a2a.server.tasks import TaskStore
    from a2a.types import AgentCard

    from agentscope_rocketmq.app import A2AApp
    from agentscope_rocketmq.executor import MakeAgent

    CardSource = AgentCard | Mapping[str, Any] | str | os.PathLike[str]

__all__ = ["A2AServer"]

logger = logging.getLogger(__name__)

CARD_PATH = "/.well-known/agent-card.json"
_LOOPBACK = {"127.0.0.1", "localhost", "::1", *EVERY_ADDRESS}
# What a stop takes beyond `Timeouts.drain`: long polls that must not be cut, agents that don't end, and farewells.
_CLOSE_SECONDS = 60.0


class A2AServer:
    """Offers an AgentScope agent as an A2A service over RocketMQ and HTTP.

    The card tells where: each of its RocketMQ interfaces is a topic to serve. It is published, completed with the
    JSON-RPC interface and the fields that A2A 0.3 readers need, at `/.well-known/agent-card.json`.

    Requests over RocketMQ are delivered at least once: leased while the agent works, acked when the response is
    complete, given to another worker of the group when this one dies. Requests over HTTP are as reliable as HTTP is.

    Args:
        make_agent: Session id (the A2A context id) -> a new AgentScope `Agent`; plain or async. One agent, and so
            one memory, per conversation.
        card: The agent's card: an a2a `AgentCard`, a dict, or a path to a JSON file (placeholders like
            `${ROCKETMQ_ENDPOINT:-127.0.0.1:8081}` in it are filled in from the environment).
        config: RocketMQ settings; None reads the environment.
        group: Consumer group of the workers; None takes the topic's name + `ConsumerGroup`.
        host: Address to serve HTTP on, unless `serve` says otherwise.
        port: Port to serve HTTP on, unless `serve` says otherwise; 0 lets the kernel choose one.
        public_url: URL at which callers reach the HTTP endpoint, for the card. None takes the card's JSONRPC URL when
            that names another machine (a load balancer, say), else the address served on; when that is every address
            (0.0.0.0, ::), this machine's host name, or loopback where that can't be resolved.
        task_store: Where the a2a-sdk keeps tasks; None keeps up to `Limits.contexts` ended ones in memory, of up to
            128 MiB, and as many that wait. Servers may share one: of several runs of a request the latest writes.
        extended_card: Card for authenticated callers; None for none.
        push_url_validator: Says of a URL whether push notifications may go there; None refuses private networks.

    Raises:
        CardError: The card can't be read, or lists no RocketMQ interface.
        ConfigurationError: A setting is malformed.
    """

    def __init__(
        self,
        make_agent: MakeAgent,
        *,
        card: CardSource,
        config: RocketMQConfig | None = None,
        group: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        public_url: str | None = None,
        task_store: TaskStore | None = None,
        extended_card: AgentCard | None = None,
        push_url_validator: Callable[[str], Awaitable[bool]] | None = None,
    ) -> None:
        from agentscope_rocketmq.events import agent_events_extension  # noqa: PLC0415  (agentscope takes seconds)
        from agentscope_rocketmq.executor import AgentScopeExecutor  # noqa: PLC0415

        self._prepare(card, config, group, host, port, public_url)
        executor = AgentScopeExecutor(make_agent, max_contexts=self._config.limits.contexts)
        self._serve_executor(executor, task_store, extended_card, push_url_validator)
        self._card.capabilities.streaming = True
        extension = agent_events_extension()
        if extension.uri not in {known.uri for known in self._card.capabilities.extensions}:
            self._card.capabilities.extensions.append(extension)

    @classmethod
    def from_executor(
        cls,
        executor: AgentExecutor,
        *,
        card: CardSource,
        config: RocketMQConfig | None = None,
        group: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        public_url: str | None = None,
        task_store: TaskStore | None = None,
        extended_card: AgentCard | None = None,
        push_url_validator: Callable[[str], Awaitable[bool]] | None = None,
    ) -> Self:
        """Serve an a2a-sdk `AgentExecutor` instead of an AgentScope agent (other arguments as the class)."""
        server = cls.__new__(cls)
        server._prepare(card, config, group, host, port, public_url)  # noqa: SLF001  (its own class)
        server._serve_executor(executor, task_store, extended_card, push_url_validator)  # noqa: SLF001
        return server

    @classmethod
    def from_app(
        cls,
        app: Any,
        *,
        card: CardSource,
        config: RocketMQConfig | None = None,
        group: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        public_url: str | None = None,
    ) -> Self:
        """Serve any A2A ASGI app, untouched, at the path of the card's JSONRPC interface (others as the class).

        Only the well-known card is answered here, so that it lists RocketMQ.
        """
        server = cls.__new__(cls)
        server._prepare(card, config, group, host, port, public_url)  # noqa: SLF001  (its own class)
        server._make_app = lambda _card, _path: app  # noqa: SLF001
        return server

    def _prepare(
        self,
        card: CardSource,
        config: RocketMQConfig | None,
        group: str | None,
        host: str,
        port: int,
        public_url: str | None,
    ) -> None:
        self._config = RocketMQConfig.from_env() if config is None else config
        self._card = self._written = _load(card)
        if not rocketmq_addresses(self._card):
            raise CardError(
                f"The card of agent {self._card.name!r} lists no RocketMQ interface, so there is no topic to serve: "
                "add one with protocolBinding RocketMQ and a url like http://127.0.0.1:8081//WeatherAgentTask."
            )
        self._group = group
        self._host = host
        self._port = port
        self._public_url = public_url
        self._instance = f"i-{uuid.uuid4().hex}"
        self._app: Any = None
        self._fails_tasks = False  # an app of others does not know how
        self._url: str | None = None
        self._home = Home(f"The server of agent {self._card.name!r}")
        self._starting = False
        self._resources: contextlib.AsyncExitStack | None = None
        self._closing = Closing(limit=self._config.timeouts.drain + _CLOSE_SECONDS, name="a2a-server.close")
        self._bridges: list[Bridge] = []

    def _serve_executor(
        self,
        executor: AgentExecutor,
        task_store: TaskStore | None,
        extended_card: AgentCard | None,
        push_url_validator: Callable[[str], Awaitable[bool]] | None,
    ) -> None:
        def make_app(card: AgentCard, path: str) -> A2AApp:
            from agentscope_rocketmq.app import A2AApp, BoundedTaskStore  # noqa: PLC0415  (takes a second to import)
            from agentscope_rocketmq.fence import FencedTaskStore  # noqa: PLC0415  (this, too)

            limits = self._config.limits
            store = BoundedTaskStore(most=limits.contexts) if task_store is None else FencedTaskStore(task_store)

            return A2AApp(
                executor,
                card,
                path=path,
                task_store=store,
                on_task=self._keep,
                extended_card=extended_card,
                push_url_validator=push_url_validator,
            )

        self._fails_tasks = True
        self._make_app: Callable[[AgentCard, str], Any] = make_app

    @property
    def url(self) -> str:
        """Base URL of the HTTP endpoint, with the port really taken.

        Raises:
            ClosedError: The server is not started.
        """
        if self._url is None:
            raise ClosedError("The A2A server is not started: use `async with server:` or `await server.serve()`.")
        return self._url

    @property
    def card(self) -> AgentCard:
        """The card as published; before the start, as given."""
        return self._card

    @property
    def bridges(self) -> tuple[Bridge, ...]:
        """One for each RocketMQ topic served, with counters of what it did."""
        return tuple(self._bridges)

    async def serve(self, *, host: str | None = None, port: int | None = None) -> None:
        """Serve until SIGTERM or SIGINT comes or the calling task is cancelled, then stop cleanly.

        Args:
            host: Address to serve HTTP on; None takes the constructor's.
            port: Port; None takes the constructor's, 0 lets the kernel choose one.

        Raises:
            BrokerError: RocketMQ can't be reached, or topic, group or credentials are refused (typed subclasses).
            ConfigurationError: The HTTP address can't be served on.
            ClosedError: It serves already.
            WrongEventLoop: It serves in another event loop.
        """
        await self._start(self._host if host is None else host, self._port if port is None else port)
        try:
            with stop_signals() as stopped:
                await self._until(stopped)
        finally:
            await self.aclose()

    async def _until(self, stopped: asyncio.Event) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in (stopped, *(b.failed for b in self._bridges))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        for bridge in self._bridges:
            if bridge.failure is not None:
                raise bridge.failure

    async def start(self) -> None:
        """Start serving; `async with server:` does the same (errors as `serve`)."""
        await self._start(self._host, self._port)

    async def _start(self, host: str, port: int) -> None:
        self._home.check()
        if self._starting or self._resources is not None:
            raise ClosedError(
                f"The server of agent {self._card.name!r} is started already: one A2AServer serves once at a time. "
                "Make another one, or await its aclose() first."
            )
        self._starting = True
        try:
            await self._open(host, port)
        except BaseException:
            self._home.leave()
            raise
        finally:
            self._starting = False
        logger.info("Agent %r serves %s", self._card.name, ", ".join([self.url, *(b.topic for b in self._bridges)]))

    async def _open(self, host: str, port: int) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._forget)
            listening = listen(host, port)
            stack.callback(listening.close)
            port = listening.getsockname()[1]
            self._url = base_url(shown(host), port)
            published = base_url(await reachable(host), port)
            config = self._config
            self._card = complete_card(
                self._written,
                jsonrpc_url=self._http_interface(published),
                large=LargeBodies(
                    config.state_topic, config.limits.request_bytes, config.blobs.name if config.blobs else None
                ),
            )
            path = urlsplit(jsonrpc_url(self._card) or "").path or "/"
            self._app = self._make_app(self._card, path)
            limits = config.limits
            slots = Slots(limits.concurrency, caller_share=limits.caller_share)
            rate = _rate(limits.requests_per_second)
            bridges = [
                await self._make_bridge(stack, number, address, path, slots, rate)
                for number, address in enumerate(rocketmq_addresses(self._card))
            ]
            # What a stop cuts off is given back when its agents have ended, or two servers would work on it at once.
            stack.push_async_callback(self._each_bridge, Bridge.aclose)
            if hasattr(self._app, "aclose"):
                stack.push_async_callback(self._app.aclose)
            # HTTP first: who reads the card finds everything it lists served a moment later, on a durable topic.
            stop_http = await stack.enter_async_context(
                serve_http(self._with_card(self._app), listening, config.timeouts.drain)
            )
            stack.push_async_callback(self._drain, stop_http)
            for bridge in bridges:
                await bridge.start()
                self._bridges.append(bridge)
            self._resources = stack.pop_all()

    async def aclose(self) -> None:
        """Stop: take no more requests, end those at work within `Timeouts.drain`, give back the rest. Idempotent.

        A call that is cancelled does not stop the closing: call again to wait for it.
        """
        if self._resources is None:
            return
        self._home.check()
        closing = self._closing
        try:
            await closing(self._resources.aclose)
        finally:
            if closing.done and closing is self._closing:
                self._closing = closing.again()
                self._resources = None
                self._home.leave()

    def __del__(self) -> None:
        if getattr(self, "_resources", None) is not None and not self._closing.begun:
            warnings.warn(
                f"The server of agent {self._card.name!r} was dropped without being closed: it serves until this "
                "process ends. Use `async with server:`, or await its aclose().",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )

    async def _each_bridge(self, do: Callable[[Bridge], Awaitable[None]]) -> None:
        for failed in await asyncio.gather(*(do(bridge) for bridge in self._bridges), return_exceptions=True):
            if isinstance(failed, BaseException):
                raise failed

    async def _drain(self, stop_http: Callable[[], Awaitable[None]]) -> None:
        await asyncio.gather(stop_http(), self._each_bridge(Bridge.drain))

    def _keep(self, task: str) -> None:
        for bridge in self._bridges:
            bridge.keep(task)

    def _forget(self) -> None:
        self._bridges.clear()
        self._url = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _make_bridge(
        self,
        stack: contextlib.AsyncExitStack,
        number: int,
        address: Address,
        path: str,
        slots: Slots,
        rate: RateLimit | None,
    ) -> Bridge:
        config = self._config
        connection = await stack.enter_async_context(
            Connection.from_config(
                config if not address.secure else config.model_copy(update={"tls": True}),
                endpoint=address.endpoint,
                namespace=address.namespace,
            )
        )
        connect = config.timeouts.connect
        # Two of one server may be on one cluster: each has a LiteTopic of its own.
        instance = f"{self._instance}-{number}" if number else self._instance
        producer = await stack.enter_async_context(Producer(connection, connect_timeout=connect))
        secret = config.a2a_secret
        guard = OwnerGuard(
            self._app,
            secret=None if secret is None else secret.get_secret_value(),
            audiences=[served.topic for served in rocketmq_addresses(self._card)],
        )
        return Bridge(
            guard,
            consumers=self._consumers(connection, address, rate),
            caller_of=guard.caller,
            producer=producer,
            reply_topics=config.reply_topics,
            timeouts=config.timeouts,
            limits=config.limits,
            slots=slots,
            instance_consumer=LiteConsumer(connection, config.state_topic, config.state_group, connect_timeout=connect),
            instance=instance,
            path=path,
            fails_tasks=self._fails_tasks,
            blobs=config.blobs,
        )

    def _consumers(self, connection: Connection, address: Address, rate: RateLimit | None) -> dict[Tier, GroupConsumer]:
        limits, timeouts = self._config.limits, self._config.timeouts
        topics = {Tier.NORMAL: address.topic}
        if address == rocketmq_addresses(self._card)[0]:
            topics |= priority_topics(self._card)
        consumers = {}
        for tier, topic in topics.items():
            consumers[tier] = GroupConsumer(
                connection,
                topic,
                (self._group if tier is Tier.NORMAL else None) or f"{topic}ConsumerGroup",
                # Urgent ones are at hand when a place becomes free: else normal ones would take it.
                concurrency=limits.concurrency * (2 if tier is Tier.HIGH else 1),
                lease=timeouts.lease,
                rate=rate,
                connect_timeout=timeouts.connect,
            )
        return consumers

    def _http_interface(self, served: str) -> str:
        """URL of the JSON-RPC interface for the card."""
        listed = urlsplit(jsonrpc_url(self._written) or "")
        if self._public_url is not None:
            return self._public_url
        if (listed.hostname or "") not in _LOOPBACK:
            return listed.geturl()
        return served + (listed.path or "/")

    def _with_card(self, app: Any) -> Any:
        body = json.dumps(card_to_dict(self._card), ensure_ascii=False).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]

        async def serve(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and scope["path"] == CARD_PATH:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": body if scope["method"] == "GET" else b""})
                return
            await app(scope, receive, send)

        return serve


def _rate(per_second: float | None) -> RateLimit | None:
    return None if per_second is None else RateLimit(per_second, clock=asyncio.get_running_loop().time)


def _load(card: CardSource) -> AgentCard:
    if isinstance(card, str) and card.lstrip().startswith("{"):
        return parse_card(card)
    if isinstance(card, str | os.PathLike):
        return read_card(card)
    return parse_card(card)
