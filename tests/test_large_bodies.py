"""Requests and answers larger than a message: in parts, whole at the other end, refused with a reason, left behind by nobody."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import uuid
from typing import Any

import httpx
import pytest
from a2a.client.errors import A2AClientError
from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskUpdater
from a2a.types import Part, Task, TaskState, TaskStatus
from a2a.utils.errors import InternalError

from agentscope_rocketmq import RocketMQ
from agentscope_rocketmq.bodies import PART_OVERHEAD, BodyReceiver, send_body
from agentscope_rocketmq.card import large_bodies
from agentscope_rocketmq.config import Limits, Timeouts
from agentscope_rocketmq.envelope import BATCH_HEADER, BodyPart, BodyReference, RequestEnvelope, ResponseEnvelope
from agentscope_rocketmq.envelope import Part as Piece
from agentscope_rocketmq.errors import MessageTooLarge, SessionTakenOver
from agentscope_rocketmq.jsonrpc import excerpt
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer, Position
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.spool import Spools
from tests.commanded import Gated
from tests.gateways import gateway_for, message
from tests.services import card_for, request, server_for
from tests.waiting import LIMIT, root_cause, take, until

REQUEST = uuid.uuid4().hex
MB = 1024 * 1024


class Mirror(AgentExecutor):
    """Answers with the hash of what it got, and with as much text as the first word says, in one artifact."""

    def __init__(self):
        self.seen = []

    async def execute(self, context, event_queue):
        text = context.get_user_input()
        self.seen.append(len(text))
        size = int(text.split(" ", 1)[0])
        task = Task(
            id=context.task_id, context_id=context.context_id, status=TaskStatus(state=TaskState.TASK_STATE_SUBMITTED)
        )
        await event_queue.enqueue_event(task)
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        await updater.add_artifact([Part(text=digest(text)), Part(text=filler(size))])
        await updater.complete()

    async def cancel(self, context, event_queue):
        raise NotImplementedError


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def filler(size):
    """Text of so many bytes that gzip can't make smaller than a message, with escapes and two bytes a letter in it."""
    text = (hashlib.shake_256(b"filler").hexdigest(size // 4) + '"\\\n') * 2
    return ("é" + text)[:size]


async def parts_of(client, text, **fields):
    """The texts of the artifact that is answered with."""
    found = []
    async for event in client.send_message(request(text, **fields)):
        kind = event.WhichOneof("payload")
        artifacts = list(event.task.artifacts) if kind == "task" else []
        if kind == "artifact_update":
            artifacts = [event.artifact_update.artifact]
        found += [part.text for artifact in artifacts for part in artifact.parts]
    return found


def limited(config, **limits):
    return config.model_copy(update={"limits": Limits(**limits)})


@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "document"])
async def test_a_request_and_an_answer_of_many_messages_arrive_whole(config, topic, streaming):
    card = card_for(config, topic, capabilities={"streaming": streaming})
    async with (
        server_for(Mirror(), config, topic, card=card) as server,
        RocketMQ(config) as rocketmq,
        await rocketmq.client(server.card) as client,
    ):
        text = f"{9 * MB} " + filler(10 * MB)
        answers = await asyncio.gather(parts_of(client, text), parts_of(client, "5 short"), parts_of(client, text))
        assert answers[1] == [digest("5 short"), filler(5)]
        assert [[digest(part) for part in answer] for answer in (answers[0], answers[2])] == 2 * [
            [digest(digest(text)), digest(filler(9 * MB))]
        ]
        assert server.bridges[0].counters.taken == 3


async def test_a_body_over_the_limit_of_either_side_is_refused_before_anything_is_sent(config, topic):
    async with server_for(Mirror(), limited(config, request_bytes=6 * MB), topic) as server:
        announced = large_bodies(server.card)
        assert announced is not None
        assert announced.request_bytes == 6 * MB
        for caller, reason in ((limited(config, request_bytes=5 * MB), f"{5 * MB}"), (config, "whose card names it")):
            async with RocketMQ(caller) as rocketmq, await rocketmq.client(server.card) as client:
                with pytest.raises(A2AClientError, match=reason) as caught:
                    await parts_of(client, filler(7 * MB))
                assert isinstance(root_cause(caught.value), MessageTooLarge)
        async with gateway_for(config, server.card) as gateway, httpx.AsyncClient(timeout=LIMIT) as http:
            sent = await http.post(gateway.url, json=message(filler(7 * MB)))
            assert (sent.status_code, sent.json()["error"]["data"]["reason"]) == (413, "too-large")
            assert "whose card names it" in sent.json()["error"]["message"]
        assert server.bridges[0].counters.taken == 0


