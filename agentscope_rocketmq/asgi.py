"""One request through an ASGI app: the three arguments that an app is called with, made from a request envelope."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.routes import is_routing_header

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agentscope_rocketmq.envelope import RequestEnvelope
    from agentscope_rocketmq.reply import ReplyEncoder
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage

    ASGIApp = Callable[
        [dict[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]
    ]

__all__ = ["Receive", "Response", "cancelled", "http_scope"]


def http_scope(envelope: RequestEnvelope, message: ReceivedMessage, *, path: str, attempt: int) -> dict[str, Any]:
    """The scope of a request.

    Args:
        envelope: The request.
        message: The message that brought it.
        path: Path of the app's JSON-RPC endpoint.
        attempt: Which run of the request this is, from 0.
    """
    headers = {name.lower(): value for name, value in envelope.headers.items() if not is_routing_header(name)}
    headers.setdefault("content-type", "application/json")
    headers.setdefault("host", "rocketmq")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode("latin-1", "replace"), value.encode()) for name, value in headers.items()],
        "client": None,
        "server": None,
        "state": {},
        # For apps that want to know how a request came.
        "rocketmq": {
            "topic": message.topic,
            "lite_topic": envelope.lite_topic,
            "request_id": envelope.request_id,
            "message_id": message.message_id,
            "attempt": attempt,
        },
    }


class Response:
    """ASGI's `send` side of one request: only notes what comes, so that a slow broker holds up nobody but itself."""

    def __init__(self, encoder: ReplyEncoder, *, limit: int) -> None:
        self.encoder = encoder
        self.changed = asyncio.Event()
        self.drained = asyncio.Event()
        self.over = asyncio.Event()
        self._limit = limit

    def begin(self) -> None:
        """Say at once that the request is taken."""
        self.encoder.begin()
        self.changed.set()

    async def send(self, event: Any) -> None:
        """Take what the app sends; waits while more than the limit is not published yet."""
        if self.over.is_set() or cancelled():
            raise OSError("the response is over: this worker stops")
        if event["type"] == "http.response.start":
            self.encoder.start(event["status"], event.get("headers", ()))
        elif event["type"] == "http.response.body":
            self.encoder.feed(event.get("body", b""))
        self.changed.set()
        while self.encoder.pending_bytes > self._limit and not self.over.is_set():
            self.drained.clear()
            await self.drained.wait()


class Receive:
    """ASGI's `receive` side: the request body, then nothing until the response is over.

    A caller that leaves can't be seen over RocketMQ, and would cancel nothing: the agent goes on.
    """

    def __init__(self, body: bytes, over: asyncio.Event) -> None:
        self._body: bytes | None = body
        self._over = over

    async def __call__(self) -> dict[str, Any]:
        """The next event."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._over.wait()
        return {"type": "http.disconnect"}


def cancelled() -> bool:
    """Whether the running task was told to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
