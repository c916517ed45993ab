"""RocketMQ: the caller's side. Reads an agent's card, chooses RocketMQ, and hands out clients and agents."""

from __future__ import annotations

import asyncio
import logging
import uuid
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary, WeakSet, finalize

import httpx
from a2a.client import ClientCallContext, ClientCallInterceptor, ClientConfig, ClientFactory
from a2a.client.transports.jsonrpc import JsonRpcTransport
from a2a.compat.v0_3.jsonrpc_transport import CompatJsonRpcTransport
from a2a.compat.v0_3.versions import is_legacy_version
from a2a.utils.constants import PROTOCOL_VERSION_1_0, VERSION_HEADER

from agentscope_rocketmq.card import (
    JSONRPC,
    ROCKETMQ,
    Address,
    Choice,
    choose,
    large_bodies,
    parse_card,
    priority_topics,
    read_card,
    rocketmq_addresses,
)
from agentscope_rocketmq.carrier import Carrier
from agentscope_rocketmq.channels import ReplyChannels
from agentscope_rocketmq.config import RocketMQConfig, endpoint_key
from agentscope_rocketmq.envelope import ACK_TIMEOUT_HEADER, TOTAL_TIMEOUT_HEADER
from agentscope_rocketmq.errors import ClosedError, ConfigurationError
from agentscope_rocketmq.fetch import CardFetcher, default_cache
from agentscope_rocketmq.priority import PRIORITY_HEADER, Tier
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.lifecycle import Closing, Home
from agentscope_rocketmq.rocketmq.litepool import LitePool
from agentscope_rocketmq.rocketmq.producer import Producer
from agentscope_rocketmq.routes import InstanceRoutes
from agentscope_rocketmq.session import ANONYMOUS, Session, lite_topic_name
from agentscope_rocketmq.transport import EXTENSIONS_HEADER, RocketMQTransport

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from a2a.client import Client
    from a2a.client.interceptors import AfterArgs, BeforeArgs
    from a2a.client.transports.base import ClientTransport
    from a2a.types import AgentCard
    from agentscope.agent import A2AAgent

    from agentscope_rocketmq.config import Timeouts

    AgentSource = AgentCard | Mapping[str, Any] | str | os.PathLike[str]

__all__ = ["RocketMQ", "call_context"]

logger = logging.getLogger(__name__)

_KEEP_CARDS = object()
# Far beyond what anything in it may take.
_CLOSE_SECONDS = 30.0
OBSERVER_SUFFIX = "_OBSERVER"
"""What the name of the observers' group has behind that of the reply group."""


def call_context(
    *,
    ack: float | None = None,
    idle: float | None = None,
    total: float | None = None,
    priority: str | None = None,
) -> ClientCallContext:
    """Timeouts and urgency of one call, to be given as `context=` to a method of an a2a-sdk client.

    Args:
        ack: Seconds for a worker to take the request; None keeps the client's.
        idle: Seconds between two signs of life of the response; None keeps the client's.
        total: Seconds for the call as a whole; None keeps the client's.
        priority: `high`, `normal` or `low`; None keeps the client's.
    """
    given = {ACK_TIMEOUT_HEADER: ack, TOTAL_TIMEOUT_HEADER: total, PRIORITY_HEADER: priority}
    parameters = {name: str(value) for name, value in given.items() if value is not None}
    return ClientCallContext(timeout=idle, service_parameters=parameters or None)


