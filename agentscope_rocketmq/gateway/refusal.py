"""Refusals and failures as HTTP answers: one status for each, and a JSON-RPC error where the question was JSON-RPC."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from agentscope_rocketmq.errors import (
    AgentScopeRocketMQError,
    BrokerError,
    CallTimeout,
    CardError,
    ClosedError,
    ConfigurationError,
    MessageTooLarge,
    ReplayGapError,
    ResponseCorrupt,
    ResponseTooSlow,
    ResyncRequired,
    SessionTakenOver,
    Unauthenticated,
    WrongOwner,
)
from agentscope_rocketmq.jsonrpc import encoded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentscope_rocketmq.jsonrpc import RpcId

__all__ = ["PARSE_ERROR", "REFUSED", "Refusal", "refusal_of"]

PARSE_ERROR = -32700
"""JSON-RPC's code for a text that is no JSON."""

REFUSED = -32000
"""Code of an error that is the gateway's own and not the agent's; its `data.reason` says which."""


class Refusal(Exception):  # noqa: N818  (what happened, as in errors.py)
    """An answer that is not the agent's: status, reason and message.

    Args:
        status: HTTP status.
        reason: What it is, for programs: a few words joined by `-`.
        message: What happened and what to do.
        code: JSON-RPC error code.
        data: More for programs.
    """

    def __init__(
        self, status: int, reason: str, message: str, *, code: int = REFUSED, data: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.code = code
        self.data = {"reason": reason, **(data or {})}

    def body(self, rpc_id: RpcId = None) -> str:
        """Its JSON-RPC error response."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.code == REFUSED:
            error["data"] = self.data
        return json.dumps({"jsonrpc": "2.0", "id": rpc_id, "error": error}, ensure_ascii=False)

    def response(self, rpc_id: RpcId = None) -> Response:
        """The HTTP answer."""
        headers = {}
        if self.status == 401:  # noqa: PLR2004  (HTTP's)
            headers["www-authenticate"] = "Bearer"
        if self.status == 503:  # noqa: PLR2004
            headers["retry-after"] = "1"
        body = encoded(self.body(rpc_id))
        return Response(body, status_code=self.status, media_type="application/json", headers=headers)


# The first that fits; bugs of this package are not in it.
_ANSWERS: tuple[tuple[type[AgentScopeRocketMQError], int, str], ...] = (
    (Unauthenticated, 401, "unauthenticated"),
    (WrongOwner, 403, "wrong-owner"),
    (ReplayGapError, 410, "gap"),
    (ConfigurationError, 400, "bad-request"),
    (MessageTooLarge, 413, "too-large"),
    (CallTimeout, 504, "timeout"),
    (SessionTakenOver, 409, "taken-over"),
    (ResyncRequired, 409, "resync"),
    (ResponseTooSlow, 409, "resync"),
    (ResponseCorrupt, 502, "corrupt"),
    (CardError, 503, "agent-unknown"),
    (ClosedError, 503, "closing"),
    (BrokerError, 503, "unreachable"),
)


def refusal_of(error: AgentScopeRocketMQError) -> Refusal:
    """What an error of this package is to an HTTP client."""
    for kind, status, reason in _ANSWERS:
        if isinstance(error, kind):
            return Refusal(status, reason, _told(error, kind))
    return Refusal(500, "internal", "The gateway failed; its log says why.")


def _told(error: AgentScopeRocketMQError, kind: type[AgentScopeRocketMQError]) -> str:
    if kind in (BrokerError, ClosedError):
        # Which broker and which topic is nobody's business out there; the log has it.
        return "The agent can't be reached through this gateway now. Ask again."
    return str(error)
