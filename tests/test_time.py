"""Time: what runs out when, and what a worker does about requests that nobody waits for any more."""

from __future__ import annotations

import asyncio
import json
import signal

import pytest
from a2a.client.errors import A2AClientError

from agentscope_rocketmq import Timeouts, call_context
from agentscope_rocketmq.envelope import ACK_TIMEOUT_HEADER, IDLE_TIMEOUT_HEADER, TOTAL_TIMEOUT_HEADER, read_seconds
from agentscope_rocketmq.errors import BrokerUnreachable, CallTimeout
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from tests.agents import Gate, make_blocked_agent, make_echo_agent
from tests.faults import Follower, Wire, process
from tests.gateways import client, gateway_for, message
from tests.offers import offering_to
from tests.services import Keeper, card_for, reply, request, server_for
from tests.test_workers import _answer, _envelope, _listening, _rpc
from tests.waiting import LIMIT, root_cause, take, until


def counting_messages(rocketmq):
    """How many messages of responses came to this process."""
    exchange = next(iter(rocketmq._carriers.values()))[1].replies.exchange
    feed, count = exchange.feed, [0]

    def counted(data, now):
        count[0] += 1
        return feed(data, now)

    exchange.feed = counted
    return count


async def fails(call):
    """The time that ran out, as the cause of the SDK's error."""
    with pytest.raises(A2AClientError) as caught:
        async with asyncio.timeout(LIMIT):
            await call
    error = root_cause(caught.value)
    assert isinstance(error, CallTimeout)
    assert f"{error.which} time limit" in str(error)
    return error.which


async def test_a_silent_agent_outlives_an_idle_time_that_is_shorter_than_its_silence(config, topic, rocketmq):
    gate = Gate()
    async with server_for(make_blocked_agent(gate), config, topic):
        client = await rocketmq.client(card_for(config, topic), timeouts=Timeouts(ack=LIMIT, idle=3.0))
        messages = counting_messages(rocketmq)
        call = asyncio.create_task(reply(client, "wait"))
        await gate.arrived.wait()
        # Three signs of life in an idle time: so many take twice as long.
        await until(lambda: messages[0] > 6)
        gate.open.set()
        assert await call == "begin end"


async def test_a_worker_that_is_frozen_is_an_idle_timeout(config, topic, rocketmq, counter):
    client = await rocketmq.client(card_for(config, topic), timeouts=Timeouts(ack=LIMIT, idle=3.0))
    with process("work", config, topic, str(counter.ledger.path)) as worker:
        follower = Follower(client, "endless")
        async with follower:
            await follower.more(3)
            worker.send_signal(signal.SIGSTOP)
            assert await fails(follower.reading) == "idle"


async def test_a_request_that_no_worker_takes_is_an_ack_timeout_whatever_the_idle_time_is(config, topic, rocketmq):
    client = await rocketmq.client(card_for(config, topic), timeouts=Timeouts(ack=1.0, idle=100.0))
    assert await fails(reply(client, "hello")) == "ack"
    patient = await rocketmq.client(card_for(config, topic), timeouts=Timeouts(ack=LIMIT, idle=1.0))
    call = asyncio.create_task(reply(patient, "hello"))
    hasty = _reply_with(patient, "hello", call_context(ack=1.5))
    # The other one has waited for longer than its idle time by then.
    assert await fails(hasty) == "ack"
    assert not call.done()
    async with server_for(make_echo_agent, config, topic):
        assert await call == "echo:hello"


async def test_a_request_that_is_taken_and_silent_is_no_ack_timeout(config, topic, rocketmq):
    """Also where nothing is streamed: the caller hears that it is taken."""
    gate = Gate()
    async with server_for(make_blocked_agent(gate), config, topic):
        client = await rocketmq.client(card_for(config, topic), timeouts=Timeouts(ack=3.0, total=5.0))
        client._config.streaming = False
        assert await fails(reply(client, "wait")) == "total"
        gate.open.set()


