"""`DevBroker`: the embedded broker from start to stop."""

from __future__ import annotations

import asyncio
import logging
import secrets
from pathlib import Path
from typing import Any, Self

import grpc

from agentscope_rocketmq.dev.embedded.clients import Clients
from agentscope_rocketmq.dev.embedded.engine import Engine
from agentscope_rocketmq.dev.embedded.handles import Handles
from agentscope_rocketmq.dev.embedded.reading import Reader
from agentscope_rocketmq.dev.embedded.refusal import Refused
from agentscope_rocketmq.dev.embedded.remoting import Remoting
from agentscope_rocketmq.dev.embedded.servicer import BROKER_NAME, Servicer
from agentscope_rocketmq.dev.embedded.settings import MIB, Settings
from agentscope_rocketmq.dev.embedded.store import Store
from agentscope_rocketmq.errors import ClosedError, ConfigurationError
from agentscope_rocketmq.rocketmq.lifecycle import Closing
from agentscope_rocketmq.rocketmq.protocol import add_servicer

__all__ = ["DevBroker"]

logger = logging.getLogger(__name__)

_TIDY_INTERVAL = 30.0
# Calls in flight have this long to end by themselves, then they are cut.
_STOP_GRACE = 0.5
# Seconds that a close may take: writing what is left, at the most.
_CLOSE_TIMEOUT = 30.0
_MOST_CALLS = 20_000
# As a proxy: a full batch of the largest messages.
_GRPC_BYTES = 130 * MIB
_GRPC_OPTIONS = (
    ("grpc.max_receive_message_length", _GRPC_BYTES),
    ("grpc.max_send_message_length", _GRPC_BYTES),
    # Two brokers must not share a port by accident.
    ("grpc.so_reuseport", 0),
    # A client whose machine is gone without a word is noticed.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
)


