"""The server's half of an exchange: turns the HTTP response of an A2A app into response envelopes. No I/O.

The bridge feeds in what the app sends, in whatever pieces, and takes out one message whenever the last one was
accepted by the broker. A caller that reads batches gets everything that piled up meanwhile in one message, numbered,
and what is too large for a message in parts, while it still comes, or by way of a blob store; the Java reference gets
its own format: one event a message with an SSE id, then a bare end marker.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from agentscope_rocketmq.envelope import (
    Part,
    ResponseEnvelope,
    encoded_size,
    is_carried_header,
)
from agentscope_rocketmq.fields import is_header
from agentscope_rocketmq.jsonrpc import (
    INTERNAL_ERROR,
    Progress,
    RpcId,
    error_response,
    progress,
    read_json,
)
from agentscope_rocketmq.spool import InParts
from agentscope_rocketmq.sse import Event, EventParser, render_event

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agentscope_rocketmq.envelope import Claim

__all__ = ["ReplyEncoder", "error_envelope"]

_MAX_HEADER_BYTES = 8 * 1024  # a part of what an envelope allows; the rest of the message is for the answer
_LARGEST_NUMBER = 2**53 - 1
_MOST_RESPONSE_BYTES = 128 * 1024 * 1024


class _Piece(NamedTuple):
    """An event ready to be sent, and the bytes it takes up in a message."""

    text: str
    size: int


class ReplyEncoder:
    """Encodes one response.

    Feed it with `start`, `feed` and `finish` (or `fail`), take messages out with `take` until `finished`.
    """

    def __init__(
        self,
        request_id: str,
        *,
        peer_reads_batches: bool,
        sticky: tuple[str, str] | None,
        attempt: int,
        run: str,
        max_message_bytes: int,
        wants_stream: bool,
        rpc_id: RpcId = None,
        max_body_bytes: int = _MOST_RESPONSE_BYTES,
        store_above: int | None = None,
    ) -> None:
        """Begin a response.

        Args:
            request_id: Id of the request envelope.
            peer_reads_batches: Whether the caller announced our additions; if not, it gets the Java format.
            sticky: Reply topic and LiteTopic on which this instance takes further requests; None for nowhere.
            attempt: Which delivery of the request this answers, from 0.
            run: Id of this run of it.
            max_message_bytes: Largest message the broker takes.
            wants_stream: Whether the request's method is one that is answered with a stream.
            rpc_id: JSON-RPC id of the request, for errors; None where it has none.
            max_body_bytes: Largest event or document that is sent in parts.
            store_above: Bytes above which one goes to a blob store instead; None where the caller shares none.
        """
        self._request_id = request_id
        self._batches = peer_reads_batches
        self._sticky = sticky
        self._attempt = attempt
        self._run = run
        self._max_message_bytes = max_message_bytes
        self._wants_stream = wants_stream
        self._rpc_id = rpc_id
        # What is in one piece is held until it is whole, or until it is known not to fit.
        self._max_body_bytes = max_body_bytes if peer_reads_batches else max_message_bytes
        self._parts: InParts | None = None
        self._store_above = store_above if peer_reads_batches else None
        self._storing = False
        self._status = 200
        self._headers: dict[str, str] = {}
        self._parser: EventParser | None = None  # set: the app answers with a stream
        self._document: list[bytes] = []
        self._document_bytes = 0
        self._is_stream = False  # the form in which the response is sent
        self._pieces: deque[_Piece] = deque()
        self._piece_bytes = 0
        self._last_event: str | None = None
        self._event_count = 0
        self._seq = 0
        self._begins = False  # an opening message is due
        self._head_sent = False
        self._complete = False
        self._failed = False
        self._finished = False
        self._started = False
        self._room = max_message_bytes - self._overhead()

    @property
    def finished(self) -> bool:
        """Whether the last message was taken."""
        return self._finished

    @property
    def is_stream(self) -> bool:
        """Whether it is sent as a stream of events, as far as is known."""
        return self._is_stream

    @property
    def pending_bytes(self) -> int:
        """Bytes that wait here to be taken: what back-pressure goes by."""
        partial = self._parser.pending_bytes if self._parser else 0
        in_parts = self._parts.pending if self._parts else 0
        return self._piece_bytes + self._document_bytes + in_parts + partial

    @property
    def saw_end_of_task(self) -> bool:
        """Whether the answer is whole.

        True for a document that is complete, and for a stream whose last event so far ends or interrupts its task.
        A stream that is finished without it was cut off on its way here: `fail` it, so that the caller knows.
        """
        if self._is_stream:
            last = self._last_event
            return last is not None and progress(last) is not Progress.OPEN
        return self._complete

    @property
    def storing(self) -> bool:
        """Whether a body is to be put into the blob store: take its chunks, then say that it is `stored`."""
        return self._storing

    def begin(self) -> None:
        """Let the caller know that its request is taken, or still worked on, where the app says nothing.

        The next message is one without body, unless there is something to send meanwhile; the first one of a response
        names this instance. The Java format has no such.
        """
        self._begins = self._batches

    def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Take the status and the headers of the app's response."""
        if self._complete:
            return
        self._started = True
        self._status = status
        self._headers = _carried(headers)
        if self._headers.get("content-type", "").lower().startswith("text/event-stream"):
            self._parser = EventParser()
            self._is_stream = True
        self._room = self._max_message_bytes - self._overhead()

    def feed(self, chunk: bytes) -> None:
        """Take a piece of the response's body."""
        if self._complete:
            return
        if self._parser is not None:
            self._add_events(self._parser.feed(chunk))
            # What is too large when it is complete need not be held until it is.
            partial = self._parser.pending_bytes if self._parser else 0
        elif self._parts is not None:
            self._parts.add(chunk)
            partial = self._parts.size
        else:
            self._document.append(chunk)
            self._document_bytes += len(chunk)
            partial = self._document_bytes
            if self._batches and partial > (self._room if self._store_above is None else self._store_above):
                self._send_document_in_parts()
        if partial > self._max_body_bytes:
            self._refuse_size(partial)

    def finish(self) -> None:
        """Take note that the app's response is complete."""
        if self._complete:
            return
        if not self._started:
            self.fail(INTERNAL_ERROR, "The agent's application ended without a response.")
            return
        if self._parser is not None:
            self._add_events(self._parser.close())
            self._complete = True
            return
        if self._parts is not None:
            self._complete = True
            return
        text = b"".join(self._document).decode("utf-8", "replace")
        if not self._batches:
            text = self._as_rpc_response(text)
        if self._wants_stream and not self._batches:
            # The Java client waits for ever when a stream request is answered with anything but events.
            self._is_stream = True
            self._clear_document()
            self._add_events([Event(data=text)])
        elif encoded_size(text) <= self._room and not self._is_for_store(self._document_bytes):
            self._set_document(text)
        elif self._batches:
            self._send_document_in_parts()
        else:
            self._refuse_size(len(text.encode()))
        self._complete = True

    def fail(self, code: int, message: str) -> None:
        """End the response with a JSON-RPC error, in the form that fits what was sent already.

        After `finish` this still replaces a document that was not taken, and adds an event to a stream whose end
        was not. It does nothing when the last message was taken, or after an earlier failure.

        Args:
            code: Error code of JSON-RPC or A2A.
            message: What happened and what to do, for the caller's eyes.
        """
        if self._finished or self._failed:
            return
        self._failed = self._complete = True
        error = error_response(self._rpc_id, code, message)
        self._parser = self._parts = None
        if self._storing:  # what comes behind a body that is lost would mislead
            self._pieces.clear()
            self._piece_bytes = 0
        self._storing = False
        if self._is_stream or (self._wants_stream and not self._batches):
            self._is_stream = True
            self._clear_document()
            self._add_piece(error)
        else:
            self._status = 200  # as all JSON-RPC errors
            self._headers = {"content-type": "application/json"}
            self._set_document(error)

    def take(self) -> ResponseEnvelope | None:
        """Take the next message to send; None when there is none yet, or no more."""
        if self._finished:
            return None
        if self._begins:
            self._begins = False
            if self._storing or not (self._pieces or self._complete):
                return self._message(None, end=False, opening=True)
        if self._parts is not None:
            return None if self._storing else self._take_part(self._parts)
        if not self._is_stream:
            return self._take_document() if self._complete else None
        if not self._pieces and not self._complete:
            return None
        return self._take_batch() if self._batches else self._take_event()

    def take_chunk(self, most: int) -> bytes | None:
        """The next bytes, so many at most, for the blob store; empty at its end, None when there are none yet."""
        if self._parts is not None and self._parts.pending:
            return self._parts.take(most, last=False).data
        return b"" if self._is_stream or self._complete else None

    def stored(self, claim: Claim) -> ResponseEnvelope | None:
        """The message that tells where the body is; None when the response failed meanwhile."""
        if self._parts is None or not self._storing:
            return None
        part = replace(self._parts.take(0, last=True), index=0, claim=claim)
        self._parts, self._storing = None, False
        return self._message(None, end=self._complete and not self._pieces, part=part)

    def _is_for_store(self, size: int) -> bool:
        return self._store_above is not None and size > self._store_above

    def _take_document(self) -> ResponseEnvelope:
        text = b"".join(self._document).decode()
        self._clear_document()
        return self._message(text, end=True)

    def _take_part(self, parts: InParts) -> ResponseEnvelope | None:
        # An event is whole when it is sent. A document may still be coming, and its last part must say so.
        whole = self._is_stream or self._complete
        last = whole and parts.pending <= self._room
        if not last and parts.pending <= self._room:
            return None
        part = parts.take(self._room, last=last)
        if last:
            self._parts = None
        return self._message(None, end=last and self._complete and not self._pieces, part=part)

    def _send_document_in_parts(self) -> None:
        self._parts = InParts(self._document)
        self._storing = self._is_for_store(self._document_bytes)
        self._clear_document()

    def _take_batch(self) -> ResponseEnvelope | None:
        largest = min(self._room, self._store_above or self._room)
        if self._pieces and self._pieces[0].size > largest:
            piece = self._pieces.popleft()
            self._piece_bytes -= piece.size
            self._parts = InParts([piece.text.encode()])
            self._storing = self._is_for_store(piece.size)
            return None if self._storing else self._take_part(self._parts)
        texts: list[str] = []
        room = self._room
        while self._pieces and self._pieces[0].size <= min(room, largest):
            piece = self._pieces.popleft()
            texts.append(piece.text)
            room -= piece.size
            self._piece_bytes -= piece.size
        return self._message("".join(texts) or None, end=self._complete and not self._pieces)

    def _take_event(self) -> ResponseEnvelope:
        if not self._pieces:
            return self._message(None, end=True)
        piece = self._pieces.popleft()
        self._piece_bytes -= piece.size
        return self._message(piece.text, end=False)

    def _message(
        self, body: str | None, *, end: bool, opening: bool = False, part: Part | None = None
    ) -> ResponseEnvelope:
        number = self._seq
        self._seq += 1
        self._finished = end
        has_head = self._batches and not (opening or self._head_sent)
        self._head_sent = self._head_sent or has_head
        # The Java server names its instance with documents only.
        names_instance = number == 0 and (self._batches or not self._is_stream)
        sticky = self._sticky if names_instance and self._sticky else (None, None)
        return ResponseEnvelope(
            request_id=self._request_id,
            body=body,
            stream=self._wants_stream if opening else self._is_stream,
            end=end,
            server_reply_topic=sticky[0],
            server_lite_topic=sticky[1],
            seq=number if self._batches else None,
            attempt=self._attempt if self._batches else None,
            run=self._run if self._batches else None,
            status=self._status if has_head else None,
            headers=self._headers if has_head else None,
            part=part,
        )

    def _overhead(self) -> int:
        """Bytes of a message beside its body, in the worst case."""
        sticky = self._sticky or (None, None)
        return len(
            ResponseEnvelope(
                request_id=self._request_id,
                body="",
                stream=False,
                end=False,
                server_reply_topic=sticky[0],
                server_lite_topic=sticky[1],
                seq=_LARGEST_NUMBER,
                attempt=_LARGEST_NUMBER,
                run=self._run,
                status=self._status,
                headers=self._headers,
                part=Part(index=_LARGEST_NUMBER, data=b"", size=_LARGEST_NUMBER, sha256="0" * 64),
            ).encode()
        )

    def _add_events(self, events: Iterable[Event]) -> None:
        for event in events:
            if self._failed:
                return
            self._add_piece(event.data, event.name)

    def _add_piece(self, data: str, name: str | None = None) -> None:
        if self._batches:
            text = render_event(data, name=name)
        else:
            # The Java client knows `data` in one line and `id`. In JSON a line end is only a blank.
            text = render_event(data.replace("\r", " ").replace("\n", " "), event_id=str(self._event_count))
        # Escapes only add to what is too large already, and looking for them costs several times its size.
        size = len(text) if len(text) > self._room else encoded_size(text)
        most = self._max_body_bytes if self._batches else self._room
        if size > most and not self._failed:
            self._refuse_size(size)
            return
        self._event_count += 1
        self._last_event = data
        self._pieces.append(_Piece(text, size))
        self._piece_bytes += size

    def _refuse_size(self, size: int) -> None:
        if self._batches:
            limit = f"{self._max_body_bytes} may be sent. Let it answer in smaller pieces, or raise its server's "
            limit += "Limits.response_bytes, and that of its callers."
        else:
            limit = f"this caller can't read it in parts: it does not fit into a message of {self._max_message_bytes} "
            limit += "bytes. Let the agent answer in smaller pieces, or raise the broker's message limit."
        self.fail(
            INTERNAL_ERROR,
            f"One {'event' if self._is_stream else 'answer'} of the agent has {size} bytes or more, and {limit}",
        )

    def _as_rpc_response(self, text: str) -> str:
        """Replace what the Java client could not read: an error page, or nothing."""
        try:
            response = read_json(text)
        except ValueError:
            response = None
        if isinstance(response, dict):
            if "result" in response or "error" in response:
                return text
            # The a2a-sdk leaves a result of nothing out.
            return json.dumps({**response, "result": None}, ensure_ascii=False)
        return error_response(
            self._rpc_id,
            INTERNAL_ERROR,
            f"The agent's server answered with HTTP status {self._status} and no JSON-RPC response.",
        )

    def _set_document(self, text: str) -> None:
        data = text.encode("utf-8", "replace")
        self._document, self._document_bytes = [data], len(data)

    def _clear_document(self) -> None:
        self._document, self._document_bytes = [], 0