async def test_the_total_time_ends_a_call_whose_worker_shows_signs_of_life(config, topic, rocketmq):
    gate = Gate()
    async with server_for(make_blocked_agent(gate), config, topic):
        client = await rocketmq.client(card_for(config, topic), timeouts=Timeouts(ack=LIMIT, idle=3.0, total=7.0))
        assert await fails(reply(client, "wait")) == "total"
        gate.open.set()


async def test_a_send_that_takes_too_long_says_that_it_was_the_send(engine, topic):
    async with (
        Wire(engine.endpoint) as wire,
        Connection(wire.endpoint) as connection,
        Producer(connection) as producer,
    ):
        wire.blackhole()
        with pytest.raises(BrokerUnreachable, match="1 s, the send time limit"):
            await producer.send(Message(topic=topic, body=b"x"), timeout=1.0)
        wire.pass_on()


async def test_what_nobody_waits_for_is_not_begun_but_answered(config, topic, producer, connection):
    begun = []

    def make(session_id):
        begun.append(session_id)
        return make_echo_agent(session_id)

    late = _envelope(config, topic, _rpc("SendMessage", "late"))
    late.headers[TOTAL_TIMEOUT_HEADER] = "0.001"
    await producer.send(Message(topic=topic, body=late.encode()))
    async with _listening(config, connection, "caller") as batches, server_for(make, config, topic) as server:
        answer = await _answer(batches)
        assert answer.request_id == late.request_id
        assert answer.end
        error = json.loads(answer.body)["error"]
        assert "total time limit (0.001 s)" in error["message"]
        await until(lambda: server.bridges[0].counters.answered == 1)
        assert server.bridges[0].counters.expired == 1
        assert begun == []
        in_time = _envelope(config, topic, _rpc("SendMessage", "in time"))
        in_time.headers[TOTAL_TIMEOUT_HEADER] = "3600"
        await producer.send(Message(topic=topic, body=in_time.encode()))
        assert json.loads((await _answer(batches)).body)["result"]["task"]["artifacts"]
        assert server.bridges[0].counters.expired == 1


@pytest.mark.parametrize("which", ["ack", "idle"])
async def test_what_no_worker_took_in_time_is_not_begun(config, topic, rocketmq, counter, which):
    """Its call has failed, and whoever made it may ask again."""
    client = await rocketmq.client(card_for(config, topic))
    assert (
        await fails(_reply_with(client, "late 1", call_context(ack=1.0) if which == "ack" else call_context(idle=1.0)))
        == which
    )
    async with server_for(counter, config, topic) as server:
        await until(lambda: server.bridges[0].counters.answered == 1)
        assert server.bridges[0].counters.expired == 1
        assert counter.ledger.count("begin", "late") == 0


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({ACK_TIMEOUT_HEADER: "0.001", IDLE_TIMEOUT_HEADER: "60"}, "ack time limit (0.001 s)"),
        ({IDLE_TIMEOUT_HEADER: "0.001"}, "idle time limit (0.001 s)"),
        ({ACK_TIMEOUT_HEADER: "60", IDLE_TIMEOUT_HEADER: "0.001"}, None),
    ],
)
async def test_a_request_says_until_when_it_must_be_taken(config, topic, producer, connection, headers, says):
    envelope = _envelope(config, topic, _rpc("SendMessage", "x"))
    envelope.headers.update(headers)
    await producer.send(Message(topic=topic, body=envelope.encode()))
    async with (
        _listening(config, connection, "caller") as batches,
        server_for(make_echo_agent, config, topic) as server,
    ):
        answer = json.loads((await _answer(batches)).body)
        assert ("error" in answer) == (says is not None)
        assert says is None or says in answer["error"]["message"]
        assert server.bridges[0].counters.expired == (says is not None)


