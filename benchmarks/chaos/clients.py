"""Plain HTTP clients of gateways: each follows one streamed answer, at the next gateway when one dies."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from benchmarks.chaos.streams import Heard, Move

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["Client"]

_AGAIN = 0.05  # seconds between two tries to connect


@dataclass(slots=True, eq=False)
class Client:
    """One client.

    Attributes:
        urls: The gateways, in the order in which it tries them.
        text: What it asks.
        heard: What it has.
        moves: Its goings on.
        at: URL of the gateway that streams to it now; None for none.
        session: Its session.
        over: Whether it has the end of its answer.
    """

    urls: list[str]
    text: str
    heard: list[Heard] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    at: str | None = None
    session: str = ""
    over: bool = False
    _cursor: str | None = None
    _retry: float = 0.0

    async def run(self, http: httpx.AsyncClient) -> None:
        """Ask, and follow the answer to its end."""
        tries = 0
        left_at = delay = 0.0
        while not self.over:
            url = self.urls[tries % len(self.urls)]
            tries += 1
            asked_at = time.time()
            try:
                async with self._request(http, url) as response:
                    if response.status_code == 200:
                        await self._read(response, url, Move(left_at, delay, asked_at, 0))
            except httpx.TransportError:
                pass
            if self.at is not None:
                self.at, left_at, delay = None, time.time(), self._retry
                await asyncio.sleep(delay)
            else:
                await asyncio.sleep(_AGAIN)

    def _request(self, http: httpx.AsyncClient, url: str) -> Any:
        if self._cursor is not None:
            headers = {"last-event-id": self._cursor}
            return http.stream("GET", f"{url}/sessions/{self.session}/events", headers=headers)
        message = {"messageId": uuid.uuid4().hex, "role": "ROLE_USER", "parts": [{"text": self.text}]}
        body = {"jsonrpc": "2.0", "id": 1, "method": "SendStreamingMessage", "params": {"message": message}}
        return http.stream("POST", f"{url}/", json=body, headers={"a2a-version": "1.0"})

    async def _read(self, response: httpx.Response, url: str, move: Move) -> None:
        resumed = self._cursor is not None
        async for cursor, name, retry, data in _events(response):
            self._retry = float(retry) / 1000 if retry else self._retry
            if name or "error" in data:
                return
            self._cursor = cursor
            self.at = url
            result = data["result"]
            if "task" in result:
                self.session = result["task"]["contextId"]
            for part in result.get("artifactUpdate", {}).get("artifact", {}).get("parts", ()):
                if resumed:
                    move.first = len(self.heard)
                    self.moves.append(move)
                    resumed = False
                self.heard.append(Heard(int(part["text"]), cursor, time.time()))
            if result.get("statusUpdate", {}).get("status", {}).get("state") == "TASK_STATE_COMPLETED":
                self.over = True
                return


async def _events(response: httpx.Response) -> AsyncIterator[tuple[str, str, str, Any]]:
    fields: dict[str, str] = {}
    async for line in response.aiter_lines():
        name, _, value = line.partition(":")
        if line and name:
            fields[name] = value.removeprefix(" ")
        elif not line and "data" in fields:
            yield fields.get("id", ""), fields.get("event", ""), fields.get("retry", ""), json.loads(fields["data"])
            fields = {}
