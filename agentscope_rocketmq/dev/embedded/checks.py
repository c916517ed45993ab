"""What a proxy refuses about a message or a request, in its words. Pure functions on the protocol's messages."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.dev.embedded.refusal import Code, Refused, not_modelled
from agentscope_rocketmq.rocketmq.protocol import definition

if TYPE_CHECKING:
    from agentscope_rocketmq.dev.embedded.settings import Settings

__all__ = ["check_lite_topic", "check_message", "milliseconds", "tags_of", "type_of"]

# Looking an enumeration's value up by attribute costs as much as the rest of a check.
_TRANSACTION = definition.MessageType.TRANSACTION
_SQL = definition.FilterType.SQL

_LITE_TOPIC = re.compile(r"[a-zA-Z0-9_-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LONGEST_GROUP = 64
_LONGEST_ID = 256
# org.apache.rocketmq.common.message.MessageConst#STRING_HASH_SET
_SYSTEM_PROPERTIES = frozenset(
    (  # noqa: SIM905  (a column of 54 names reads worse)
        "1ST_POP_TIME ARRIVE_TIME BORN_TIMESTAMP BUYER_ID CLUSTER CONSUME_START_TIME CORRECTION_FLAG CORRELATION_ID "
        "DELAY DLQ_ORIGIN_MESSAGE_ID DLQ_ORIGIN_TOPIC EXTEND_UNIQ_INFO INNER_MULTI_QUEUE_OFFSET INSTANCE_ID KEYS "
        "MAX_OFFSET MAX_RECONSUME_TIMES MIN_OFFSET MQ2_FLAG MSG_REGION MSG_TYPE ORIGIN_GROUP ORIGIN_MESSAGE_ID PGROUP "
        "POP_CK POP_CK_OFFSET PUSH_REPLY_TIME REAL_QID REAL_TOPIC RECONSUME_TIME REPLY_TO_CLIENT RETRY_TOPIC TAGS "
        "TIMER_DELAY_LEVEL TIMER_DELAY_MS TIMER_DELAY_SEC TIMER_DELIVER_MS TIMER_DEL_UNIQKEY TIMER_DEQUEUE_MS "
        "TIMER_ENQUEUE_MS TIMER_OUT_MS TIMER_ROLL_TIMES TRACE_ON TRANSFER_FLAG TRAN_MSG TRAN_PREPARED_QUEUE_OFFSET "
        "TTL UNIQ_KEY WAIT _SYS_MSG_PRIORITY_ __BORNHOST __CRC32# __LITE_TOPIC"
    ).split()
)


def milliseconds(duration: Any) -> int:
    """A protobuf `Duration` in ms, whatever a client wrote into it."""
    return int(duration.seconds) * 1000 + int(duration.nanos) // 1_000_000


def type_of(message: Any) -> str:
    """The type of a message, as a proxy derives it from its properties (not from what it says it is)."""
    system = message.system_properties
    if system.message_type == _TRANSACTION:
        return "TRANSACTION"
    if system.HasField("delivery_timestamp"):
        return "DELAY"
    if system.message_group:
        return "FIFO"
    if system.HasField("priority"):
        return "PRIORITY"
    return "LITE" if system.lite_topic else "NORMAL"


def check_message(message: Any, settings: Settings) -> None:
    """Refuse a message that a proxy refuses.

    Args:
        message: The protocol's `Message`.
        settings: Limits.

    Raises:
        Refused: With the code that fits.
    """
    system = message.system_properties
    if not message.body:
        raise Refused(Code.MESSAGE_BODY_EMPTY, "message body cannot be empty")
    if len(message.body) > settings.max_body_bytes:
        raise Refused(Code.MESSAGE_BODY_TOO_LARGE, f"message body cannot exceed the max {settings.max_body_bytes}")
    _check_properties(message, settings)
    if not system.message_id.strip():
        raise Refused(Code.ILLEGAL_MESSAGE_ID, "message id cannot be empty")
    if len(system.message_id) > _LONGEST_ID:
        raise Refused(Code.ILLEGAL_MESSAGE_ID, f"message id exceed the max size {_LONGEST_ID}")
    _check_words(Code.ILLEGAL_MESSAGE_GROUP, "message group", system.message_group)
    if len(system.message_group.encode()) >= _LONGEST_GROUP:
        raise Refused(Code.ILLEGAL_MESSAGE_GROUP, f"message group exceed the max size {_LONGEST_GROUP}")
    if system.lite_topic:
        check_lite_topic(system.lite_topic, settings)


def _check_properties(message: Any, settings: Settings) -> None:
    system, properties = message.system_properties, message.user_properties
    if len(properties) > settings.max_properties:
        text = f"too many user properties, max is {settings.max_properties}"
        raise Refused(Code.MESSAGE_PROPERTIES_TOO_LARGE, text)
    for name, value in properties.items():
        if name in _SYSTEM_PROPERTIES:
            raise Refused(Code.ILLEGAL_MESSAGE_PROPERTY_KEY, f"property is used by system: {name}")
        for what, word in (("key", name), ("value", value)):
            if _CONTROL.search(word):
                text = f"the {what} of property cannot contain control character"
                raise Refused(Code.ILLEGAL_MESSAGE_PROPERTY_KEY, text)
    _check_words(Code.ILLEGAL_MESSAGE_TAG, "tag", system.tag)
    if "|" in system.tag:
        raise Refused(Code.ILLEGAL_MESSAGE_TAG, "tag cannot contain '|'")
    for key in system.keys:
        _check_words(Code.ILLEGAL_MESSAGE_KEY, "key", key)
    texts = (*properties.keys(), *properties.values(), system.tag, *system.keys)
    if sum(len(text.encode()) for text in texts) > settings.max_properties_bytes:
        text = f"the total size of user property is too large, max is {settings.max_properties_bytes}"
        raise Refused(Code.MESSAGE_PROPERTIES_TOO_LARGE, text)


def check_lite_topic(name: str, settings: Settings) -> None:
    """Refuse what can't be the name of a LiteTopic."""
    if not name.strip():
        raise Refused(Code.ILLEGAL_LITE_TOPIC, "lite topic cannot be the char sequence of whitespace")
    if len(name.encode()) > settings.max_lite_topic_length:
        raise Refused(Code.ILLEGAL_LITE_TOPIC, f"lite topic exceed the max size {settings.max_lite_topic_length}")
    if not _LITE_TOPIC.fullmatch(name):
        raise Refused(
            Code.ILLEGAL_LITE_TOPIC,
            "lite topic can only contain alphanumeric characters, hyphens(-), and underscores(_)",
        )


def tags_of(expression: Any) -> frozenset[str] | None:
    """The tags that a filter lets through; None for all.

    Raises:
        Refused: NOT_IMPLEMENTED for SQL filters.
    """
    if expression.type == _SQL:
        raise not_modelled("SQL filters")
    tags = frozenset(tag.strip() for tag in expression.expression.split("||") if tag.strip())
    return None if not tags or "*" in tags else tags


def _check_words(code: int, what: str, text: str) -> None:
    if text and not text.strip():
        raise Refused(code, f"{what} cannot be the char sequence of whitespace")
    if _CONTROL.search(text):
        raise Refused(code, f"{what} cannot contain control character")
