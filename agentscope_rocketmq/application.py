"""The A2A app behind a bridge: called with a request and its body, which may come in parts or from a blob store."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from agentscope_rocketmq.asgi import Receive, cancelled, http_scope
from agentscope_rocketmq.errors import BlobStoreError, EnvelopeError
from agentscope_rocketmq.jsonrpc import INTERNAL_ERROR, INVALID_REQUEST

if TYPE_CHECKING:
    from agentscope_rocketmq.asgi import ASGIApp, Response
    from agentscope_rocketmq.bodies import BodyReceiver
    from agentscope_rocketmq.envelope import RequestEnvelope
    from agentscope_rocketmq.jsonrpc import RpcRequest
    from agentscope_rocketmq.runs import BridgeCounters, Delivery, Limit

__all__ = ["Application"]

logger = logging.getLogger(__name__)


class Application:
    """Calls an app with requests.

    Args:
        app: The ASGI app.
        path: Path of its JSON-RPC endpoint.
        bodies: Has large bodies.
        counters: Of the bridge; `expired` and `refused` are counted here.
    """

    def __init__(self, app: ASGIApp, path: str, *, bodies: BodyReceiver, counters: BridgeCounters) -> None:
        self._app = app
        self._path = path
        self._bodies = bodies
        self._counters = counters

    async def answer(
        self, envelope: RequestEnvelope, request: RpcRequest, delivery: Delivery, response: Response
    ) -> None:
        """Call the app with a request, when its body is there, and note what it sends.

        Args:
            envelope: The request.
            request: What its body says.
            delivery: The delivery that it came by.
            response: Takes what the app sends, or why it can't be called.

        Raises:
            BlobStoreError: The store that has its body failed: another worker may have it.
        """
        if envelope.large is None:
            receive = Receive(envelope.body.encode(), response.complete, rpc_id=request.id)
            await self._call_app(envelope, delivery, response, receive)
            return
        try:
            async with self._bodies.fetch(envelope) as body:
                receive = Receive(body, response.complete, rpc_id=request.id)
                await self._call_app(envelope, delivery, response, receive)
        except EnvelopeError as error:
            self._counters.refused += 1
            logger.warning("%s", error)
            response.encoder.fail(INVALID_REQUEST, str(error))
        except BlobStoreError as error:
            if delivery.given_up is None:
                raise
            response.encoder.fail(INTERNAL_ERROR, f"{delivery.given_up} {error}")

    def expire(self, envelope: RequestEnvelope, limit: Limit, response: Response) -> None:
        """Say that nobody waits for a request any more: who reads the session's log finds why it has no answer."""
        self._counters.expired += 1
        logger.info("Request %s was not begun: its caller's %s time had run out", envelope.request_id, limit.which)
        response.encoder.fail(
            INTERNAL_ERROR,
            f"The {limit.which} time limit ({limit.seconds:g} s) of request {envelope.request_id} ran out before a "
            "worker could begin: the agent has not seen it. Start more workers, or raise the limit.",
        )

    async def _call_app(
        self, envelope: RequestEnvelope, delivery: Delivery, response: Response, receive: Receive
    ) -> None:
        scope = http_scope(
            envelope, delivery.message, path=self._path, attempt=delivery.attempt, given_up=delivery.given_up
        )
        try:
            await self._app(scope, receive, response.send)
        except Exception:
            logger.exception("The A2A app failed on request %s", envelope.request_id)
            response.encoder.fail(
                INTERNAL_ERROR, f"The agent's server failed on request {envelope.request_id}; its log says why."
            )
            return
        if cancelled():
            # The a2a-sdk swallows the cancellation of a blocking send and answers with a task at work.
            raise asyncio.CancelledError
        response.encoder.finish()
        if not response.encoder.saw_end_of_task:
            # The a2a-sdk ends the stream of a reader that it finds too slow as if all were well.
            response.encoder.fail(
                INTERNAL_ERROR,
                f"The response to request {envelope.request_id} ended before its task did. "
                "The task may go on: ask for it (GetTask), or subscribe to it.",
            )
