"""Changes of different LiteTopics go on side by side; those of one, and a refresh of all, do not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from agentscope_rocketmq.rocketmq.changes import Changes
from tests.waiting import LIMIT

if TYPE_CHECKING:
    import contextlib


class Going:
    """A change that goes on until it is let go of."""

    def __init__(self, change: contextlib.AbstractAsyncContextManager[None]) -> None:
        self.begun = False
        self._end = asyncio.Event()
        self.task = asyncio.create_task(self._go(change))

    async def _go(self, change):
        async with change:
            self.begun = True
            await self._end.wait()

    async def end(self) -> None:
        self._end.set()
        async with asyncio.timeout(LIMIT):
            await self.task


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_different_lite_topics_do_not_wait_for_each_other_and_one_does_for_itself():
    changes = Changes()
    one, other, same = (Going(changes.of(names)) for names in (["a", "b"], ["c"], ["b", "d"]))
    await settle()
    assert (one.begun, other.begun, same.begun) == (True, True, False)
    await one.end()
    await settle()
    assert same.begun
    await other.end()
    await same.end()


async def test_a_refresh_waits_for_what_goes_on_and_what_comes_later_waits_for_it():
    changes = Changes()
    before = Going(changes.of(["a"]))
    await settle()
    refresh = Going(changes.of_all())
    await settle()
    after = Going(changes.of(["b"]))
    again = Going(changes.of_all())
    await settle()
    assert (refresh.begun, after.begun, again.begun) == (False, False, False)
    await before.end()
    await settle()
    assert (refresh.begun, after.begun, again.begun) == (True, False, False)
    await refresh.end()
    await settle()
    assert (after.begun, again.begun) == (False, True)
    await again.end()
    await settle()
    assert after.begun
    await after.end()


async def test_a_change_that_is_cancelled_lets_the_next_one_begin():
    changes = Changes()
    going, waiting = Going(changes.of(["a"])), Going(changes.of_all())
    await settle()
    waiting.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting.task
    last = Going(changes.of(["b"]))
    await settle()
    assert last.begun
    going.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await going.task
    same = Going(changes.of(["a"]))
    await settle()
    assert same.begun
    await last.end()
    await same.end()


async def test_a_stampede_has_a_bounded_number_of_calls_in_flight_and_all_get_through():
    changes, now, most = Changes(), 0, 0

    async def change(number: int) -> None:
        nonlocal now, most
        async with changes.of([str(number)]):
            now += 1
            most = max(most, now)
            await settle()
            now -= 1

    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*(change(number) for number in range(500)))
    assert most == 16