async def test_agents_that_do_not_announce_it_are_sent_no_parts(config, topic):
    async with (
        server_for(Mirror(), config, topic),
        RocketMQ(config) as rocketmq,
        await rocketmq.client(card_for(config, topic)) as client,
    ):
        with pytest.raises(A2AClientError, match="failed before anything was sent") as caught:
            await parts_of(client, filler(9 * MB))
        assert isinstance(root_cause(caught.value), MessageTooLarge)
        assert await parts_of(client, "1 x") == [digest("1 x"), filler(1)]


async def test_an_answer_over_the_limit_of_either_side_is_an_error_that_names_it(config, topic):
    async with server_for(Mirror(), limited(config, response_bytes=6 * MB), topic) as server:
        async with RocketMQ(config) as rocketmq, await rocketmq.client(server.card) as client:
            with pytest.raises(InternalError, match="response_bytes"):
                await parts_of(client, f"{7 * MB}")
        async with RocketMQ(limited(config, response_bytes=2 * MB)) as small, await small.client(server.card) as client:
            with pytest.raises(A2AClientError, match=f"more than the {2 * MB} bytes"):
                await parts_of(client, f"{5 * MB}")
            assert await parts_of(client, "1 x") == [digest("1 x"), filler(1)]


def large_request(config, topic, body, reference, *, text=None):
    return RequestEnvelope(
        request_id=REQUEST,
        body=excerpt(body) if text is None else text,
        headers={BATCH_HEADER: "1", "A2A-Version": "1.0"},
        dest_topic=topic,
        reply_topic=config.reply_topic,
        lite_topic="caller",
        large=reference,
    )


def rpc(text):
    message = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": text}]}
    return json.dumps({"jsonrpc": "2.0", "id": 7, "method": "SendMessage", "params": {"message": message}}).encode()


@contextlib.asynccontextmanager
async def listening(config, connection):
    """What comes on the LiteTopic `caller`, message by message."""
    async with LiteConsumer(connection, config.reply_topic, config.reply_group) as consumer:
        await consumer.subscribe(["caller"], at=Position.last())

        async def messages():
            async for item in consumer.batches():
                assert isinstance(item, LiteBatch)
                for message in item.messages:
                    yield ResponseEnvelope.decode(message.body())
                await consumer.ack(item.messages)

        yield messages()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sha256": "0" * 64}, "SHA-256"),
        ({"size": 4}, "not what its envelope says"),
        ({"parts": 3, "size": 10 * MB}, "(Timeouts.parts of the agent's server)"),
        ({"lite_topic": f"p-{'0' * 32}"}, "did not come in full"),
        ({"size": 200 * MB}, "this agent takes"),
        ({"text": '{"jsonrpc":"2.0","id":7,"method":"GetTask","params":{"id":"t"}}'}, "not the one that its envelope"),
    ],
)
async def test_bodies_that_are_not_what_the_envelope_says_are_refused_and_leave_nothing(
    config, topic, connection, producer, change, reason
):
    config = config.model_copy(update={"timeouts": Timeouts(parts=2.0)})
    change, text = {name: value for name, value in change.items() if name != "text"}, change.get("text")
    mirror = Mirror()
    async with server_for(mirror, config, topic) as server, listening(config, connection) as answers:
        body = rpc("1 x")
        reference = await send_body(producer, config.state_topic, REQUEST, body, timeout=30)
        reference = dataclasses.replace(reference, **change)
        envelope = large_request(config, topic, body, reference, text=text)
        await producer.send(Message(topic=topic, body=envelope.encode()))
        async for answer in answers:  # behind signs of life
            if answer.body is not None:
                break
        error = json.loads(answer.body)["error"]
        assert error["code"] == -32600
        assert reason in error["message"]
        assert mirror.seen == []
        bridge = server.bridges[0]
        await until(lambda: bridge.counters.answered == 1)
        assert bridge._bodies._spools.held == bridge._bodies._reserved == 0
        assert bridge._instance_consumer.lite_topics == {bridge._instance}


class Unsent:
    """A producer that keeps what it is to send."""

    def __init__(self, max_body_size):
        self.max_body_size = max_body_size
        self.messages = []

    async def send(self, message, **_options):
        self.messages.append(message)


