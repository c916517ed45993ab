"""gRPC channels to the proxies of one RocketMQ cluster, shared by all producers and consumers of a process."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import platform
import socket
import ssl
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Self

import grpc

from agentscope_rocketmq.config import endpoint_key, parse_endpoints
from agentscope_rocketmq.errors import ClosedError, ConfigurationError
from agentscope_rocketmq.rocketmq.lifecycle import Closing
from agentscope_rocketmq.rocketmq.protocol import MessagingServiceStub, definition

if TYPE_CHECKING:
    from pathlib import Path

    from agentscope_rocketmq.config import RocketMQConfig

__all__ = ["Connection", "Endpoint", "new_client_id", "speaks_tls", "user_agent"]

logger = logging.getLogger(__name__)

_PROBE_SECONDS = 2.0
_CLOSE_SECONDS = 3.0

# One message may be as large as the broker allows (4 MiB unless raised there) plus its properties.
_MAX_GRPC_MESSAGE = 128 * 1024 * 1024

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", _MAX_GRPC_MESSAGE),
    ("grpc.max_send_message_length", _MAX_GRPC_MESSAGE),
    ("grpc.enable_retries", 0),
    # A proxy that restarts is found again within a second, not after gRPC's two minutes of back-off.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Despite its name, how long one attempt to connect may take: a handshake over a long way takes its time.
    ("grpc.min_reconnect_backoff_ms", 5000),
    # Channels of one process must not share a subchannel, or one dead connection looks like many.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(slots=True)
class Endpoint:
    """One proxy and the channel to it.

    Attributes:
        address: `host:port`.
        channel: Its gRPC channel, which reconnects by itself.
        stub: The protocol's calls over that channel.
    """

    address: str
    channel: Any
    stub: Any


class Connection:
    """The way to one RocketMQ cluster: endpoints, credentials, TLS.

    A cluster's proxies are equals: whichever endpoint of the list answers is used for everything, and when it fails
    the next one is. (In RocketMQ's cluster mode, the only one that serves LiteTopics, a proxy passes each call on to
    the broker concerned.) Opening a connection does no I/O; the first call does.

    Args:
        endpoint: `host:port` of a proxy's gRPC port; several separated by `;`.
        namespace: RocketMQ namespace for all topics and groups; empty for none.
        access_key: Access key; None sends calls unsigned.
        secret_key: Secret key that belongs to it.
        tls: Encrypt.
        tls_ca: PEM file of the authorities to trust; None trusts gRPC's built-in ones.

    Raises:
        ConfigurationError: A malformed endpoint, or an unreadable `tls_ca`.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        namespace: str = "",
        access_key: str | None = None,
        secret_key: str | None = None,
        tls: bool = False,
        tls_ca: Path | None = None,
    ) -> None:
        self.namespace = namespace
        self._addresses = parse_endpoints(endpoint)
        self._access_key = access_key
        self._secret_key = secret_key
        self._credentials = _channel_credentials(tls_ca) if tls else None
        self._endpoints: dict[str, Endpoint] = {}
        self._index = 0
        self._closed = False
        self._closing = Closing(limit=_CLOSE_SECONDS, name=f"connection[{self.address}].close")

    @classmethod
    def from_config(
        cls, config: RocketMQConfig, *, endpoint: str | None = None, namespace: str | None = None
    ) -> Connection:
        """A connection with the credentials of a configuration.

        Args:
            config: Where credentials and TLS come from.
            endpoint: Another endpoint than the configuration's. Credentials are sent only to the configuration's
                own endpoints: a card must not be able to collect them.
            namespace: Another namespace than the configuration's.
        """
        target = endpoint or config.endpoint
        trusted = endpoint_key(target) <= endpoint_key(config.endpoint)
        if config.access_key is not None and not trusted:
            logger.warning(
                "Calls to RocketMQ at %s are sent without the credentials of this configuration, whose endpoint is %s: "
                "a card must not be able to collect them. If they are for it too, set ROCKETMQ_ENDPOINT to it.",
                target,
                config.endpoint,
            )
        secret = config.secret_key.get_secret_value() if config.secret_key is not None else None
        return cls(
            target,
            namespace=config.namespace if namespace is None else namespace,
            access_key=config.access_key if trusted else None,
            secret_key=secret if trusted else None,
            tls=config.tls,
            tls_ca=config.tls_ca,
        )

    def __repr__(self) -> str:
        return f"Connection({self.address!r}, namespace={self.namespace!r})"

    @property
    def address(self) -> str:
        """The endpoints as configured, separated by `;`."""
        return ";".join(self._addresses)

    @property
    def addresses(self) -> tuple[str, ...]:
        """The endpoints as configured, each `host:port`."""
        return self._addresses

    @property
    def encrypted(self) -> bool:
        """Whether it uses TLS."""
        return self._credentials is not None

    def endpoint(self, *, failed: Endpoint | None = None) -> Endpoint:
        """The endpoint to use now.

        Args:
            failed: An endpoint that just failed its user; when it is the current one, the next in the list becomes
                current, and its channel is not used again: a connection whose far end is gone without a word would
                keep gRPC waiting for many minutes. None only asks.

        Raises:
            ClosedError: The connection is closed.
        """
        if self._closed:
            raise ClosedError(f"The connection to RocketMQ at {self.address} is closed.")
        if failed is not None and failed is self._endpoints.get(self._current):
            # Calls of others may still be on its channel; gRPC closes it when nobody refers to it any more.
            del self._endpoints[failed.address]
            self._index = (self._index + 1) % len(self._addresses)
            if len(self._addresses) > 1:
                logger.warning("RocketMQ proxy %s failed; going on with %s", failed.address, self._current)
        return self._open(self._current)

    @property
    def _current(self) -> str:
        return self._addresses[self._index]

    def _open(self, address: str) -> Endpoint:
        endpoint = self._endpoints.get(address)
        if endpoint is None:
            if self._credentials is None:
                channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
            else:
                channel = grpc.aio.secure_channel(address, self._credentials, options=_CHANNEL_OPTIONS)
            endpoint = Endpoint(address, channel, MessagingServiceStub(channel))
            self._endpoints[address] = endpoint
        return endpoint

    def resource(self, name: str) -> Any:
        """The protocol's `Resource` for a topic or group in this connection's namespace.

        The proxies of Apache RocketMQ look at the name alone, so it is the full one; those that know namespaces leave
        a full name as it is (NamespaceUtil#wrapNamespace).
        """
        prefix = f"{self.namespace}%" if self.namespace else ""
        full_name = name if name.startswith(prefix) else prefix + name
        return definition.Resource(resource_namespace=self.namespace, name=full_name)

    def endpoints_message(self) -> Any:
        """The protocol's `Endpoints` of this connection, as routes and settings want it."""
        message = definition.Endpoints(scheme=_scheme(self._addresses[0]))
        for address in self._addresses:
            host, _, port = address.rpartition(":")
            message.addresses.add(host=host.strip("[]"), port=int(port))
        return message

    def metadata(self, client_id: str) -> tuple[tuple[str, str], ...]:
        """Call metadata for a client id, signed (MQv2-HMAC-SHA1) where there are credentials."""
        # The official client signs local time marked as UTC; brokers compare nothing but the signature.
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        metadata = (
            ("x-mq-language", "PYTHON"),
            ("x-mq-protocol", "GRPC_V2"),
            ("x-mq-client-version", _CLIENT_VERSION),
            ("x-mq-date-time", now),
            ("x-mq-request-id", str(uuid.uuid4())),
            ("x-mq-client-id", client_id),
            ("x-mq-namespace", self.namespace),
        )
        if self._access_key is None or self._secret_key is None:
            return metadata
        signature = hmac.new(self._secret_key.encode(), now.encode(), hashlib.sha1).hexdigest()
        authorization = (
            f"MQv2-HMAC-SHA1 Credential={self._access_key}, SignedHeaders=x-mq-date-time, Signature={signature}"
        )
        return (*metadata, ("authorization", authorization))

    async def aclose(self) -> None:
        """Close all channels. Producers and consumers are to be closed before. Repeated calls are safe."""
        self._closed = True
        await self._closing(self._aclose)

    async def _aclose(self) -> None:
        endpoints, self._endpoints = list(self._endpoints.values()), {}
        await asyncio.gather(*(endpoint.channel.close() for endpoint in endpoints))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


