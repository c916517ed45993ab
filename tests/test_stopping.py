"""A server that stops: what it cuts off has ended here before anybody else begins it."""

from __future__ import annotations

import asyncio
import contextlib

import httpx
from a2a.server.agent_execution import AgentExecutor
from a2a.types import Task, TaskState, TaskStatus

from tests.gateways import message
from tests.offers import asked, offering_to
from tests.services import Keeper, card_for, reply, server_for
from tests.waiting import LIMIT, until


class Endless(AgentExecutor):
    """Works until it is cancelled, and takes a second more to end; all of one story know who did what, and when."""

    def __init__(self, name, story):
        self._name = name
        self._story = story

    async def execute(self, context, event_queue):
        text = context.get_user_input()
        status = TaskStatus(state=TaskState.TASK_STATE_SUBMITTED)
        await event_queue.enqueue_event(Task(id=context.task_id, context_id=context.context_id, status=status))
        self._story.append(f"{self._name} begins {text}")
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(1)
            self._story.append(f"{self._name} ends {text}")

    async def cancel(self, context, event_queue):
        raise NotImplementedError


@contextlib.asynccontextmanager
async def ended(calls):
    """Cancels what was called for."""
    try:
        yield
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


def draining(config, seconds):
    return config.model_copy(update={"timeouts": config.timeouts.model_copy(update={"drain": seconds})})


async def test_what_a_stop_cuts_off_has_ended_before_another_worker_begins_it(config, topic, make_topic):
    """Of each topic of the server, and while a caller over HTTP reads something else."""
    other = (await make_topic("NORMAL")).topic
    card = card_for(config, topic)
    card["supportedInterfaces"] += card_for(config, other)["supportedInterfaces"]
    story: list[str] = []
    stops = server_for(Endless("first", story), draining(config, 4.0), topic, card=card)
    goes_on = server_for(Endless("second", story), draining(config, 0.1), topic, card=card)
    calls: list[asyncio.Task] = []
    async with (
        Keeper(config, card_cache=None) as rocketmq,
        httpx.AsyncClient(timeout=LIMIT, headers={"A2A-Version": "1.0"}) as http,
        ended(calls),
    ):
        await stops.start()
        calls.append(asyncio.create_task(http.post(stops.url, json=message("http"))))
        for name, text in ((topic, "one"), (other, "two")):
            client = await rocketmq.client(card_for(config, name))
            calls.append(asyncio.create_task(reply(client, text)))
        await until(lambda: len(story) == 3)
        async with goes_on:
            stopping = asyncio.create_task(stops.aclose())
            await until(lambda: {"second begins one", "second begins two"} <= {*story})
            for text in ("one", "two"):
                assert f"first ends {text}" in story
                assert story.index(f"first ends {text}") < story.index(f"second begins {text}")
            await stopping


async def test_an_instance_that_stops_says_that_an_offer_is_not_done_when_it_has_ended(
    config, topic, connection, producer
):
    story: list[str] = []
    server = server_for(Endless("it", story), draining(config, 0.1), topic)
    await server.start()
    async with offering_to(server._instance, config, connection, producer) as other:
        await other.offer(asked(config, topic, "work", {"A2A-Version": "1.0"}), "offer")
        assert await other.heard() == "offer taken"
        await other.go("offer")
        await until(lambda: story == ["it begins work"])
        stopping = asyncio.create_task(server.aclose())
        # While it is at work that is said again and again.
        while (report := await other.heard()) == "offer taken":
            pass
        assert report == "offer failed"
        assert story == ["it begins work", "it ends work"]
        await stopping
