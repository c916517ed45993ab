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

# Served at once. A subscription lasts as long as its task works.
MOST = 1000


class Questions:
    """Those of one bridge.

    Args:
        publisher: Answers those that are too many.

    Attributes:
        count: How many are served, or refused, now.
    """

    def __init__(self, publisher: Publisher) -> None:
        self.count = 0
        self._publisher = publisher

    async def serve(self, envelope: RequestEnvelope, request: RpcRequest, serve: Callable[[], Awaitable[None]]) -> None:
        """Serve one, or say that too many are served already.

        Args:
            envelope: The request.
            request: What its body says.
            serve: Serves it.
        """
        if self.count >= 2 * MOST:
            # Not even that can be said to so many at once: the broker is slow.
            logger.warning("Request %s is dropped: too many requests about tasks at once", envelope.request_id)
            return
        self.count += 1
        try:
            if self.count <= MOST:
                await serve()
            else:
                reason = (
                    f"The instance of the task of request {envelope.request_id} serves {MOST} requests about its tasks "
                    "at once (get, cancel, subscribe), and takes no more now. Ask again in a moment."
                )
                await self._publisher.answer_given_up(envelope, request, reason, attempt=0)
        finally:
            self.count -= 1