class RocketMQ:
    """Calls A2A agents over RocketMQ. One for each process: its connections are shared by everything it hands out.

    Args:
        config: RocketMQ settings; None reads the environment.
        card_cache: Folder in which fetched cards are kept, so that an agent whose processes are all down can still
            be sent to; None keeps them in memory only. Default: the user's cache folder.
    """

    def __init__(self, config: RocketMQConfig | None = None, *, card_cache: Path | object | None = _KEEP_CARDS) -> None:
        self.config = RocketMQConfig.from_env() if config is None else config
        cache: Any = default_cache() if card_cache is _KEEP_CARDS else card_cache
        self._cards = CardFetcher(cache)
        self._carriers: dict[tuple[frozenset[str], str, bool], tuple[Connection, Carrier]] = {}
        self._clients: WeakKeyDictionary[Any, Choice] = WeakKeyDictionary()
        # Those of clients over JSON-RPC; those over RocketMQ end with their carrier.
        self._https: WeakSet[httpx.AsyncClient] = WeakSet()
        self._home = Home("This RocketMQ object")
        self._closing = Closing(limit=_CLOSE_SECONDS, name="rocketmq.close")

    async def card(self, agent: AgentSource) -> AgentCard:
        """The card of an agent.

        Args:
            agent: Its base URL (the card is fetched, and kept), a path to a card file, a dict, or an `AgentCard`.

        Raises:
            CardError: It can't be had or read.
        """
        if isinstance(agent, str) and agent.startswith(("http://", "https://")):
            return await self._cards.fetch(agent)
        if isinstance(agent, str) and agent.lstrip().startswith("{"):
            return parse_card(agent)
        if isinstance(agent, str) or hasattr(agent, "__fspath__"):
            return read_card(agent)
        return parse_card(agent)

    async def client(
        self,
        agent: AgentSource,
        *,
        session: str | None = None,
        owner: str | None = None,
        allow_jsonrpc: bool = False,
        timeouts: Timeouts | None = None,
        interceptors: Sequence[ClientCallInterceptor] = (),
        extensions: Sequence[str] = (),
        headers: Mapping[str, str] | None = None,
        priority: str | None = None,
    ) -> Client:
        """An a2a-sdk client for an agent, over RocketMQ where its card lists it. Close it, or use `async with`.

        Args:
            agent: As for `card`.
            session: Name of the conversation: its answers come on a LiteTopic of their own, and it is the A2A context
                of messages that name none. None takes a fresh random one, and leaves contexts to the server.
            owner: On whose behalf: a named session belongs to the first owner that uses it. None where nobody is
                authenticated: nothing is checked then.
            allow_jsonrpc: Take JSON-RPC over HTTP when the card lists no RocketMQ interface; else that is an error.
            timeouts: Defaults of its calls; None takes those of the configuration. `call_context` sets them per call.
            interceptors: The SDK's, for authentication and the like.
            extensions: URIs of A2A extensions to ask for.
            headers: HTTP headers to carry with each request.
            priority: How urgent its requests are, for agents that have tiers: `high`, `normal` or `low`; None is
                normal. `call_context` sets it per call.

        Returns:
            The client. `choice(client)` says which interface it took.

        Raises:
            ConfigurationError: The session's name is empty or no text, or so is the owner's.
            IllegalRequest: The priority is none of the three.
            CardError: The card can't be had, or lists no interface that can be used.
            BrokerError: RocketMQ can't be reached, or reply topic, group or credentials are refused.
            WrongEventLoop: This object lives in another event loop.
            ClosedError: This object is closed.
        """
        self._check()
        self._lite_topic(session, owner)  # refuses names that are none before anything is connected
        card = await self.card(agent)
        choice = choose(card, allow_jsonrpc=allow_jsonrpc)
        if priority is not None:
            headers = {**(headers or {}), PRIORITY_HEADER: Tier.parse(priority)}
            if headers[PRIORITY_HEADER] not in (Tier.NORMAL, *priority_topics(card)):
                logger.warning("Agent %r has no priority tiers: its requests are all alike", card.name)
        transport = await self._transport(
            card, choice, (session, owner), timeouts or self.config.timeouts, extensions, headers
        )
        from a2a.client.base_client import BaseClient  # noqa: PLC0415  (what ClientFactory.create makes)

        guards = [] if session is None else [_ContextIsSession(session)]
        client = BaseClient(card, ClientConfig(streaming=True), transport, [*guards, *interceptors])
        finalize(client, _warn_unless_closed, transport.httpx_client, self._closing, card.name).atexit = False
        self._clients[client] = choice
        logger.info("Agent %r is called over %s at %s", card.name, choice.binding, choice.url)
        return client

    async def agent(
        self,
        agent: AgentSource,
        *,
        session: str | None = None,
        owner: str | None = None,
        allow_jsonrpc: bool = False,
        timeouts: Timeouts | None = None,
        interceptors: Sequence[ClientCallInterceptor] = (),
        headers: Mapping[str, str] | None = None,
        priority: str | None = None,
    ) -> A2AAgent:
        """A remote agent as an AgentScope `A2AAgent` (arguments and errors as `client`). Close it, or `async with`."""
        from agentscope.state import A2AAgentState  # noqa: PLC0415  (takes seconds to import)

        from agentscope_rocketmq.remote import NotesRestarts, RemoteAgent  # noqa: PLC0415

        client = await self.client(
            agent,
            session=session,
            owner=owner,
            allow_jsonrpc=allow_jsonrpc,
            timeouts=timeouts,
            interceptors=[NotesRestarts(), *interceptors],
            headers=headers,
            priority=priority,
        )
        state = A2AAgentState() if session is None else A2AAgentState(context_id=session)
        remote = RemoteAgent(await self.card(agent), client=client, state=state)
        self._clients[remote] = self._clients[client]
        return remote

    def session(self, name: str, *, owner: str | None = None) -> Session:
        """A session by its name: its events, from any place on, in this process or another one.

        It is that of the configuration's cluster. Nothing is sent or read before it is used.

        Args:
            name: The name that its clients and agents were given.
            owner: On whose behalf: a session belongs to the first owner that uses it. None where nobody is
                authenticated: nothing is checked then.

        Raises:
            ConfigurationError: The name is empty or no text, or so is the owner's.
            WrongEventLoop: This object lives in another event loop.
            ClosedError: This object is closed.
        """
        self._check()
        self._lite_topic(name, owner)
        return self._session(name, owner, self.carrier(None))

    def choice(self, client: Client | A2AAgent) -> Choice:
        """Which interface of its card a client or agent of this object took: label, URL and A2A version."""
        return self._clients[client]

    def client_config(self, **options: Any) -> ClientConfig:
        """A `ClientConfig` for one's own `ClientFactory`, that knows the RocketMQ interface and prefers it.

        Args:
            **options: Other fields of `ClientConfig`.
        """
        bindings = [ROCKETMQ, *options.pop("supported_protocol_bindings", [JSONRPC])]
        return ClientConfig(
            supported_protocol_bindings=list(dict.fromkeys(bindings)),
            use_client_preference=options.pop("use_client_preference", True),
            **options,
        )

    def register(self, factory: ClientFactory, *, session: str | None = None) -> None:
        """Teach one's own `ClientFactory` to make clients over RocketMQ.

        Each client it makes has a fresh session unless one is given here. RocketMQ is connected to by the first call.

        Args:
            factory: Made with `client_config()`, or with `RocketMQ` in its `supported_protocol_bindings`.
            session: One session for all its clients; None for one each.

        Raises:
            ConfigurationError: The factory's config does not list `RocketMQ`: it would silently take another interface.
                Or the session's name is empty or no text.
        """
        self._lite_topic(session, None)
        config: ClientConfig = factory._config  # noqa: SLF001  (the factory has no public view of it)
        if ROCKETMQ not in config.supported_protocol_bindings:
            raise ConfigurationError(
                "This ClientFactory would never choose RocketMQ: its ClientConfig.supported_protocol_bindings does not "
                "list it. Make it with ClientFactory(rocketmq.client_config())."
            )

        def produce(card: AgentCard, url: str, _config: ClientConfig) -> ClientTransport:
            entries = [e for e in card.supported_interfaces if e.protocol_binding == ROCKETMQ and e.url == url]
            best = ClientFactory._find_best_interface(entries)  # noqa: SLF001  (so that both see the same)
            version = best.protocol_version if best else PROTOCOL_VERSION_1_0
            choice = Choice(binding=ROCKETMQ, url=url, version=version)
            return self._over_rocketmq(card, choice, (session, None), self.config.timeouts, (), None)

        factory.register(ROCKETMQ, produce)

    async def aclose(self) -> None:
        """Close all connections; clients and agents handed out end with it. Repeated calls are safe.

        A call that is cancelled does not stop the closing, which takes some seconds at most: call again to wait for it.
        """
        self._home.check()
        await self._closing(self._aclose)

    async def _aclose(self) -> None:
        ends = [http.aclose() for http in list(self._https)]
        ends += [_close(connection, carrier) for connection, carrier in self._carriers.values()]
        results = await asyncio.gather(*ends, return_exceptions=True)
        self._carriers.clear()
        for error in results:
            if error is not None:
                raise error

    def __del__(self) -> None:
        if getattr(self, "_carriers", None) and not self._closing.begun:
            warnings.warn(
                "A RocketMQ object was dropped without being closed: its connections and sessions stay until this "
                "process ends. Use `async with RocketMQ(...)`, or await its aclose().",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )

    async def __aenter__(self) -> Self:
        self._check()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _transport(
        self,
        card: AgentCard,
        choice: Choice,
        session: tuple[str | None, str | None],
        timeouts: Timeouts,
        extensions: Sequence[str],
        headers: Mapping[str, str] | None,
    ) -> JsonRpcTransport | CompatJsonRpcTransport:
        if choice.binding == ROCKETMQ:
            # Connect now rather than in the first call: whoever asks for a client wants to know.
            await self.carrier(Address.parse(choice.url)).start()
            return self._over_rocketmq(card, choice, session, timeouts, extensions, headers)
        http = httpx.AsyncClient(**_options(choice, timeouts, extensions, headers))
        self._https.add(http)
        return _json_rpc(card, choice, http)

    def _over_rocketmq(
        self,
        card: AgentCard,
        choice: Choice,
        session: tuple[str | None, str | None],
        timeouts: Timeouts,
        extensions: Sequence[str],
        headers: Mapping[str, str] | None,
    ) -> JsonRpcTransport | CompatJsonRpcTransport:
        address = Address.parse(choice.url)
        carrier = self.carrier(address)
        transport = RocketMQTransport(
            address,
            session=self._session(*session, carrier),
            carrier=carrier,
            timeouts=timeouts,
            tiers=priority_topics(card) if address == rocketmq_addresses(card)[0] else None,
            large=large_bodies(card),
        )
        options = _options(choice, timeouts, extensions, headers)
        # httpx can't read a list of endpoints, and this transport knows them.
        url = replace(address, endpoint=address.endpoint.partition(";")[0]).url
        return _json_rpc(card, replace(choice, url=url), httpx.AsyncClient(transport=transport, **options))

    def _session(self, name: str | None, owner: str | None, carrier: Carrier) -> Session:
        return Session(self._lite_topic(name, owner), carrier=carrier, name=name, owner=owner)

    def _lite_topic(self, session: str | None, owner: str | None) -> str:
        secret = self.config.a2a_secret
        return lite_topic_name(
            uuid.uuid4().hex if session is None else session,
            owner=ANONYMOUS if owner is None else owner,
            secret=None if secret is None else secret.get_secret_value(),
        )

    def _check(self) -> None:
        self._home.check()
        if self._closing.begun:
            raise ClosedError("This RocketMQ object is closed: make a new one.")

    def carrier(self, address: Address | None) -> Carrier:
        """What is shared by all that goes to the cluster of that address; None takes the configuration's."""
        if self._closing.begun:
            raise ClosedError("This RocketMQ object is closed: make a new one.")
        endpoint = self.config.endpoint if address is None else address.endpoint
        namespace = self.config.namespace if address is None else address.namespace
        secure = self.config.tls or (address is not None and address.secure)
        # One for each cluster, however cards spell it: a second one would take the sessions of the first over.
        key = (endpoint_key(endpoint), namespace, secure)
        if key not in self._carriers:
            config = self.config.model_copy(update={"tls": secure})
            connection = Connection.from_config(config, endpoint=endpoint, namespace=namespace)
            connect = config.timeouts.connect

            def read(group: str) -> ReplyChannels:
                consumer = LitePool(connection, config.reply_topic, group, connect_timeout=connect)
                return ReplyChannels(consumer, timeouts=config.timeouts, limits=config.limits, blobs=config.blobs)

            def make() -> tuple[Producer, ReplyChannels]:
                return Producer(connection, connect_timeout=connect), read(config.reply_group)

            def make_observers() -> ReplyChannels:
                return read(f"{config.reply_group}{OBSERVER_SUFFIX}")

            self._carriers[key] = (
                connection,
                Carrier(
                    make,
                    make_observers,
                    InstanceRoutes(config.state_topic),
                    limits=config.limits,
                    blobs=config.blobs,
                ),
            )
        return self._carriers[key][1]


