"""How long a call waits for what, and what a worker is told of it."""

from __future__ import annotations

from typing import NamedTuple

from agentscope_rocketmq.envelope import ACK_TIMEOUT_HEADER, IDLE_TIMEOUT_HEADER, TOTAL_TIMEOUT_HEADER

__all__ = ["CallTimes"]


class CallTimes(NamedTuple):
    """How long a call waits for what, in seconds; None waits for ever.

    Attributes:
        ack: For a worker to take it. None counts `idle` from its sending.
        idle: Between two signs of life of its response.
        total: For all of its response.
    """

    ack: float | None
    idle: float | None
    total: float | None

    def headers(self) -> dict[str, str]:
        """What a worker must know of them: headers of the request."""
        given = {ACK_TIMEOUT_HEADER: self.ack, IDLE_TIMEOUT_HEADER: self.idle, TOTAL_TIMEOUT_HEADER: self.total}
        return {name: f"{seconds:.3f}" for name, seconds in given.items() if seconds is not None}

    def after(self, seconds: float) -> CallTimes:
        """What is left when it took so long to get as far as sending the request; what ran out is 1 ms."""
        return self if self.total is None else self._replace(total=max(0.001, self.total - seconds))
