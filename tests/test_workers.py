"""Workers and callers: one topic shared, requests that wait, sessions that never mix, bad input that harms nobody."""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from contextlib import AsyncExitStack

import pytest
from a2a.client.errors import A2AClientError
from a2a.types import CancelTaskRequest, GetTaskRequest, TaskState
from agentscope.message import UserMsg

from agentscope_rocketmq import RocketMQ
from agentscope_rocketmq.envelope import BATCH_HEADER, RequestEnvelope, ResponseEnvelope
from agentscope_rocketmq.errors import MessageTooLarge, SessionTakenOver, TopicNotFound
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.sse import parse_events
from tests.agents import Gate, make_blocked_agent, make_echo_agent, make_streaming_agent, scripted, user_texts
from tests.services import calling, card_for, reply, request, server_for
from tests.waiting import LIMIT, root_cause, take, until

COMPLETED, WORKING = TaskState.TASK_STATE_COMPLETED, TaskState.TASK_STATE_WORKING


def make_named_agent(name):
    """Answers with its worker's name and what it was told in this conversation."""

    def make(_session_id):
        async def script(messages):
            yield f"{name}: " + " | ".join(user_texts(messages))

        return scripted(script, name="agent")

    return make


async def test_two_workers_share_a_topic_and_every_conversation_stays_with_its_own(config, topic, rocketmq):
    async with AsyncExitStack() as stack:
        for name in ("one", "two"):
            await stack.enter_async_context(server_for(make_named_agent(name), config, topic))
        clients = [await rocketmq.client(card_for(config, topic), session=f"s-{number}") for number in range(20)]
        first = await asyncio.gather(*(reply(client, "a") for client in clients))
        second = await asyncio.gather(*(reply(client, "b") for client in clients))
        workers = [answer.split(": ")[0] for answer in first]
        assert set(workers) == {"one", "two"}
        # Memory lives in a worker, so the second message of a conversation must reach the first one's.
        assert second == [f"{worker}: a | b" for worker in workers]


async def test_get_and_cancel_reach_the_worker_that_runs_the_task(config, topic, rocketmq):
    gates = [Gate(), Gate()]
    async with AsyncExitStack() as stack:
        for gate in gates:
            await stack.enter_async_context(server_for(make_blocked_agent(gate), config, topic))
        client = await rocketmq.client(card_for(config, topic))
        for _ in range(6):
            stream = client.send_message(request("wait"))
            async for event in stream:
                if event.HasField("artifact_update"):
                    task_id = event.artifact_update.task_id
                    break
            assert (await client.get_task(GetTaskRequest(id=task_id))).status.state == WORKING
            cancelled = await client.cancel_task(CancelTaskRequest(id=task_id))
            assert cancelled.status.state == TaskState.TASK_STATE_CANCELED


async def test_when_the_instance_that_knows_a_context_is_gone_another_worker_answers(config, topic, rocketmq):
    client = await rocketmq.client(card_for(config, topic), session="moving")
    async with server_for(make_named_agent("one"), config, topic):
        assert await reply(client, "a") == "one: a"
    async with server_for(make_named_agent("two"), config, topic):
        assert await reply(client, "b") == "two: b"


async def test_requests_sent_while_no_worker_runs_are_answered_when_one_starts(config, topic, rocketmq):
    clients = [await rocketmq.client(card_for(config, topic), session=f"waiting-{number}") for number in range(20)]
    calls = [asyncio.create_task(reply(clients[number % 20], f"say {number}")) for number in range(200)]
    pending = rocketmq._carriers[next(iter(rocketmq._carriers))][1].replies._by_call
    await until(lambda: len(pending) == 200)
    assert not any(call.done() for call in calls)

    def make(_session_id):
        async def script(messages):
            yield user_texts(messages)[-1]

        return scripted(script)

    async with server_for(make, config, topic):
        async with asyncio.timeout(3 * LIMIT):
            answers = await asyncio.gather(*calls)
    assert answers == [f"say {number}" for number in range(200)]


