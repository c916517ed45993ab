"""The auditor: reads what is on the broker and what the agent says it said, and shares nothing with the clients."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from typing import TYPE_CHECKING

from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer, Position

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from agentscope_rocketmq import RocketMQConfig
    from agentscope_rocketmq.rocketmq.message import ReceivedMessage

__all__ = ["ledger", "stored"]

_QUIET_SECONDS = 20.0
_AT_ONCE = 200


def ledger(path: Path) -> dict[str, list[int]]:
    """What the agent said, by session, in the order in which it said it."""
    said: dict[str, list[int]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        session, number = line.split()
        said[session].append(int(number))
    return said


async def stored(
    config: RocketMQConfig, lite_topics: Sequence[str], *, expected: int
) -> Mapping[str, list[tuple[int, float]]]:
    """The numbers that lie in raw LiteTopics, each with the time at which the broker stored it.

    Args:
        config: The cluster.
        lite_topics: The LiteTopics.
        expected: Numbers in each; reading ends with them, or when nothing more comes.
    """
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in lite_topics}
    seen: set[tuple[str, int]] = set()
    async with (
        Connection.from_config(config) as connection,
        LiteConsumer(connection, config.reply_topic, f"{config.reply_group}_OBSERVER") as consumer,
    ):
        for first in range(0, len(lite_topics), _AT_ONCE):
            await consumer.subscribe(list(lite_topics[first : first + _AT_ONCE]), at=Position.offset(0))
        batches = aiter(consumer.batches())
        while any(len(numbers) < expected for numbers in found.values()):
            try:
                async with asyncio.timeout(_QUIET_SECONDS):
                    item = await anext(batches)
            except TimeoutError:
                break
            assert isinstance(item, LiteBatch)
            for message in item.messages:
                found[message.lite_topic or ""] += _numbers(message, seen)
            await consumer.ack(item.messages)
    return found


def _numbers(message: ReceivedMessage, seen: set[tuple[str, int]]) -> list[tuple[int, float]]:
    fields = json.loads(message.body())
    key = fields.get("requestId", ""), fields.get("seq", -1)
    if "session" in fields or key in seen:
        return []
    seen.add(key)
    numbers = []
    for line in (fields.get("responseBody") or "").splitlines():
        if line.startswith("data:"):
            update = json.loads(line[5:]).get("result", {}).get("artifactUpdate", {})
            numbers += [int(part["text"]) for part in update.get("artifact", {}).get("parts", ())]
    return [(number, message.store_time.timestamp()) for number in numbers]
