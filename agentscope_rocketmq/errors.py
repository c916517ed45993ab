"""Every error this package raises on purpose.

::

    AgentScopeRocketMQError
    ├── ConfigurationError            a setting is missing, contradictory or malformed
    ├── CardError                     an agent card can't be read, or lists no usable interface
    ├── EnvelopeError                 a message on the wire is not an envelope we understand
    ├── BrokerError                   what a RocketMQ broker or proxy refused or failed at
    │   ├── BrokerUnreachable         nobody answers at the endpoint
    │   ├── NotAuthorized             credentials are missing, wrong, or lack a permission
    │   ├── TopicNotFound             the topic does not exist
    │   ├── TopicTypeMismatch         the topic is of another message type
    │   ├── GroupNotFound             the consumer group does not exist
    │   ├── GroupNotBound             the consumer group is not bound to that LITE topic
    │   ├── MessageTooLarge           the body is over the broker's limit
    │   ├── QuotaExceeded             too many LiteTopics or subscriptions
    │   ├── Throttled                 flow control lasted longer than the caller's deadline
    │   └── IllegalRequest            a name or a property that RocketMQ does not accept
    ├── CallError                     an A2A call over RocketMQ ended without its answer
    │   ├── CallTimeout               ack, idle or total time ran out; says which
    │   ├── ResponseTooSlow           the reader of a stream did not keep up
    │   └── ResponseCorrupt           what came back can't be put together
    ├── BlobStoreError                a blob store failed
    ├── SessionTakenOver              another reader opened this session
    ├── ReplayGapError                what was asked for of a session is not kept, or never was
    ├── ResyncRequired                a listener of a session did not keep up and was cut off
    ├── WrongOwner                    the session belongs to somebody else
    ├── Unauthenticated               a bearer token or an owner assertion is missing, forged or expired
    ├── WrongEventLoop                the object lives in another event loop
    └── ClosedError                   the object was used before its start or after its close

Each message says what happened, to which topic, session or request, and what to do about it. None carries a
credential. At the edge to httpx, `transport.py` maps them to httpx's own classes, with the original as cause.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

    from agentscope_rocketmq.cursor import Cursor

__all__ = [
    "AgentScopeRocketMQError",
    "BlobStoreError",
    "BrokerError",
    "BrokerUnreachable",
    "CallError",
    "CallTimeout",
    "CardError",
    "ClosedError",
    "ConfigurationError",
    "EnvelopeError",
    "GroupNotBound",
    "GroupNotFound",
    "IllegalRequest",
    "MessageTooLarge",
    "NotAuthorized",
    "QuotaExceeded",
    "ReplayGapError",
    "ResponseCorrupt",
    "ResponseTooSlow",
    "ResyncRequired",
    "SessionTakenOver",
    "Throttled",
    "TopicNotFound",
    "TopicTypeMismatch",
    "Unauthenticated",
    "WrongEventLoop",
    "WrongOwner",
]

# Names follow the table of design.md (`SessionTakenOver`, …): what happened, not "SomethingError".
# ruff: noqa: N818


class AgentScopeRocketMQError(Exception):
    """The root: catch this to catch whatever this package raises on purpose."""


class ConfigurationError(AgentScopeRocketMQError, ValueError):
    """A setting is missing, contradictory or malformed."""


class CardError(AgentScopeRocketMQError, ValueError):
    """An agent card can't be read, or lists no interface that both sides know."""


class EnvelopeError(AgentScopeRocketMQError, ValueError):
    """A message on the wire is not an envelope we understand.

    Attributes:
        request_id: The request it names, when that much could be read, else None.
    """

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id


class BlobStoreError(AgentScopeRocketMQError):
    """A blob store failed; the same may succeed later."""


