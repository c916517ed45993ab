"""Everything about RocketMQ that an agent card must not carry: keys, reply topics, groups, time and size limits.

`RocketMQConfig.from_env()` reads the environment; every field can be given by hand instead. Values are checked at
once, and no credential appears in a repr, a log or an error.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Mapping  # noqa: TC003  (pydantic reads annotations at run time)
from pathlib import Path  # noqa: TC003

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from agentscope_rocketmq.blobs import BlobStore  # noqa: TC001  (pydantic reads annotations at run time)
from agentscope_rocketmq.errors import ConfigurationError

__all__ = ["Limits", "RocketMQConfig", "Timeouts", "endpoint_key", "parse_endpoints"]

_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")
_RESOURCE = re.compile(r"[%|A-Za-z0-9_-]{1,127}")
# What can stand in a signature's header: printable ASCII without the separators of its fields.
_ACCESS_KEY = re.compile(r"[!-+\--~]+")
_LOOPBACK = {"127.0.0.1", "::1"}
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"", "0", "false", "no", "off"}


def parse_endpoints(endpoint: str) -> tuple[str, ...]:
    """Split an endpoint list into its addresses.

    Args:
        endpoint: `host:port`, or several separated by `;` or `,`. An IPv6 host is written in brackets.

    Returns:
        The addresses as `host:port`, in the order given; the first that answers is used.

    Raises:
        ConfigurationError: Empty, or an entry that is not `host:port`.
    """
    addresses = tuple(part.strip() for part in re.split(r"[;,]", endpoint) if part.strip())
    if not addresses:
        raise ConfigurationError(
            "The RocketMQ endpoint is empty: give host:port of the proxy's gRPC port, e.g. 127.0.0.1:8081."
        )
    for address in addresses:
        match = _ADDRESS.fullmatch(address)
        if match is None or not 0 < int(match["port"]) < 65536:  # noqa: PLR2004
            raise ConfigurationError(
                f"{address!r} is not a RocketMQ endpoint: give host:port of the proxy's gRPC port "
                "(several separated by ';'), without a scheme, e.g. 127.0.0.1:8081."
            )
    return addresses


def endpoint_key(endpoint: str) -> frozenset[str]:
    """The cluster that an endpoint list names, whatever its spelling: equal for lists that surely mean the same.

    The order of the list, upper and lower case, forms of an IP address, and the names of this very machine's loopback
    (`localhost`, 127.0.0.1, ::1) make no difference. Other names are not resolved.

    Raises:
        ConfigurationError: As `parse_endpoints`.
    """
    split = (address.rpartition(":") for address in parse_endpoints(endpoint))
    return frozenset(f"{_host(host)}:{int(port)}" for host, _, port in split)


def _host(host: str) -> str:
    name = host.strip("[]").lower().removesuffix(".")
    with contextlib.suppress(ValueError):
        name = str(ipaddress.ip_address(name))
    return "localhost" if name in _LOOPBACK else name


class Timeouts(BaseModel):
    """How long to wait for what, in seconds. Idle and total time of a call are apart.

    Attributes:
        connect: To reach a broker that has not answered yet.
        send: For one message to be accepted by the broker, retries and reconnects included.
        ack: For a worker to take a request, from its sending: how long it may lie on the broker. It travels with the
            request: what no worker had taken by then is not begun. None: `idle` counts from the sending, and for that.
        idle: Between two signs of life of a response. A worker gives one for as long as its agent is at work, also
            when the agent says nothing, so this runs out when the worker is gone. None waits for ever.
        total: For a call from its sending to its last event. It travels with the request: what could not be begun
            before is not begun at all. None sets no such limit.
        lease: How long a request stays invisible to other workers without being renewed (10 s to 12 h, which is what
            a proxy takes). It is renewed every third of that while its agent works, so a dead worker's request goes to
            another one after at most this long.
        parts: How long to wait for the next part of a body that comes in parts. Then what came of it is dropped; the
            request is refused, the call whose answer it is gets an error.
        stall: How long a reader of a streamed response may leave its buffer full, and a listener of a session take
            nothing while a call of it waits, before it is cut off.
        drain: How long a stopping server waits for the requests it is still working on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    connect: float = Field(default=10.0, gt=0)
    send: float = Field(default=30.0, gt=0)
    ack: float | None = Field(default=None, gt=0)
    idle: float | None = Field(default=300.0, gt=0)
    total: float | None = Field(default=3600.0, gt=0)
    lease: float = Field(default=30.0, ge=10, le=12 * 3600)
    parts: float = Field(default=120.0, gt=0)
    stall: float = Field(default=30.0, gt=0)
    drain: float = Field(default=10.0, ge=0)