async def test_what_was_taken_before_is_begun_again_although_its_ack_time_is_over(make_topic, config, connection):
    names = await make_topic("NORMAL")
    envelope = _envelope(config, names.topic, _rpc("SendMessage", "x"))
    envelope.headers[ACK_TIMEOUT_HEADER] = "0.001"
    group = f"{names.topic}ConsumerGroup"
    async with Producer(connection) as producer, GroupConsumer(connection, names.topic, group) as first:
        await producer.send(Message(topic=names.topic, body=envelope.encode()))
        await take(first.messages(), 1)  # given back when it stops
    async with (
        _listening(config, connection, "caller") as batches,
        server_for(make_echo_agent, config, names.topic) as server,
    ):
        assert json.loads((await _answer(batches)).body)["result"]["task"]["artifacts"]
        assert server.bridges[0].counters.expired == 0


async def test_a_request_that_was_handed_over_too_late_is_not_begun(config, topic, connection, producer):
    """What its caller had waited before is told in the offer."""
    async with (
        server_for(make_echo_agent, config, topic) as server,
        offering_to(server._instance, config, connection, producer) as other,
    ):
        counters = server.bridges[0].counters
        for waited, expired in ((0.0, 0), (LIMIT + 1.0, 1)):
            envelope = _envelope(config, topic, _rpc("SendMessage", "x"))
            envelope.headers[ACK_TIMEOUT_HEADER] = f"{LIMIT}"
            await other.offer(envelope, "offer", waited=waited)
            assert await other.heard() == "offer taken"
            await other.go("offer")
            assert await other.heard() == "offer done"
            assert counters.expired == expired


async def test_a_caller_hears_that_its_request_is_taken_before_it_gives_up(config, topic, rocketmq):
    """Although its ack time is as long as a worker otherwise takes to say so, and nothing is streamed."""
    gate = Gate()
    async with server_for(make_blocked_agent(gate), config, topic):
        client = await rocketmq.client(card_for(config, topic), timeouts=Timeouts(ack=1.0))
        client._config.streaming = False
        call = asyncio.create_task(reply(client, "wait"))
        await gate.arrived.wait()
        began = asyncio.get_running_loop().time()
        await until(lambda: call.done() or asyncio.get_running_loop().time() > began + 1.5)
        gate.open.set()
        assert await call == "begin end"


async def test_what_expires_while_it_waits_for_a_place_is_not_begun(config, topic, rocketmq):
    gate = Gate()
    limits = config.limits.model_copy(update={"concurrency": 1})
    small = config.model_copy(update={"limits": limits})
    async with server_for(make_blocked_agent(gate), small, topic) as server:
        client = await rocketmq.client(card_for(config, topic))
        first = asyncio.create_task(reply(client, "wait"))
        await gate.arrived.wait()
        counters = server.bridges[0].counters
        assert await fails(_reply_with(client, "late", call_context(total=1.0))) == "total"
        gate.open.set()
        assert await first == "begin end"
        await until(lambda: counters.answered == 2)
        assert counters.expired == 1


async def test_a_message_tells_how_long_it_waited_by_the_servers_clocks(make_topic, connection, producer):
    names = await make_topic("NORMAL")
    await producer.send(Message(topic=names.topic, body=b"x"))
    sent = asyncio.get_running_loop().time()
    await until(lambda: asyncio.get_running_loop().time() > sent + 0.5)
    async with GroupConsumer(connection, names.topic, names.group) as consumer:
        [leased] = await take(consumer.messages(), 1)
        assert 0.5 <= leased.message.waited < LIMIT
        await consumer.ack(leased)


@pytest.mark.parametrize("text", ["", "soon", "nan", "inf", "0", "-1", "1e999"])
def test_what_is_no_number_of_seconds_sets_no_limit(text):
    assert read_seconds(text) is None


