"""The fields of an envelope: a JSON object in UTF-8, written without nulls, each field checked as it is read."""

from __future__ import annotations

import json
import re
from typing import Any

from agentscope_rocketmq.errors import EnvelopeError
from agentscope_rocketmq.jsonrpc import read_json

__all__ = ["MAX_HEADERS", "MAX_HEADER_BYTES", "REQUEST_ID", "Fields", "encode_fields", "is_header"]

MAX_HEADERS = 128
"""Most headers that an envelope may carry."""

MAX_HEADER_BYTES = 64 * 1024
"""Most bytes that names and values of an envelope's headers may have together."""

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What the id of a request looks like."""

_MAX_NUMBER = 2**53 - 1  # JSON's safe integers
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")
_HEADER_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")


def is_header(name: str, value: str) -> bool:
    """Whether a header may stand in an envelope: a legal name, no control characters in the value."""
    return bool(_HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value))


def encode_fields(**fields: object) -> bytes:
    """Write fields; those that are None are left out."""
    present = {name: value for name, value in fields.items() if value is not None}
    text = json.dumps(present, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


class Fields:
    """The fields of one envelope."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    @classmethod
    def parse(cls, data: bytes) -> Fields:
        """Read them.

        Raises:
            EnvelopeError: It is no JSON object.
        """
        try:
            fields = read_json(data.decode("utf-8"))
        except ValueError as error:  # UnicodeDecodeError is one
            raise EnvelopeError(f"The message is not an envelope: {error}.") from None
        if not isinstance(fields, dict):
            raise EnvelopeError("The message is not an envelope: its JSON is not an object.")
        return cls(fields)

    def any(self, name: str) -> Any:
        """A field as it is; None where it is missing."""
        return self._fields.get(name)

    def has(self, name: str) -> bool:
        """Whether a field is there."""
        return self._fields.get(name) is not None

    def inner(self, name: str) -> Fields:
        """The fields of one that is an object; the request id is seen from within (errors as all others)."""
        value = self._fields.get(name)
        if not isinstance(value, dict):
            raise self.error(name, "it is not a map")
        return Fields({"requestId": self._fields.get("requestId"), **value})

    def error(self, name: str, problem: str) -> EnvelopeError:
        """The error for a field that is not what it should be."""
        request_id = self._fields.get("requestId")
        if not (isinstance(request_id, str) and REQUEST_ID.fullmatch(request_id)):
            request_id = None
        return EnvelopeError(
            f"The envelope of request {request_id or '(unknown)'} has a bad {name}: {problem}.",
            request_id=request_id,
        )

    def optional_text(
        self, name: str, pattern: re.Pattern[str] | None = None, *, limit: int | None = None
    ) -> str | None:
        """A text; None where it is missing.

        Raises:
            EnvelopeError: It is no text, does not match, or is too long.
        """
        value = self._fields.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.error(name, "it is not a string")
        if pattern is not None and not pattern.fullmatch(value):
            raise self.error(name, f"it does not match {pattern.pattern}")
        if limit is not None and len(value) > limit:
            raise self.error(name, f"it is longer than {limit} characters")
        return _without_surrogates(value)

    def text(self, name: str, pattern: re.Pattern[str] | None = None) -> str:
        """A text that must be there (errors as `optional_text`)."""
        value = self.optional_text(name, pattern)
        if value is None:
            raise self.error(name, "it is missing")
        return value

    def flag(self, name: str) -> bool:
        """True or false; false where it is missing (errors as `optional_text`)."""
        value = self._fields.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.error(name, "it is neither true nor false")
        return value

    def number(self, name: str, *, low: int = 0, high: int = _MAX_NUMBER) -> int | None:
        """A whole number; None where it is missing (errors as `optional_text`)."""
        value = self._fields.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(name, f"it is not a whole number from {low} to {high}")
        return value

    def headers(self, name: str) -> dict[str, str] | None:
        """HTTP headers; None where they are missing (errors as `optional_text`)."""
        value = self._fields.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "it is not a map")
        if len(value) > MAX_HEADERS:
            raise self.error(name, f"it has more than {MAX_HEADERS} entries")
        headers: dict[str, str] = {}
        size = 0
        for header, text in value.items():
            if text is None:
                continue
            if not isinstance(text, str) or not is_header(header, text):
                raise self.error(name, "an entry is not a legal HTTP header")
            headers[header] = _without_surrogates(text)
            size += len(header) + len(headers[header].encode())
        if size > MAX_HEADER_BYTES:
            raise self.error(name, f"it is longer than {MAX_HEADER_BYTES} bytes")
        return headers


def _without_surrogates(text: str) -> str:
    # JSON can escape half a surrogate pair; such a string could never be written as UTF-8 again.
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