# The version of the stubs; the proxy derives from it which answer codes a client knows.
_CLIENT_VERSION = version("rocketmq-python-client")


def user_agent() -> Any:
    """The protocol's `UA` of this process."""
    return definition.UA(
        language=definition.Language.PYTHON,
        version=_CLIENT_VERSION,
        platform=platform.platform(),
        hostname=socket.gethostname(),
    )


def new_client_id() -> str:
    """A client id that no other client has: the broker keeps settings and subscriptions by it."""
    return f"{socket.gethostname()}@{os.getpid()}@{uuid.uuid4().hex}"


async def speaks_tls(address: str) -> bool:
    """Whether a TLS server listens there: why a plain-text connection to it was closed.

    Args:
        address: `host:port`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent over it
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
    except OSError:  # a refused handshake and a timeout are some too
        return False
    writer.transport.abort()
    return True


def _channel_credentials(tls_ca: Path | None) -> Any:
    if tls_ca is None:
        return grpc.ssl_channel_credentials()
    try:
        authorities = tls_ca.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"The certificate authorities in {tls_ca} can't be read ({error.strerror}): "
            "give a readable PEM file as ROCKETMQ_TLS_CA."
        ) from error
    try:
        # gRPC would only say of a file that it can't use that no connection came about.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=authorities.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigurationError(
            f"{tls_ca} holds no certificate authorities ({error}): give a PEM file as ROCKETMQ_TLS_CA."
        ) from error
    return grpc.ssl_channel_credentials(root_certificates=authorities)


def _scheme(address: str) -> Any:
    host = address.rpartition(":")[0]
    if host.startswith("["):
        return definition.AddressScheme.IPv6
    if host.replace(".", "").isdigit():
        return definition.AddressScheme.IPv4
    return definition.AddressScheme.DOMAIN_NAME
