"""The agents behind a gateway: their cards, kept fresh in the background, and the cards that are served for them."""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a2a.types import AgentCard, AgentInterface, HTTPAuthSecurityScheme, SecurityScheme

from agentscope_rocketmq.card import JSONRPC, ROCKETMQ, Address, card_to_dict, choose
from agentscope_rocketmq.config import endpoint_key
from agentscope_rocketmq.errors import CardError, ConfigurationError
from agentscope_rocketmq.gateway.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from agentscope_rocketmq.client import AgentSource
    from agentscope_rocketmq.config import RocketMQConfig

__all__ = ["Agent", "Agents", "path_name", "served_card"]

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 60.0
"""Seconds after which a card that came from a URL is fetched again."""

UNKNOWN_SECONDS = 2.0
"""The same while it was never had."""

# How long a start waits for cards; those that come later are served from then on.
_START_SECONDS = 15.0
_OWN_PATHS = {"healthz", "readyz", "sessions", ""}
_BEARER = "bearer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """An agent as the gateway knows it.

    Attributes:
        name: Its part of the path.
        card: Its card.
        address: Its topic.
    """

    name: str
    card: AgentCard
    address: Address


class Agents:
    """The agents of a gateway.

    Args:
        sources: What each agent's card is read from, by the agent's part of the path, or as a plain list: the part is
            then the card's name in small letters.
        read: Reads a source.
        config: The cluster on which all of them must be.
    """

    def __init__(
        self,
        sources: Mapping[str, AgentSource] | Sequence[AgentSource],
        *,
        read: Callable[[AgentSource], Awaitable[AgentCard]],
        config: RocketMQConfig,
    ) -> None:
        named = list(sources.items()) if hasattr(sources, "items") else [(None, source) for source in sources]
        if not named:
            raise ConfigurationError("A gateway without agents has nothing to do: give it URLs or cards of agents.")
        for name, _ in named:
            if name is not None and (path_name(name) != name or name in _OWN_PATHS):
                raise ConfigurationError(f"{name!r} can't be an agent's path: use small letters, digits and '-'.")
        self._sources: list[tuple[str | None, AgentSource]] = named
        self._read = read
        self._config = config
        self._known: dict[str, Agent] = {}
        # Where the agent of each source is, by the source's number.
        self._paths: dict[int, str] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Read all cards. A URL that does not answer is tried again in the background, a wrong card is an error.

        Raises:
            CardError: A card that is not fetched can't be read, or an agent is on another cluster.
            ConfigurationError: Two agents have the same path.
        """
        first = [asyncio.create_task(self._first(number)) for number in range(len(self._sources))]
        await asyncio.wait(first, timeout=_START_SECONDS)
        for number, (task, (_, source)) in enumerate(zip(first, self._sources, strict=True)):
            if task.done():
                task.result()
            else:
                task.cancel()
            if _is_url(source):
                refreshing = self._refresh(number, str(source))
                self._tasks.append(asyncio.create_task(refreshing, name=f"gateway.card[{source}]"))

    async def aclose(self) -> None:
        """Stop refreshing."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    @property
    def complete(self) -> bool:
        """Whether every agent's card is known."""
        return len(self._paths) == len(self._sources)

    def find(self, name: str) -> Agent:
        """The agent of a path; the only one there is has the root too.

        Raises:
            Refusal: 404, there is no such agent; 503, its card is not known yet.
        """
        if not name and len(self._sources) == 1 and self._known:
            return next(iter(self._known.values()))
        agent = self._known.get(name)
        if agent is not None:
            return agent
        if not self.complete:
            raise Refusal(503, "agent-unknown", "This agent's card could not be had yet. Ask again.")
        paths = ", ".join(f"/{path}" for path in self._known)
        raise Refusal(404, "no-such-agent", f"There is no agent here; those of this gateway are at {paths}.")

    async def _first(self, number: int) -> None:
        _, source = self._sources[number]
        try:
            card = await self._read(source)
        except CardError:
            if not _is_url(source):
                raise
            logger.warning("The card at %s can't be had yet; it is tried again", source)
        else:
            self._learn(number, card)

    async def _refresh(self, number: int, url: str) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS if number in self._paths else UNKNOWN_SECONDS)
            try:
                self._learn(number, await self._read(url))
            except (CardError, ConfigurationError) as error:
                logger.warning("The card at %s stays as it was: %s", url, error)

    def _learn(self, number: int, card: AgentCard) -> None:
        name, _ = self._sources[number]
        path = name or path_name(card.name)
        address = Address.parse(choose(card, allow_jsonrpc=False).url)
        here = endpoint_key(self._config.endpoint), self._config.namespace
        if (endpoint_key(address.endpoint), address.namespace) != here:
            raise CardError(
                f"Agent {card.name!r} listens at {address.url}, which is another cluster than this gateway's "
                f"({self._config.endpoint}). Run a gateway there, or give it a card with the address it should use."
            )
        if path in _OWN_PATHS:
            raise ConfigurationError(f"The name of agent {card.name!r} makes no path: give it one, as name=source.")
        before = self._paths.get(number)
        other = self._known.get(path)
        if other is not None and before != path:
            raise ConfigurationError(
                f"Two agents, {other.card.name!r} and {card.name!r}, have the path /{path}: give one another, as "
                "name=source."
            )
        if before is not None and before != path:
            logger.warning("Agent %r has a new name: it is at /%s now, and no more at /%s", card.name, path, before)
            del self._known[before]
        self._paths[number] = path
        self._known[path] = Agent(name=path, card=card, address=address)


def path_name(name: str) -> str:
    """An agent's part of the path: its name in small letters, digits and single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def served_card(card: AgentCard, *, url: str, authenticates: bool) -> dict[str, Any]:
    """The card that a gateway serves for an agent: its own URL, its own security, in both versions' fields.

    Args:
        card: The agent's.
        url: Where the gateway answers JSON-RPC for it.
        authenticates: Whether the gateway asks for bearer tokens.
    """
    # Our servers speak 0.3 wherever they speak 1.0; the Java reference speaks 0.3 alone.
    listed = [entry.protocol_version for entry in card.supported_interfaces if entry.protocol_binding == ROCKETMQ]
    old = all(version.startswith("0.") for version in listed)
    served = AgentCard()
    served.CopyFrom(card)
    for field in ("supported_interfaces", "signatures", "security_schemes", "security_requirements"):
        served.ClearField(field)
    for version in ("0.3",) if old else ("1.0", "0.3"):
        served.supported_interfaces.append(AgentInterface(url=url, protocol_binding=JSONRPC, protocol_version=version))
    if authenticates:
        scheme = SecurityScheme(http_auth_security_scheme=HTTPAuthSecurityScheme(scheme=_BEARER))
        served.security_schemes[_BEARER].CopyFrom(scheme)
        served.security_requirements.add().schemes[_BEARER].SetInParent()
    return card_to_dict(served)


def _is_url(source: object) -> bool:
    return isinstance(source, str) and source.startswith(("http://", "https://"))
