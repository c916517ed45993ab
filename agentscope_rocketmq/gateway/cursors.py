"""Cursors as a gateway hands them out: opaque texts that name their session, so that any gateway can use them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import NamedTuple

from agentscope_rocketmq.gateway.refusal import Refusal
from agentscope_rocketmq.jsonrpc import read_json

__all__ = ["Cursors", "Place"]

_MAC_BYTES = 12
# A session's name has 1,024 characters at most, and each takes six bytes in JSON at most ("\u0001"); beside it
# there are a session's cursor and the MAC. In base64 all of it is a third longer.
_LONGEST = (6 * 1024 + 200) * 4 // 3


class Place(NamedTuple):
    """What a cursor says.

    Attributes:
        session: Name of the session.
        cursor: Cursor of an event in it, as `Session.events(after=…)` takes it.
    """

    session: str
    cursor: str


class Cursors:
    """Writes and reads them.

    Args:
        secret: Secret of the deployment: cursors are signed with it, for their owner; None leaves them unsigned.

    Attributes:
        signed: Whether a cursor proves that its session is there and is its owner's.
    """

    def __init__(self, secret: str | None) -> None:
        self.signed = secret is not None
        self._key = (
            None if secret is None else hmac.new(secret.encode(), b"agentscope-rocketmq cursor", "sha256").digest()
        )

    def write(self, place: Place, *, owner: str) -> str:
        """The text of a place, for an `id:` line of server-sent events."""
        said = json.dumps(place, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        return _text(said) + ("" if self._key is None else "." + _text(self._mac(said, owner)))

    def read(self, text: str, *, owner: str) -> Place:
        """What a text says.

        Args:
            text: A cursor as `write` made it.
            owner: Who shows it.

        Raises:
            Refusal: 403, it is no cursor, is forged, or was handed out to another owner.
        """
        place = self._read(text, owner) if len(text) <= _LONGEST else None
        if place is None:
            raise Refusal(
                403,
                "bad-cursor",
                "This cursor (Last-Event-ID, after) was not handed out to you by this deployment. Give the id of an "
                "event as it came, or begin anew with from_start, since or tail.",
            )
        return place

    def _read(self, text: str, owner: str) -> Place | None:
        said, _, mac = text.partition(".")
        try:
            raw = _bytes(said)
            if self._key is not None and not hmac.compare_digest(_bytes(mac), self._mac(raw, owner)):
                return None
            session, cursor = read_json(raw.decode())
        except (ValueError, TypeError):  # binascii's error and UnicodeDecodeError are ValueErrors
            return None
        is_place = isinstance(session, str) and session and isinstance(cursor, str)
        return Place(session, cursor) if is_place else None

    def _mac(self, said: bytes, owner: str) -> bytes:
        text = f"{len(owner)}:{owner}".encode() + said
        return hmac.new(self._key or b"", text, hashlib.sha256).digest()[:_MAC_BYTES]


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