@pytest.mark.parametrize("order", [(2, 1, 0, 3, 4), (0, 2, 1, 2, 0, 4, 3), (1, 1, 0, 2, 2, 4, 4, 3)])
async def test_parts_that_overtook_others_or_came_twice_are_put_in_order(config, topic, connection, producer, order):
    mirror = Mirror()
    async with server_for(mirror, config, topic) as server, listening(config, connection) as answers:
        body = rpc(f"1 {'x' * 80_000}")
        unsent: Any = Unsent(PART_OVERHEAD + 20_000)
        reference = await send_body(unsent, config.state_topic, REQUEST, body, timeout=30)
        assert reference.parts == len(unsent.messages) == 5
        for index in order:
            await producer.send(unsent.messages[index])
        await producer.send(Message(topic=topic, body=large_request(config, topic, body, reference).encode()))
        async for answer in answers:  # behind signs of life
            if answer.body is not None:
                break
        assert json.loads(answer.body)["result"]["task"]["artifacts"]
        assert mirror.seen == [80_002]
        await until(lambda: server.bridges[0].counters.answered == 1)
        assert server.bridges[0]._bodies._spools.held == 0


async def test_a_part_that_is_further_ahead_than_any_sender_puts_it_is_refused(config, topic, connection, producer):
    """What comes early is held in memory: no more than a sender has on its way."""
    mirror = Mirror()
    async with server_for(mirror, config, topic), listening(config, connection) as answers:
        body = rpc(f"1 {'x' * 80_000}")
        unsent: Any = Unsent(PART_OVERHEAD + 20_000)
        reference = await send_body(unsent, config.state_topic, REQUEST, body, timeout=30)
        for message in reversed(unsent.messages):
            await producer.send(message)
        await producer.send(Message(topic=topic, body=large_request(config, topic, body, reference).encode()))
        async for answer in answers:
            if answer.body is not None:
                break
        assert "not what its envelope says" in json.loads(answer.body)["error"]["message"]
        assert mirror.seen == []


async def test_a_sender_has_three_parts_on_their_way_and_ends_with_the_error_of_the_first():
    started, gate = [], asyncio.Event()

    class Slow(Unsent):
        async def send(self, message, **_options):
            started.append(message)
            await gate.wait()
            raise MessageTooLarge(f"part {len(started)}")

    slow: Any = Slow(PART_OVERHEAD + 1)
    sending = asyncio.create_task(send_body(slow, "topic", REQUEST, b"x" * 9, timeout=30))
    await until(lambda: len(started) == 3)
    gate.set()
    with pytest.raises(MessageTooLarge):
        await sending
    assert len(started) == 3


async def test_who_waits_for_room_leaves_its_place_to_others(config, topic, producer):
    few = limited(config, concurrency=2, request_bytes=8 * MB, response_bytes=8 * MB, spooled_bytes=8 * MB)
    mirror = Mirror()
    async with (
        server_for(mirror, few, topic) as server,
        RocketMQ(config) as rocketmq,
        await rocketmq.client(server.card) as client,
    ):
        bridge = server.bridges[0]
        # One that has a place and room, and the last part of which is still on its way.
        body = rpc("1 " + filler(5 * MB))
        unsent: Any = Unsent(producer.max_body_size)
        reference = await send_body(unsent, config.state_topic, REQUEST, body, timeout=30)
        *first, last = unsent.messages
        for part in first:
            await producer.send(part)
        await producer.send(Message(topic=topic, body=large_request(config, topic, body, reference).encode()))
        await until(lambda: bridge._bodies._reserved == len(body))
        text = "2 " + filler(5 * MB)
        waiting = asyncio.create_task(parts_of(client, text))
        await until(lambda: len(bridge._running) == 2)
        async with asyncio.timeout(LIMIT):
            assert await parts_of(client, "5 short") == [digest("5 short"), filler(5)]
            assert len(mirror.seen) == 1
            await producer.send(last)
            assert await waiting == [digest(text), filler(2)]
        await until(lambda: bridge.counters.answered == 3)
        assert len(mirror.seen) == 3
        assert bridge._bodies._spools.held == bridge._bodies._reserved == 0


async def test_the_room_of_a_body_is_given_back_when_the_agent_has_it(config, topic):
    few = limited(config, concurrency=3, request_bytes=8 * MB, response_bytes=8 * MB, spooled_bytes=8 * MB)
    reader = Gated()
    async with (
        server_for(reader, few, topic) as server,
        RocketMQ(config) as rocketmq,
        await rocketmq.client(server.card) as client,
    ):
        bodies = server.bridges[0]._bodies
        texts = [f"{number} " + filler(5 * MB) for number in range(3)]
        calls = [asyncio.create_task(parts_of(client, text)) for text in texts]
        await until(lambda: len(reader.begun) == 3)
        assert bodies._spools.held == bodies._reserved == 0
        reader.gate.set()
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(*calls)
        assert sorted(reader.begun) == texts