class BrokerError(AgentScopeRocketMQError):
    """What a RocketMQ broker or proxy refused or failed at.

    Attributes:
        code: The `apache.rocketmq.v2.Code` number of the answer (40402, 42900, …), 0 where there was no answer.
        transient: Whether the same call may succeed later without anybody changing anything.
    """

    def __init__(self, message: str, *, code: int = 0, transient: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.transient = transient


class BrokerUnreachable(BrokerError):
    """Nobody answers at the endpoint, or the answer did not come in time."""


class NotAuthorized(BrokerError):
    """Credentials are missing, wrong, or lack a permission."""


class TopicNotFound(BrokerError):
    """The topic does not exist on this cluster (or in this namespace)."""


class TopicTypeMismatch(BrokerError):
    """The topic exists, but for another message type (NORMAL, LITE, PRIORITY, …)."""


class GroupNotFound(BrokerError):
    """The consumer group does not exist on this cluster (or in this namespace)."""


class GroupNotBound(BrokerError):
    """The consumer group is not bound to that LITE topic."""


class MessageTooLarge(BrokerError):
    """The body is over the limit of the broker (4 MiB unless raised there)."""


class QuotaExceeded(BrokerError):
    """More LiteTopics or LiteTopic subscriptions than the broker allows this client."""


class Throttled(BrokerError):
    """The broker's flow control lasted longer than the caller's deadline."""


class IllegalRequest(BrokerError):
    """A name, key or property that RocketMQ does not accept."""


class CallError(AgentScopeRocketMQError):
    """An A2A call over RocketMQ ended without its answer.

    Attributes:
        request_id: Id of the request envelope, as found in traces and logs.
    """

    def __init__(self, message: str, *, request_id: str) -> None:
        super().__init__(message)
        self.request_id = request_id


class CallTimeout(CallError, TimeoutError):
    """Ack, idle or total time of a call ran out.

    Attributes:
        which: `"ack"` (no worker took the request), `"idle"` (nothing arrived for that long) or `"total"` (the call as
            a whole took that long).
        seconds: The limit that ran out.
    """

    def __init__(self, message: str, *, request_id: str, which: str, seconds: float) -> None:
        super().__init__(message, request_id=request_id)
        self.which = which
        self.seconds = seconds


class ResponseTooSlow(CallError):
    """The reader of a streamed response did not keep up and was cut off, so that others could go on."""


class ResponseCorrupt(CallError):
    """The messages of a response can't be put together (one missing, or not decodable)."""


class SessionTakenOver(AgentScopeRocketMQError):
    """Another reader opened this session; this one no longer receives its events.

    Attributes:
        session: The session's LiteTopic.
    """

    def __init__(self, message: str, *, session: str) -> None:
        super().__init__(message)
        self.session = session


class Unauthenticated(AgentScopeRocketMQError):
    """A bearer token or an owner assertion is missing, forged, expired, or meant for something else."""


class ReplayGapError(AgentScopeRocketMQError):
    """What was asked for of a session is not there: no longer kept, begun anew since, or never there.

    Attributes:
        wanted: What was asked for: a cursor or its text, a time, None for the session's start.
        oldest: Where the oldest event that is kept can be had: `events(after=error.oldest)` begins with it. None
            where nothing is kept, or it was not looked for.
        session: The session's LiteTopic; None where the cursor was not even one.
    """

    def __init__(
        self,
        message: str,
        *,
        wanted: Cursor | datetime | str | None,
        oldest: Cursor | None = None,
        session: str | None = None,
    ) -> None:
        super().__init__(message)
        self.wanted = wanted
        self.oldest = oldest
        self.session = session


class ResyncRequired(AgentScopeRocketMQError):
    """A listener of a session did not keep up and was cut off, so that others could go on.

    Attributes:
        session: The session's LiteTopic.
        cursor: The last event that the listener took; `events(after=error.cursor)` goes on behind it. None when it
            took none.
    """

    def __init__(self, message: str, *, session: str, cursor: Cursor | None) -> None:
        super().__init__(message)
        self.session = session
        self.cursor = cursor


class WrongOwner(AgentScopeRocketMQError):
    """The session belongs to another owner; nothing of it was read.

    Attributes:
        session: The session's LiteTopic.
    """

    def __init__(self, message: str, *, session: str) -> None:
        super().__init__(message)
        self.session = session


class WrongEventLoop(AgentScopeRocketMQError, RuntimeError):
    """The object was used from another event loop than the one it lives in."""


class ClosedError(AgentScopeRocketMQError, RuntimeError):
    """The object was used before its start or after its close."""