async def test_sessions_at_once_never_mix(config, topic, rocketmq):
    def make(session_id):
        async def script(messages):
            for number in range(20):
                yield f"[{session_id} {user_texts(messages)[-1]} {number}]"
                await asyncio.sleep(random.random() / 200)

        return scripted(script)

    async with server_for(make, config, topic):
        sessions = [uuid.uuid4().hex for _ in range(12)]
        clients = {session: await rocketmq.client(card_for(config, topic), session=session) for session in sessions}

        async def one(session, turn):
            answer = await reply(clients[session], f"turn{turn}")
            assert answer == "".join(f"[{session} turn{turn} {number}]" for number in range(20))

        await asyncio.gather(*(one(session, turn) for session in sessions for turn in range(3)))


async def test_two_supervisors_each_receive_on_their_own_lite_topic(config, topic):
    async with (
        server_for(make_echo_agent, config, topic),
        RocketMQ(config, card_cache=None) as first,
        RocketMQ(config, card_cache=None) as second,
    ):
        one = await first.agent(card_for(config, topic), session="supervisor-1")
        two = await second.agent(card_for(config, topic), session="supervisor-2")
        answers = await asyncio.gather(
            one.reply(UserMsg(name="user", content="from one")), two.reply(UserMsg(name="user", content="from two"))
        )
        assert [answer.get_text_content() for answer in answers] == ["echo:from one", "echo:from two"]
        assert (one.state.context_id, two.state.context_id) == ("supervisor-1", "supervisor-2")


async def test_a_session_opened_elsewhere_ends_here_with_the_reason(config, topic):
    gate = Gate()
    async with (
        server_for(make_blocked_agent(gate), config, topic),
        RocketMQ(config, card_cache=None) as first,
        RocketMQ(config, card_cache=None) as second,
    ):
        old = await first.client(card_for(config, topic), session="moved")
        call = asyncio.create_task(reply(old, "wait"))
        await gate.arrived.wait()
        new = await second.client(card_for(config, topic), session="moved")
        with pytest.raises(A2AClientError, match="opened by another reader") as caught:
            # The LiteTopic is taken by the first call.
            await asyncio.gather(asyncio.wait_for(call, LIMIT), new.get_task(GetTaskRequest(id="unknown")))
        assert isinstance(root_cause(caught.value), SessionTakenOver)
        gate.open.set()


async def test_a_stream_whose_reader_stops_is_cut_off_and_its_session_goes_on(config, topic):
    config = config.model_copy(
        update={
            "limits": config.limits.model_copy(update={"stream_buffer": 4}),
            "timeouts": config.timeouts.model_copy(update={"stall": 2.0}),
        }
    )

    def make(_session_id):
        async def script(messages):
            for number in range(int(user_texts(messages)[-1])):
                yield f"{number} " + "x" * 30_000
                await asyncio.sleep(0.005)

        return scripted(script)

    async with server_for(make, config, topic) as server, calling(config, server) as client:
        slow = client.send_message(request("400"))
        await anext(slow)
        # Another call of the same session, while nobody reads the first one's stream.
        assert (await reply(client, "400")).startswith("0 x")
        with pytest.raises(A2AClientError, match=r"did not keep up|cut off"):
            async for _ in slow:
                await asyncio.sleep(0.01)


async def test_a_copy_of_a_request_is_not_run_again(config, topic, rocketmq, producer, connection):
    runs = []

    def make(_session_id):
        runs.append(1)
        return make_echo_agent("")

    async with server_for(make, config, topic) as server:
        client = await rocketmq.client(card_for(config, topic))
        assert await reply(client, "first") == "echo:first"
        envelope = _envelope(config, topic, _rpc("SendMessage", "copied"))
        for _ in range(3):
            await producer.send(Message(topic=topic, body=envelope.encode()))
        counters = server.bridges[0].counters
        await until(lambda: (counters.repeated, counters.answered) == (2, 2))
        assert len(runs) == 2