def error_envelope(
    request_id: str,
    *,
    code: int,
    message: str,
    rpc_id: RpcId = None,
    peer_reads_batches: bool = False,
    wants_stream: bool = False,
    attempt: int = 0,
) -> ResponseEnvelope:
    """Answer a request that never reaches the app with a JSON-RPC error, in one message.

    Args:
        request_id: Id of the request envelope.
        code: Error code of JSON-RPC or A2A.
        message: What happened and what to do, for the caller's eyes.
        rpc_id: JSON-RPC id of the request; None where it has none or can't be read.
        peer_reads_batches: Whether the caller announced our additions to the Java format.
        wants_stream: Whether the request's method is one that is answered with a stream.
        attempt: Which delivery of the request this answers, from 0.
    """
    body = error_response(rpc_id, code, message)
    if peer_reads_batches:
        return ResponseEnvelope(
            request_id=request_id,
            body=body,
            stream=False,
            end=True,
            seq=0,
            attempt=attempt,
            status=200,
            headers={"content-type": "application/json"},
        )
    if wants_stream:
        body = render_event(body, event_id="0")
    return ResponseEnvelope(request_id=request_id, body=body, stream=wants_stream, end=True)


def _carried(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    carried: dict[str, str] = {}
    size = 0
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        size += len(name) + 2 * len(value)  # a latin-1 character is at most two bytes of UTF-8
        if is_carried_header(name) and is_header(name, value) and size <= _MAX_HEADER_BYTES:
            carried[name] = f"{carried[name]}, {value}" if name in carried else value
    return carried
