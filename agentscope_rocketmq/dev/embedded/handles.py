"""Receipt handles: strings that say which delivery they belong to, and that nobody else can make."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from agentscope_rocketmq.dev.embedded.refusal import Code, Refused

__all__ = ["Handle", "Handles"]

_FIELDS = 5
_MAC_LENGTH = 16
_LONGEST = 200


@dataclass(frozen=True, slots=True)
class Handle:
    """One delivery of one message to one group.

    Attributes:
        group: Number of the group.
        queue: Number of the queue.
        offset: The message's offset in it.
        serial: Number of the delivery: a redelivered or renewed message has another.
        expires_ms: When the handle is void at the latest, in ms since 1970.
    """

    group: int
    queue: int
    offset: int
    serial: int
    expires_ms: int


class Handles:
    """Writes and reads handles.

    Args:
        secret: What they are authenticated with. A broker keeps it with its data, so that handles outlive a restart.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def write(self, handle: Handle) -> str:
        """The string for a handle."""
        text = f"{handle.group}.{handle.queue}.{handle.offset}.{handle.serial}.{handle.expires_ms}"
        return f"{text}.{self._mac(text)}"

    def read(self, text: str, *, now_ms: int) -> Handle:
        """The handle in a string.

        Args:
            text: What a client sent.
            now_ms: The time, in ms since 1970.

        Raises:
            Refused: INVALID_RECEIPT_HANDLE: not made here, or expired.
        """
        fields, _, mac = text.rpartition(".")
        if len(text) > _LONGEST or not text.isascii() or not hmac.compare_digest(mac, self._mac(fields)):
            raise Refused(Code.INVALID_RECEIPT_HANDLE, "receipt handle is not one of this broker")
        numbers = [int(number) for number in fields.split(".")]
        assert len(numbers) == _FIELDS  # noqa: S101  (its MAC says that it was written above)
        handle = Handle(*numbers)
        if handle.expires_ms <= now_ms:
            raise Refused(Code.INVALID_RECEIPT_HANDLE, "receipt handle is expired")
        return handle

    def _mac(self, text: str) -> str:
        return hmac.digest(self._secret, text.encode(), "sha256").hex()[:_MAC_LENGTH]