def _options(
    choice: Choice, timeouts: Timeouts, extensions: Sequence[str], headers: Mapping[str, str] | None
) -> dict[str, Any]:
    """Options of the httpx client: explicit timeouts, since httpx's five seconds would end most agents' work."""
    all_headers = dict(headers or {})
    if not is_legacy_version(choice.version):
        # The SDK's transport leaves this to its factory.
        all_headers[VERSION_HEADER] = PROTOCOL_VERSION_1_0
    if extensions:
        all_headers[EXTENSIONS_HEADER] = ", ".join(extensions)
    timeout = httpx.Timeout(None, connect=timeouts.connect, read=timeouts.idle)
    return {"headers": all_headers, "timeout": timeout}


async def _close(connection: Connection, carrier: Carrier) -> None:
    try:
        await carrier.aclose()
    finally:
        await connection.aclose()


def _warn_unless_closed(http: httpx.AsyncClient, closing: Closing, agent: str) -> None:
    if not http.is_closed and not closing.begun:
        warnings.warn(
            f"A client of agent {agent!r} was dropped without being closed: its session stays subscribed until its "
            "RocketMQ object is closed. Use `async with await rocketmq.client(...)`, or await its close().",
            ResourceWarning,
            stacklevel=2,
        )


def _json_rpc(card: AgentCard, choice: Choice, http: httpx.AsyncClient) -> JsonRpcTransport | CompatJsonRpcTransport:
    kind = CompatJsonRpcTransport if is_legacy_version(choice.version) else JsonRpcTransport
    return kind(http, card, choice.url)


class _ContextIsSession(ClientCallInterceptor):
    """A message that names no context belongs to the session's."""

    def __init__(self, session: str) -> None:
        self._session = session

    async def before(self, args: BeforeArgs) -> None:
        if args.method in ("send_message", "send_message_streaming") and not args.input.message.context_id:
            args.input.message.context_id = self._session

    async def after(self, args: AfterArgs) -> None:
        pass