async def test_a_worker_whose_agent_holds_the_interpreter_is_fenced(config, topic, counter):
    """Nothing of it runs meanwhile, no thread and no renewal: another worker has the request when it wakes up."""
    config = config.model_copy(update={"timeouts": Timeouts(lease=10)})
    async with Keeper(config, card_cache=None) as rocketmq:
        client = await rocketmq.client(card_for(config, topic))
        with process("work", config, topic, str(counter.ledger.path)):
            follower = Follower(client, "held 60 30")
            await follower.more(1)
            counter.ledger.note("hold", "held")
            async with server_for(counter, config, topic), follower:
                await follower.whole()
                assert follower.artifact == list(range(60))
                assert follower.restarts == [1]
                await until(lambda: counter.ledger.count("end", "held") == 2)
                # What the first one says when it wakes up belongs to no call any more, or to an older run.
                exchange = next(iter(rocketmq._carriers.values()))[1].replies.exchange
                await until(lambda: exchange.outdated + exchange.unknown > 0)
                assert counter.ledger.count("begin", "held") == 2


async def test_a_worker_that_was_fenced_goes_on_when_the_one_that_took_over_dies(config, topic, counter):
    """Its caller listens to the dead one, so it is told anew what is there, and what comes; nothing is run again."""
    config = config.model_copy(update={"timeouts": Timeouts(lease=10)})
    async with Keeper(config, card_cache=None) as rocketmq:
        client = await rocketmq.client(card_for(config, topic))
        with process("work", config, topic, str(counter.ledger.path)):
            async with Follower(client, "held 500 15") as follower:
                await follower.more(1)
                counter.ledger.note("hold", "held")
                with process("work", config, topic, str(counter.ledger.path)) as second:
                    await until(lambda: follower.restarts == [1], limit=2 * LIMIT)
                    second.kill()
                await follower.whole(limit=2 * LIMIT)
                assert follower.artifact == list(range(500))
                # The third begins with all there is, or, when that is whole by then, is no run any more.
                assert follower.restarts in ([1, 2], [1])
                assert counter.ledger.count("begin", "held") == 2


async def test_a_lonely_worker_that_was_held_goes_on_with_what_it_had(config, topic, counter):
    config = config.model_copy(update={"timeouts": Timeouts(lease=10)})
    async with Keeper(config, card_cache=None) as rocketmq:
        client = await rocketmq.client(card_for(config, topic))
        with process("work", config, topic, str(counter.ledger.path)):
            async with Follower(client, "held 60 15") as follower:
                await follower.more(1)
                counter.ledger.note("hold", "held")
                assert await follower.whole() == list(range(60))
                assert counter.ledger.count("held", "held") == 1
                assert follower.restarts == []
                assert counter.ledger.count("begin", "held") == 1


async def _reply_with(client, text, context):
    async for _event in client.send_message(request(text), context=context):
        pass


# Through a gateway


async def test_the_total_time_of_a_gateways_call_travels_with_it(config, topic, counter):
    hasty = config.model_copy(update={"timeouts": Timeouts(total=1.0)})
    async with gateway_for(hasty, card_for(config, topic)) as served, client(served.url) as http:
        late = await http.post("/", json=message("late 1 0"))
        assert (late.status_code, late.json()["error"]["data"]["reason"]) == (504, "timeout")
        async with server_for(counter, config, topic) as server:
            await until(lambda: server.bridges[0].counters.answered == 1)
            assert server.bridges[0].counters.expired == 1
            assert counter.ledger.count("begin", "late") == 0


async def test_a_gateways_idle_time_is_told_to_workers_and_its_ack_time_counts(config, topic):
    hasty = config.model_copy(update={"timeouts": Timeouts(ack=LIMIT, idle=3.0)})
    gate = Gate()
    async with gateway_for(hasty, card_for(config, topic)) as served, client(served.url) as http:
        answer = asyncio.create_task(http.post("/", json=message("wait", stream=False)))
        carrier = served.gateway._rocketmq.carrier(None)
        await until(lambda: len(carrier.replies._by_call) == 1)
        [call] = carrier.replies._by_call
        messages = counting_messages(served.gateway._rocketmq)
        # No worker for longer than the idle time: the ack time counts.
        asked = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() > asked + 3.5)
        assert call in carrier.replies._by_call
        async with server_for(make_blocked_agent(gate), config, topic):
            await gate.arrived.wait()
            await until(lambda: messages[0] > 6)  # three in an idle time
            gate.open.set()
            assert (await answer).status_code == 200
