"""Handing a request over to the instance that knows its conversation, without letting go of its lease.

Any worker of a topic may get a message of a conversation that lives in another one. It offers the request on that
instance's LiteTopic and keeps the lease until the instance reports the response complete: when the instance dies, its
reports cease and the request is delivered again; when the offering worker dies, its lease runs out and the next worker
offers the same request, which the instance recognises.

An offer lies on that LiteTopic until the instance reads it, perhaps long after the other one has done the work itself.
So the instance says that it takes the request, and begins when it is told to go: an offer that was given up never gets
that word.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import uuid
from enum import Enum, StrEnum
from typing import TYPE_CHECKING

from agentscope_rocketmq.errors import BrokerError
from agentscope_rocketmq.jsonrpc import read_json
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.routes import (
    OFFER_ATTEMPT_HEADER,
    OFFER_HEADER,
    OFFER_WAITED_HEADER,
    OFFERED_BY_HEADER,
    is_instance,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentscope_rocketmq.envelope import RequestEnvelope
    from agentscope_rocketmq.rocketmq.producer import Producer

__all__ = ["Handover", "Offer", "Outcome"]

logger = logging.getLogger(__name__)

TAKEN_WITHIN = 5.0
"""Seconds within which an instance says that it takes a request; one that says nothing is gone."""

GO_WITHIN = 5.0
"""Seconds within which an instance that takes a request is told to go, or lets it be; less than any lease."""

_MOST_REPORT_BYTES = 1024
_MOST_ATTEMPT = 1_000_000
_LONGEST_OFFER_ID = 64


class Outcome(Enum):
    """How an offered request went."""

    DONE = "done"
    """Its response is complete on the broker."""
    FAILED = "failed"
    """It was taken, and not brought to its end: the instance stops, or is gone."""
    NOT_TAKEN = "not taken"
    """Nobody there, or not in time, or one that stops: it is not begun there."""


class _State(StrEnum):
    TAKEN = "taken"
    GO = "go"  # the other way: from who offers to who takes
    DONE = "done"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """A request that another instance has the lease of.

    Attributes:
        id: Its id.
        by: LiteTopic of that instance.
        attempt: Which delivery of the request this is, from 0.
        waited: Seconds that its caller had waited when it was offered.
    """

    id: str
    by: str
    attempt: int
    waited: float

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Offer | None:
        """Read it from the headers of a request; None for one that came from its caller."""
        try:
            offer = cls(
                headers[OFFER_HEADER],
                headers[OFFERED_BY_HEADER],
                int(headers[OFFER_ATTEMPT_HEADER]),
                float(headers[OFFER_WAITED_HEADER]),
            )
        except (KeyError, ValueError):
            return None
        sane = len(offer.id) <= _LONGEST_OFFER_ID and is_instance(offer.by) and 0 <= offer.attempt <= _MOST_ATTEMPT
        return offer if sane and offer.waited >= 0 else None


class _Waiting:
    """An offer of ours and what was heard of it."""

    def __init__(self) -> None:
        self.state: _State | None = None
        self.changed = asyncio.Event()


class Handover:
    """Both sides of handing over, for one instance.

    Args:
        producer: Sends offers and reports; not closed by this object.
        topic: LITE topic of the instances.
        instance: LiteTopic of this one.
        silence: Seconds without a report after which an instance that took a request is taken for dead; above
            `GO_WITHIN`.
        send_timeout: Seconds that a report may take to be accepted by the broker.
    """

    def __init__(self, producer: Producer, *, topic: str, instance: str, silence: float, send_timeout: float) -> None:
        self._producer = producer
        self._topic = topic
        self._instance = instance
        self._silence = silence
        self._send_timeout = send_timeout
        self._offers: dict[str, _Waiting] = {}
        self._goes: dict[str, asyncio.Event] = {}

    async def offer(
        self, envelope: RequestEnvelope, to: str, *, attempt: int, waited: float, patient: bool = False
    ) -> Outcome:
        """Have a request answered by another instance, and wait for its end. The caller keeps the lease meanwhile.

        Args:
            envelope: The request; its answer goes to its caller.
            to: LiteTopic of the instance.
            attempt: Which delivery of the request this is, from 0.
            waited: Seconds that its caller has waited.
            patient: Whether an instance that says nothing is waited for as long as for one that took the request, and
                not for `TAKEN_WITHIN`.
        """
        offer_id = uuid.uuid4().hex
        headers = {
            OFFER_HEADER: offer_id,
            OFFERED_BY_HEADER: self._instance,
            OFFER_ATTEMPT_HEADER: str(attempt),
            OFFER_WAITED_HEADER: f"{waited:.3f}",
        }
        offered = dataclasses.replace(envelope, headers={**envelope.headers, **headers})
        waiting = self._offers[offer_id] = _Waiting()
        try:
            await self._send(to, offered.encode(), (envelope.request_id,), timeout=TAKEN_WITHIN)
            if not await self._changed(waiting, within=self._silence if patient else TAKEN_WITHIN):
                return Outcome.NOT_TAKEN
            if waiting.state is _State.FAILED:
                return Outcome.NOT_TAKEN  # it was not told to go
            return await self._follow(waiting, offer_id, to)
        except BrokerError as error:
            logger.warning("Request %s is not handed over: %s", envelope.request_id, error)
            # The word to go may have arrived all the same.
            return Outcome.NOT_TAKEN if waiting.state is None else Outcome.FAILED
        finally:
            del self._offers[offer_id]

    async def _follow(self, waiting: _Waiting, offer_id: str, to: str) -> Outcome:
        if waiting.state is _State.TAKEN:
            await self._say(to, offer_id, _State.GO)
        while waiting.state is _State.TAKEN:
            if not await self._changed(waiting, within=self._silence):
                break
        return Outcome.DONE if waiting.state is _State.DONE else Outcome.FAILED

    async def _changed(self, waiting: _Waiting, *, within: float) -> bool:
        try:
            async with asyncio.timeout(within):
                await waiting.changed.wait()
        except TimeoutError:
            return False
        waiting.changed.clear()
        return True

    def hear(self, body: bytes) -> bool:
        """Take a message of this instance's LiteTopic; whether it was a report."""
        if len(body) > _MOST_REPORT_BYTES:
            return False
        try:
            report = read_json(body.decode())
            offer_id, state = report["offer"], _State(report["state"])
        except (ValueError, TypeError, KeyError):
            return False
        # One that nobody waits for any more is a report all the same.
        if not isinstance(offer_id, str):
            return True
        if state is _State.GO:
            if (go := self._goes.get(offer_id)) is not None:
                go.set()
        elif (waiting := self._offers.get(offer_id)) is not None:
            waiting.state = state
            waiting.changed.set()
        return True

    async def take(self, offer: Offer) -> bool:
        """Say that an offered request is taken here, and wait for the word to go; whether it came in time.

        Without it the request is not to be begun here: the instance that offered it has given that up, or is dead, and
        then its lease runs out.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + GO_WITHIN
        go = self._goes.setdefault(offer.id, asyncio.Event())  # the offer may come twice
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._report(offer, _State.TAKEN)
                    await go.wait()
        finally:
            self._goes.pop(offer.id, None)
        # Who stood still meanwhile may find the word in its row, of one who has long given it up since.
        if go.is_set() and loop.time() < deadline:
            return True
        logger.info("A request that %s offers is not begun here: there was no word to go in time", offer.by)
        await self.report_end(offer, complete=False)
        return False

    async def report_taken(self, offer: Offer) -> None:
        """Let the instance that offered a request know that it is still at work here, until cancelled."""
        while True:
            await asyncio.sleep(self._silence / 3)
            await self._report(offer, _State.TAKEN)

    async def report_end(self, offer: Offer, *, complete: bool) -> None:
        """Let it know that the response is complete, or that it will not be."""
        await self._report(offer, _State.DONE if complete else _State.FAILED)

    async def _report(self, offer: Offer, state: _State) -> None:
        try:
            await self._say(offer.by, offer.id, state)
        except BrokerError as error:
            # Heard of no more, the request is delivered again, and recognised.
            logger.warning("How an offered request goes is not reported: %s", error)

    async def _say(self, instance: str, offer_id: str, state: _State) -> None:
        body = json.dumps({"offer": offer_id, "state": state.value}).encode()
        await self._send(instance, body, (), timeout=self._send_timeout)

    async def _send(self, instance: str, body: bytes, keys: tuple[str, ...], *, timeout: float) -> None:  # noqa: ASYNC109
        message = Message(topic=self._topic, lite_topic=instance, body=body, keys=keys)
        await self._producer.send(message, timeout=timeout)
