"""A server takes what it can carry: places, a rate, a share for each caller, and tiers of which none starves."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskUpdater
from a2a.types import GetTaskRequest, Part, SubscribeToTaskRequest, Task, TaskState, TaskStatus
from a2a.utils.errors import InternalError
from hypothesis import given
from hypothesis import strategies as st

from agentscope_rocketmq import Timeouts, call_context, questions, server
from agentscope_rocketmq.card import parse_card, priority_topics
from agentscope_rocketmq.errors import CardError, IllegalRequest
from agentscope_rocketmq.priority import PRIORITY_EXTENSION, PRIORITY_HEADER, Tier, tier_of
from agentscope_rocketmq.provision import apply, plan
from agentscope_rocketmq.rocketmq.consumer import GroupConsumer
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.rate import RateLimit
from agentscope_rocketmq.slots import Slot, Slots
from tests.agents import Gate, scripted, user_texts
from tests.commanded import Gated
from tests.faults import Counter as Numbers
from tests.faults import Follower, Ledger
from tests.offers import asked, offering_to
from tests.services import Keeper, card_for, reply, request, server_for
from tests.waiting import LIMIT, take, until


class Worker(AgentExecutor):
    """Works for a moment on each request; knows who worked when."""

    def __init__(self, seconds: float = 0.005) -> None:
        self.seconds = seconds
        self.done: list[str] = []
        self.at_once: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.gate = asyncio.Event()
        self.gate.set()

    async def execute(self, context, event_queue):
        text = context.get_user_input()
        kind = text.partition(" ")[0]
        for name in ("all", kind):
            self.at_once[name] += 1
            self.most[name] = max(self.most[name], self.at_once[name])
        submitted = TaskStatus(state=TaskState.TASK_STATE_SUBMITTED)
        await event_queue.enqueue_event(Task(id=context.task_id, context_id=context.context_id, status=submitted))
        await self.gate.wait()
        await asyncio.sleep(self.seconds)
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        await updater.add_artifact([Part(text=text)], artifact_id="a")
        self.done.append(text)
        for name in ("all", kind):
            self.at_once[name] -= 1
        await updater.complete()

    async def cancel(self, context, event_queue):
        await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()


def with_limits(config, **limits):
    return config.model_copy(update={"limits": config.limits.model_copy(update=limits)})


def with_tiers(config, topic):
    extension = {"uri": PRIORITY_EXTENSION, "params": {"high": f"{topic}-high", "low": f"{topic}-low"}}
    return card_for(config, topic, capabilities={"streaming": True, "extensions": [extension]})


# Places


def nothing():
    pass


class Places:
    """Requests that want a place, and in which order they got one."""

    def __init__(self, slots):
        self._slots = slots
        self.order: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.holding: list[asyncio.Event] = []

    def want(self, tier, caller="c", name=""):
        self.tasks.append(asyncio.create_task(self._have(tier, caller, name or tier.value)))

    async def _have(self, tier, caller, name):
        async with self._slots.slot(tier, caller, on_aside=nothing):
            self.order.append(name)
            let_go = asyncio.Event()
            self.holding.append(let_go)
            await let_go.wait()

    async def one_done(self):
        """The one who has had its place longest gives it back."""
        self.holding.pop(0).set()
        await settled()

    async def all_done(self):
        while self.holding:
            await self.one_done()
        await asyncio.gather(*self.tasks)


async def settled():
    for _ in range(10):
        await asyncio.sleep(0)


async def test_places_go_to_the_tiers_by_their_weights():
    places = Places(Slots(1))
    places.want(Tier.NORMAL, name="first")
    await settled()
    for tier in (Tier.LOW, Tier.NORMAL, Tier.HIGH):
        for _ in range(40):
            places.want(tier)
    await settled()
    await places.all_done()
    # High work overtakes, and what came before it still moves.
    assert Counter(places.order[1:43]) == {"high": 32, "normal": 8, "low": 2}
    assert len(places.order) == 121


async def test_a_tier_that_had_nothing_to_do_has_not_saved_up():
    places = Places(Slots(1))
    for _ in range(100):
        places.want(Tier.HIGH)
    await settled()
    for _ in range(50):
        await places.one_done()
    for _ in range(20):
        places.want(Tier.LOW)
    await settled()
    before = len(places.order)
    for _ in range(20):
        await places.one_done()
    assert Counter(places.order[before:])["low"] <= 2
    await places.all_done()


async def test_within_a_tier_it_is_first_come_first_served():
    places = Places(Slots(2))
    for number in range(10):
        places.want(Tier.NORMAL, name=str(number))
        await settled()
    await places.all_done()
    assert places.order == [str(number) for number in range(10)]


async def test_a_caller_has_no_more_than_its_share_and_others_pass_it_by():
    places = Places(Slots(4, caller_share=0.5))
    for number in range(6):
        places.want(Tier.NORMAL, "greedy", f"greedy {number}")
    places.want(Tier.NORMAL, "modest", "modest")
    await settled()
    assert places.order == ["greedy 0", "greedy 1", "modest"]
    await places.one_done()
    assert places.order[3:] == ["greedy 2"]
    await places.all_done()
    assert len(places.order) == 7


async def test_who_steps_aside_lets_others_work_and_takes_a_place_anew():
    slots, parked = Slots(1), []
    async with slots.slot(Tier.NORMAL, "c", on_aside=lambda: parked.append(1)) as slot:
        assert Slot.current() is slot
        slot.leave()
        slot.leave()
        other = Places(slots)
        other.want(Tier.NORMAL)
        await settled()
        assert other.order == ["normal"]
        entering = asyncio.create_task(slot.enter())
        await settled()
        assert not entering.done()
        await other.all_done()
        await entering
        slot.leave()
        assert parked == [1]
    await slot.enter()  # the request is over: its agent may go on, and needs no place
    assert Slot.current() is None
    places = Places(slots)
    places.want(Tier.LOW)
    await settled()
    assert places.order == ["low"]
    await places.all_done()


STEPS = st.tuples(
    st.sampled_from(["want", "done", "cancel"]),
    st.sampled_from(Tier),
    st.sampled_from("ab"),
    st.integers(0, 99),
    st.booleans(),
)


@given(st.lists(STEPS, max_size=40), st.sampled_from([0.5, 1.0]))
async def test_no_place_is_lost_or_doubled_whoever_is_cancelled(steps, share):
    slots = Slots(2, caller_share=share)
    places = Places(slots)
    for step, tier, caller, which, settle in steps:
        if step == "want":
            places.want(tier, caller)
        elif step == "cancel" and places.tasks:
            places.tasks[which % len(places.tasks)].cancel()
        elif step == "done" and places.holding:
            places.holding.pop(0).set()
        if settle:
            await settled()
    for task in places.tasks:
        task.cancel()
    await asyncio.gather(*places.tasks, return_exceptions=True)
    after = Places(slots)
    for caller in "abc":
        after.want(Tier.NORMAL, caller)
    await settled()
    assert len(after.order) == 2
    await after.all_done()


# A rate


def test_a_rate_lets_through_what_it_says_and_saves_up_a_second():
    now = 0.0
    rate = RateLimit(4, clock=lambda: now)
    assert rate.room() == rate.room() == 4
    rate.charge(3)
    assert rate.room() == 1
    rate.charge(3)  # of several polls: two more than there was room for
    assert rate.room() == 0
    now = 0.5
    assert rate.room() == 0
    now = 1.0
    assert rate.room() == 2
    now = 100.0
    assert rate.room() == 4
    assert RateLimit(0.1, clock=lambda: now).room() == 1


async def test_a_consumer_takes_no_more_than_its_rate(make_topic, connection, producer):
    names = await make_topic("NORMAL")
    now, charged = 0.0, []

    class Noting(RateLimit):
        def charge(self, arrived):
            charged.append(arrived)
            super().charge(arrived)

    for number in range(12):
        await producer.send(Message(topic=names.topic, body=str(number).encode()))
    rate = Noting(2, clock=lambda: now)
    async with GroupConsumer(connection, names.topic, names.group, concurrency=16, rate=rate) as consumer:
        messages = consumer.messages()
        for second in (1, 2, 3):
            for leased in await take(messages, 2):
                await consumer.ack(leased)
            # A poll that was out may bring one more, which the next second lacks.
            assert 2 * second <= sum(charged) <= 2 * second + 1
            now += 1.0


async def test_polls_of_an_empty_topic_keep_nothing_of_the_rate_from_others(make_topic, connection, producer):
    quiet, busy = await make_topic("NORMAL"), await make_topic("NORMAL")
    for number in range(2):
        await producer.send(Message(topic=busy.topic, body=str(number).encode()))
    rate = RateLimit(2, clock=lambda: 0.0)
    async with GroupConsumer(connection, quiet.topic, quiet.group, rate=rate) as waiting:
        polls = waiting._poller._polls
        await until(lambda: any(polls.values()))
        async with GroupConsumer(connection, busy.topic, busy.group, rate=rate) as consumer:
            out = {poll for each in polls.values() for poll in each}
            for leased in await take(consumer.messages(), 2):
                await consumer.ack(leased)
            assert any(not poll.done() for poll in out)


# Tiers


@pytest.mark.parametrize(
    ("headers", "tier"),
    [({}, "normal"), ({PRIORITY_HEADER: "high"}, "high"), ({PRIORITY_HEADER.upper(): " LOW "}, "low")]
    + [({PRIORITY_HEADER: text}, "normal") for text in ("", "urgent", "7", "high,low")],
)
def test_the_tier_of_a_request_is_what_its_header_says(headers, tier):
    assert tier_of(headers) == tier


@pytest.mark.parametrize(
    "params", [{"normal": "T"}, {"high": 7}, {"high": ""}, {"high": "a b"}, {"high": "T"}, {"high": "H", "low": "H"}]
)
def test_a_card_whose_tiers_are_none_is_refused(config, params):
    extension = {"uri": PRIORITY_EXTENSION, "params": params}
    card = parse_card(card_for(config, "T", capabilities={"extensions": [extension]}))
    with pytest.raises(CardError, match=r"priority topic|twice"):
        priority_topics(card)


async def test_urgent_work_overtakes_a_backlog_and_low_work_moves(config, topic):
    """A backlog that waited while no worker ran; urgent requests come last."""
    card = with_tiers(config, topic)
    await apply(plan([card], config), config)
    worker = Worker()
    async with Keeper(config, card_cache=None) as rocketmq:
        normal = await rocketmq.client(card)
        low = await rocketmq.client(card, priority="low")
        calls = [asyncio.create_task(reply(low, f"low {number}")) for number in range(10)]
        calls += [asyncio.create_task(reply(normal, f"normal {number}")) for number in range(150)]
        pending = rocketmq._carriers[next(iter(rocketmq._carriers))][1].replies._by_call
        await until(lambda: len(pending) == 160)
        calls += [
            asyncio.create_task(_reply_with(normal, f"high {number}", call_context(priority="high")))
            for number in range(30)
        ]
        await until(lambda: len(pending) == 190)
        async with server_for(worker, with_limits(config, concurrency=4), topic, card=card) as server:
            async with asyncio.timeout(2 * LIMIT):
                await asyncio.gather(*calls)
            await until(lambda: server.bridges[0].counters.answered == 190)
    assert worker.most["all"] <= 4
    assert len(set(worker.done)) == len(worker.done) == 190
    last_urgent = max(place for place, text in enumerate(worker.done) if text.startswith("high"))
    before = Counter(text.split()[0] for text in worker.done[:last_urgent])
    assert before["normal"] < 0.8 * 150
    # Low requests got on while normal ones waited.
    last_normal = max(place for place, text in enumerate(worker.done) if text.startswith("normal"))
    assert any(text.startswith("low") for text in worker.done[:last_normal])


async def test_an_agent_without_tiers_treats_all_alike_and_says_so(config, topic, caplog):
    async with server_for(Worker(), config, topic), Keeper(config, card_cache=None) as rocketmq:
        client = await rocketmq.client(card_for(config, topic), priority="high")
        assert "no priority tiers" in caplog.text
        assert await reply(client, "hello") == "hello"
        with pytest.raises(IllegalRequest, match="urgent"):
            await rocketmq.client(card_for(config, topic), priority="urgent")
        with pytest.raises(Exception, match="'urgent' is no priority"):
            await _reply_with(client, "x", call_context(priority="urgent"))


# One server, whatever its card lists


def with_topics(config, *topics):
    interfaces = [card_for(config, topic)["supportedInterfaces"][0] for topic in topics]
    return card_for(config, topics[0], supportedInterfaces=interfaces)


async def test_topics_of_one_server_share_its_places(config, topic, make_topic):
    other = (await make_topic("NORMAL")).topic
    worker = Worker()
    worker.gate.clear()
    limited = with_limits(config, concurrency=2)
    async with (
        server_for(worker, limited, topic, card=with_topics(config, topic, other)) as server,
        Keeper(config, card_cache=None) as rocketmq,
    ):
        clients = [await rocketmq.client(card_for(config, name)) for name in (topic, other)]
        calls = [asyncio.create_task(reply(client, f"work {number}")) for client in clients for number in range(3)]
        # Each topic brings as many as there are places: more have arrived than may begin.
        await until(lambda: [len(bridge._running) for bridge in server.bridges] == [2, 2])
        await until(lambda: worker.at_once["all"] >= 2)
        worker.gate.set()
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(*calls)
    assert worker.most["all"] == 2
    assert len(worker.done) == 6


async def test_topics_of_one_server_share_its_rate(config, topic, make_topic, monkeypatch):
    other = (await make_topic("NORMAL")).topic
    seen = []

    class Noting(RateLimit):
        def charge(self, arrived):
            seen.append((self, arrived))
            super().charge(arrived)

    monkeypatch.setattr(server, "RateLimit", Noting)
    limited = with_limits(config, requests_per_second=100.0)
    async with (
        server_for(Worker(), limited, topic, card=with_topics(config, topic, other)),
        Keeper(config, card_cache=None) as rocketmq,
    ):
        for name in (topic, other):
            assert await reply(await rocketmq.client(card_for(config, name)), "hello") == "hello"
    assert sum(arrived for _, arrived in seen) == 2
    assert len({id(rate) for rate, _ in seen}) == 1


# Nobody in the way of others


async def test_messages_that_wait_for_their_turn_in_a_conversation_hold_up_no_other(config, topic):
    gate = Gate()

    def make(session_id):
        async def script(messages):
            if session_id == "slow":
                gate.arrived.set()
                await gate.open.wait()
            yield user_texts(messages)[-1]

        return scripted(script)

    async with (
        server_for(make, with_limits(config, concurrency=2), topic),
        Keeper(config, card_cache=None) as rocketmq,
    ):
        slow = await rocketmq.client(card_for(config, topic), session="slow")
        waiting = [asyncio.create_task(reply(slow, "0"))]
        await gate.arrived.wait()
        waiting += [asyncio.create_task(reply(slow, str(number))) for number in (1, 2)]
        for name in range(4):
            other = await rocketmq.client(card_for(config, topic), session=f"other-{name}")
            assert await reply(other, "hello") == "hello"
        assert not any(call.done() for call in waiting)
        gate.open.set()
        async with asyncio.timeout(LIMIT):
            assert sorted(await asyncio.gather(*waiting)) == ["0", "1", "2"]


async def test_a_caller_that_sends_much_leaves_room_for_others(config, topic):
    worker = Worker()
    worker.gate.clear()
    limited = with_limits(config, concurrency=4, caller_share=0.5)
    async with server_for(worker, limited, topic), Keeper(config, card_cache=None) as rocketmq:
        greedy = await rocketmq.client(card_for(config, topic), headers={"authorization": "Bearer greedy"})
        # More than there are places: those that have to wait for the first two hold none.
        calls = [asyncio.create_task(reply(greedy, f"greedy {number}")) for number in range(5)]
        await until(lambda: worker.at_once["greedy"] == 2)
        modest = await rocketmq.client(card_for(config, topic), headers={"authorization": "Bearer modest"})
        calls.append(asyncio.create_task(reply(modest, "modest")))
        await until(lambda: worker.at_once["modest"] == 1)
        worker.gate.set()
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(*calls)
    assert worker.most["greedy"] == 2


async def _reply_with(client, text, context):
    texts = []
    async for event in client.send_message(request(text), context=context):
        if event.HasField("artifact_update"):
            texts += [part.text for part in event.artifact_update.artifact.parts]
    return "".join(texts)


async def test_questions_about_tasks_need_no_place(config, topic, tmp_path):
    """Also those of callers that don't know of the instance, and send them to the topic."""
    numbers = Numbers(Ledger(tmp_path / "ledger"))
    elsewhere = config.model_copy(update={"state_topic": "NotOfTheCaller"})
    async with (
        server_for(numbers, with_limits(config, concurrency=2), topic) as server,
        Keeper(config, card_cache=None) as rocketmq,
        Keeper(elsewhere, card_cache=None) as stranger,
        await rocketmq.client(card_for(config, topic)) as client,
        await stranger.client(card_for(config, topic)) as subscriber,
        Follower(client, "endless") as follower,
        asyncio.timeout(LIMIT),
    ):
        await follower.more(2)
        taken = server.bridges[0].counters.taken
        subscription = subscriber.subscribe(SubscribeToTaskRequest(id=follower.tasks[0]))
        await anext(subscription)
        assert server.bridges[0].counters.taken == taken + 1
        async with Follower(client, "quick 2") as quick:
            assert await quick.whole() == [0, 1]
        numbers.enough["endless"].set()
        assert [event async for event in subscription]