BAD = {
    "not JSON": b"\xff\xfe not json",
    "not an object": b"[1, 2]",
    "no fields": b"{}",
    "no reply address": json.dumps({"requestId": "a" * 32, "requestBody": "{}"}).encode(),
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
async def test_a_message_that_is_no_request_is_set_aside_once(config, topic, rocketmq, producer, body, caplog):
    async with server_for(make_echo_agent, config, topic) as server:
        counters = server.bridges[0].counters
        await producer.send(Message(topic=topic, body=body))
        await until(lambda: counters.refused == 1)
        client = await rocketmq.client(card_for(config, topic))
        assert await reply(client, "still there?") == "echo:still there?"
        assert (counters.refused, counters.taken) == (1, 1)
        assert "set aside" in caplog.text


async def test_a_request_for_a_foreign_reply_topic_is_refused(config, topic, producer, connection, make_topic):
    foreign = await make_topic("LITE")
    async with (
        server_for(make_echo_agent, config, topic) as server,
        LiteConsumer(connection, foreign.topic, foreign.group) as victim,
    ):
        await victim.subscribe(["victim"])
        envelope = _envelope(config, topic, _rpc("SendMessage", "x"), reply_topic=foreign.topic, lite_topic="victim")
        await producer.send(Message(topic=topic, body=envelope.encode()))
        await until(lambda: server.bridges[0].counters.refused == 1)
        with pytest.raises(TimeoutError):
            await take(victim.batches(), 1, limit=1)


async def test_a_bad_field_is_answered_where_the_reply_address_is_readable(config, topic, producer, connection):
    async with server_for(make_echo_agent, config, topic), _listening(config, connection, "caller") as batches:
        fields = json.loads(_envelope(config, topic, "{}").encode())
        fields["requestBody"] = {"not": "a string"}
        await producer.send(Message(topic=topic, body=json.dumps(fields).encode()))
        answer = await _answer(batches)
        assert answer.request_id == fields["requestId"]
        assert json.loads(answer.body)["error"]["code"] == -32600


async def test_a_bad_field_of_a_stream_request_is_answered_by_an_event(config, topic, producer, connection):
    # A document in answer to a stream hangs the Java client for ever.
    async with server_for(make_echo_agent, config, topic), _listening(config, connection, "caller") as batches:
        fields = json.loads(_envelope(config, topic, _rpc("message/stream", "x")).encode())
        fields["requestHeader"] = {"x-two-lines": "one\ntwo"}
        await producer.send(Message(topic=topic, body=json.dumps(fields).encode()))
        answer = await _answer(batches)
        assert (answer.request_id, answer.stream, answer.end) == (fields["requestId"], True, True)
        [event] = parse_events(answer.body)
        response = json.loads(event.data)
        assert (event.id, response["id"], response["error"]["code"]) == ("0", "rpc-1", -32600)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("this is not json", -32700),
        ("[]", -32600),
        ('{"jsonrpc":"2.0","id":1,"method":"NoSuchMethod","params":{}}', -32601),
        ('{"jsonrpc":"2.0","id":1,"method":"SendMessage","params":{"message":{}}}', -32602),
    ],
    ids=["not JSON", "not a request", "unknown method", "bad parameters"],
)
async def test_bad_json_rpc_gets_the_json_rpc_error(config, topic, producer, connection, body, code):
    async with server_for(make_echo_agent, config, topic), _listening(config, connection, "caller") as batches:
        await producer.send(Message(topic=topic, body=_envelope(config, topic, body).encode()))
        answer = await _answer(batches)
        error = json.loads(answer.body)["error"]
        assert error["code"] == code
        assert "Traceback" not in answer.body


