"""Bodies whose senders are killed half way: nobody waits for them, and what is left of them goes."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from a2a.types import TaskState

from agentscope_rocketmq import RocketMQ, RocketMQConfig
from agentscope_rocketmq.card import parse_card
from agentscope_rocketmq.config import Timeouts
from agentscope_rocketmq.dev import DevBroker
from agentscope_rocketmq.dev.embedded import broker as embedded
from agentscope_rocketmq.provision import apply, plan
from agentscope_rocketmq.rerun import RESTART_EXTENSION
from agentscope_rocketmq.rocketmq.admin import Admin
from tests.faults import Bulk, Ledger, Wire, bulk, process
from tests.services import card_for, reply, request, server_for
from tests.test_session_expiration import apache, expire
from tests.waiting import LIMIT, until

MB = 1024 * 1024
SENT = 20  # MB of a body, in six parts
HALF = 16 * MB  # two to four of its parts, and some of up to three more, which are on their way at one time
GET_LITE_TOPIC_INFO = 200076  # org.apache.rocketmq.remoting.protocol.RequestCode


@pytest.fixture
def bulky(tmp_path):
    return Bulk(Ledger(tmp_path / "ledger"))


async def kept_by_apache(config, lite_topic):
    """How many messages a real broker has in a LiteTopic of the state topic; asking keeps nothing alive."""
    async with Admin(config.namesrv) as admin:
        [broker] = (await admin.brokers()).values()
        fields = {"parentTopic": config.state_topic, "liteTopic": lite_topic}
        answer = await admin._ask(broker, GET_LITE_TOPIC_INFO, fields, "looking")
    offsets = json.loads(answer or b"")["topicOffset"]
    return offsets["maxOffset"] - offsets["minOffset"]


def kept_by_embedded(broker, config, lite_topic):
    """The same of the embedded one."""
    queues = broker._engine.catalog.queues.values()
    return sum(q.end - q.first for q in queues if (q.topic, q.lite_topic) == (config.state_topic, lite_topic))


@pytest.fixture
async def expiring(request, monkeypatch):
    """A RocketMQ of its own that looks for expired LiteTopics all the time, and what tells how full one is."""
    if request.param == "apache":
        async with apache() as (endpoint, namesrv):
            yield RocketMQConfig(endpoint=endpoint, namesrv=namesrv), kept_by_apache
        return
    monkeypatch.setattr(embedded, "_TIDY_INTERVAL", 0.5)
    async with DevBroker(port=0) as broker:

        async def kept(config, lite_topic):
            return kept_by_embedded(broker, config, lite_topic)

        yield RocketMQConfig(endpoint=broker.endpoint, namesrv=broker.namesrv), kept


@pytest.mark.xdist_group("own brokers")
@pytest.mark.parametrize("expiring", ["apache", "embedded"], indirect=True)
async def test_half_a_request_starts_no_worker_and_goes_with_its_lite_topic(expiring, bulky):
    config, kept = expiring
    card = card_for(config, "Agent")
    await apply(plan([parse_card(card)], config), config)
    async with (
        server_for(bulky, config, "Agent") as server,
        RocketMQ(config, card_cache=None) as rocketmq,
        await rocketmq.client(card) as client,
        Wire(config.endpoint) as wire,
    ):
        bridge = server.bridges[0]
        wire.hold_after(HALF)
        through = config.model_copy(update={"endpoint": wire.endpoint})
        with process("call-bulk", through, "Agent", f"half {SENT}") as caller:
            await until(lambda: wire.holds)
            caller.kill()
            caller.wait()
        found = {name.decode() for name in re.findall(rb"p-[0-9a-f]{32}", bytes(wire.sent))}
        [lite_topic] = found
        async with asyncio.timeout(LIMIT):
            while await kept(config, lite_topic) < 2:
                await asyncio.sleep(0.1)
        # Others are served, and of the half nobody knows.
        assert await reply(client, "whole 1") == bulk("whole", 1)
        assert bulky.ledger.count("begin", "half") == 0
        assert (bridge.counters.taken, bridge.counters.refused) == (1, 0)
        assert bridge._bodies._spools.held == bridge._bodies._reserved == 0
        assert lite_topic not in bridge._instance_consumer.lite_topics
        assert await kept(config, lite_topic) <= 4
        await expire(config, config.state_topic)
        async with asyncio.timeout(240):
            while await kept(config, lite_topic) > 0:
                await asyncio.sleep(1)
        assert await reply(client, "later 1") == bulk("later", 1)
        assert bulky.ledger.count("begin", "half") == 0


@pytest.mark.parametrize("streaming", [True, False], ids=["event", "document"])
async def test_half_an_answer_is_dropped_for_the_whole_one_of_the_next_run(
    engine, config, make_topic, bulky, streaming
):
    topic = (await make_topic("NORMAL")).topic
    config = config.model_copy(update={"timeouts": Timeouts(lease=10)})
    card = card_for(config, topic, capabilities={"streaming": streaming})
    async with (
        RocketMQ(config, card_cache=None) as rocketmq,
        await rocketmq.client(card) as client,
        Wire(engine.endpoint) as wire,
    ):
        [(_, carrier)] = rocketmq._carriers.values()
        spools = carrier.replies._exchange.spools
        wire.hold_after(HALF)
        through = config.model_copy(update={"endpoint": wire.endpoint})

        async def follow():
            return [event async for event in client.send_message(request(f"job {SENT}"))]

        following = asyncio.create_task(follow())
        with process("work-bulk", through, topic, str(bulky.ledger.path)) as worker:
            await until(lambda: wire.holds and spools.held > 0)
            worker.kill()
            worker.wait()
        assert not following.done()
        async with server_for(bulky, config, topic) as server:
            async with asyncio.timeout(LIMIT):
                events = await following
            await until(lambda: server.bridges[0].counters.answered == 1)
            assert server.bridges[0]._bodies._spools.held == 0
        assert bulky.ledger.count("begin", "job") == 2
        answers = [event.task.artifacts for event in events if event.HasField("task")]
        answers += [[event.artifact_update.artifact] for event in events if event.HasField("artifact_update")]
        texts = [part.text for artifacts in answers for artifact in artifacts for part in artifact.parts]
        assert texts == [bulk("job", SENT)]
        assert spools.held == 0
        if streaming:
            assert [e for e in events if RESTART_EXTENSION in e.status_update.metadata]
        last = events[-1].task if events[-1].HasField("task") else events[-1].status_update
        assert last.status.state == TaskState.TASK_STATE_COMPLETED
