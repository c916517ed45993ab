"""Server-sent events to one HTTP client: keep-alives, clients that leave or do not read, the end of a gateway."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.errors import AgentScopeRocketMQError
from agentscope_rocketmq.gateway.refusal import Refusal, refusal_of
from agentscope_rocketmq.jsonrpc import encoded
from agentscope_rocketmq.sse import render_event

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

    from agentscope_rocketmq.jsonrpc import RpcId

__all__ = ["EventStream", "Streams"]

logger = logging.getLogger(__name__)

# Milliseconds after which a client should connect again: from, and to. When a gateway dies, all of its clients come to
# another one; spread like this they don't come at the same moment and wait for each other there.
_RETRY = (200, 1200)
# Seconds that last words may wait for a client to read.
_LAST_WORDS = 30.0
# A line, not a block: readers that give out an event at each blank line would give out an empty one.
_KEEP_ALIVE = b": keep-alive\n"
# An event of that name ends a stream that is not over: the client connects again, with the id of the last event it has.
_LAST_EVENTS = {"resync": "resync", "taken-over": "reconnect", "draining": "reconnect"}


def retry() -> str:
    """The field of a stream's first event that tells its client when to connect again, each another moment."""
    return f"retry: {random.randint(*_RETRY)}\n"  # noqa: S311  (no secret)


class Streams:
    """The open streams of a gateway.

    Args:
        keep_alive: Seconds without an event after which a comment is sent.
        stall: Seconds that a client may leave what it is sent unread.

    Attributes:
        cut_off: How many clients were cut off because they did not read.
    """

    def __init__(self, *, keep_alive: float, stall: float) -> None:
        self.keep_alive = keep_alive
        self.stall = stall
        self.cut_off = 0
        self.ending = asyncio.Event()
        self._open: set[EventStream] = set()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    async def drain(self) -> None:
        """Tell all clients to connect again, elsewhere, and wait until their streams have ended."""
        self.ending.set()
        while self._open:
            self._changed.clear()
            await self._changed.wait()

    def add(self, stream: EventStream) -> None:
        """A stream has begun."""
        self._open.add(stream)

    def discard(self, stream: EventStream) -> None:
        """A stream has ended."""
        self._open.discard(stream)
        self._changed.set()


class EventStream:
    """The response to one client: an ASGI app.

    A client that leaves ends the reading for it and nothing else. One that does not read is cut off: it is sent a
    `resync` event where it still takes one, and its connection ends.

    Args:
        events: The events, each rendered.
        streams: The streams of the gateway.
        headers: Headers of the response.
        rpc_id: JSON-RPC id of the request, for an error that ends the stream.
        on_end: Closes what the events come from; called once, however the stream ends.
    """

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        *,
        streams: Streams,
        on_end: Callable[[], Awaitable[None]],
        headers: Mapping[str, str] | None = None,
        rpc_id: RpcId = None,
    ) -> None:
        self._events = events
        self._streams = streams
        self._headers = {"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})}
        self._headers["content-type"] = "text/event-stream; charset=utf-8"
        self._rpc_id = rpc_id
        self._on_end = on_end

    async def __call__(self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        """Serve one ASGI request."""
        del scope
        self._streams.add(self)
        writing = asyncio.create_task(self._write(send), name="gateway.stream.write")
        leaving = asyncio.create_task(_left(receive), name="gateway.stream.left")
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)
            self._streams.discard(self)
        if not writing.cancelled() and (error := writing.exception()) is not None:
            raise error

    async def _write(self, send: Callable[[Any], Any]) -> None:
        headers = [
            (name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in self._headers.items()
        ]
        refusal: Refusal | None = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._pass_on(send)
        except Refusal as error:
            refusal = error
        except AgentScopeRocketMQError as error:
            logger.info("A stream ends: %s", error)
            refusal = refusal_of(error)
        finally:
            # Before any last words: whoever does not read holds up nobody but its own connection.
            await self._events.aclose()
            await self._on_end()
        if refusal is not None and not await self._say_last(send, refusal):
            # It reads nothing at all: the server drops the connection of an answer that has no end.
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pass_on(self, send: Callable[[Any], Any]) -> None:
        """Send events as they come, and comments where none come."""
        ending = asyncio.create_task(self._streams.ending.wait(), name="gateway.stream.ending")
        coming: asyncio.Task[str | None] | None = None
        try:
            while True:
                coming = coming or asyncio.create_task(_next(self._events), name="gateway.stream.next")
                await asyncio.wait(
                    {coming, ending}, timeout=self._streams.keep_alive, return_when=asyncio.FIRST_COMPLETED
                )
                if coming.done():
                    text, coming = coming.result(), None
                    if text is None:
                        return
                    await self._send(send, encoded(text))
                elif ending.done():
                    raise Refusal(503, "draining", "This gateway stops. Connect again, with the id of your last event.")
                else:
                    await self._send(send, _KEEP_ALIVE)
        finally:
            for task in (ending, coming):
                if task is not None:
                    task.cancel()
            await asyncio.gather(*filter(None, (ending, coming)), return_exceptions=True)

    async def _send(self, send: Callable[[Any], Any], data: bytes) -> None:
        try:
            async with asyncio.timeout(self._streams.stall):
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError:
            self._streams.cut_off += 1
            raise Refusal(
                409,
                "resync",
                f"You left events unread for {self._streams.stall:g} s. Connect again, with the id of your last event.",
            ) from None

    async def _say_last(self, send: Callable[[Any], Any], refusal: Refusal) -> bool:
        """Say why the stream ends; whether the client took it."""
        name = _LAST_EVENTS.get(refusal.reason)
        text = render_event(refusal.body(self._rpc_id), name=name)
        if name is not None:
            text = retry() + text
        try:
            async with asyncio.timeout(_LAST_WORDS):
                await send({"type": "http.response.body", "body": encoded(text), "more_body": True})
        except TimeoutError:
            return False
        return True


async def _next(events: AsyncGenerator[str, None]) -> str | None:
    return await anext(events, None)


async def _left(receive: Callable[[], Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
