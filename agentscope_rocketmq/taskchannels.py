"""The LiteTopics of the tasks that live in this instance: whoever runs or keeps a task reads its channel.

A task's id is the name of a LiteTopic on the state topic. What concerns the task (get, cancel, subscribe, a message
that answers its question) is sent there by whoever knows the id, and nothing else need be known. The state group is
exclusive, so a worker that runs a task anew takes its channel over.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING

from agentscope_rocketmq.errors import BrokerError

if TYPE_CHECKING:
    from agentscope_rocketmq.rocketmq.lite import LiteConsumer

__all__ = ["TaskChannels"]

logger = logging.getLogger(__name__)

# Channels read at a time; the one begun longest ago is let go first, and its task is asked for at any worker.
_MOST = 4096
# Begun tasks are subscribed together: a call costs the same for one as for many.
_GATHER = 0.02
_AGAIN = 1.0
# Two workers that hold a lease on a copy of one request each would take its channel from each other for ever.
_MOST_RETAKES = 3


class TaskChannels:
    """Subscribes the channels of one instance's tasks.

    Args:
        consumer: Reads the LiteTopics of this instance; not closed by this object.
        most: Channels to read at a time.
    """

    def __init__(self, consumer: LiteConsumer, *, most: int = _MOST) -> None:
        self._consumer = consumer
        self._most = most
        # Each with how often it was taken from us and taken back.
        self._kept: OrderedDict[str, int] = OrderedDict()
        self._to_join: set[str] = set()
        self._to_leave: set[str] = set()
        self._changed = asyncio.Event()

    def keep(self, task: str) -> None:
        """This instance runs the task, or goes on with it: read its channel from soon on."""
        if task in self._kept:
            return
        self._kept[task] = 0
        self._to_join.add(task)
        self._to_leave.discard(task)
        while len(self._kept) > self._most:
            self._leave(self._kept.popitem(last=False)[0])
        self._changed.set()

    def keeps(self, task: str) -> bool:
        """Whether the task lives here."""
        return task in self._kept

    def lost(self, task: str, *, ours: bool) -> None:
        """Another instance has the channel now.

        Args:
            task: Whose channel.
            ours: Whether this instance still holds the lease on the task's request: then the other one is late, woken
                from a long sleep for example, and the channel is taken back.
        """
        retakes = self._kept.pop(task, _MOST_RETAKES)
        if ours and retakes < _MOST_RETAKES:
            self._kept[task] = retakes + 1
            self._to_join.add(task)
            self._changed.set()
        else:
            self._to_join.discard(task)

    async def run(self) -> None:
        """Subscribe and unsubscribe, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await asyncio.sleep(_GATHER)
            joining, self._to_join = self._to_join, set()
            leaving, self._to_leave = self._to_leave, set()
            try:
                if joining:
                    await self._consumer.subscribe(joining)
                if leaving:
                    await self._consumer.unsubscribe(leaving)
            except BrokerError as error:
                logger.warning("Tasks begun here are not found by their ids yet: %s", error)
                self._to_join |= joining & self._kept.keys()
                await asyncio.sleep(_AGAIN)
                self._changed.set()

    def _leave(self, task: str) -> None:
        if task in self._to_join:
            self._to_join.discard(task)
        else:
            self._to_leave.add(task)
            self._changed.set()
