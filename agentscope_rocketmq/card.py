"""Agent cards: where an agent listens on RocketMQ, and which of a card's interfaces a caller takes.

Cards come in two forms, A2A 1.0 (`supportedInterfaces`) and 0.3 (`url`, `preferredTransport`,
`additionalInterfaces`). Reading and writing both is the a2a-sdk's work; what is here is the RocketMQ interface in
them: its label, its address, and the order in which the interfaces must stand so that every reader finds its own.
"""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a2a.types import AgentCard, AgentExtension, AgentInterface
from google.protobuf.json_format import ParseError

from agentscope_rocketmq.config import parse_endpoints
from agentscope_rocketmq.errors import CardError, ConfigurationError
from agentscope_rocketmq.jsonrpc import read_json
from agentscope_rocketmq.priority import PRIORITY_EXTENSION, Tier

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "JSONRPC",
    "LARGE_BODIES_EXTENSION",
    "ROCKETMQ",
    "Address",
    "Choice",
    "LargeBodies",
    "card_to_dict",
    "choose",
    "complete_card",
    "jsonrpc_url",
    "large_bodies",
    "parse_card",
    "priority_topics",
    "read_card",
    "rocketmq_addresses",
]

ROCKETMQ = "RocketMQ"
"""Label of the RocketMQ interface in a card (`protocolBinding`, in 0.3 `transport`); case-sensitive."""

JSONRPC = "JSONRPC"
"""Label of A2A's JSON-RPC over HTTP."""

LARGE_BODIES_EXTENSION = "urn:agentscope-rocketmq:extension:large-bodies:v1"
"""Extension by which a card says that its servers read requests in parts, where those go, and how large they may be."""

