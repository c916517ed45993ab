"""The caller's half of an exchange: puts the messages of responses together. No I/O, no clock.

Messages may come late, twice, out of order, from an earlier run of the request, or from somebody else. What leaves
is, for each call, the text of its HTTP response: each event once and in order, or the JSON document.

Servers of this package number their messages (`seq`) and deliveries (`attempt`), and name their runs (`run`): of two
workers that got copies of one request, the one heard first is listened to. The Java reference numbers only the
events of a stream, by SSE id, and its end marker may overtake them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic, TypeVar

from agentscope_rocketmq.envelope import ResponseEnvelope, is_carried_header
from agentscope_rocketmq.errors import CallTimeout, EnvelopeError, ResponseCorrupt
from agentscope_rocketmq.jsonrpc import INTERNAL_ERROR, Progress, error_response, plain_error, progress
from agentscope_rocketmq.rerun import Seam
from agentscope_rocketmq.spool import Spools, Whole
from agentscope_rocketmq.sse import parse_events, render_event

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentscope_rocketmq.envelope import Part

__all__ = ["END_GRACE", "Call", "Exchange", "ResponseHead"]

END_GRACE = 1.0
"""Seconds to wait for events that the end marker of a stream without `seq` may have overtaken."""

_LONGEST_EVENT_ID = 15  # digits; more is no counter

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHead:
    """What comes before the body of a response.

    Attributes:
        status: HTTP status.
        headers: HTTP headers, names in lower case; always with a content type.
        stream: Whether the body is a stream of events.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    stream: bool

    @classmethod
    def of(cls, envelope: ResponseEnvelope) -> ResponseHead:
        """Read it from the first message of a response."""
        given = {name.lower(): value for name, value in (envelope.headers or {}).items()}
        content_type = "text/event-stream" if envelope.stream else "application/json"
        return cls(
            status=200 if envelope.status is None else envelope.status,
            headers={"content-type": content_type}
            | {name: value for name, value in given.items() if is_carried_header(name)},
            stream=envelope.stream,
        )


class _Sequence(Generic[_T]):
    """Puts numbered items in order and holds those that came early, within bounds."""

    def __init__(self, *, max_held: int, max_held_bytes: int, midway: bool) -> None:
        self.next = 0
        self.held: dict[int, tuple[_T, int]] = {}
        self._held_bytes = 0
        self._max_held = max_held
        self._max_held_bytes = max_held_bytes
        self._begun = not midway

    def add(self, number: int, item: _T, size: int) -> list[_T] | None:
        """Add an item; return those now in order, None for one that came before.

        Raises:
            OverflowError: More would have to be held than the bounds allow.
        """
        if not self._begun:
            self._begun = True
            self.next = number
        if number < self.next or number in self.held:
            return None
        if number == self.next:
            self.next += 1
            return [item, *self._continue()]
        self._held_bytes += size
        if len(self.held) >= self._max_held or self._held_bytes > self._max_held_bytes:
            raise OverflowError
        self.held[number] = item, size
        return []

    def rest(self) -> tuple[list[_T], int]:
        """Give up waiting: what is held, in order, and how many numbers before it are missing."""
        items = [self.held[number][0] for number in sorted(self.held)]
        missing = max(self.held) + 1 - self.next - len(items) if items else 0
        self.held.clear()
        return items, missing

    def _continue(self) -> list[_T]:
        items = []
        while self.next in self.held:
            item, size = self.held.pop(self.next)
            self._held_bytes -= size
            self.next += 1
            items.append(item)
        return items


class _BySequence:
    """Orders the messages of a server that numbers them."""

    settle_at: float | None = None  # its end is numbered too, so there is nothing to wait for
    ends_its_task = True  # the server sees to it

    def __init__(self, *, max_held: int, max_held_bytes: int, midway: bool) -> None:
        self._sequence = _Sequence[ResponseEnvelope](max_held=max_held, max_held_bytes=max_held_bytes, midway=midway)
        self.finished = False

    def feed(self, envelope: ResponseEnvelope, _now: float) -> list[ResponseEnvelope] | None:
        """Take a message; return those now in order, None for a duplicate."""
        number = envelope.seq or 0
        size = len(envelope.body or "") if envelope.part is None else len(envelope.part.data)
        ready = self._sequence.add(number, envelope, size)
        for index, message in enumerate(ready or ()):
            if message.end:
                self.finished = True
                return (ready or [])[: index + 1]
        return ready

    def settle(self) -> tuple[list[ResponseEnvelope], int]:
        return self._sequence.rest()  # of one that came with too much before it


