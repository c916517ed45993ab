"""What a session holds, event by event: its messages read one after the other, whoever asked for them. No I/O.

A session's LiteTopic holds the responses of all its calls, message after message, with duplicates and what older runs
of a request still said. `EventReader` turns it into events, each once and in order, so that reading it again from the
same place gives the same events with the same cursors.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.cursor import Cursor
from agentscope_rocketmq.envelope import ResponseEnvelope
from agentscope_rocketmq.errors import EnvelopeError, ResponseCorrupt
from agentscope_rocketmq.exchange import Exchange
from agentscope_rocketmq.jsonrpc import Progress, RpcError, progress, read_json
from agentscope_rocketmq.rerun import places
from agentscope_rocketmq.taps import Taps

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from a2a.types import StreamResponse, Task

    from agentscope_rocketmq.exchange import Call
    from agentscope_rocketmq.spool import Spools

__all__ = ["EventReader", "SessionEvent", "SessionRecord"]

# Calls whose copies and older runs are still recognised; the one not heard of longest is let go first.
_CALLS = 1024
_LONGEST_NAME = 4096
_LATEST = 1e12  # seconds since 1970; beyond it no clock goes


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionEvent:
    """One event of a session: what an agent answered, or a piece of it.

    Attributes:
        cursor: Its place in the session.
        raw: The JSON-RPC response that it is, as it was carried.
        request_id: Id of the request envelope that it answers.
        attempt: Which delivery of the request it is of, from 0.
        run: The run of it; None where the server does not say.
        store_time: When the broker stored the message that brought it, UTC.
        ends: Whether it is the last event of its response.
        stream: Whether it is one of a stream of events; otherwise it is the whole response.
        agent: Topic of the agent that was asked, where this process asked; None otherwise.
    """

    cursor: Cursor
    raw: str
    request_id: str
    attempt: int
    run: str | None
    store_time: datetime
    ends: bool
    stream: bool
    agent: str | None = None

    @property
    def payload(self) -> StreamResponse | Task | RpcError | None:
        """What it says: an A2A event, a task (of `GetTask`, `CancelTask`), an error.

        Both versions of A2A are read; 0.3 comes in the types of 1.0. None for any other result, which `raw` has.
        """
        try:
            response = read_json(self.raw)
        except ValueError:
            return None
        if not isinstance(response, dict):
            return None
        if (error := RpcError.of(response)) is not None:
            return error
        result = response.get("result")
        return _payload(result) if isinstance(result, dict) else None


def _payload(result: dict[str, Any]) -> StreamResponse | Task | None:
    from a2a.types import StreamResponse, Task  # noqa: PLC0415  (they take a third of a second to import)
    from google.protobuf.json_format import ParseDict, ParseError  # noqa: PLC0415

    try:
        if "kind" in result:
            return _payload_of_0_3(result)
        if len(result) == 1:
            event: StreamResponse = ParseDict(result, StreamResponse(), ignore_unknown_fields=True)
            if event.WhichOneof("payload") is not None:
                return event
        if "id" in result and "status" in result:
            task: Task = ParseDict(result, Task(), ignore_unknown_fields=True)
            return task
    except (ParseError, ValueError):  # pydantic's ValidationError is one
        pass
    return None


def _payload_of_0_3(result: dict[str, Any]) -> StreamResponse:
    from a2a.compat.v0_3.conversions import to_core_stream_response  # noqa: PLC0415
    from a2a.compat.v0_3.types import SendStreamingMessageSuccessResponse  # noqa: PLC0415

    return to_core_stream_response(SendStreamingMessageSuccessResponse.model_validate({"result": result}))


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """What this package writes into a session's LiteTopic about the session itself.

    On the wire it is a response to no request: `ResponseEnvelope` fields with an id that nobody waits for, and one
    more, `session`. Readers that do not know it, the Java reference among them, drop it as an answer that came late.

    Attributes:
        id: Its own id, as unlikely as a request's.
        name: The session's name, as its caller gave it.
        owner: Whose it is.
        time: When it was written, seconds since 1970.
        mark: It only marks a place, and says nothing of the session.
    """

    id: str
    name: str
    owner: str
    time: float
    mark: bool = False

    def encode(self) -> bytes:
        """Write the message body."""
        about = {"name": self.name, "owner": self.owner, "time": self.time, "mark": self.mark}
        fields = {"requestId": self.id, "stream": False, "end": True, "session": about}
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")

    @classmethod
    def decode(cls, data: bytes) -> SessionRecord | None:
        """Read a message body; None when it is no record."""
        if b'"session":{' not in data:
            return None
        try:
            fields = read_json(data.decode())
        except ValueError:
            return None
        about = fields.get("session") if isinstance(fields, dict) else None
        if not isinstance(about, dict) or fields.get("responseBody") is not None:
            return None
        record_id, name, owner = (
            _text(text) for text in (fields.get("requestId"), about.get("name"), about.get("owner"))
        )
        time: Any = about.get("time")
        if record_id is None or name is None or owner is None or type(time) not in (int, float):
            return None
        return cls(id=record_id, name=name, owner=owner, time=float(time), mark=about.get("mark") is True)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME else None


class EventReader:
    """Reads the messages of one session in order of their offsets.

    Args:
        agents: Request id -> topic of the agent asked, as far as known; looked into, not kept.
        spools: Where events are put together that come in parts; None for some of its own.

    Attributes:
        headless: Whether the end of an event was read whose first parts are before where reading began.
        lost: Why the event of the message that was read last can't be had from its blob store; None where it can.
    """

    def __init__(self, *, agents: Mapping[str, str] | None = None, spools: Spools | None = None) -> None:
        self.headless = False
        self.lost: str | None = None
        self._begun = False
        self._agents = agents or {}
        self._exchange = Exchange(spools=spools)
        self._calls: OrderedDict[str, Call] = OrderedDict()

    def begin(self, offset: int) -> None:
        """Reading began with the message at that offset, whether or not that is one of a response.

        In the middle, where it was told to begin or the rest is not kept, calls are taken up where they are first seen.
        """
        if not self._begun:
            self._begun, self._midway = True, offset > 0
            self._taps = Taps(midway=offset > 0)

    def feed(self, body: bytes, *, offset: int, message_id: str, store_time: datetime) -> list[SessionEvent]:
        """Take a message.

        Args:
            body: Its body.
            offset: Its offset in the session's LiteTopic.
            message_id: Its id.
            store_time: When the broker stored it.

        Returns:
            The events that can be given out now, in order: those that it brought, and those that waited for it.
        """
        self.lost = None
        self.begin(offset)
        try:
            envelope = ResponseEnvelope.decode(body)
        except EnvelopeError:
            return []
        call = self._call(envelope.request_id)
        now = store_time.timestamp()
        # Time is that of the broker, so that reading again gives the same.
        texts = call.check(now)
        try:
            texts += call.feed(envelope, now)
        except ResponseCorrupt as error:
            if envelope.part is not None and envelope.part.claim is not None:
                self.lost = str(error)  # the call goes on without it, for those who begin behind it
            else:
                texts += call.give_up()
        self.headless = self.headless or (envelope.part is not None and envelope.part.is_last and call.whole.headless)
        stream = call.head is not None and call.head.stream
        found = [(index, event.data) for index, event in places(texts)] if stream else list(enumerate(texts))
        events = [
            SessionEvent(
                cursor=Cursor.of(offset, index, message_id),
                raw=raw,
                request_id=envelope.request_id,
                attempt=call.attempt,
                run=call.run,
                store_time=store_time,
                ends=(call.finished and number == len(found)) or progress(raw) is not Progress.OPEN,
                stream=stream,
                agent=self._agents.get(envelope.request_id),
            )
            for number, (index, raw) in enumerate(found, start=1)
            if not (stream and envelope.seq is None and self._taps.is_repeat(envelope.request_id, raw))
        ]
        if call.finished:
            self._taps.close(envelope.request_id)
        return events

    def _call(self, request_id: str) -> Call:
        call = self._calls.get(request_id)
        if call is None:
            call = self._exchange.open(request_id, idle=None, total=None, now=0.0, midway=self._midway)
            self._calls[request_id] = call
            if len(self._calls) > _CALLS:
                _, forgotten = self._calls.popitem(last=False)
                self._exchange.close(forgotten)
        else:
            self._calls.move_to_end(request_id)
        return call
