"""The one edge where RocketMQ's answer codes and gRPC's failures become this package's typed errors."""

from __future__ import annotations

import re
from typing import Any

import grpc

from agentscope_rocketmq.errors import (
    BrokerError,
    BrokerUnreachable,
    GroupNotBound,
    GroupNotFound,
    IllegalRequest,
    MessageTooLarge,
    NotAuthorized,
    QuotaExceeded,
    Throttled,
    TopicNotFound,
    TopicTypeMismatch,
)
from agentscope_rocketmq.rocketmq.protocol import definition

__all__ = ["check", "from_rpc_error", "from_status", "hopeless", "hung_up"]

_Code = definition.Code
_JAVA_CLASS = re.compile(r"^(?:[a-z0-9]+\.)+[A-Za-z]*(?:Exception|Error): ")

# What each answer means and what to do about it; codes that are not here become a plain BrokerError.
_ADVICE: dict[int, tuple[type[BrokerError], str]] = {
    _Code.TOPIC_NOT_FOUND: (
        TopicNotFound,
        "Create it with `agentscope-rocketmq provision CARD` (a new topic takes some seconds to be known), "
        "check topic name and namespace, and that the brokers that have it are up.",
    ),
    _Code.ILLEGAL_TOPIC: (IllegalRequest, "Use 1-127 letters, digits, '_', '-' or '%' in topic names."),
    _Code.CONSUMER_GROUP_NOT_FOUND: (
        GroupNotFound,
        "Create it with `agentscope-rocketmq provision CARD`, check group name and namespace, and that the brokers "
        "that have it are up.",
    ),
    _Code.ILLEGAL_CONSUMER_GROUP: (
        IllegalRequest,
        "Use 1-120 letters, digits, '_', '-' or '%' in group names.",
    ),
    _Code.ILLEGAL_LITE_TOPIC: (
        IllegalRequest,
        "A LiteTopic's name is 1-64 letters, digits, '_' or '-'.",
    ),
    _Code.MESSAGE_BODY_TOO_LARGE: (
        MessageTooLarge,
        "Send less, or raise maxMessageSize on the brokers and proxies.",
    ),
    _Code.PAYLOAD_TOO_LARGE: (
        MessageTooLarge,
        "Send less, or raise maxMessageSize on the brokers and proxies.",
    ),
    _Code.MESSAGE_PROPERTIES_TOO_LARGE: (MessageTooLarge, "Send fewer or shorter message properties."),
    _Code.MESSAGE_PROPERTY_CONFLICT_WITH_TYPE: (
        TopicTypeMismatch,
        "The topic's +message.type is another one: provision it as the type that is sent "
        "(requests NORMAL, replies LITE).",
    ),
    _Code.UNAUTHORIZED: (
        NotAuthorized,
        "Check ROCKETMQ_ACCESS_KEY and ROCKETMQ_SECRET_KEY, and the user's permissions on this topic and group.",
    ),
    _Code.FORBIDDEN: (
        NotAuthorized,
        "Check the user's permissions on this topic and group, and that the group is allowed to consume.",
    ),
    _Code.TOO_MANY_REQUESTS: (Throttled, "The broker limits the rate: send slower, or wait longer."),
    _Code.LITE_TOPIC_QUOTA_EXCEEDED: (
        QuotaExceeded,
        "The brokers hold as many LiteTopics as they may: raise maxLmqConsumeQueueNum there, "
        "or let LiteTopics expire sooner.",
    ),
    _Code.LITE_SUBSCRIPTION_QUOTA_EXCEEDED: (
        QuotaExceeded,
        "Raise the group's lite.sub.client.quota (`agentscope-rocketmq provision` does), "
        "or spread the sessions over more processes.",
    ),
}

# What the proxy says, as an internal error, of an ack for a message that was handed out again or taken over meanwhile.
_STALE_RECEIPT = "status is abnormal"

# The same call may succeed later although nobody changes anything.
_TRANSIENT = {
    _Code.TOO_MANY_REQUESTS,
    _Code.REQUEST_TIMEOUT,
    _Code.INTERNAL_ERROR,
    _Code.INTERNAL_SERVER_ERROR,
    _Code.HA_NOT_AVAILABLE,
    _Code.PROXY_TIMEOUT,
    _Code.MASTER_PERSISTENCE_TIMEOUT,
    _Code.SLAVE_PERSISTENCE_TIMEOUT,
}

# gRPC's words for what no waiting mends while a connection is being made for the first time, and what to do.
_HOPELESS = {
    "CERTIFICATE_VERIFY_FAILED": "Its certificate is not trusted here: give the authority that signed it as "
    "ROCKETMQ_TLS_CA, and check that TLS is set the same on both sides.",
    "Hostname Verification Check failed": "Its certificate is for another host: use a host name that it names in "
    "ROCKETMQ_ENDPOINT or the card.",
    "WRONG_VERSION_NUMBER": "What answers there does not speak TLS: check that TLS is set the same on both sides "
    "(ROCKETMQ_TLS here, http or https in a card) and that this is the proxy's gRPC port.",
    "Domain name not found": "Its host name is unknown: check it in ROCKETMQ_ENDPOINT or the card.",
    "Name or service not known": "Its host name is unknown: check it in ROCKETMQ_ENDPOINT or the card.",
}

