"""One request through an ASGI app: the three arguments that an app is called with, made from a request envelope.

Around the app stands `OwnerGuard`, which believes or refuses what a gateway says about the owner of a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.authentication import SimpleUser

from agentscope_rocketmq.errors import Unauthenticated
from agentscope_rocketmq.jsonrpc import INVALID_REQUEST, RpcRequest, error_response
from agentscope_rocketmq.owners import OWNER_HEADER, read_assertion
from agentscope_rocketmq.routes import is_routing_header, new_context_id, new_task_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from agentscope_rocketmq.envelope import RequestEnvelope
    from agentscope_rocketmq.jsonrpc import RpcId
    from agentscope_rocketmq.reply import ReplyEncoder
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage
    from agentscope_rocketmq.spool import Spool

    ASGIApp = Callable[
        [dict[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]
    ]

__all__ = ["OwnerGuard", "Receive", "Response", "cancelled", "http_scope", "request_name", "with_rpc_id"]

_OWNER_HEADER = OWNER_HEADER.encode()


def request_name(envelope: RequestEnvelope) -> str:
    """What tells a request from all others, and is the same in all its deliveries."""
    return f"{envelope.request_id} {envelope.reply_topic} {envelope.lite_topic}"


def with_rpc_id(envelope: RequestEnvelope, request: RpcRequest) -> RequestEnvelope:
    """The request with a JSON-RPC id: that of its envelope where its caller gave none.

    Java servers answer such requests; the a2a-sdk refuses them in A2A 0.3, and the answer goes by the envelope anyway.
    Requests of peers of this package, gateways among them, stay as they are, byte for byte.

    Args:
        envelope: The request.
        request: What its body says.
    """
    if envelope.reads_batches or request.id is not None or request.method is None or envelope.large is not None:
        return envelope
    # Of two members with one name JSON's readers take the last. The rest stays as it was: half a surrogate pair, which
    # JSON can escape, could not be written again.
    members = envelope.body.rstrip().removesuffix("}")
    return replace(envelope, body=f'{members},"id":"{envelope.request_id}"}}')


def http_scope(
    envelope: RequestEnvelope, message: ReceivedMessage, *, path: str, attempt: int, given_up: str | None = None
) -> dict[str, Any]:
    """The scope of a request.

    Args:
        envelope: The request.
        message: The message that brought it.
        path: Path of the app's JSON-RPC endpoint.
        attempt: Which run of the request this is, from 0.
        given_up: Why its task is to fail instead of being worked on; None for work.
    """
    headers = {name.lower(): value for name, value in envelope.headers.items() if not is_routing_header(name)}
    headers.setdefault("content-type", "application/json")
    headers.setdefault("host", "rocketmq")
    request = request_name(envelope)
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
            "reply_topic": envelope.reply_topic,
            "lite_topic": envelope.lite_topic,
            "request_id": envelope.request_id,
            "message_id": message.message_id,
            "attempt": attempt,
            "given_up": given_up,
            # Ids for a task and a context that this request begins: they are the same in every run of it.
            "task_id": new_task_id(request),
            "context_id": new_context_id(request),
        },
    }


class Response:
    """ASGI's `send` side of one request: only notes what comes, so that a slow broker holds up nobody but itself."""

    def __init__(self, encoder: ReplyEncoder, *, limit: int) -> None:
        self.encoder = encoder
        self.changed = asyncio.Event()
        self.drained = asyncio.Event()
        self.over = asyncio.Event()
        self.complete = asyncio.Event()  # the app has sent all of it, or it is over
        self.unpublished = False  # the broker did not take all of it
        self._limit = limit

    def end(self) -> None:
        """Nothing more of it is taken."""
        self.over.set()
        self.complete.set()

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
            if not event.get("more_body", False):
                self.complete.set()
                if not self.encoder.is_stream:
                    # The app may go on behind its answer.
                    self.encoder.finish()
        self.changed.set()
        while self.encoder.pending_bytes > self._limit and not self.over.is_set():
            self.drained.clear()
            await self.drained.wait()