class _ByEventId:
    """Orders the messages of a server that numbers only the events of a stream, by SSE id.

    Its end marker may overtake events. So the stream is over when it was seen and the last event in order says so
    too, or when nothing more came for `END_GRACE` after the end marker or an event that ends the task.
    """

    def __init__(self, *, max_held: int, max_held_bytes: int, midway: bool) -> None:
        self._sequence = _Sequence[ResponseEnvelope](max_held=max_held, max_held_bytes=max_held_bytes, midway=midway)
        self.finished = False
        self.settle_at: float | None = None
        self._end_seen = False
        self._end_number: int | None = None  # id of the event that carried the end
        self._highest = -1
        self._last = Progress.OPEN  # what the event with the highest id says

    def feed(self, envelope: ResponseEnvelope, now: float) -> list[ResponseEnvelope] | None:
        """Take a message; return what is now in order, one event each, None for a duplicate."""
        if not envelope.stream:
            self.finished = True
            document = replace(envelope, body=plain_error(envelope.body or ""))
            return [*self.settle()[0], document]
        ready: list[ResponseEnvelope] = []
        fresh = envelope.end and not self._end_seen
        number = None
        for event in parse_events(envelope.body or ""):
            number = _number(event.id)
            data = plain_error(event.data)
            text = render_event(data, name=event.name, event_id=event.id)
            message = replace(envelope, body=text, end=False)
            in_order = [message] if number is None else self._sequence.add(number, message, len(text))
            if in_order is None:
                continue
            fresh = True
            ready += in_order
            if number is None or number > self._highest:
                self._highest = self._highest if number is None else number
                self._last = progress(data)
        if not fresh:
            return None
        if envelope.end:
            self._end_seen = True
            self._end_number = number
        self.finished = self._is_whole()
        waits = self._end_seen or self._last is Progress.ENDED
        self.settle_at = now + END_GRACE if waits and not self.finished else None
        return ready

    def settle(self) -> tuple[list[ResponseEnvelope], int]:
        """Give up waiting: what is held, in order, and how many events are missing."""
        self.finished = True
        return self._sequence.rest()

    @property
    def ends_its_task(self) -> bool:
        """Whether the last event leaves nothing to wait for: a final state, a question, a message, an error."""
        return self._last is not Progress.OPEN

    def _is_whole(self) -> bool:
        if not self._end_seen or self._sequence.held:
            return False
        return self.ends_its_task or (self._end_number is not None and self._sequence.next > self._end_number)


