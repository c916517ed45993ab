"""Requests beside one that kills workers: they come to their end although each death costs them a delivery, too.

That the deadly one ends as a failed task: test_dead_letters.py.
"""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from agentscope_rocketmq.config import Limits, Timeouts
from agentscope_rocketmq.suspects import SUSPECT_FROM, Suspects
from tests.faults import Follower, Ledger, process
from tests.services import Keeper, card_for
from tests.waiting import LIMIT, until


def nothing():
    pass


async def begun(names, attempt, *, deadly):
    """What a worker with these requests at the same time begins, until the deadly one kills it."""
    suspects, order, dead = Suspects(LIMIT), [], asyncio.Event()

    async def work(name):
        async with suspects.turn(name, attempt, on_wait=nothing):
            order.append(name)
            if name == deadly:
                dead.set()
                await asyncio.Event().wait()

    tasks = [asyncio.create_task(work(name)) for name in names]
    async with asyncio.timeout(LIMIT):
        await dead.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return order


@pytest.mark.parametrize("count", [2, 3, 5, 8])
async def test_up_to_eight_suspects_of_one_worker_end_whichever_of_them_kills(count):
    names = [f"r{number}" for number in range(count)]

    async def lives(deadly):
        left = list(names)
        for attempt in range(SUSPECT_FROM, Limits().attempts):
            done = await begun(left, attempt, deadly=deadly)
            left = [name for name in left if name == deadly or name not in done]
        return left

    for deadly, left in zip(names, await asyncio.gather(*map(lives, names)), strict=True):
        assert left == [deadly]


async def test_one_suspect_is_begun_at_a_time_and_what_is_none_does_not_wait():
    suspects, waited, ending = Suspects(LIMIT), [], {name: asyncio.Event() for name in "abc"}
    attempt = SUSPECT_FROM + 6  # its turn is as long as can be
    order: list[str] = []

    async def work(name, attempt=attempt):
        async with suspects.turn(name, attempt, on_wait=lambda: waited.append(name)):
            order.append(name)
            if name in ending:
                await ending[name].wait()

    tasks = {name: asyncio.create_task(work(name)) for name in "abc"}
    await until(lambda: order)
    await work("other", SUSPECT_FROM - 1)
    assert order == ["c", "other"]  # 8 % 3: the row begins with the third
    tasks["a"].cancel()  # in the row
    ending["c"].set()
    await until(lambda: order[2:])
    assert order[2:] == ["b"]
    late = asyncio.create_task(work("a"))
    await until(lambda: waited.count("a") == 2)
    assert order[2:] == ["b"]
    tasks["b"].cancel()  # at work
    ending["a"].set()
    await late
    assert order == ["c", "other", "b", "a"]
    assert sorted(waited) == ["a", "a", "b", "c"]


@pytest.mark.parametrize(("longest", "attempt"), [(LIMIT, SUSPECT_FROM), (0.1, SUSPECT_FROM + 6)])
async def test_a_suspect_that_works_for_long_does_not_hold_up_the_others(longest, attempt):
    """The first time it is one, that is short however long it may be later."""
    suspects, order = Suspects(longest), []

    async def work(name):
        async with suspects.turn(name, attempt, on_wait=nothing):
            order.append(name)
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(work(name)) for name in "abc"]
    await until(lambda: len(order) == 3)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_requests_beside_one_that_kills_its_worker_come_to_their_end(config, make_topic, tmp_path):
    topic = (await make_topic("NORMAL")).topic
    config = config.model_copy(update={"timeouts": Timeouts(lease=10)})
    ledger = Ledger(tmp_path / "ledger")
    async with Keeper(config, card_cache=None) as rocketmq, contextlib.AsyncExitStack() as stack:
        clients = [await rocketmq.client(card_for(config, topic), session=f"s{number}") for number in range(4)]
        deadly = clients.pop()
        await stack.enter_async_context(Follower(deadly, "poison 3 dies"))
        # Longer than the deadly one lets a worker live that has both.
        innocent = [
            await stack.enter_async_context(Follower(client, f"innocent{number} 20"))
            for number, client in enumerate(clients)
        ]
        deaths = asyncio.create_task(keep_working(config, topic, ledger))
        try:
            for follower in innocent:
                await follower.whole(limit=2 * LIMIT)
                assert follower.artifact == list(range(20))
        finally:
            deaths.cancel()
            await asyncio.gather(deaths, return_exceptions=True)
        # They were at work beside it, and died with it.
        assert any(ledger.count("begin", f"innocent{number}") > 1 for number in range(3))


async def keep_working(config, topic, ledger):
    """One worker, started again whenever it dies."""
    while True:
        with process("work", config, topic, str(ledger.path)) as worker:
            while worker.poll() is None:
                await asyncio.sleep(0.1)