_GRPC_TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def check(status: Any, doing: str, *, known: bool = False) -> None:
    """Raise unless a `Status` says OK.

    Args:
        status: The protocol's `Status` of an answer.
        doing: What was asked and of whom, as the start of a sentence: `Sending to topic 'X'`.
        known: Whether the topic and the group asked about have worked before. A proxy forgets them some 20 s after the
            brokers that have them went away, and says that they do not exist until some 20 s after they are back
            (its caches of routes and settings): for known ones that is an outage, which passes.

    Raises:
        BrokerError: The class that fits the code, with the broker's own words and what to do.
    """
    if status.code not in (_Code.OK, _Code.MULTIPLE_RESULTS):
        raise from_status(status, doing, known=known)


def from_status(status: Any, doing: str, *, known: bool = False) -> BrokerError:
    """The error for a `Status` that is not OK (arguments as `check`)."""
    code = int(status.code)
    name = _Code.Name(code) if code in _Code.values() else "unknown code"
    said = _first_line(status.message)
    kind, advice = _by_words(said) or _ADVICE.get(
        code,
        (IllegalRequest if 40000 <= code < 40100 else BrokerError, ""),  # noqa: PLR2004
    )
    if known and kind in (TopicNotFound, GroupNotFound):
        return BrokerUnreachable(
            f"{doing} failed: the RocketMQ broker that serves it is away ({name}: {said}). Check that it runs.",
            code=code,
            transient=True,
        )
    text = f"{doing} was refused: {name} ({code}): {said}. {advice}".strip()
    passes = code in _TRANSIENT and kind in (BrokerError, Throttled) and _STALE_RECEIPT not in said
    return kind(text, code=code, transient=passes)


def from_rpc_error(error: grpc.RpcError, doing: str, endpoint: str) -> BrokerError:
    """The error for a call that got no answer.

    Args:
        error: What gRPC raised.
        doing: What was asked, as in `check`.
        endpoint: Where the call went, `host:port`.
    """
    code = error.code() if isinstance(error, grpc.aio.AioRpcError) else grpc.StatusCode.UNKNOWN
    details = _first_line(_details(error)) if isinstance(error, grpc.aio.AioRpcError) else ""
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        kind, advice = _ADVICE[_Code.UNAUTHORIZED]
        return kind(f"{doing} was refused by {endpoint}: {details}. {advice}", code=_Code.UNAUTHORIZED)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        kind, advice = _by_words(details) or (IllegalRequest, "")
        return kind(f"{doing} was refused by {endpoint}: {details}. {advice}".strip())
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return BrokerError(
            f"{doing} failed: {endpoint} does not implement it ({details}). "
            "LiteTopics need Apache RocketMQ 5.5 or newer with its proxy in cluster mode."
        )
    advice = hopeless(error) or (
        "Check that the RocketMQ proxy runs there, that this is its gRPC port, and that TLS is set the same on both "
        "sides."
    )
    return BrokerUnreachable(
        f"{doing} failed: no answer from {endpoint} ({code.name}: {details}). {advice}",
        transient=code in _GRPC_TRANSIENT,
    )


def hopeless(error: BaseException | None) -> str | None:
    """What to do about a failure that stays until somebody changes something; None for all others.

    Only a first connection is hopeless then: a certificate that is being renewed, or a name server that restarts, must
    not end what worked before.
    """
    details = _details(error)
    return next((advice for words, advice in _HOPELESS.items() if words in details), None)


def hung_up(error: BaseException | None) -> bool:
    """Whether the far end took a connection and closed it without an answer."""
    return any(words in _details(error) for words in ("Socket closed", "Connection reset"))


def _details(error: BaseException | None) -> str:
    return str(error.details() or "") if isinstance(error, grpc.aio.AioRpcError) else ""


def _by_words(said: str) -> tuple[type[BrokerError], str] | None:
    """What the proxy says in words only, under a code that means something else (measured on 5.5.0)."""
    if "expected type is UNSPECIFIED" in said:
        return _ADVICE[_Code.TOPIC_NOT_FOUND]
    if "group not found" in said:
        return _ADVICE[_Code.CONSUMER_GROUP_NOT_FOUND]
    if "bind topic" in said or "cannot use LITE mode" in said:
        return (
            GroupNotBound,
            "A lite group reads one LITE topic, its +lite.bind.topic: `agentscope-rocketmq provision CARD` binds it.",
        )
    return None


def _first_line(text: str) -> str:
    # The proxy appends Java stack traces and pointers to its FAQ; the first line is what it has to say.
    line = text.strip().splitlines()[0] if text.strip() else "no reason given"
    return _JAVA_CLASS.sub("", line)[:500].rstrip(". ")
