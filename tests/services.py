"""Servers and callers over RocketMQ, for tests."""

from __future__ import annotations

import contextlib
import uuid
from typing import TYPE_CHECKING, Any

from a2a.server.agent_execution import AgentExecutor
from a2a.types import Message, Part, Role, SendMessageRequest, TaskState

from agentscope_rocketmq import A2AServer, RocketMQ
from agentscope_rocketmq.card import parse_card

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from a2a.client import Client

    from agentscope_rocketmq import RocketMQConfig

COMPLETED = TaskState.TASK_STATE_COMPLETED


class Keeper(RocketMQ):
    """Keeps the clients it hands out until it is closed, so that none is dropped before."""

    async def client(self, *arguments: Any, **options: Any) -> Client:
        client = await super().client(*arguments, **options)
        self.__dict__.setdefault("kept", []).append(client)
        return client


def card_for(config: RocketMQConfig, topic: str, *, name: str = "agent", **fields: Any) -> dict[str, Any]:
    """A card as a user writes it: one RocketMQ interface, nothing that the server can fill in."""
    return {
        "name": name,
        "description": "An agent under test.",
        "version": "1",
        "capabilities": {"streaming": True, "pushNotifications": True},
        "defaultInputModes": ["text/plain"],
        "defaultOutputModes": ["text/plain"],
        "skills": [{"id": "test", "name": "test", "description": "Is tested.", "tags": ["test"]}],
        "supportedInterfaces": [
            {"url": f"http://{config.endpoint}//{topic}", "protocolBinding": "RocketMQ", "protocolVersion": "1.0"}
        ],
    } | fields


def server_for(agent: Any, config: RocketMQConfig, topic: str, **options: Any) -> A2AServer:
    """A server for an executor or for a function that makes AgentScope agents."""
    card = options.pop("card", None) or card_for(config, topic)
    if isinstance(agent, AgentExecutor):
        return A2AServer.from_executor(agent, card=card, config=config, **options)
    return A2AServer(agent, card=card, config=config, **options)


@contextlib.asynccontextmanager
async def calling(
    config: RocketMQConfig, server: A2AServer, *, binding: str = "RocketMQ", version: str = "1.0", **options: Any
) -> AsyncIterator[Client]:
    """A client for a running server, over the interface asked for."""
    card = parse_card(server.card)
    kept = [e for e in card.supported_interfaces if (e.protocol_binding, e.protocol_version) == (binding, version)]
    del card.supported_interfaces[:]
    card.supported_interfaces.extend(kept)
    async with RocketMQ(config, card_cache=None) as rocketmq:
        client = await rocketmq.client(card, allow_jsonrpc=binding == "JSONRPC", **options)
        assert (rocketmq.choice(client).binding, rocketmq.choice(client).version) == (binding, version)
        async with client:
            yield client


def request(text: str, *, context_id: str = "", task_id: str = "", message_id: str | None = None) -> SendMessageRequest:
    """A message to send."""
    return SendMessageRequest(
        message=Message(
            message_id=message_id or uuid.uuid4().hex,
            role=Role.ROLE_USER,
            context_id=context_id,
            task_id=task_id,
            parts=[Part(text=text)],
        )
    )


async def reply(client: Client, text: str, **fields: Any) -> str:
    """Send a message, expect a completed task, return its text, streamed or not."""
    found: list[str] = []
    state = None
    async for event in client.send_message(request(text, **fields)):
        kind = event.WhichOneof("payload")
        if kind == "task":
            state = event.task.status.state
            found += [part.text for artifact in event.task.artifacts for part in artifact.parts]
        elif kind == "artifact_update":
            found += [part.text for part in event.artifact_update.artifact.parts]
        elif kind == "status_update":
            state = event.status_update.status.state
    assert state == COMPLETED
    return "".join(found)
