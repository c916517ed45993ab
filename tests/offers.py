"""An instance that offers requests to another one, spoken in the bare protocol."""

from __future__ import annotations

import asyncio
import json
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.envelope import BATCH_HEADER, RequestEnvelope
from agentscope_rocketmq.rocketmq.lite import LiteBatch, LiteConsumer, Position
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.routes import (
    OFFER_ATTEMPT_HEADER,
    OFFER_HEADER,
    OFFER_WAITED_HEADER,
    OFFERED_BY_HEADER,
)
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agentscope_rocketmq.config import RocketMQConfig
    from agentscope_rocketmq.rocketmq.connection import Connection
    from agentscope_rocketmq.rocketmq.producer import Producer


@dataclass
class Offerer:
    """Offers to one instance."""

    me: str
    to: str
    topic: str
    consumer: LiteConsumer
    producer: Producer

    def __post_init__(self) -> None:
        self._batches = self.consumer.batches()

    async def offer(self, envelope: RequestEnvelope, name: str, *, waited: float = 0.0) -> None:
        offer = {
            OFFER_HEADER: name,
            OFFERED_BY_HEADER: self.me,
            OFFER_ATTEMPT_HEADER: "0",
            OFFER_WAITED_HEADER: f"{waited:.3f}",
        }
        await self._say(replace(envelope, headers={**envelope.headers, **offer}).encode())

    async def go(self, name: str) -> None:
        await self._say(json.dumps({"offer": name, "state": "go"}).encode())

    async def heard(self) -> str:
        """The next report: of which offer, and what."""
        async with asyncio.timeout(LIMIT):
            batch = await anext(self._batches)
        assert isinstance(batch, LiteBatch)
        [message] = batch.messages
        await self.consumer.ack(batch.messages)
        report = json.loads(message.body())
        return f"{report['offer']} {report['state']}"

    async def _say(self, body: bytes) -> None:
        await self.producer.send(Message(topic=self.topic, lite_topic=self.to, body=body))


@asynccontextmanager
async def offering_to(
    instance: str, config: RocketMQConfig, connection: Connection, producer: Producer
) -> AsyncIterator[Offerer]:
    me = f"i-{uuid.uuid4().hex}"
    async with LiteConsumer(connection, config.state_topic, config.state_group) as consumer:
        await consumer.subscribe([me], at=Position.last())
        yield Offerer(me, instance, config.state_topic, consumer, producer)


def asked(config: RocketMQConfig, topic: str, text: str, headers: dict[str, str], **fields: Any) -> RequestEnvelope:
    """A request as a caller sends it."""
    message = {"messageId": uuid.uuid4().hex, "role": "ROLE_USER", "parts": [{"text": text}], **fields}
    return RequestEnvelope(
        request_id=uuid.uuid4().hex,
        body=json.dumps({"jsonrpc": "2.0", "id": 1, "method": "SendMessage", "params": {"message": message}}),
        headers={BATCH_HEADER: "1", **headers},
        dest_topic=topic,
        reply_topic=config.reply_topic,
        lite_topic="caller",
    )
