"""Fetches agent cards over HTTP and keeps them, so that an agent whose processes are all down can still be sent to."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from a2a.client import A2ACardResolver
from a2a.client.errors import AgentCardResolutionError

from agentscope_rocketmq.card import card_to_dict, parse_card
from agentscope_rocketmq.errors import CardError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from a2a.types import AgentCard

__all__ = ["CardFetcher", "default_cache"]

logger = logging.getLogger(__name__)

FETCH_SECONDS = 5.0
# Within this a card is not fetched again.
FRESH_SECONDS = 60.0
# What is longer is no card, and what takes longer than this as a whole is none today.
MOST_BYTES = 1024 * 1024
MOST_SECONDS = 2 * FETCH_SECONDS
_NOBODY_BEHIND = (502, 503, 504)


def default_cache() -> Path:
    """Where cards are kept: `agentscope-rocketmq/cards` in the user's cache folder (`XDG_CACHE_HOME`, `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentscope-rocketmq" / "cards"


class CardFetcher:
    """Agent cards by URL.

    Args:
        cache: Folder to keep them in, for other processes and later runs; None keeps them in memory only.
    """

    def __init__(self, cache: Path | None) -> None:
        self._cache = cache
        self._fresh: dict[str, tuple[float, AgentCard]] = {}

    async def fetch(self, url: str) -> AgentCard:
        """The card of the agent at a base URL, from its well-known place.

        Args:
            url: Base URL, as `http://127.0.0.1:10001`; one that ends with `.json` is the card's own.

        Returns:
            The card as served now; when nobody answers, the one kept from before (a warning says so).

        Raises:
            CardError: Nobody answers and none was kept, or what answers is no agent card.
        """
        fetched_at, known = self._fresh.get(url, (0.0, None))
        if known is not None and time.monotonic() - fetched_at < FRESH_SECONDS:
            return known
        base, path = (url.rsplit("/", 1)[0], url.rsplit("/", 1)[1]) if url.endswith(".json") else (url, None)
        try:
            async with httpx.AsyncClient(timeout=FETCH_SECONDS, transport=_Bounded(httpx.AsyncHTTPTransport())) as http:
                card = await A2ACardResolver(http, base).get_agent_card(path)
        except AgentCardResolutionError as error:
            # A load balancer in front of processes that are all down answers for them.
            down = isinstance(error.__cause__, httpx.TransportError) or (error.status_code or 0) in _NOBODY_BEHIND
            if not down:
                raise CardError(f"What {url} answers is not an agent card: {error}") from error
            kept = known or await asyncio.to_thread(self._kept, url)
            if kept is None:
                raise CardError(
                    f"The agent at {url} does not answer, and its card was never fetched before: start the agent, or "
                    f"give its card as a file. ({error})"
                ) from error
            logger.warning("The agent at %s does not answer over HTTP; going by its card kept from before", url)
            return kept
        except (ValueError, TypeError, KeyError, AttributeError, httpx.InvalidURL) as error:
            raise CardError(f"What {url} answers is not an agent card: {error}") from error
        self._fresh[url] = (time.monotonic(), card)
        await asyncio.to_thread(self._keep, url, card)
        return card

    def _file(self, url: str) -> Path | None:
        return None if self._cache is None else self._cache / f"{hashlib.sha256(url.encode()).hexdigest()}.json"

    def _kept(self, url: str) -> AgentCard | None:
        file = self._file(url)
        try:
            return None if file is None else parse_card(file.read_text(encoding="utf-8"))
        except (OSError, CardError):
            return None

    def _keep(self, url: str, card: AgentCard) -> None:
        file = self._file(url)
        if file is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Written beside and renamed: another process never reads half a card.
            with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as beside:
                try:
                    json.dump(card_to_dict(card), beside)
                    beside.flush()
                    Path(beside.name).replace(file)
                except BaseException:
                    Path(beside.name).unlink(missing_ok=True)
                    raise
        except (OSError, ValueError) as error:  # a card with half of a surrogate pair can't be written
            logger.warning("The card of %s could not be kept in %s: %s", url, file.parent, error)


class _Bounded(httpx.AsyncBaseTransport):
    """Gives up on a response that is too long, or that comes drop by drop."""

    def __init__(self, inner: httpx.AsyncHTTPTransport) -> None:
        self._inner = inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        response.stream = _BoundedStream(response.stream, request)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _BoundedStream(httpx.AsyncByteStream):
    def __init__(self, inner: Any, request: httpx.Request) -> None:
        self._inner = inner
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        deadline = time.monotonic() + MOST_SECONDS
        size = 0
        async for chunk in self._inner:
            size += len(chunk)
            if size > MOST_BYTES:
                raise httpx.DecodingError(f"it is longer than {MOST_BYTES} bytes", request=self._request)
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout(f"it did not come within {MOST_SECONDS:g} s", request=self._request)
            yield chunk

    async def aclose(self) -> None:
        await self._inner.aclose()
