"""Gateways and their plain HTTP clients, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from agentscope_rocketmq.gateway import create_gateway
from agentscope_rocketmq.httpserver import listen, serve_http
from agentscope_rocketmq.sse import EventParser
from tests.waiting import LIMIT, closed_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from agentscope_rocketmq import RocketMQConfig
    from agentscope_rocketmq.gateway import Gateway
    from agentscope_rocketmq.sse import Event

VERSIONS = ("1.0", "0.3")
LAST = "last-event-id"


@dataclass
class Served:
    """A gateway that is served in this process."""

    gateway: Gateway
    url: str


@contextlib.asynccontextmanager
async def gateway_for(config: RocketMQConfig, *agents: Any, **options: Any) -> AsyncIterator[Served]:
    """A gateway on a port of its own, ready."""
    gateway = create_gateway(config, list(agents), **options)
    with contextlib.closing(listen("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        async with gateway, serve_http(gateway, listening, 1.0):
            try:
                await ready(url)
                yield Served(gateway, url)
            finally:
                await gateway.drain()


async def ready(url: str) -> None:
    """Until a gateway says that it is ready."""
    async with asyncio.timeout(LIMIT), httpx.AsyncClient() as http:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get(f"{url}/readyz")).status_code == 200:
                    return
            await asyncio.sleep(0.05)


class Process:
    """A gateway in a process of its own, started by the command line, on a port that it keeps."""

    def __init__(self, config: RocketMQConfig, card: Path, *arguments: str) -> None:
        self.port = closed_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._arguments = ("--agent", str(card), "--port", str(self.port), *arguments)
        self._environ = environment(config)
        self.running: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it, and wait until it is ready."""
        self.running = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "from agentscope_rocketmq.cli import main; main()", "gateway", *self._arguments),
            env=self._environ,
            stderr=asyncio.subprocess.DEVNULL,
        )
        await ready(self.url)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self.running is not None
        self.running.send_signal(number)

    async def kill(self) -> None:
        """kill -9."""
        if self.running is not None and self.running.returncode is None:
            self.running.kill()
            await self.running.wait()

    async def __aenter__(self):
        try:
            await self.start()
        except BaseException:
            await self.kill()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()


def environment(config: RocketMQConfig) -> dict[str, str]:
    """A process's environment that says the same as a configuration."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ROCKETMQ_")}
    for field in ("endpoint", "reply_topic", "reply_group", "state_topic", "state_group"):
        environ[f"ROCKETMQ_{field.upper()}"] = getattr(config, field)
    if config.a2a_secret is not None:
        environ["ROCKETMQ_A2A_SECRET"] = config.a2a_secret.get_secret_value()
    return environ


def call(method: str, params: Any, *, rpc_id: Any = "q") -> dict[str, Any]:
    """A JSON-RPC request."""
    return {"jsonrpc": "2.0", "id": rpc_id, "method": method, "params": params}


def message(text: str, *, version: str = "1.0", stream: bool = True, **fields: Any) -> dict[str, Any]:
    """A request that sends a message, in the words of a version."""
    old = version == "0.3"
    part = {"kind": "text", "text": text} if old else {"text": text}
    said = {"messageId": uuid.uuid4().hex, "role": "user" if old else "ROLE_USER", "parts": [part], **fields}
    if old:
        return call("message/stream" if stream else "message/send", {"message": said})
    return call("SendStreamingMessage" if stream else "SendMessage", {"message": said})


def about(method: str, task_id: str, *, version: str = "1.0") -> dict[str, Any]:
    """A request about a task: `get`, `cancel` or `subscribe`, in the words of a version."""
    new, old = {
        "get": ("GetTask", "tasks/get"),
        "cancel": ("CancelTask", "tasks/cancel"),
        "subscribe": ("SubscribeToTask", "tasks/resubscribe"),
    }[method]
    return call(old if version == "0.3" else new, {"id": task_id})


def client(url: str, *, version: str = "1.0", token: str | None = None) -> httpx.AsyncClient:
    """A plain HTTP client."""
    headers = {"A2A-Version": version} | ({"Authorization": f"Bearer {token}"} if token else {})
    return httpx.AsyncClient(base_url=url, timeout=LIMIT, headers=headers)


@contextlib.asynccontextmanager
async def stream(http: httpx.AsyncClient, path: str, body: Any = None, **headers: Any):
    """A response whose events come one by one: `async for event in response.events`."""
    method = "GET" if body is None else "POST"
    async with http.stream(method, path, json=body, headers=headers) as response:
        response.events = events_of(response)  # type: ignore[attr-defined]
        yield response


async def events_of(response: httpx.Response) -> AsyncIterator[Event]:
    """The events of a response."""
    parser = EventParser()
    async for chunk in response.aiter_bytes():
        for event in parser.feed(chunk):
            yield event


async def events(http: httpx.AsyncClient, path: str, body: Any = None, **headers: Any) -> list[Any]:
    """All events of a response that ends by itself."""
    async with asyncio.timeout(LIMIT), stream(http, path, body, **headers) as response:
        assert response.status_code == 200, await response.aread()
        return [event async for event in response.events]


def result(event: Any) -> dict[str, Any]:
    """What an event says."""
    said: dict[str, Any] = json.loads(event.data)["result"]
    return said


def numbers(found: list[Any]) -> list[int]:
    """The numbers of a `Counter` in its artifact events, in the words of both versions."""
    counted = []
    for event in found:
        said = result(event)
        update = said.get("artifactUpdate") or (said if said.get("kind") == "artifact-update" else None)
        if update is not None:
            counted += [int(part["text"]) for part in update["artifact"]["parts"]]
    return counted


def task_of(event: Any) -> dict[str, Any]:
    """The task in an event."""
    said = result(event)
    task: dict[str, Any] = said.get("task", said)
    return task