class Receive:
    """ASGI's `receive` side: the request body, then nothing until the response is complete, or over.

    A caller that leaves can't be seen over RocketMQ, and would cancel nothing: the agent goes on.
    """

    def __init__(self, body: bytes | Spool, complete: asyncio.Event, *, rpc_id: RpcId = None) -> None:
        self.rpc_id = rpc_id
        self._body = body
        self._chunks = iter(()) if isinstance(body, bytes) else body.chunks()
        self._complete = False
        self._response_complete = complete

    @property
    def sha256(self) -> str:
        """SHA-256 of the request body, in hexadecimal."""
        return hashlib.sha256(self._body).hexdigest() if isinstance(self._body, bytes) else self._body.sha256

    async def __call__(self) -> dict[str, Any]:
        """The next event."""
        if self._complete:
            await self._response_complete.wait()
            return {"type": "http.disconnect"}
        if isinstance(self._body, bytes):
            chunk, self._complete = self._body, True
        else:
            chunk = await asyncio.to_thread(next, self._chunks, b"")
            if not chunk:
                self._complete = True
                self._body.close()  # the app has it now
        return {"type": "http.request", "body": chunk, "more_body": not self._complete}


class OwnerGuard:
    """Around an app that serves RocketMQ: makes the owner that a gateway asserts the user of the ASGI scope.

    A request without an assertion passes as it is; one whose assertion is not valid gets 403 and a JSON-RPC error, and
    does not reach the app.

    Args:
        app: The app.
        secret: Secret of the deployment; None refuses every assertion, since it can't be verified.
        audiences: Topics of the agent.
    """

    def __init__(self, app: ASGIApp, *, secret: str | None, audiences: Iterable[str]) -> None:
        self._app = app
        self._secret = secret
        self._audiences = tuple(audiences)

    def caller(self, envelope: RequestEnvelope) -> str:
        """Whose a request is, for what is shared out among callers; not to be believed for anything else."""
        headers = {name.lower(): value for name, value in envelope.headers.items()}
        with contextlib.suppress(Unauthenticated):
            if OWNER_HEADER in headers:
                large = envelope.large
                # Whether a large body has this hash is seen when it is read.
                sha256 = hashlib.sha256(envelope.body.encode()).hexdigest() if large is None else large.sha256
                reply = _reply(envelope.reply_topic, envelope.lite_topic)
                return "owner " + self._owner([headers[OWNER_HEADER].encode()], envelope.request_id, sha256, reply)
        if "authorization" in headers:
            return "credentials " + hashlib.sha256(headers["authorization"].encode()).hexdigest()
        return f"session {envelope.reply_topic} {envelope.lite_topic}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        assertions = [value for name, value in scope.get("headers", ()) if name == _OWNER_HEADER]
        if not assertions:
            await self._app(scope, receive, send)
            return
        try:
            carried = scope["rocketmq"]
            reply = _reply(carried["reply_topic"], carried["lite_topic"])
            owner = self._owner(assertions, carried["request_id"], receive.sha256, reply)
        except Unauthenticated as error:
            await _refuse(send, 403, error_response(receive.rpc_id, INVALID_REQUEST, str(error)))
            return
        headers = [(name, value) for name, value in scope["headers"] if name != _OWNER_HEADER]
        await self._app({**scope, "headers": headers, "user": SimpleUser(owner)}, receive, send)

    def _owner(self, assertions: list[bytes], request_id: str, body_sha256: str, reply: str) -> str:
        if self._secret is None:
            raise Unauthenticated(
                "This agent's server can't verify for whom a gateway asks: give it the gateway's ROCKETMQ_A2A_SECRET."
            )
        return read_assertion(
            assertions[0].decode("latin-1"),
            secret=self._secret,
            audiences=self._audiences,
            request_id=request_id,
            body_sha256=body_sha256,
            reply=reply,
        )


def _reply(reply_topic: str, lite_topic: str) -> str:
    return f"{reply_topic} {lite_topic}"


async def _refuse(send: Callable[[Any], Awaitable[None]], status: int, text: str) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def cancelled() -> bool:
    """Whether the running task was told to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