async def test_the_next_worker_has_the_whole_body_when_one_dies_while_it_reads(config, connection, producer):
    body = rpc(filler(9 * MB))
    reference = await send_body(producer, config.state_topic, REQUEST, body, timeout=30)
    envelope = large_request(config, "Topic", body, reference)
    async with contextlib.AsyncExitStack() as stack:
        workers = []
        for _ in range(2):
            consumer = await stack.enter_async_context(LiteConsumer(connection, config.state_topic, config.state_group))
            spools = Spools(most=20 * MB, total=20 * MB, in_memory=MB)
            workers.append((consumer, spools, BodyReceiver(consumer, spools=spools, patience=60.0)))

        async def serve(consumer, receiver):
            async for item in consumer.batches():
                receiver.hear(item)

        first = workers[0][0]
        # It takes the first part and does not come to ack it, as one that is killed.
        await first.subscribe([reference.lite_topic], at=Position.offset(0))
        [batch] = await take(first.batches(), 1)
        assert batch.messages[0].offset == 0
        consumer, spools, receiver = workers[1]
        serving = asyncio.create_task(serve(consumer, receiver))
        async with receiver.fetch(envelope) as spool:
            assert spool.size == len(body) == spools.held
            assert hashlib.sha256(b"".join(spool.chunks())).hexdigest() == spool.sha256 == reference.sha256
        assert spools.held == 0
        serving.cancel()


async def test_a_worker_from_which_a_body_is_taken_gives_the_request_back(config, connection, producer):
    body = rpc("1 x")
    part = BodyPart(request_id=REQUEST, part=Piece(index=0, data=body)).encode()
    reference = BodyReference(
        lite_topic=f"p-{uuid.uuid4().hex}", parts=1, size=len(body), sha256="0" * 64, request_id=REQUEST
    )
    envelope = large_request(config, "Topic", body, reference)
    async with (
        LiteConsumer(connection, config.state_topic, config.state_group) as one,
        LiteConsumer(connection, config.state_topic, config.state_group) as other,
    ):
        receiver = BodyReceiver(one, spools=Spools(most=MB, total=MB, in_memory=MB), patience=60.0)

        async def serve():
            async for item in one.batches():
                receiver.hear(item)

        async def fetch():
            async with receiver.fetch(envelope):
                pass

        serving, fetching = asyncio.create_task(serve()), asyncio.create_task(fetch())
        await until(lambda: reference.lite_topic in one.lite_topics)
        await other.subscribe([reference.lite_topic], at=Position.offset(0))
        await producer.send(Message(topic=config.state_topic, lite_topic=reference.lite_topic, body=part))
        with pytest.raises(SessionTakenOver):
            async with asyncio.timeout(LIMIT):
                await fetching
        serving.cancel()


async def test_a_large_event_is_replayed_whole_and_its_cursor_is_behind_its_last_part(config, topic):
    async with (
        server_for(Mirror(), config, topic) as server,
        RocketMQ(config) as rocketmq,
        await rocketmq.client(server.card, session="replayed") as client,
    ):
        await parts_of(client, f"{5 * MB}")
        await parts_of(client, "5 behind")
    async with RocketMQ(config) as later:
        session = later.session("replayed")
        events = [event async for event in session.events(from_start=True, follow=False)]
        large = [event for event in events if len(event.raw) > 5 * MB]
        assert len(large) == 1
        again = [event.cursor async for event in session.events(after=large[0].cursor, follow=False)]
        assert again == [event.cursor for event in events[events.index(large[0]) + 1 :]]


def test_the_limits_fit_each_other():
    with pytest.raises(ValueError, match="spooled_bytes"):
        Limits(request_bytes=10_000, spooled_bytes=5000)


async def test_a_gateway_passes_large_requests_on_and_large_answers_back(config, topic):
    async with server_for(Mirror(), config, topic) as server, gateway_for(config, server.card) as served:
        async with httpx.AsyncClient(timeout=LIMIT, headers={"A2A-Version": "1.0"}) as http:
            text = f"{5 * MB} " + filler(5 * MB)
            answer = await http.post(served.url, json=message(text, stream=False))
        [artifact] = answer.json()["result"]["task"]["artifacts"]
        assert [part["text"] for part in artifact["parts"]] == [digest(text), filler(5 * MB)]