class Call:
    """One request whose response is being received; made by `Exchange.open`.

    Attributes:
        request_id: Id of the request envelope.
        head: Status, headers and form of the response; None until its first message in order was fed, an opening
            message apart.
        begun: Whether a server has taken the request: its first message, an opening one counted, was fed.
        finished: Whether the response is complete.
        sticky: Reply topic and LiteTopic of the instance that answers; None where it did not say.
        attempt: The delivery of the request whose messages are taken; those of earlier ones are dropped.
        run: The run of it whose messages are taken; None where the server does not say, or nothing came yet.
        restarts: How often a later run took over from one that had begun to answer.
        missing: Events of a stream without `seq` that never came although its end did.
        whole: Puts together what comes in parts.
    """

    def __init__(
        self,
        request_id: str,
        *,
        idle: float | None,
        total: float | None,
        now: float,
        owner: Exchange,
        ack: float | None = None,
        midway: bool = False,
    ) -> None:
        self.request_id = request_id
        self.head: ResponseHead | None = None
        self.begun = False
        self.finished = False
        self.sticky: tuple[str, str] | None = None
        self.attempt = 0
        self.run: str | None = None
        self.restarts = 0
        self.missing = 0
        self._ack = ack
        self._idle = idle
        self._total = total
        self._opened_at = now
        self._fed_at = now
        self._owner = owner
        self._midway = midway
        self._order: _BySequence | _ByEventId | None = None
        self._seam = Seam()
        self.whole = Whole(owner.spools, midway=midway)

    def feed(self, envelope: ResponseEnvelope, now: float) -> list[str]:
        """Take a message of this call.

        Args:
            envelope: The message.
            now: The time, in seconds of any steady clock, the same in every call.

        Returns:
            The texts that became deliverable, in order: server-sent events, each text whole events with their
            closing blank lines, or the JSON document.

        Raises:
            ResponseCorrupt: What should come before it seems lost, or a body in parts can't be put together.
        """
        order = self._order_for(envelope)
        if order is None:
            self._owner.outdated += 1
            return []
        if self.finished:
            self._owner.duplicates += 1
            return []
        try:
            messages = order.feed(envelope, now)
        except OverflowError:
            raise ResponseCorrupt(
                f"The response to request {self.request_id} can't be put together: too many of its messages came "
                "before one that is missing. Send the request again.",
                request_id=self.request_id,
            ) from None
        if messages is None:
            self._owner.duplicates += 1
            return []
        self._fed_at = now
        if envelope.seq is None:
            self._note(envelope)
        texts = self._texts(messages)
        self.finished = order.finished or self._seam.ended  # nothing comes after the end of its task
        if self.finished:
            self.drop()  # an error may have ended it in the middle of a body
        return texts

    def drop(self) -> None:
        """Let go of what came of a body whose end did not."""
        self.whole.drop()

    def next_deadline(self) -> float | None:
        """When `check` has something to do next; None for never."""
        if self.finished:
            return None
        settle_at = self._order.settle_at if self._order else None
        idle = self._idle if self.begun or self._ack is None else self._ack
        idle_at = None if idle is None else self._fed_at + idle
        total_at = None if self._total is None else self._opened_at + self._total
        # A stream that only waits for stragglers is not idle.
        deadlines = (idle_at if settle_at is None else settle_at, total_at)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def check(self, now: float) -> list[str]:
        """Look at the time: complete a stream that waited long enough for stragglers, or run out of time.

        Args:
            now: The time, on the clock of `feed`.

        Returns:
            The texts that became deliverable, as `feed`.

        Raises:
            CallTimeout: Idle, total or ack time ran out.
        """
        deadline = self.next_deadline()
        if deadline is None or now < deadline:
            return []
        if self._order is not None and self._order.settle_at is not None:
            texts = self.give_up()
            if self.missing or not self._order.ends_its_task:
                texts.append(render_event(self._broken_off()))
            return texts
        if self._total is not None and now >= self._opened_at + self._total:
            raise self._timeout("total", self._total, "did not end")
        if self._ack is not None and not self.begun:
            raise self._timeout("ack", self._ack, "did not begin")
        raise self._timeout("idle", self._idle or 0.0, "brought nothing new")

    def give_up(self) -> list[str]:
        """Wait for nothing more; what was held, in order, as `feed`."""
        self.finished = True
        if self._order is None:
            return []
        messages, self.missing = self._order.settle()
        return self._texts(messages)

    def _order_for(self, envelope: ResponseEnvelope) -> _BySequence | _ByEventId | None:
        """The order that the message belongs to; None when another run of the request answers."""
        attempt = 0 if envelope.attempt is None else envelope.attempt
        kind = _ByEventId if envelope.seq is None else _BySequence
        if self._order is not None:
            if attempt < self.attempt:
                return None
            if attempt == self.attempt:
                return self._order if isinstance(self._order, kind) and envelope.run == self.run else None
            if self.finished:
                return None
            self.restarts += 1
            self.drop()
        elif self._midway:
            self._seam = Seam(attempt)  # what this run took over from is not known here
        self.attempt, self.run = attempt, envelope.run
        self._order = kind(
            max_held=self._owner.max_held, max_held_bytes=self._owner.max_held_bytes, midway=self._midway
        )
        return self._order

    def _note(self, message: ResponseEnvelope) -> None:
        """Note what a message says about the response as a whole."""
        self.begun = True
        empty = message.body is None and message.part is None
        opening = message.seq is not None and message.status is None and empty and not message.end
        if self.head is None and not opening:
            self.head = ResponseHead.of(message)
        if message.server_reply_topic is not None and message.server_lite_topic is not None:
            self.sticky = message.server_reply_topic, message.server_lite_topic

    def _texts(self, messages: list[ResponseEnvelope]) -> list[str]:
        texts = []
        for message in messages:
            self._note(message)
            text = message.body if message.part is None else self._body(message.part)
            if text and self.head and self.head.stream and not message.stream:
                text = render_event(text)  # the reader was promised a stream: an error that ends it
            if text and self.head and self.head.stream and message.attempt is not None:
                text = self._seam.take(text, message.attempt)
            if text:
                texts.append(text)
        return texts

    def _body(self, part: Part) -> str | None:
        try:
            return self.whole.add(part)
        except (ValueError, OverflowError) as error:
            self.drop()
            advice = "Ask for less, or raise Limits" if isinstance(error, OverflowError) else "Send the request again"
            raise ResponseCorrupt(
                f"The response to request {self.request_id} can't be put together: {error}. {advice}.",
                request_id=self.request_id,
            ) from None

    def _broken_off(self) -> str:
        lost = f"{self.missing} of its events never came" if self.missing else "its last event leaves the task at work"
        return error_response(
            None,
            INTERNAL_ERROR,
            f"The agent's server ended the stream of request {self.request_id} too early: {lost}. "
            "The task may have gone on, or failed: ask for it (GetTask).",
        )

    def _timeout(self, which: str, seconds: float, what: str) -> CallTimeout:
        begun = "a server had taken the request" if self.begun else "no server had taken the request"
        return CallTimeout(
            f"The response to request {self.request_id} {what} for {seconds:g} s ({which} time limit; {begun}). "
            f"See whether the agent runs and consumes its topic, or raise the {which} timeout.",
            request_id=self.request_id,
            which=which,
            seconds=seconds,
        )