class DevBroker:
    """A RocketMQ for development, in this process: the gRPC protocol of RocketMQ 5 with LiteTopics, over SQLite.

    Use it as an async context manager. It listens without encryption or authentication; keep it on 127.0.0.1.

    Args:
        port: TCP port; 0 lets the kernel choose one, which `endpoint` tells.
        data: Folder to keep topics, messages and offsets in, made where it does not exist: a send or ack that was
            acknowledged survives the death of this process. None forgets everything at the end.
        host: Address to listen on.
        namesrv_port: TCP port of `namesrv`; 0 lets the kernel choose one.
        strict: Topics and groups must have been made (`create_topic`, `create_group`); by default first use does.
        fsync: With `data`, what is acknowledged is on the disk and survives the machine's death as well. False is
            faster.
        max_body_bytes: Largest body of a message; RocketMQ's own default is 4 MiB.
        max_lite_topic_length: Longest name of a LiteTopic, in characters.
        retention: Seconds after which messages are deleted, consumed or not.
        settings: All of the above but ports, data and host, and more; None builds them from the other arguments.

    Raises:
        ConfigurationError: On entering: the port is taken, or the data folder can't be used.
    """

    def __init__(
        self,
        port: int = 0,
        data: Path | str | None = None,
        *,
        host: str = "127.0.0.1",
        namesrv_port: int = 0,
        strict: bool = False,
        fsync: bool = True,
        max_body_bytes: int = 4 * MIB,
        max_lite_topic_length: int = 64,
        retention: float = 72 * 3600.0,
        settings: Settings | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._namesrv_port = namesrv_port
        self._settings = settings or Settings(
            strict=strict,
            fsync=fsync,
            max_body_bytes=max_body_bytes,
            max_lite_topic_length=max_lite_topic_length,
            retention=retention,
        )
        self._store = Store(None if data is None else Path(data), fsync=self._settings.fsync)
        self._engine: Engine | None = None
        self._servicer: Servicer | None = None
        self._started = False
        self._closing = Closing(limit=_CLOSE_TIMEOUT, name="rocketmq-embedded.close")
        self._server: Any = None
        self._remoting: Remoting | None = None
        self._tidying: asyncio.Task[None] | None = None

    @property
    def endpoint(self) -> str:
        """`host:port` for `ROCKETMQ_ENDPOINT`.

        Raises:
            ClosedError: It does not run.
        """
        self._running()
        return f"{self._host}:{self._port}"

    @property
    def namesrv(self) -> str:
        """`host:port` for `ROCKETMQ_NAMESRV`, where `agentscope-rocketmq provision` makes topics and groups.

        Raises:
            ClosedError: It does not run.
        """
        self._running()
        assert self._remoting is not None  # noqa: S101  (set with the engine)
        return self._remoting.address

    async def start(self) -> None:
        """Load what `data` has, and listen.

        Raises:
            ConfigurationError: A port is taken, or the data folder can't be used.
            ClosedError: It was started before.
        """
        if self._started:
            raise ClosedError("This broker was started before: make another one.")
        self._started = True
        await self._store.open()
        try:
            await self._serve()
        except BaseException:
            await self._store.aclose()
            raise

    async def _serve(self) -> None:
        clients = Clients(self._settings)
        engine = Engine(self._store, self._settings, alive=clients.is_alive, evicted=clients.evict)
        try:
            await self._listen(engine, clients)
        except BaseException:
            engine.close()
            raise
        self._engine = engine
        self._tidying = asyncio.create_task(self._tidy(engine), name="rocketmq-embedded.tidy")

    async def _listen(self, engine: Engine, clients: Clients) -> None:
        await engine.load()
        reader = Reader(engine, Handles(await self._secret()))
        servicer = Servicer(engine, reader, clients, self._settings, host=self._host)
        server = grpc.aio.server(options=_GRPC_OPTIONS, maximum_concurrent_rpcs=_MOST_CALLS)
        add_servicer(servicer, server)
        try:
            port = server.add_insecure_port(f"{self._host}:{self._port}")
        except RuntimeError as error:
            raise _port_taken(self._host, self._port) from error
        servicer.port = self._port = port
        engine.store_host = f"{self._host}:{port}"
        remoting = Remoting(engine.catalog, self._store, broker_name=BROKER_NAME)
        await server.start()
        try:
            # Last: who can connect to this port can use the broker.
            await remoting.start(self._host, self._namesrv_port)
        except BaseException as error:
            await server.stop(None)
            if isinstance(error, OSError):
                raise _port_taken(self._host, self._namesrv_port) from error
            raise
        self._server, self._servicer, self._remoting = server, servicer, remoting

    async def aclose(self) -> None:
        """Stop listening, end the calls in flight, write what is left. It goes on when the caller is cancelled."""
        if self._engine is not None or self._closing.begun:
            await self._closing(self._close)

    async def _close(self) -> None:
        engine, self._engine = self._engine, None
        assert engine and self._servicer and self._remoting and self._tidying  # noqa: S101, PT018  (set together)
        try:
            self._tidying.cancel()
            await asyncio.gather(self._tidying, return_exceptions=True)
            self._servicer.close()
            await self._server.stop(_STOP_GRACE)
            await self._remoting.aclose()
        finally:
            engine.close()
            await self._store.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def create_topic(
        self, name: str, message_type: str = "NORMAL", *, queues: int = 8, lite_expiration_minutes: int = -1
    ) -> None:
        """Make a topic, or change one.

        Args:
            name: Its name.
            message_type: NORMAL, FIFO, LITE or PRIORITY; once it has one it keeps it.
            queues: How many queues it has at least; the levels of a PRIORITY topic.
            lite_expiration_minutes: When its LiteTopics are deleted, counted from their last message; -1 for never.

        Raises:
            ConfigurationError: That type is not modelled, or not the topic's; or the name is illegal.
        """
        engine = self._running()
        try:
            attributes = {"message.type": message_type, "lite.topic.expiration": str(lite_expiration_minutes)}
            engine.catalog.put_topic(name, attributes, queues=queues)
        except Refused as refused:
            raise ConfigurationError(f"Topic {name!r} can't be made: {refused.text}.") from refused
        await self._store.committed()

    async def create_group(
        self,
        name: str,
        *,
        lite_bind_topic: str | None = None,
        exclusive: bool = True,
        ordered: bool | None = None,
        lite_quota: int | None = None,
        max_attempts: int | None = None,
    ) -> None:
        """Make a consumer group, or change one.

        Args:
            name: Its name.
            lite_bind_topic: The LITE topic that it reads; None makes an ordinary group.
            exclusive: Each LiteTopic has one reader at a time, and a new one takes it over; False shares it.
            ordered: An ordinary group reads each queue in order; None does so for FIFO topics.
            lite_quota: LiteTopics that one client may subscribe; None takes the broker's.
            max_attempts: Deliveries of a message after which it becomes a dead letter; None takes the broker's.

        Raises:
            ConfigurationError: A name is illegal, or the topic is not a LITE topic.
        """
        engine = self._running()
        attributes = {}
        if lite_bind_topic is not None:
            attributes["lite.bind.topic"] = lite_bind_topic
            attributes["lite.sub.model"] = "Exclusive" if exclusive else "Shared"
            attributes["lite.sub.client.quota"] = str(lite_quota or self._settings.lite_quota)
        try:
            engine.catalog.put_group(name, attributes, ordered=ordered, max_attempts=max_attempts)
        except Refused as refused:
            raise ConfigurationError(f"Group {name!r} can't be made: {refused.text}.") from refused
        await self._store.committed()

    def _running(self) -> Engine:
        if self._engine is None:
            raise ClosedError("The embedded broker does not run: enter it with `async with` first.")
        return self._engine

    async def _secret(self) -> bytes:
        for (value,) in await self._store.rows("SELECT value FROM meta WHERE name = 'secret'"):
            return bytes(value)
        secret = secrets.token_bytes(32)
        self._store.put("meta", ("secret",), (secret,))
        return secret

    async def _tidy(self, engine: Engine) -> None:
        while True:
            await asyncio.sleep(_TIDY_INTERVAL)
            try:
                await engine.tidy()
            except Exception:
                logger.exception("The embedded broker failed to delete what is old, and will try again")


def _port_taken(host: str, port: int) -> ConfigurationError:
    return ConfigurationError(
        f"The embedded broker can't listen on {host}:{port}: stop what listens there, or choose another port."
    )
