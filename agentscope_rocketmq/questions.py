"""Requests about tasks (get, cancel, subscribe) that reach an instance: they take no place, and are bounded apart."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agentscope_rocketmq.envelope import RequestEnvelope
    from agentscope_rocketmq.jsonrpc import RpcRequest
    from agentscope_rocketmq.publisher import Publisher

__all__ = ["Questions"]

logger = logging.getLogger(__name__)

# Subscriptions served at once, each of which lasts as long as its task works, and other requests apart from them.
MOST = 1000
_MOST_REFUSALS = 1000  # under way


class Questions:
    """Those of one bridge.

    Args:
        publisher: Answers those that are too many.

    Attributes:
        count: How many are served, or refused, now.
        subscriptions: How many of them want a stream.
    """

    def __init__(self, publisher: Publisher) -> None:
        self.count = 0
        self.subscriptions = 0
        self._publisher = publisher

    async def serve(self, envelope: RequestEnvelope, request: RpcRequest, serve: Callable[[], Awaitable[None]]) -> None:
        """Serve one, or say that too many are served already.

        Args:
            envelope: The request.
            request: What its body says.
            serve: Serves it.
        """
        if self.count >= 2 * MOST + _MOST_REFUSALS:
            # Not even that can be said to so many at once: the broker is slow.
            logger.warning("Request %s is dropped: too many requests about tasks at once", envelope.request_id)
            return
        self.count += 1
        self.subscriptions += request.wants_stream
        # Subscriptions must not keep a cancel out.
        many = self.subscriptions if request.wants_stream else self.count - self.subscriptions
        try:
            if many <= MOST:
                await serve()
            else:
                what = "subscriptions" if request.wants_stream else "requests about its tasks (get, cancel)"
                reason = (
                    f"The instance of the task of request {envelope.request_id} serves {MOST} {what} at once, and "
                    "takes no more now. Ask again in a moment."
                )
                await self._publisher.answer_given_up(envelope, request, reason, attempt=0)
        finally:
            self.count -= 1
            self.subscriptions -= request.wants_stream
