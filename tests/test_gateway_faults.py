"""Gateways that die, stop, are restarted and sleep: their clients go on, with nothing missing and nothing twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal

import httpx
import pytest

from tests.faults import Counter, Ledger
from tests.gateways import Process, client, events, message, numbers, result, stream
from tests.services import card_for, server_for
from tests.waiting import LIMIT

ENDED = {"TASK_STATE_COMPLETED", "completed"}


class Roaming:
    """A client that goes on at the next gateway when its stream ends before its task does.

    Attributes:
        found: The events it has.
        moves: How often it went on elsewhere.
    """

    def __init__(self, gateways, body, *, silence=LIMIT):
        self.found = []
        self.moves = -1
        self._urls = [gateway.url for gateway in gateways]
        self._body = body
        self._session = None
        self._cursor = None
        self._silence = silence
        self._changed = asyncio.Condition()
        self.running = asyncio.create_task(self._run())

    async def _run(self):
        while not self._over():
            url = self._urls[(self.moves + 1) % len(self._urls)]
            self.moves += 1
            with contextlib.suppress(httpx.TransportError):
                await self._read(url)
            await asyncio.sleep(0.05)

    async def _read(self, url):
        timeout = httpx.Timeout(LIMIT, read=self._silence)
        async with httpx.AsyncClient(base_url=url, timeout=timeout, headers={"A2A-Version": "1.0"}) as http:
            if self._cursor is None:
                opened = stream(http, "/", self._body)
            else:
                path = f"/sessions/{self._session}/events"
                opened = stream(http, path, **{"last-event-id": self._cursor})
            async with opened as response:
                if response.status_code != 200:
                    return
                async for event in response.events:
                    if event.name is not None:
                        return
                    async with self._changed:
                        self.found.append(event)
                        self._changed.notify_all()
                    self._cursor = event.id
                    if "task" in result(event):
                        self._session = result(event)["task"]["contextId"]
                    if self._over():
                        return

    def _over(self):
        return (
            bool(self.found) and result(self.found[-1]).get("statusUpdate", {}).get("status", {}).get("state") in ENDED
        )

    async def until(self, count):
        """Until it has so many numbers."""
        async with asyncio.timeout(LIMIT), self._changed:
            await self._changed.wait_for(lambda: len(numbers(self.found)) >= count)

    async def end(self):
        """Wait for its end; the numbers it has."""
        async with asyncio.timeout(2 * LIMIT):
            await self.running
        assert len({event.id for event in self.found}) == len(self.found)
        return numbers(self.found)


@pytest.fixture
async def setting(config, make_topic, tmp_path):
    """A counter, and two gateways before it in processes of their own."""
    names = await make_topic("NORMAL")
    card = card_for(config, names.topic)
    file = tmp_path / "card.json"
    file.write_text(json.dumps(card))
    counter = Counter(Ledger(tmp_path / "ledger"))
    config = config.model_copy(update={"limits": config.limits.model_copy(update={"concurrency": 64})})
    async with (
        server_for(counter, config, names.topic, card=card),
        Process(config, file) as one,
        Process(config, file) as other,
    ):
        yield counter, one, other
        for enough in counter.enough.values():
            enough.set()


async def test_a_gateway_that_is_killed_while_it_answers_loses_and_doubles_nothing(setting):
    counter, one, other = setting
    roaming = [Roaming((one, other), message(f"x{number}")) for number in range(8)]
    for each in roaming:
        await each.until(5)
    await one.kill()
    for each in roaming:
        await each.until(len(numbers(each.found)) + 5)
    await one.start()
    await other.kill()
    for each in roaming:
        await each.until(len(numbers(each.found)) + 5)
    for number, each in enumerate(roaming):
        counter.enough[f"x{number}"].set()
        found = await each.end()
        assert found == list(range(len(found)))
        assert each.moves >= 2
        assert counter.ledger.count("begin", f"x{number}") == 1


async def test_a_rolling_restart_goes_unnoticed(setting):
    counter, one, other = setting
    roaming = [Roaming((one, other), message(f"x{number}")) for number in range(5)]
    for each in roaming:
        await each.until(3)
    for gateway in (one, other):
        gateway.signal(signal.SIGTERM)
        assert gateway.running is not None
        async with asyncio.timeout(LIMIT):
            assert await gateway.running.wait() == 0
        await gateway.start()
        for each in roaming:
            await each.until(len(numbers(each.found)) + 3)
    for number, each in enumerate(roaming):
        counter.enough[f"x{number}"].set()
        found = await each.end()
        assert found == list(range(len(found)))


async def test_a_gateway_that_sleeps_through_a_take_over_wakes_harmless(setting):
    counter, one, other = setting
    body = message("x", contextId="talk")
    roaming = Roaming((one, other), body, silence=1.0)
    await roaming.until(5)
    one.signal(signal.SIGSTOP)
    try:
        await roaming.until(20)
        assert roaming.moves >= 1
        counter.enough["x"].set()
        found = await roaming.end()
        assert found == list(range(len(found)))
        second = Roaming((other,), message("y", contextId="talk"))
        await second.until(5)
        one.signal(signal.SIGCONT)
        # It answers again; what it held of the session is not its own any more.
        async with httpx.AsyncClient(timeout=LIMIT) as woken:
            assert (await woken.get(f"{one.url}/healthz")).status_code == 200
        await second.until(40)
        counter.enough["y"].set()
        counted = await second.end()
        assert (counted, second.moves) == (list(range(len(counted))), 0)
        async with client(other.url) as http:
            whole = await events(http, "/sessions/talk/events?from_start=1&follow=0")
        assert numbers(whole) == [*found, *counted]
    finally:
        one.signal(signal.SIGCONT)