class Limits(BaseModel):
    """How much to hold at once. Everything beyond stays on the broker or gets a clear error.

    Attributes:
        concurrency: Requests that one server works on at a time; the rest waits on the broker. What waits for something
            else than a place (its turn in a conversation, another instance) is kept leased beside them, as many again.
        requests_per_second: Requests that one server takes from the broker, on average; after a rest a second's worth
            may come at once. None sets no limit.
        caller_share: Largest part of `concurrency` that one caller may have, above 0 and up to 1, so that one who sends
            much leaves room for others; one place at least. A caller is who a gateway says it is, else whose
            credentials come with the request, else a session.
        attempts: How often a request is delivered before it is given up: its task fails, and it becomes a
            dead letter. Each worker that dies or stops while it has it costs one. RocketMQ itself gives up at 16.
        request_bytes: Largest request body a server accepts, and largest a caller sends. What does not fit into a
            message (4 MiB) travels in parts, to servers whose card says that they read them.
        response_bytes: Largest single answer, or event of a stream, that a server sends and a caller accepts; in
            parts as well.
        spooled_bytes: Bodies that a process puts together from parts at one time, all of them, in bytes. A request
            waits for room, a response beyond it fails.
        spool_from_bytes: A body that is put together lies in a temporary file from this size on; below in memory.
        blob_bytes: What is larger than this goes to the blob store, where both sides share one (see `blobs`).
        response_buffer_bytes: What a response may pile up in memory while the broker is slow, each response.
        stream_buffer: Response messages that a caller holds for a slow reader, each call.
        stream_buffer_bytes: Their text, in bytes. One message may be larger; beyond that the broker holds the rest,
            but for one batch of 32 messages.
        listener_buffer: Events that a listener of a session may be behind while others of the session go on;
            `stream_buffer_bytes` bounds it as well.
        contexts: Conversations whose agents a server keeps in memory; the one idle longest is let go first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    concurrency: int = Field(default=16, ge=1, le=1024)
    requests_per_second: float | None = Field(default=None, gt=0)
    caller_share: float = Field(default=1.0, gt=0, le=1)
    attempts: int = Field(default=10, ge=1, le=15)
    request_bytes: int = Field(default=128 * 1024 * 1024, ge=1024)
    response_bytes: int = Field(default=128 * 1024 * 1024, ge=1024)
    spooled_bytes: int = Field(default=1024 * 1024 * 1024, ge=1024)
    spool_from_bytes: int = Field(default=4 * 1024 * 1024, ge=0)
    blob_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    response_buffer_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    stream_buffer: int = Field(default=256, ge=1)
    stream_buffer_bytes: int = Field(default=16 * 1024 * 1024, ge=1024)
    listener_buffer: int = Field(default=1000, ge=1)
    contexts: int = Field(default=10_000, ge=1)

    @model_validator(mode="after")
    def _one_body_fits(self) -> Limits:
        if self.spooled_bytes < max(self.request_bytes, self.response_bytes):
            raise ValueError("spooled_bytes must be at least request_bytes and response_bytes, or no such body fits")
        return self


class RocketMQConfig(BaseModel):
    """Where RocketMQ is and how this process uses it.

    Attributes:
        endpoint: `host:port` of the proxy's gRPC port; several separated by `;`.
        namespace: RocketMQ namespace of topics and groups; empty for none.
        access_key: Access key (AK) to sign calls with; None sends them unsigned.
        secret_key: Secret key (SK) that belongs to it.
        tls: Encrypt the connection.
        tls_ca: PEM file of the certificate authorities to trust; None trusts gRPC's built-in ones.
        namesrv: `host:port` of the name server, for provisioning only.
        reply_topic: LITE topic on which this process receives answers.
        reply_group: Consumer group bound to it, exclusive.
        state_topic: LITE topic of this process's servers: one LiteTopic for each running instance.
        state_group: Consumer group bound to it, exclusive.
        allowed_reply_topics: Further LITE topics that a server may answer into, besides `reply_topic`. A request
            that names any other is refused, so that nobody makes a server write where it should not.
        a2a_secret: Secret of this deployment for names that can't be guessed; None uses plain names.
        blobs: Where bodies larger than `Limits.blob_bytes` go, requests and answers, when the other side names the same
            store; a `DirectoryBlobStore`, or one of your own. None: what is too large for a message travels in parts.
        timeouts: See `Timeouts`.
        limits: See `Limits`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    endpoint: str = "127.0.0.1:8081"
    namespace: str = ""
    access_key: str | None = None
    secret_key: SecretStr | None = None
    tls: bool = False
    tls_ca: Path | None = None
    namesrv: str | None = None
    reply_topic: str = "WorkerAgentResponse"
    reply_group: str = "CID_HOST_AGENT_LITE"
    state_topic: str = "WorkerAgentResponseServer"
    state_group: str = "CID_HOST_AGENT_LITE_SERVER"
    allowed_reply_topics: tuple[str, ...] = ()
    a2a_secret: SecretStr | None = None
    blobs: BlobStore | None = None
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()

    def __init__(self, **values: object) -> None:
        """Check the values; see the class for what each means.

        Raises:
            ConfigurationError: A value is malformed or contradicts another; the message names the field, never a
                credential's value.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(part) for part in problem['loc']) or 'configuration'}: {problem['msg']}"
                for problem in error.errors(include_input=False, include_context=False, include_url=False)
            )
            raise ConfigurationError(f"The RocketMQ configuration is not usable: {problems}") from None

    @field_validator("endpoint")
    @classmethod
    def _endpoint_is_host_and_port(cls, value: str) -> str:
        parse_endpoints(value)
        return value

    @field_validator("namesrv")
    @classmethod
    def _namesrv_is_host_and_port(cls, value: str | None) -> str | None:
        if value is not None:
            parse_endpoints(value)
        return value

    @field_validator("reply_topic", "reply_group", "state_topic", "state_group")
    @classmethod
    def _name_is_legal(cls, value: str) -> str:
        return _legal(value)

    @field_validator("namespace")
    @classmethod
    def _namespace_is_legal_or_none(cls, value: str) -> str:
        return value and _legal(value)

    @field_validator("allowed_reply_topics")
    @classmethod
    def _names_are_legal(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_legal(name) for name in value)

    @field_validator("access_key")
    @classmethod
    def _access_key_fits_a_header(cls, value: str | None) -> str | None:
        if value is not None and not _ACCESS_KEY.fullmatch(value):
            raise ValueError("an access key is printable ASCII without spaces and commas")
        return value

    @field_validator("secret_key", "a2a_secret")
    @classmethod
    def _secret_is_text(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            secret = value.get_secret_value()
            if not secret or secret.encode(errors="replace").decode() != secret:
                raise ValueError("a secret is text, not empty and encodable as UTF-8; leave it out for none")
        return value

    @model_validator(mode="after")
    def _keys_come_in_pairs(self) -> RocketMQConfig:
        if (self.access_key is None) != (self.secret_key is None):
            raise ValueError("an access key and a secret key go together: give both or neither")
        return self

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The addresses of `endpoint`, each `host:port`."""
        return parse_endpoints(self.endpoint)

    @property
    def reply_topics(self) -> frozenset[str]:
        """The LITE topics that a server with this configuration may answer into."""
        return frozenset((self.reply_topic, *self.allowed_reply_topics))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: object) -> RocketMQConfig:
        """Read the configuration from environment variables.

        `ROCKETMQ_ENDPOINT`, `ROCKETMQ_NAMESPACE`, `ROCKETMQ_ACCESS_KEY`, `ROCKETMQ_SECRET_KEY`, `ROCKETMQ_TLS`,
        `ROCKETMQ_TLS_CA`, `ROCKETMQ_NAMESRV`, `ROCKETMQ_REPLY_TOPIC`, `ROCKETMQ_REPLY_GROUP`, `ROCKETMQ_STATE_TOPIC`,
        `ROCKETMQ_STATE_GROUP`, `ROCKETMQ_ALLOWED_REPLY_TOPICS` (separated by commas), `ROCKETMQ_A2A_SECRET`,
        `ROCKETMQ_BLOBS` (`NAME=DIRECTORY`, a `DirectoryBlobStore`). What is unset or empty keeps its default.

        Args:
            environ: The variables; None takes those of the process.
            **overrides: Fields that win over the environment.

        Raises:
            ConfigurationError: A value is malformed; the message names the field.
        """
        source = os.environ if environ is None else environ
        values: dict[str, object] = {}
        for field in cls.model_fields:
            text = source.get(f"ROCKETMQ_{field.upper()}", "").strip()
            if not text or field in ("timeouts", "limits"):
                continue
            if field == "tls":
                values[field] = _boolean("ROCKETMQ_TLS", text)
            elif field == "allowed_reply_topics":
                values[field] = tuple(part.strip() for part in text.split(",") if part.strip())
            elif field == "blobs":
                values[field] = _directory(text)
            else:
                values[field] = text
        return cls(**(values | overrides))


def _legal(name: str) -> str:
    if not _RESOURCE.fullmatch(name):
        raise ValueError(f"{name!r} is not a RocketMQ name: use 1-127 of letters, digits, '_', '-', '%', '|'")
    return name


def _directory(text: str) -> BlobStore:
    from agentscope_rocketmq.directory import DirectoryBlobStore  # noqa: PLC0415  (it does I/O, this module does none)

    name, _, path = text.partition("=")
    if not path:
        raise ConfigurationError(f"ROCKETMQ_BLOBS={text!r} is no blob store: give NAME=DIRECTORY.")
    return DirectoryBlobStore(path, name=name)


def _boolean(name: str, text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ConfigurationError(f"{name}={text!r} is neither true nor false: use 1/0, true/false, yes/no or on/off.")