class Exchange:
    """The open calls of one receiver, and what came in that belongs to none.

    Attributes:
        max_held: Most messages or events that a call holds while one before them is missing.
        max_held_bytes: Most bytes (characters, strictly) of them.
        spools: Where bodies are put together that come in parts.
        unknown: Messages of no open call: late ones, and those of other processes.
        malformed: Messages that are no envelopes.
        duplicates: Messages that came before.
        outdated: Messages of another run of a request than the one that answers.
    """

    def __init__(
        self, *, max_held: int = 1024, max_held_bytes: int = 16 * 1024 * 1024, spools: Spools | None = None
    ) -> None:
        self.spools = spools or Spools(most=128 * 1024 * 1024, total=1024 * 1024 * 1024, in_memory=4 * 1024 * 1024)
        self.max_held = max_held
        self.max_held_bytes = max_held_bytes
        self.unknown = 0
        self.malformed = 0
        self.duplicates = 0
        self.outdated = 0
        self._calls: dict[str, Call] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def open(
        self,
        request_id: str,
        *,
        idle: float | None,
        total: float | None,
        now: float,
        ack: float | None = None,
        midway: bool = False,
    ) -> Call:
        """Begin to wait for a response; do it before the request is sent.

        Args:
            request_id: Id of the request envelope.
            idle: Seconds between two messages of the response, and before the first; None waits for ever.
            total: Seconds from now to its last message; None sets no limit.
            now: The time, in seconds of any steady clock, the same in every call.
            ack: Seconds until a server must have taken the request; None counts `idle` from now.
            midway: What came before is somebody else's: the first number that is seen is the one to begin with.

        Raises:
            ValueError: A call with this id is open.
        """
        if request_id in self._calls:
            raise ValueError(f"Request {request_id} is being waited for already.")
        call = Call(request_id, idle=idle, total=total, ack=ack, now=now, owner=self, midway=midway)
        self._calls[request_id] = call
        return call

    def close(self, call: Call) -> None:
        """Stop waiting for a response; what still comes of it is counted as unknown. May be repeated."""
        call.drop()
        if self._calls.get(call.request_id) is call:
            del self._calls[call.request_id]

    def feed(self, data: bytes, now: float) -> tuple[Call, list[str]] | None:
        """Take a message as it came.

        Args:
            data: The message body.
            now: The time, on the clock of `open`.

        Returns:
            Its call and the texts that became deliverable (see `Call.feed`), which may be none; None when it
            belongs to no open call.

        Raises:
            ResponseCorrupt: The response it belongs to can't be put together. Its call is closed.
        """
        try:
            envelope = ResponseEnvelope.decode(data)
        except EnvelopeError as error:
            self.malformed += 1
            call = self._calls.get(error.request_id or "")
            if call is None or call.finished:
                return None
            self.close(call)
            raise ResponseCorrupt(
                f"The response to request {call.request_id} can't be put together: {error}",
                request_id=call.request_id,
            ) from error
        call = self._calls.get(envelope.request_id)
        if call is None or call.finished:
            self.unknown += 1
            return None
        try:
            return call, call.feed(envelope, now)
        except ResponseCorrupt:
            self.close(call)
            raise


def _number(event_id: str | None) -> int | None:
    """The number in an SSE id; None for an id that doesn't count."""
    if event_id is None or len(event_id) > _LONGEST_EVENT_ID:
        return None
    return int(event_id) if event_id.isascii() and event_id.isdigit() else None
