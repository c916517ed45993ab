"""Large bodies by way of a blob store: whole at the other end, replayed from there, never misread, never lost in silence."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import stat
import subprocess
import sys
import threading
import time
import uuid

import httpx
import pytest
from a2a.client.errors import A2AClientError
from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskUpdater
from a2a.types import Part, Task, TaskState, TaskStatus
from a2a.utils.errors import InternalError, InvalidRequestError

from agentscope_rocketmq import A2AServer, BlobStore, Cursor, DirectoryBlobStore, RocketMQ
from agentscope_rocketmq.card import card_to_dict, large_bodies
from agentscope_rocketmq.claims import put_body
from agentscope_rocketmq.config import Limits, Timeouts
from agentscope_rocketmq.envelope import Claim, ClaimedBody, RequestEnvelope, ResponseEnvelope
from agentscope_rocketmq.envelope import Part as Piece
from agentscope_rocketmq.errors import ConfigurationError, EnvelopeError, ReplayGapError
from agentscope_rocketmq.rerun import RESTART_EXTENSION
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from agentscope_rocketmq.rocketmq.message import Message
from tests.faults import Wire
from tests.gateways import gateway_for, message
from tests.services import card_for, request, server_for
from tests.test_large_bodies import Mirror, digest, filler, large_request, listening, parts_of, rpc
from tests.waiting import LIMIT, until

MB = 1024 * 1024
KEY = f"p-{'0' * 32}"


@pytest.fixture
def store(tmp_path):
    return DirectoryBlobStore(tmp_path / "blobs", name="shared")


def sharing(config, store, **limits):
    return config.model_copy(update={"blobs": store, "limits": Limits(**limits)})


def files(store):
    return sorted(store.path.iterdir()) if store.path.exists() else []


class Recording(DirectoryBlobStore):
    """Notes how many bodies were put there; refuses them on demand."""

    def __init__(self, path, *, name="shared", refuses=False):
        super().__init__(path, name=name)
        self.puts = 0
        self._refuses = refuses

    async def put(self, key, chunks):
        self.puts += 1
        if self._refuses:
            raise OSError(28, "No space left on device")
        await super().put(key, chunks)


class Narrator(AgentExecutor):
    """Streams a small artifact, a large one, and a small one."""

    async def execute(self, context, event_queue):
        size = int(context.get_user_input())
        status = TaskStatus(state=TaskState.TASK_STATE_SUBMITTED)
        await event_queue.enqueue_event(Task(id=context.task_id, context_id=context.context_id, status=status))
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        for text in ("before", filler(size), "behind"):
            await updater.add_artifact([Part(text=text)])
        await updater.complete()

    async def cancel(self, context, event_queue):
        raise NotImplementedError


async def ask(config, server, text, **options):
    async with RocketMQ(config) as rocketmq, await rocketmq.client(server.card, **options) as client:
        return await parts_of(client, text)


async def messages_of(config, connection, work):
    """The messages of responses that come on the LiteTopic `caller` until one ends, while something is done."""
    found = []
    async with listening(config, connection) as answers:
        await work
        async for answer in answers:
            found.append(answer)
            if answer.end:
                return found
    raise AssertionError


@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "document"])
async def test_a_request_and_an_answer_of_20_mb_go_by_way_of_the_store(config, topic, tmp_path, streaming):
    config = sharing(config, store := Recording(tmp_path / "blobs"))
    card = card_for(config, topic, capabilities={"streaming": streaming})
    async with server_for(Mirror(), config, topic, card=card) as server:
        announced = large_bodies(server.card)
        assert announced is not None
        assert announced.blob_store == "shared"
        text = f"{20 * MB} " + filler(20 * MB)
        answer = await ask(config, server, text)
        assert [digest(part) for part in answer] == [digest(digest(text)), digest(filler(20 * MB))]
        assert store.puts == 2
        # The answer is kept for who replays it, the request is not.
        await until(lambda: len(files(store)) == 1)
        assert stat.S_IMODE(files(store)[0].stat().st_mode) == 0o600
        assert stat.S_IMODE(store.path.stat().st_mode) == 0o700
        assert await ask(config, server, "5 short") == [digest("5 short"), filler(5)]
        assert store.puts == 2


@pytest.mark.parametrize("size", [100_000, 6 * MB])
async def test_a_large_event_comes_in_its_place_and_is_replayed_from_the_store(config, topic, tmp_path, size):
    config = sharing(config, store := Recording(tmp_path / "blobs"), blob_bytes=50_000)
    async with server_for(Narrator(), config, topic) as server:
        assert await ask(config, server, str(size), session="told") == ["before", filler(size), "behind"]
    assert store.puts == 1
    async with RocketMQ(config) as later:
        session = later.session("told")
        events = [event async for event in session.events(from_start=True, follow=False)]
        [large] = [event for event in events if len(event.raw) > size]
        assert json.loads(large.raw)["result"]["artifactUpdate"]["artifact"]["parts"] == [{"text": filler(size)}]
        again = [event.cursor async for event in session.events(after=large.cursor, follow=False)]
        assert again == [event.cursor for event in events[events.index(large) + 1 :]]
        for count in range(1, len(events)):
            tail = [event.cursor async for event in session.events(tail=count, follow=False)]
            assert tail == [event.cursor for event in events[-count:]]


@pytest.mark.parametrize("reason", ["not in blob store 'shared' any more", "size or SHA-256", "has none"])
async def test_who_replays_an_event_that_is_not_there_any_more_is_told_and_can_go_on_behind_it(
    config, topic, store, reason
):
    shared = sharing(config, store, blob_bytes=50_000)
    async with server_for(Narrator(), shared, topic) as server:
        await ask(shared, server, "100000", session="told")
    [file] = files(store)
    if "any more" in reason:
        file.unlink()
    elif "SHA" in reason:
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    else:
        shared = config
    heard = []
    async with RocketMQ(shared) as later:
        session = later.session("told")
        with pytest.raises(ReplayGapError, match=reason) as caught:
            async for event in session.events(from_start=True, follow=False):
                heard += [event.raw]
        assert any("before" in raw for raw in heard)
        assert not any("behind" in raw for raw in heard)
        assert isinstance(caught.value.wanted, Cursor)
        rest = [event.raw async for event in session.events(after=caught.value.wanted, follow=False)]
        assert "behind" in rest[0]
        assert rest[-1].count("COMPLETED") == 1


async def test_a_caller_whose_answer_is_not_in_its_store_gets_an_error(config, topic, store, tmp_path):
    shared = sharing(config, store)
    elsewhere = sharing(config, DirectoryBlobStore(tmp_path / "elsewhere", name="shared"))
    async with server_for(Mirror(), shared, topic) as server:
        with pytest.raises(A2AClientError, match="not in blob store 'shared' any more"):
            await ask(elsewhere, server, f"{5 * MB}")
        # And a server whose store is another one refuses the request.
        with pytest.raises(InvalidRequestError, match="not in blob store 'shared' any more"):
            await ask(elsewhere, server, "1 " + filler(5 * MB))
        assert await ask(elsewhere, server, "1 x") == [digest("1 x"), filler(1)]


@pytest.mark.parametrize("who", ["server", "caller", "another name"])
async def test_bodies_travel_in_parts_where_not_both_share_a_store(config, topic, tmp_path, who):
    store = Recording(tmp_path / "blobs")
    other = Recording(tmp_path / "blobs", name="other")
    served = {"server": config, "caller": sharing(config, store), "another name": sharing(config, other)}[who]
    caller = config if who == "caller" else sharing(config, store)
    async with server_for(Mirror(), served, topic) as server:
        text = f"{5 * MB} " + filler(5 * MB)
        assert await ask(caller, server, text) == [digest(text), filler(5 * MB)]
    assert (store.puts, other.puts) == (0, 0)


async def test_a_store_that_fails_is_an_error_for_the_caller(config, topic, tmp_path):
    store = DirectoryBlobStore(tmp_path / "blobs", name="shared")
    full = sharing(config, Recording(tmp_path / "full", refuses=True))
    async with server_for(Mirror(), full, topic) as server:
        with pytest.raises(InternalError, match=r"could not keep the answer .* No space left"):
            await ask(sharing(config, store), server, f"{5 * MB}")
        with pytest.raises(A2AClientError, match=r"could not keep the body of request .* No space left"):
            await ask(full, server, "1 " + filler(5 * MB))
        assert server.bridges[0].counters.taken == 1


class Unreadable(DirectoryBlobStore):
    """Takes bodies and gives none back."""

    async def get(self, key):
        raise OSError(5, "Input/output error", key)
        yield


async def test_a_request_whose_store_stays_unreadable_is_given_up_and_its_body_kept_for_a_retry(
    config, topic, tmp_path
):
    config = sharing(config, store := Unreadable(tmp_path / "blobs", name="shared"), attempts=1)
    mirror = Mirror()
    async with server_for(mirror, config, topic) as server:
        with pytest.raises(InternalError, match=r"given up after 1 deliveries.*could not read .*Input/output error"):
            await ask(config, server, "1 " + filler(5 * MB))
        assert mirror.seen == []
        await until(lambda: server.bridges[0].counters.answered == 1)
    assert len(files(store)) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sha256": "0" * 64}, "SHA-256"),
        ({"size": 4}, "it is larger"),
        ({"size": 200 * MB}, "this agent takes"),
        ({"claim": Claim(store="shared", key=KEY)}, "any more"),
        ({"claim": Claim(store="unknown", key=KEY)}, "it is in blob store 'unknown', and this process has"),
        ({"claim": Claim(store="shared", key="../../etc/passwd")}, "bad key"),
        ({"text": '{"jsonrpc":"2.0","id":7,"method":"GetTask","params":{"id":"t"}}'}, "not the one that its envelope"),
    ],
)
async def test_requests_that_are_not_what_the_envelope_says_are_refused(
    config, topic, connection, producer, store, change, reason
):
    config = sharing(config, store)
    fields = {name: value for name, value in change.items() if name != "text"}
    mirror = Mirror()
    async with server_for(mirror, config, topic) as server, listening(config, connection) as answers:
        body = rpc("1 x")
        reference = dataclasses.replace(await put_body(store, "r", body, timeout=30), **fields)
        envelope = large_request(config, topic, body, reference, text=change.get("text"))
        await producer.send(Message(topic=topic, body=envelope.encode()))
        async for answer in answers:
            if answer.body is not None:
                break
        error = json.loads(answer.body)["error"]
        assert error["code"] == -32600
        assert reason in error["message"]
        assert mirror.seen == []
        assert server.bridges[0]._bodies._spools.held == 0


async def test_a_request_that_is_given_back_waits_twice_as_long_each_time(config, topic, tmp_path, monkeypatch):
    """Or a store that is away for a while uses up all deliveries of all requests."""
    given_back = []
    release = GroupConsumer.release

    async def noted(self, leased, **options):
        given_back.append((leased.message.attempt, options.get("after")))
        return await release(self, leased, **options)

    monkeypatch.setattr(GroupConsumer, "release", noted)
    config = sharing(config, Unreadable(tmp_path / "blobs", name="shared"), attempts=3)
    async with server_for(Mirror(), config, topic) as server:
        with pytest.raises(InternalError, match="given up after 3 deliveries"):
            await ask(config, server, "1 " + filler(5 * MB))
    assert len(given_back) > 1
    assert all(after == 2 ** (attempt - 1) for attempt, after in given_back)


class Waiting(AgentExecutor):
    """Answers with its name when its gate is open."""

    def __init__(self, name):
        self.name = name
        self.arrived, self.gate = asyncio.Event(), asyncio.Event()

    async def execute(self, context, event_queue):
        self.arrived.set()
        status = TaskStatus(state=TaskState.TASK_STATE_SUBMITTED)
        await event_queue.enqueue_event(Task(id=context.task_id, context_id=context.context_id, status=status))
        await self.gate.wait()
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        await updater.add_artifact([Part(text=self.name)], artifact_id="a")
        await updater.complete()

    async def cancel(self, context, event_queue):
        raise NotImplementedError


async def test_a_worker_that_lost_its_lease_leaves_the_body_to_the_one_that_has_it(config, topic, store):
    config = sharing(config, store, blob_bytes=100_000)
    config = config.model_copy(update={"timeouts": Timeouts(lease=10, drain=0.1)})
    first, second, third = Waiting("first"), Waiting("second"), Waiting("third")
    async with (
        Wire(config.endpoint) as cut,
        Wire(config.endpoint) as dies,
        RocketMQ(config, card_cache=None) as rocketmq,
    ):
        one = server_for(first, config.model_copy(update={"endpoint": cut.endpoint}), topic)
        other = server_for(second, config.model_copy(update={"endpoint": dies.endpoint}), topic)
        await one.start()
        card = card_for(config, topic)
        card["capabilities"] = {**card["capabilities"], **card_to_dict(one.card)["capabilities"]}
        async with await rocketmq.client(card) as client, asyncio.timeout(2 * LIMIT):
            events = []

            async def ask():
                async for event in client.send_message(request("x" * 300_000)):
                    events.append(event)  # noqa: PERF401  (looked at while they come)

            asking = asyncio.create_task(ask())
            await first.arrived.wait()
            [body] = files(store)
            cut.blackhole()
            await other.start()
            await second.arrived.wait()
            await until(lambda: any(RESTART_EXTENSION in event.status_update.metadata for event in events))
            cut.pass_on()
            first.gate.set()
            await until(lambda: one.bridges[0].counters.answered == 1 and not one.bridges[0]._running)
            assert files(store) == [body]
            await one.aclose()
            dies.cut()
            async with server_for(third, config, topic):
                third.gate.set()
                await asking
                updates = [event.artifact_update for event in events]
                assert [part.text for update in updates for part in update.artifact.parts if part.text] == ["third"]
                await until(lambda: files(store) == [])
            await other.aclose()


class Pieces:
    """An app that writes one document in pieces."""

    def __init__(self, document, step):
        self._document = document
        self._step = step

    async def __call__(self, _scope, receive, send):
        while (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        for start in range(0, len(self._document), self._step):
            more = start + self._step < len(self._document)
            piece = self._document[start : start + self._step]
            await send({"type": "http.response.body", "body": piece, "more_body": more})


def small_request(config, topic, headers):
    envelope = RequestEnvelope(
        request_id=uuid.uuid4().hex,
        body=rpc("x").decode(),
        headers={"x-rocketmq-a2a": "1", **headers},
        dest_topic=topic,
        reply_topic=config.reply_topic,
        lite_topic="caller",
    )
    return Message(topic=topic, body=envelope.encode())


async def test_a_document_that_the_app_writes_in_pieces_has_room_until_a_message_is_full(
    config, topic, connection, producer
):
    config = config.model_copy(update={"limits": Limits(response_buffer_bytes=1024)})
    document = json.dumps({"jsonrpc": "2.0", "id": 7, "result": {"text": "x" * 9 * MB}}).encode()
    async with A2AServer.from_app(Pieces(document, 300_000), card=card_for(config, topic), config=config):
        sent = producer.send(small_request(config, topic, {}))
        answers = [each for each in await messages_of(config, connection, sent) if each.part or each.body]
    assert b"".join(each.part.data for each in answers) == document


async def test_a_document_goes_to_the_store_while_the_app_writes_it(config, topic, store, connection, producer):
    config = sharing(config, store, response_buffer_bytes=MB, blob_bytes=5 * MB)
    document = json.dumps({"jsonrpc": "2.0", "id": 7, "result": {"text": "x" * 9 * MB}}).encode()
    async with A2AServer.from_app(Pieces(document, 300_000), card=card_for(config, topic), config=config):
        sent = producer.send(small_request(config, topic, {"x-rocketmq-blobs": "shared"}))
        answers = [each for each in await messages_of(config, connection, sent) if each.part or each.body]
    assert len(answers) == 1
    assert answers[0].part.claim.store == "shared"
    assert (store.path / answers[0].part.claim.key).read_bytes() == document


async def test_a_gateway_passes_bodies_on_by_way_of_the_store(config, topic, tmp_path):
    config = sharing(config, store := Recording(tmp_path / "blobs"))
    async with server_for(Mirror(), config, topic) as server, gateway_for(config, server.card) as served:
        async with httpx.AsyncClient(timeout=60, headers={"A2A-Version": "1.0"}) as http:
            text = f"{5 * MB} " + filler(5 * MB)
            answer = await http.post(served.url, json=message(text, stream=False))
        [artifact] = answer.json()["result"]["task"]["artifacts"]
        assert [part["text"] for part in artifact["parts"]] == [digest(text), filler(5 * MB)]
    assert store.puts == 2


def test_claims_are_written_and_read_and_nothing_that_is_none_is():
    claim = Claim(store="shared", key=KEY)
    request = RequestEnvelope(
        request_id="r",
        body="{}",
        dest_topic="T",
        reply_topic="R",
        lite_topic="L",
        large=ClaimedBody(claim=claim, size=9, sha256="0" * 64),
    )
    assert RequestEnvelope.decode(request.encode()) == request
    part = Piece(index=0, data=b"", size=9, sha256="0" * 64, claim=claim)
    response = ResponseEnvelope(request_id="r", body=None, stream=True, end=False, seq=1, attempt=0, run="a", part=part)
    assert ResponseEnvelope.decode(response.encode()) == response
    for old, new in (
        (KEY, "../secret"),
        ("shared", "a/b"),
        ('"size":9', '"size":0'),
        ("0" * 64, "00"),
        (f'"key":"{KEY}",', ""),
    ):
        for envelope in (request, response):
            changed = envelope.encode().replace(old.encode(), new.encode())
            assert changed != envelope.encode()
            with pytest.raises(EnvelopeError) as caught:
                type(envelope).decode(changed)
            assert caught.value.request_id == "r"
    with pytest.raises(EnvelopeError):
        ResponseEnvelope.decode(response.encode() + b"bytes of its own")
    # Readers that know no claims look for these.
    assert "liteTopic" not in json.loads(request.encode())["largeBody"]
    assert "index" not in json.loads(response.encode())["part"]


async def some(*chunks):
    for chunk in chunks:
        yield chunk


async def read(store, key):
    return b"".join([chunk async for chunk in store.get(key)])


async def test_a_directory_keeps_what_is_whole_and_nothing_else(store):
    await store.put(KEY, some(b"one ", b"two"))
    assert await read(store, KEY) == b"one two"
    await store.delete(KEY)
    await store.delete(KEY)
    with pytest.raises(KeyError):
        await read(store, KEY)

    async def broken():
        yield b"half"
        raise EOFError

    with pytest.raises(EOFError):
        await store.put(KEY, broken())
    assert files(store) == []

    async def endless():
        yield b"half"
        await asyncio.Event().wait()

    putting = asyncio.create_task(store.put(KEY, endless()))
    await until(lambda: len(files(store)) == 1)
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert files(store) == []


@pytest.mark.parametrize("key", ["", "../x", "/etc/passwd", "p-" + "0" * 31, "p-" + "0" * 32 + "\n", "p-" + "A" * 32])
async def test_a_directory_takes_no_key_that_is_none(store, key):
    store.path.mkdir()
    for attempt in (store.put(key, some(b"x")), store.delete(key), read(store, key)):
        with pytest.raises(ValueError, match="no key of a body"):
            await attempt
    assert files(store) == []


async def test_a_directory_is_left_by_no_link(store, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    store.path.mkdir()
    (store.path / KEY).symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match=r"symbolic link|Too many levels"):
        await read(store, KEY)


async def test_what_is_too_old_is_deleted_and_what_is_none_of_ours_is_let_be(store):
    old = time.time() - store.keep - 60
    store.path.mkdir()
    ours = [f"p-{'1' * 32}", f".p-{'2' * 32}.{'3' * 16}"]
    for name in (*ours, "notes.txt"):
        (store.path / name).write_bytes(b"x")
        os.utime(store.path / name, (old, old))
    await store.put(KEY, some(b"new"))
    assert [file.name for file in files(store)] == sorted([KEY, "notes.txt"])
    os.utime(store.path / KEY, (time.time() - 100, time.time() - 100))
    assert await store.expire(older_than=200) == 0
    assert await store.expire(older_than=50) == 1
    assert [file.name for file in files(store)] == ["notes.txt"]


def test_a_store_has_a_name_that_both_sides_can_write():
    with pytest.raises(ConfigurationError, match="no name of a blob store"):
        DirectoryBlobStore("/nowhere", name="a b")
    with pytest.raises(TypeError, match="abstract"):
        BlobStore("x")  # type: ignore[abstract]


def pipes(store, count):
    """Bodies that nobody can open for reading before somebody writes them."""
    store.path.mkdir()
    found = [store.path / f"p-{number:032x}" for number in range(count)]
    for pipe in found:
        os.mkfifo(pipe)
    return found


async def test_a_directory_that_hangs_holds_up_nothing_else(store):
    """More reads hang than the event loop has threads."""
    hanging = pipes(store, 40)
    reads = [asyncio.create_task(read(store, pipe.name)) for pipe in hanging]
    try:
        await until(lambda: store._threads._count == 8)
        async with asyncio.timeout(LIMIT):
            assert await asyncio.to_thread(lambda: "done") == "done"
        assert not any(each.done() for each in reads)
    finally:
        writing = [threading.Thread(target=pipe.write_bytes, args=(b"x",), daemon=True) for pipe in hanging]
        for each in writing:
            each.start()
    async with asyncio.timeout(LIMIT):
        assert await asyncio.gather(*reads) == [b"x"] * 40
    await until(lambda: store._threads._count == 0)


def test_a_process_ends_although_its_directory_hangs(store):
    """One read hangs at the opening of the file, one within it; both are cancelled."""
    opening, within = pipes(store, 2)
    script = """
import asyncio, os, sys
from agentscope_rocketmq import DirectoryBlobStore

async def read(store, key):
    async for chunk in store.get(key):
        pass

async def main():
    store = DirectoryBlobStore(sys.argv[1], name="x")
    opened = os.open(sys.argv[1] + "/" + sys.argv[3], os.O_RDWR)
    reads = [asyncio.create_task(read(store, key)) for key in sys.argv[2:]]
    done, pending = await asyncio.wait(reads, timeout=1)
    assert not done
    for each in reads:
        each.cancel()
    await asyncio.wait(reads)
    print("ended", flush=True)

asyncio.run(main())
"""
    command = [sys.executable, "-c", script, str(store.path), opening.name, within.name]
    assert subprocess.run(command, timeout=2 * LIMIT, check=True, capture_output=True).stdout == b"ended\n"