async def test_an_instance_refuses_questions_beyond_what_it_serves_at_once_and_holds_up_no_work(
    config, topic, tmp_path, connection, producer, monkeypatch
):
    monkeypatch.setattr(questions, "MOST", 3)
    numbers = Numbers(Ledger(tmp_path / "ledger"))
    async with (
        server_for(numbers, config, topic) as served,
        Keeper(config, card_cache=None) as rocketmq,
        await rocketmq.client(card_for(config, topic)) as client,
        offering_to(served._instance, config, connection, producer) as other,
        Follower(client, "endless") as follower,
        asyncio.timeout(LIMIT),
    ):
        await follower.more(2)
        [task] = set(follower.tasks)
        subscriptions = [client.subscribe(SubscribeToTaskRequest(id=task)) for _ in range(3)]
        for subscription in subscriptions:
            await anext(subscription)
        with pytest.raises(InternalError, match=r"serves 3 subscriptions.*Ask again"):
            await anext(client.subscribe(SubscribeToTaskRequest(id=task)))
        # Others are counted apart: a cancel must get in.
        assert (await client.get_task(GetTaskRequest(id=task))).id == task
        monkeypatch.setattr(questions, "MOST", 0)
        with pytest.raises(InternalError, match=r"serves 0 requests about its tasks.*Ask again"):
            await client.get_task(GetTaskRequest(id=task))
        monkeypatch.setattr(questions, "MOST", 3)
        await other.offer(asked(config, topic, "offered 1", {"A2A-Version": "1.0"}), "offer")
        assert await other.heard() == "offer taken"
        await other.go("offer")
        assert await other.heard() == "offer done"
        numbers.enough["endless"].set()
        for subscription in subscriptions:
            assert [event async for event in subscription]
        await until(lambda: served.bridges[0]._questions.count == 0)
        assert (await client.get_task(GetTaskRequest(id=task))).status.state == TaskState.TASK_STATE_COMPLETED


async def test_a_server_that_stops_begins_nothing_that_still_waits_for_a_place(config, topic):
    """It would only cut it off again; another worker has it at once."""
    one, other = Gated(), Gated()
    patient = with_limits(config, concurrency=2, caller_share=0.5).model_copy(
        update={"timeouts": Timeouts(drain=LIMIT)}
    )
    server = server_for(one, patient, topic)
    await server.start()
    async with (
        Keeper(config, card_cache=None) as rocketmq,
        await rocketmq.client(card_for(config, topic), session="s") as client,
        asyncio.timeout(LIMIT),
    ):
        first = asyncio.create_task(reply(client, "first"))
        await until(lambda: one.begun == ["first"])
        second = asyncio.create_task(reply(client, "second"))
        await until(lambda: len(server.bridges[0]._running) == 2)
        stopping = asyncio.create_task(server.aclose())
        async with server_for(other, config, topic):
            await until(lambda: other.begun == ["second"])
            assert not stopping.done()
            other.gate.set()
            await second
            one.gate.set()
            await first
            await stopping
    assert (one.begun, other.begun) == (["first"], ["second"])
