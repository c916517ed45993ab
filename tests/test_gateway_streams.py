"""What a gateway does for its streams: keeps them alive, cuts off who does not read, sends clients elsewhere at its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket

import pytest
from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskUpdater
from a2a.types import Part, Task, TaskState, TaskStatus

from agentscope_rocketmq.config import Timeouts
from agentscope_rocketmq.sse import parse_events
from tests.faults import Counter, Ledger
from tests.gateways import about, client, events, gateway_for, message, numbers, stream, task_of
from tests.services import card_for, server_for
from tests.waiting import LIMIT, take, until

LARGE = 64 * 1024


class Pourer(AgentExecutor):
    """Streams large pieces until it is told that it is enough."""

    def __init__(self):
        self.enough = asyncio.Event()
        self.poured = 0

    async def execute(self, context, event_queue):
        submitted = TaskStatus(state=TaskState.TASK_STATE_SUBMITTED)
        await event_queue.enqueue_event(Task(id=context.task_id, context_id=context.context_id, status=submitted))
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        while not self.enough.is_set():
            text = f"{self.poured} " + "x" * LARGE
            await updater.add_artifact([Part(text=text)], artifact_id="a", append=self.poured > 0)
            self.poured += 1
            await asyncio.sleep(0.02)
        await updater.complete()

    async def cancel(self, context, event_queue):
        raise NotImplementedError


@pytest.fixture
async def setting(config, make_topic, tmp_path):
    """A counter behind RocketMQ, and its card."""
    names = await make_topic("NORMAL")
    counter = Counter(Ledger(tmp_path / "ledger"))
    card = card_for(config, names.topic)
    async with server_for(counter, config, names.topic, card=card):
        yield card, counter
        for enough in counter.enough.values():
            enough.set()


async def test_a_quiet_stream_is_kept_alive_by_comments(config, setting):
    card, _ = setting
    async with gateway_for(config, card, keep_alive=0.1) as served, client(served.url) as http:
        await events(http, "/", message("x 1", contextId="talk"))
        async with http.stream("GET", "/sessions/talk/events?from_start=1") as response, asyncio.timeout(LIMIT):
            text = ""
            async for chunk in response.aiter_text():
                text += chunk
                if text.count(": keep-alive\n") >= 3:
                    break
    assert len(parse_events(text)) == 3
    assert ": keep-alive\n\n" not in text


async def test_a_reader_that_does_not_read_is_cut_off_with_a_resync_event_and_slows_nobody(
    config, make_topic, tmp_path
):
    config = config.model_copy(update={"timeouts": Timeouts(stall=1.0)})
    pouring, counting = await make_topic("NORMAL"), await make_topic("NORMAL")
    cards = [card_for(config, pouring.topic, name="Pourer"), card_for(config, counting.topic, name="Counter")]
    pourer, counter = Pourer(), Counter(Ledger(tmp_path / "ledger"))
    async with (
        server_for(pourer, config, pouring.topic, card=cards[0]),
        server_for(counter, config, counting.topic, card=cards[1]),
        gateway_for(config, *cards) as served,
        client(served.url) as http,
    ):
        host, port = served.url.removeprefix("http://").split(":")
        connected = socket.create_connection((host, int(port)))
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        reader, writer = await asyncio.open_connection(sock=connected, limit=1024)
        body = json.dumps(message("pour", contextId="poured")).encode()
        head = f"POST /pourer HTTP/1.1\r\nhost: x\r\na2a-version: 1.0\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await until(lambda: len(served.gateway.streams) == 1)
        # While it leaves everything unread, others have their agents, their sessions and the cards.
        for number in range(2):
            found = await events(http, "/counter", message(f"x{number} 3"))
            assert numbers(found) == [0, 1, 2]
            assert (await http.get("/pourer/.well-known/agent-card.json")).status_code == 200
        # Once the kernel's buffers are full.
        await until(lambda: served.gateway.streams.cut_off == 1)
        async with asyncio.timeout(LIMIT):
            rest = (await reader.read(-1)).decode()
        assert "event: resync" in rest[-2000:]
        pourer.enough.set()
        writer.close()
        await until(lambda: len(served.gateway.streams) == 0)
        # It has the ids of what it got, and goes on from there.
        text = "".join(_chunks(rest.partition("\r\n\r\n")[2]))
        got = [event for event in parse_events(text) if event.id is not None]
        whole = await events(http, "/sessions/poured/events?from_start=1&follow=0")
        again = await events(http, "/sessions/poured/events?follow=0", **{"last-event-id": got[-1].id})
        assert [event.id for event in (*got, *again)] == [event.id for event in whole]


async def test_streams_that_nobody_reads_hold_up_no_calls_of_others(config, setting):
    limits = config.limits.model_copy(update={"stream_buffer": 1})
    config = config.model_copy(update={"limits": limits, "timeouts": Timeouts(stall=10 * LIMIT)})
    card, counter = setting
    async with gateway_for(config, card) as served, client(served.url) as http:
        found = await events(http, "/", message("x 1", contextId="other"))
        channels = served.gateway._rocketmq.carrier(None).replies._channels
        async with stream(http, "/", message("y", contextId="talk")) as response:
            task = task_of(await anext(response.events))["id"]
            unread = [Unread(about("subscribe", task)) for _ in range(16)]
            for each in unread:
                each.start(served.gateway)
            await until(lambda: all(each.sending for each in unread))
            # What one of them holds at most lies behind these.
            await take(response.events, 100)
            for _ in range(16):
                answered = (await http.post("/", json=about("get", task_of(found[0])["id"]))).json()
                assert answered["result"]["status"]["state"] == "TASK_STATE_COMPLETED"
            assert (served.gateway.streams.cut_off, len(channels)) == (0, 8 + 16 + 2)
            # However they end, their reply channels are left.
            for each in unread[:8]:
                each.left.set()
            for each in unread[8:12]:
                each.running.cancel()
            for each in unread[12:]:
                each.goes_on.set()
            counter.enough["y"].set()
            await asyncio.gather(*(each.running for each in unread), return_exceptions=True)
        refused = await http.post("/", json=about("subscribe", "no-such-task"))
        assert refused.json()["error"]["code"] == -32001
        await until(lambda: len(channels) == 8 + 2)


class Unread:
    """A client of a gateway, at its ASGI interface, that takes nothing of the answer until it is told to.

    Attributes:
        sending: Whether it is being sent events.
        left: Set when it leaves.
        goes_on: Set when it takes what it is sent.
    """

    def __init__(self, body):
        self.sending = False
        self.left, self.goes_on = asyncio.Event(), asyncio.Event()
        self._request = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    def start(self, gateway):
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "query_string": b"",
            "headers": [(b"a2a-version", b"1.0")],
        }
        self.running = asyncio.create_task(gateway(scope, self._receive, self._send))

    async def _receive(self):
        if self._request:
            return self._request.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        if message["type"] == "http.response.body":
            self.sending = True
            await self.goes_on.wait()


def _chunks(text):
    """The pieces of a chunked HTTP body."""
    while text:
        size, _, text = text.partition("\r\n")
        length = int(size or "0", 16)
        if not length:
            return
        yield text[:length]
        text = text[length + 2 :]


async def test_at_its_end_a_gateway_sends_its_clients_elsewhere(config, setting):
    card, counter = setting
    async with gateway_for(config, card) as one, gateway_for(config, card) as other:
        async with client(one.url) as http, stream(http, "/", message("x")) as response:
            before = await take(response.events, 3)
            ending = asyncio.create_task(http.post("/", json=message("y", stream=False)))
            await until(lambda: counter.ledger.count("begin", "y") == 1)
            draining = asyncio.create_task(one.gateway.drain())
            async with asyncio.timeout(LIMIT):
                before += [event async for event in response.events]
            *before, last = before
            assert last.name == "reconnect"
            assert json.loads(last.data)["error"]["data"] == {"reason": "draining"}
            assert (await http.get("/healthz")).status_code == 200
            assert (await http.get("/readyz")).status_code == 503
            refused = await http.post("/", json=message("z 1"))
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            # Calls without a stream end as they would.
            counter.enough["y"].set()
            assert (await ending).json()["result"]["task"]["status"]["state"] == "TASK_STATE_COMPLETED"
            await draining
        body = about("subscribe", task_of(before[0])["id"])
        async with client(other.url) as http, stream(http, "/", body, **{"last-event-id": before[-1].id}) as joined:
            after = await take(joined.events, 4)
            counter.enough["x"].set()
            async with asyncio.timeout(LIMIT):
                after += [event async for event in joined.events]
    counted = numbers(before) + numbers(after)
    assert counted == list(range(len(counted)))
    assert counter.ledger.count("begin", "z") == 0


async def test_drain_takes_no_longer_than_it_may(config, setting):
    card, counter = setting
    config = config.model_copy(update={"timeouts": Timeouts(drain=0.5)})
    async with gateway_for(config, card) as served, client(served.url) as http:
        never = asyncio.create_task(http.post("/", json=message("x", stream=False)))
        await until(lambda: counter.ledger.count("begin", "x") == 1)
        async with asyncio.timeout(LIMIT):
            await served.gateway.drain()
        assert not never.done()
        never.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await never


async def test_a_session_that_is_opened_elsewhere_tells_its_stream_here(config, setting):
    card, counter = setting
    async with (
        gateway_for(config, card) as one,
        gateway_for(config, card) as other,
        client(one.url) as http,
        stream(http, "/", message("x", contextId="talk")) as response,
    ):
        before = await take(response.events, 3)
        async with client(other.url) as there, stream(there, "/sessions/talk/events?from_start=1") as joined:
            await take(joined.events, 3)
            async with asyncio.timeout(LIMIT):
                before += [event async for event in response.events]
            assert before[-1].name == "reconnect"
            assert json.loads(before[-1].data)["error"]["data"] == {"reason": "taken-over"}
            counter.enough["x"].set()
    assert counter.ledger.count("begin", "x") == 1


async def test_clients_are_told_to_connect_again_at_different_moments(config, make_topic, tmp_path):
    topic = await make_topic("NORMAL")
    card = card_for(config, topic.topic, name="Counter")
    async with (
        server_for(Counter(Ledger(tmp_path / "ledger")), config, topic.topic, card=card),
        gateway_for(config, card) as served,
        client(served.url) as http,
    ):
        told = []
        for number in range(8):
            text = (await http.post("/", json=message(f"told{number} 1", contextId=f"told-{number}"))).text
            told += re.findall(r"^retry: (\d+)$", text, re.MULTILINE)
            again = await http.get(f"/sessions/told-{number}/events?from_start=1&follow=0")
            told += re.findall(r"^retry: (\d+)$", again.text, re.MULTILINE)
    # Once a stream, within its first event.
    assert len(told) == 16
    assert len(set(told)) > 1
    assert all(200 <= int(milliseconds) <= 1200 for milliseconds in told)
