"""Cursors: where an event stands in its session. No I/O."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.errors import ReplayGapError
from agentscope_rocketmq.jsonrpc import read_json

if TYPE_CHECKING:
    from a2a.types import StreamResponse

__all__ = ["CURSOR_EXTENSION", "Cursor", "cursor_of", "with_cursor"]

CURSOR_EXTENSION = "urn:agentscope-rocketmq:extension:cursor:v1"
"""URI of the A2A extension by which a caller asks for the cursors of events; also their key in an event's metadata.

The carrier on the caller's own side adds them, to what the agent sent: no server needs to know the extension.
"""

# Before the first event of a message an index is -1: what to go on from when a message is the oldest one kept.
_CURSOR = re.compile(r"(?P<offset>0|[1-9][0-9]{0,18})\.(?P<index>-1|0|[1-9][0-9]{0,8})\.(?P<check>[0-9a-f]{12})")
_CHECK_CHARACTERS = 12


@dataclass(frozen=True, slots=True)
class Cursor:
    """The place of an event: to go on after it, give this cursor, or its text, to `Session.events(after=…)`.

    Its text is `offset.index.check`. It means something only in its own session.

    Attributes:
        offset: Offset of the message in the session's LiteTopic.
        index: Number of the event among those that came with the message, from 0; -1 stands before the first.
        check: Short hash of the message's id and the index: another message at that offset is noticed, and an index
            that was made up.
    """

    offset: int
    index: int
    check: str

    def __str__(self) -> str:
        return f"{self.offset}.{self.index}.{self.check}"

    @property
    def place(self) -> tuple[int, int]:
        """What orders the cursors of one session."""
        return self.offset, self.index

    def is_of(self, message_id: str) -> bool:
        """Whether it points into that message."""
        return self.check == _check(message_id, self.index)

    @classmethod
    def of(cls, offset: int, index: int, message_id: str) -> Cursor:
        """The cursor of an event.

        Args:
            offset: Offset of its message.
            index: Number of the event in it.
            message_id: Id of the message.
        """
        return cls(offset, index, _check(message_id, index))

    @classmethod
    def parse(cls, text: str | Cursor) -> Cursor:
        """Read a cursor's text; a cursor comes back as it is.

        Raises:
            ReplayGapError: It is none, so there is nothing that it could stand for.
        """
        if isinstance(text, Cursor):
            return text
        match = _CURSOR.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ReplayGapError(
                f"{text!r:.80} is not a cursor of a session: give one as an event carried it, or start from an event "
                "that is kept (from_start, since, tail).",
                wanted=text,
            )
        return cls(int(match["offset"]), int(match["index"]), match["check"])


def with_cursor(response: str, cursor: Cursor) -> str:
    """A JSON-RPC response with the cursor in the metadata of the event that it carries, of A2A 1.0 or 0.3.

    Any other text comes back as it is.
    """
    try:
        fields = read_json(response)
    except ValueError:
        return response
    result = fields.get("result") if isinstance(fields, dict) else None
    if not isinstance(result, dict):
        return response
    kinds = ("task", "message", "statusUpdate", "artifactUpdate")
    event: Any = result if "kind" in result else next((result[kind] for kind in kinds if kind in result), None)
    if not isinstance(event, dict):
        return response
    metadata = event.get("metadata")
    event["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), CURSOR_EXTENSION: str(cursor)}
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def cursor_of(event: StreamResponse) -> Cursor | None:
    """The cursor that an a2a-sdk client's event carries, where the client asked for `CURSOR_EXTENSION`."""
    payload = event.WhichOneof("payload")
    if payload is None or CURSOR_EXTENSION not in (metadata := getattr(event, payload).metadata):
        return None
    return Cursor.parse(metadata[CURSOR_EXTENSION])


def _check(message_id: str, index: int) -> str:
    return hashlib.sha256(f"{index} {message_id}".encode("utf-8", "replace")).hexdigest()[:_CHECK_CHARACTERS]