async def test_a_request_over_the_servers_limit_gets_an_error_and_is_not_run(config, topic, rocketmq):
    small = config.model_copy(update={"limits": config.limits.model_copy(update={"request_bytes": 10_000})})
    async with server_for(make_echo_agent, small, topic) as server:
        client = await rocketmq.client(card_for(config, topic))
        with pytest.raises(Exception, match=r"10000"):
            await reply(client, "x" * 20_000)
        assert await reply(client, "short") == "echo:short"
        await until(lambda: server.bridges[0].counters.answered == 2)


async def test_what_is_over_the_limit_is_refused_before_it_is_sent(config, topic, rocketmq):
    async with server_for(make_echo_agent, config, topic) as server:
        client = await rocketmq.client(card_for(config, topic))
        with pytest.raises(A2AClientError, match="limit") as caught:
            await reply(client, "x" * (config.limits.request_bytes + 1))
        assert isinstance(root_cause(caught.value), MessageTooLarge)
        assert server.bridges[0].counters.taken == 0
        assert await reply(client, "short") == "echo:short"


async def test_an_answer_that_fits_no_message_is_an_error_that_says_so(config, topic, rocketmq):
    def make(_session_id):
        async def script(messages):
            yield user_texts(messages)[-1] if user_texts(messages)[-1] != "big" else "x" * 5_000_000

        return scripted(script)

    small = config.model_copy(update={"limits": config.limits.model_copy(update={"response_bytes": 4_000_000})})
    async with server_for(make, small, topic):
        client = await rocketmq.client(card_for(config, topic))
        with pytest.raises(Exception, match="4000000 may be sent"):
            await reply(client, "big")
        client = await rocketmq.client(card_for(config, topic))
        assert await reply(client, "short") == "short"


async def test_a_call_to_a_topic_that_does_not_exist_says_so_at_once(config, rocketmq):
    client = await rocketmq.client(card_for(config, "NoSuchTopicAnywhere"))
    with pytest.raises(A2AClientError, match="NoSuchTopicAnywhere") as caught:
        await reply(client, "x")
    assert isinstance(root_cause(caught.value), TopicNotFound)


async def test_ten_thousand_characters_in_a_thousand_deltas_arrive_in_order(config, topic, rocketmq):
    async with server_for(make_streaming_agent(1000, delta="{:09d} "), config, topic):
        agent = await rocketmq.agent(card_for(config, topic))
        answer = await agent.reply(UserMsg(name="user", content="go"))
        assert answer.get_text_content() == "".join(f"{number:09d} " for number in range(1000))
        assert len(answer.get_content_blocks("text")) == 1


def _rpc(method, text):
    message = {"messageId": uuid.uuid4().hex, "role": "ROLE_USER", "parts": [{"text": text}]}
    return json.dumps({"jsonrpc": "2.0", "id": "rpc-1", "method": method, "params": {"message": message}})


def _envelope(config, topic, body, *, reply_topic=None, lite_topic="caller"):
    return RequestEnvelope(
        request_id=uuid.uuid4().hex,
        body=body,
        headers={BATCH_HEADER: "1", "A2A-Version": "1.0"},
        dest_topic=topic,
        reply_topic=reply_topic or config.reply_topic,
        lite_topic=lite_topic,
    )


class _listening:
    """Reads a LiteTopic of the reply topic as a caller would, raw."""

    def __init__(self, config, connection, lite_topic):
        self._consumer = LiteConsumer(connection, config.reply_topic, config.reply_group)
        self._lite_topic = lite_topic

    async def __aenter__(self):
        await self._consumer.start()
        await self._consumer.subscribe([self._lite_topic])
        return self._consumer.batches()

    async def __aexit__(self, *_):
        await self._consumer.aclose()


async def _answer(batches):
    [batch] = await take(batches, 1)
    assert isinstance(batch, LiteBatch)
    [message] = batch.messages
    return ResponseEnvelope.decode(message.body())