_VERSIONS = ("1.0", "0.3")
_ADDRESS = re.compile(
    r"(?P<scheme>https?)://(?P<endpoint>[^/]+)/(?P<namespace>[^/]*)/(?P<topic>[^/]+)",
    re.IGNORECASE,
)
_NAME = re.compile(r"[%|A-Za-z0-9_-]{1,127}")
_PLACEHOLDER = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")
_VERSION = re.compile(r"(\d{1,9})\.(\d{1,9})(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Address:
    """Where an agent takes requests: a topic of a RocketMQ cluster.

    Attributes:
        endpoint: `host:port` of the cluster's gRPC proxy; several separated by `;`.
        namespace: RocketMQ namespace; empty for none.
        topic: The agent's topic.
        secure: Whether the connection is encrypted (`https`).
    """

    endpoint: str
    namespace: str
    topic: str
    secure: bool = False

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read it from a card's URL: `http://ENDPOINT/NAMESPACE/TOPIC`, the namespace may be empty.

        Raises:
            CardError: Not of that form.
        """
        match = _ADDRESS.fullmatch(url)
        # A password that somebody put in front of the host is not for a log.
        shown = re.sub(r"//[^/]*@", "//***@", url)
        if match is None:
            raise CardError(
                f"{shown!r} is not the address of an agent on RocketMQ: write http://ENDPOINT/NAMESPACE/TOPIC, "
                "with an empty NAMESPACE as http://127.0.0.1:8081//WeatherAgentTask."
            )
        namespace, topic = match["namespace"], match["topic"]
        for what, name in (("namespace", namespace), ("topic", topic)):
            if name and not _NAME.fullmatch(name):
                raise CardError(
                    f"{shown!r} has no legal RocketMQ {what}: use 1-127 of letters, digits, '_', '-', '%', '|'."
                )
        try:
            endpoints = parse_endpoints(match["endpoint"])
        except ConfigurationError:
            raise CardError(
                f"{shown!r} names no RocketMQ endpoint: write host:port of the proxy's gRPC port between '//' and "
                "the namespace, e.g. http://127.0.0.1:8081//WeatherAgentTask."
            ) from None
        secure = match["scheme"].lower() == "https"
        return cls(";".join(endpoints), namespace, topic, secure)

    @property
    def url(self) -> str:
        """The address as a card has it."""
        scheme = "https" if self.secure else "http"
        return f"{scheme}://{self.endpoint}/{self.namespace}/{self.topic}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The interface of a card that a caller takes.

    Attributes:
        binding: Its label, `RocketMQ` or `JSONRPC`.
        url: Its URL.
        version: Its A2A version as the card has it; empty where the card does not say.
    """

    binding: str
    url: str
    version: str


def parse_card(data: Mapping[str, Any] | AgentCard | str) -> AgentCard:
    """Read an agent card in the 1.0 or the 0.3 form.

    Args:
        data: A card, its JSON as a string, or that parsed. It is left as it is.

    Returns:
        A card of its own, in the 1.0 form.

    Raises:
        CardError: It is not an agent card.
    """
    from a2a.client.card_resolver import parse_agent_card  # noqa: PLC0415  (takes a second to import)

    if isinstance(data, AgentCard):
        return _copy(data)
    try:
        fields: Any = read_json(data) if isinstance(data, str) else copy.deepcopy(data)
        return parse_agent_card(fields)
    # What the SDK does not check in an unknown structure ends in one of these.
    except (ParseError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CardError(f"This is not an A2A agent card: {error}") from error


def read_card(path: str | os.PathLike[str], environ: Mapping[str, str] | None = None) -> AgentCard:
    """Read an agent card from a file and fill in its placeholders.

    `${NAME}` in a string stands for an environment variable, `${NAME:-default}` for the default where that is unset
    or empty. Values are filled in after the JSON was parsed, so they can't change its structure.

    Args:
        path: A local JSON file.
        environ: The variables; None takes those of the process.

    Raises:
        CardError: The file can't be read, is not an agent card, or has a placeholder without a value.
    """
    source = os.environ if environ is None else environ
    try:
        fields = read_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CardError(f"The agent card {os.fspath(path)} can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise CardError(f"The agent card {os.fspath(path)} is not JSON: {error}.") from error
    try:
        return parse_card(_expand(fields, source))
    except CardError as error:
        raise CardError(f"The agent card {os.fspath(path)} is not usable: {error}") from error


def rocketmq_addresses(card: AgentCard) -> list[Address]:
    """List where the agent listens on RocketMQ, each address once, in the card's order.

    Raises:
        CardError: The URL of a RocketMQ interface is not an address.
    """
    urls = [entry.url for entry in card.supported_interfaces if entry.protocol_binding == ROCKETMQ]
    return list(dict.fromkeys(Address.parse(url) for url in urls))


def jsonrpc_url(card: AgentCard) -> str | None:
    """Find the URL of the card's newest JSON-RPC interface; None when it has none."""
    entry = _best(card, JSONRPC)
    return None if entry is None else entry.url


def priority_topics(card: AgentCard) -> dict[Tier, str]:
    """The further topics of an agent, by tier; they lie beside that of its first RocketMQ interface.

    The card lists them by the extension `PRIORITY_EXTENSION`, whose parameters name the topic of `high` and of `low`.

    Raises:
        CardError: A tier or a topic that is none.
    """
    topics: dict[Tier, str] = {}
    for extension in card.capabilities.extensions:
        if extension.uri != PRIORITY_EXTENSION:
            continue
        for name, topic in extension.params.items():
            if name not in (Tier.HIGH, Tier.LOW) or not isinstance(topic, str) or not _NAME.fullmatch(topic):
                raise CardError(
                    f"The card of {card.name!r} has priority topic {name!r}: {topic!r}. Name the topic of 'high' and "
                    "of 'low', each 1-127 of letters, digits, '_', '-', '%', '|'."
                )
            topics[Tier(name)] = topic
    taken = [address.topic for address in rocketmq_addresses(card)]
    if clash := {topic for topic in topics.values() if [*topics.values(), *taken].count(topic) > 1}:
        raise CardError(f"The card of {card.name!r} uses topic {', '.join(clash)} twice: each tier has one of its own.")
    return topics


@dataclass(frozen=True, slots=True)
class LargeBodies:
    """How an agent's servers read requests that do not fit into a message.

    Attributes:
        topic: LITE topic that the parts of a body go to; it lies beside the agent's topics.
        request_bytes: Largest request that they take.
        blob_store: Name of the blob store in which they find bodies as well; None for none.
    """

    topic: str
    request_bytes: int
    blob_store: str | None = None


def large_bodies(card: AgentCard) -> LargeBodies | None:
    """Read it from a card; None when its servers do not say that they read parts.

    Raises:
        CardError: What the card says of it is none.
    """
    for extension in card.capabilities.extensions:
        if extension.uri == LARGE_BODIES_EXTENSION:
            fields = dict(extension.params.items())
            topic, size, store = (fields.get(name) for name in ("topic", "requestBytes", "blobStore"))
            if not (isinstance(topic, str) and _NAME.fullmatch(topic) and isinstance(size, float) and size >= 1):
                raise CardError(
                    f"The card of {card.name!r} says that large requests go to topic {topic!r}, of {size!r} bytes at "
                    "most: name a topic, 1-127 of letters, digits, '_', '-', '%', '|', and a number."
                )
            return LargeBodies(topic, int(min(size, 2**53)), store if isinstance(store, str) else None)
    return None


def _announce_large_bodies(card: AgentCard, large: LargeBodies) -> None:
    extensions = [known for known in card.capabilities.extensions if known.uri != LARGE_BODIES_EXTENSION]
    entry = AgentExtension(uri=LARGE_BODIES_EXTENSION, description="Reads requests that come in parts.")
    entry.params.update({"topic": large.topic, "requestBytes": large.request_bytes})
    if large.blob_store is not None:
        entry.params.update({"blobStore": large.blob_store})
    del card.capabilities.extensions[:]
    card.capabilities.extensions.extend([*extensions, entry])


def choose(card: AgentCard, *, allow_jsonrpc: bool) -> Choice:
    """Choose the interface to call an agent on: RocketMQ before JSON-RPC, 1.0 before 0.3.

    Args:
        card: The agent's card.
        allow_jsonrpc: Whether to take JSON-RPC over HTTP when the card lists no RocketMQ interface.

    Raises:
        CardError: The card lists no interface that can be taken, or its RocketMQ address is malformed.
    """
    for binding in (ROCKETMQ, JSONRPC) if allow_jsonrpc else (ROCKETMQ,):
        entry = _best(card, binding)
        if entry is None:
            continue
        if binding == ROCKETMQ:
            Address.parse(entry.url)
        return Choice(binding=binding, url=entry.url, version=entry.protocol_version)
    listed = ", ".join(
        f"{entry.protocol_binding or '(unnamed)'} {entry.protocol_version}".strip()
        for entry in card.supported_interfaces
    )
    advice = (
        "Add a RocketMQ or a JSONRPC interface to its card."
        if allow_jsonrpc
        else "Add a RocketMQ interface to its card, or allow JSON-RPC over HTTP for this agent."
    )
    raise CardError(
        f"The card of agent {card.name!r} lists {listed or 'no interface'}: none that can be used here, where the "
        f"protocol is A2A 1.0 or 0.3 over RocketMQ{' or JSONRPC' if allow_jsonrpc else ''}. {advice}"
    )


def complete_card(card: AgentCard, *, jsonrpc_url: str, large: LargeBodies | None = None) -> AgentCard:
    """Complete a server's card so that every reader finds its interface.

    The RocketMQ interfaces of the card and one for JSON-RPC are listed at 1.0 and at 0.3, in the order for which
    the SDK writes the 0.3 fields that the Java reference needs; others follow as they are. Tenants are kept.
    Signatures are dropped when the card changes, since they would no longer hold.

    Args:
        card: The card as written by its owner; it is left as it is.
        jsonrpc_url: Where the server answers JSON-RPC over HTTP; replaces what the card says.
        large: How it reads large requests, which the card then says; None leaves what the card says.

    Raises:
        CardError: The URL of a RocketMQ interface is not an address.
    """
    rocketmq_addresses(card)
    completed = _copy(card)
    tenants = [e.tenant for e in card.supported_interfaces if e.protocol_binding == JSONRPC]
    jsonrpc = dict.fromkeys((jsonrpc_url, tenant) for tenant in tenants or [""])
    rocketmq = dict.fromkeys((e.url, e.tenant) for e in card.supported_interfaces if e.protocol_binding == ROCKETMQ)
    interfaces = [
        AgentInterface(url=url, protocol_binding=binding, tenant=tenant, protocol_version=version)
        for version in _VERSIONS
        for binding, places in ((JSONRPC, jsonrpc), (ROCKETMQ, rocketmq))
        for url, tenant in places
    ]
    interfaces += [e for e in card.supported_interfaces if e.protocol_binding not in (JSONRPC, ROCKETMQ)]
    del completed.supported_interfaces[:]
    completed.supported_interfaces.extend(interfaces)
    if large is not None:
        _announce_large_bodies(completed, large)
    if completed != card:
        del completed.signatures[:]
    return completed


def card_to_dict(card: AgentCard) -> dict[str, Any]:
    """Write a card as JSON objects, with the 0.3 fields beside those of 1.0 where it lists 0.3 interfaces."""
    from a2a.server.request_handlers.response_helpers import (  # noqa: PLC0415  (takes a second to import)
        agent_card_to_dict,
    )

    return agent_card_to_dict(card)


def _copy(card: AgentCard) -> AgentCard:
    duplicate = AgentCard()
    duplicate.CopyFrom(card)
    return duplicate


def _expand(value: Any, environ: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _expand(member, environ) for name, member in value.items()}
    if isinstance(value, list):
        return [_expand(member, environ) for member in value]
    if isinstance(value, str):
        return _PLACEHOLDER.sub(lambda match: _value(match, environ), value)
    return value


def _value(match: re.Match[str], environ: Mapping[str, str]) -> str:
    name, default = match["name"], match["default"]
    value = environ.get(name)
    if default is not None:
        return value or default
    if value is None:
        raise CardError(
            f"${{{name}}} has no value: set the environment variable {name}, or write ${{{name}:-default}}."
        )
    return value


def _best(card: AgentCard, binding: str) -> AgentInterface | None:
    """The interface of that label that the SDK's client factory would take too."""
    ranked: Iterable[tuple[int, AgentInterface]] = (
        (rank, entry)
        for entry in card.supported_interfaces
        if entry.protocol_binding == binding and (rank := _rank(entry.protocol_version)) is not None
    )
    best = min(ranked, key=lambda pair: pair[0], default=None)
    return None if best is None else best[1]


def _rank(version: str) -> int | None:
    if not version:
        return 3
    match = _VERSION.fullmatch(version)
    if match is None:
        return None
    number = int(match[1]), int(match[2])
    if number == (1, 0):
        return 0
    if number > (1, 0):
        return 1
    return 2 if number >= (0, 3) else None
