"""Server-sent events as text: read from a byte stream in any chunking, written so that every reader takes them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Event", "EventParser", "parse_events", "render_event"]

# Readers built on str.splitlines, httpx's among them, take these for line ends too and tear an event apart. All
# events of A2A are JSON, where the escape means the same.
_ESCAPED = {char: f"\\u{ord(char):04x}" for char in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One server-sent event.

    Attributes:
        data: Its data, lines joined by a line feed; never empty.
        name: Its event name; None for the unnamed kind.
        id: Its id; None without one.
    """

    data: str
    name: str | None = None
    id: str | None = None


class EventParser:
    """Reads events from bytes that arrive in any chunking, split characters and line ends included.

    Comments (pings) and events without data are dropped, as the specification of server-sent events wants it.
    """

    def __init__(self) -> None:
        self._line: list[bytes] = []
        self._line_bytes = 0
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._name: bytes | None = None
        self._id: bytes | None = None
        self._skip_line_feed = False

    @property
    def pending_bytes(self) -> int:
        """Bytes held of an event that is not complete yet."""
        return self._line_bytes + self._data_bytes

    def feed(self, chunk: bytes) -> list[Event]:
        """Take further bytes; return the events they complete."""
        if not chunk:
            return []
        # A carriage return ends its line at once; the line feed that may follow still belongs to it.
        ends_with_return = chunk.endswith(b"\r")
        if self._skip_line_feed:
            chunk = chunk.removeprefix(b"\n")
        self._skip_line_feed = ends_with_return
        lines = chunk.splitlines()  # of bytes: the line ends of the specification, and no others
        rest = lines.pop() if chunk and chunk[-1] not in b"\r\n" else b""
        events = []
        for line in lines:
            self._line.append(line)
            event = self._end_line()
            if event is not None:
                events.append(event)
        if rest:
            self._line.append(rest)
            self._line_bytes += len(rest)
        return events

    def close(self) -> list[Event]:
        """End the stream; return the last event where only its closing blank line is missing."""
        if self._line:
            self._end_line()
        event = self._end_event()
        return [] if event is None else [event]

    def _end_line(self) -> Event | None:
        line = b"".join(self._line)
        self._line, self._line_bytes = [], 0
        if not line:
            return self._end_event()
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
            self._data_bytes += len(value)
        elif field == b"event":
            self._name = value
        elif field == b"id":
            self._id = value
        return None

    def _end_event(self) -> Event | None:
        data, name, event_id = b"\n".join(self._data), self._name, self._id
        self._data, self._data_bytes, self._name, self._id = [], 0, None, None
        if not data:
            return None
        return Event(
            data=data.decode("utf-8", "replace"),
            name=None if name is None else name.decode("utf-8", "replace"),
            id=None if event_id is None else event_id.decode("utf-8", "replace"),
        )


def parse_events(text: str) -> list[Event]:
    """Read the events of a complete text; the blank line after the last one may be missing."""
    parser = EventParser()
    return parser.feed(text.encode("utf-8", "replace")) + parser.close()


def render_event(data: str, *, name: str | None = None, event_id: str | None = None) -> str:
    """Write one event.

    Args:
        data: Its data, a JSON text.
        name: Its event name; None for none.
        event_id: Its id; None for none.

    Returns:
        The event with its closing blank line.
    """
    for char, escape in _ESCAPED.items():
        if char in data:
            data = data.replace(char, escape)
    if "\r" in data:
        data = data.replace("\r\n", "\n").replace("\r", "\n")
    lines = [f"data: {line}" for line in data.split("\n")]
    if name is not None:
        lines.insert(0, f"event: {name}")
    if event_id is not None:
        lines.append(f"id: {event_id}")
    return "\n".join(lines) + "\n\n"
