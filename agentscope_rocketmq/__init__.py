"""AgentScope agents talk A2A (the Agent2Agent protocol) reliably through Apache RocketMQ LiteTopics.

The rooms, in the order data flows::

    errors       every error this package raises on purpose
    config       RocketMQConfig, Timeouts, Limits
    blobs        what a blob store is; directory is the built-in one, claims takes bodies there and from there
    card         agent card <-> RocketMQ address; fetch gets cards over HTTP and keeps them
    client       RocketMQ: agent(), client(), session(), register(); chooses the transport from the card; remote is
                 agent()'s part
    transport    an httpx transport over RocketMQ, beneath the a2a-sdk's own clients; carrier is what they share
    routes       which server instance runs a task
    owners       who a caller is: bearer tokens, and what a gateway asserts about an owner
    session      a conversation by its name: events(), from any place on; survey finds the place
    channels     the LiteTopics of sessions, one reader each (channel), and what is acked of them; reading is where
                 that begins; pending has the calls that wait, listening those who listen
    envelope     what goes into a message, fields are its fields; jsonrpc and sse read what it carries
    exchange     the caller's half: messages -> one response, each event once and in order; rerun joins two runs. No I/O
    replay       messages of a session -> its events, the same each time; cursor is their place, taps tells copies of
                 streams that two requests listen to. No I/O
    reply        the server's half: one response -> messages. No I/O
    bodies       large requests, in parts; spool is where what comes in parts is put together
    deadletters  requests that no worker could serve
    rocketmq     an asyncio client of the RocketMQ 5 protocol
    bridge       RocketMQ -> ASGI: take, lease, run, ack; publisher sends, asgi is what an app is called with
    slots        who may work next in a server that is full; priority names the tiers
    handover     requests that belong to another instance's conversation; taskchannels is how tasks are found
    server       A2AServer: HTTP, RocketMQ and the well-known card; app and ends are the a2a-sdk's side
    executor     AgentScope agent -> a2a executor; events and confirmation are its vocabulary
    gateway      plain A2A clients over HTTP in front of agents on RocketMQ; a package with a map of its own
    provision    topics and groups that a card needs
    dev          a local RocketMQ for development and tests
    cli          the command `agentscope-rocketmq`

Names are loaded on first use: importing AgentScope takes seconds, and a caller or a command line may not need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from agentscope_rocketmq._version import __version__

if TYPE_CHECKING:
    from agentscope_rocketmq.blobs import BlobStore
    from agentscope_rocketmq.card import Address, Choice
    from agentscope_rocketmq.client import RocketMQ, call_context
    from agentscope_rocketmq.config import Limits, RocketMQConfig, Timeouts
    from agentscope_rocketmq.cursor import CURSOR_EXTENSION, Cursor, cursor_of
    from agentscope_rocketmq.directory import DirectoryBlobStore
    from agentscope_rocketmq.errors import AgentScopeRocketMQError
    from agentscope_rocketmq.events import AGENT_EVENTS_EXTENSION, agent_events
    from agentscope_rocketmq.executor import AgentScopeExecutor
    from agentscope_rocketmq.gateway import create_gateway
    from agentscope_rocketmq.replay import SessionEvent
    from agentscope_rocketmq.server import A2AServer
    from agentscope_rocketmq.session import Session

__all__ = [
    "AGENT_EVENTS_EXTENSION",
    "CURSOR_EXTENSION",
    "A2AServer",
    "Address",
    "AgentScopeExecutor",
    "AgentScopeRocketMQError",
    "BlobStore",
    "Choice",
    "Cursor",
    "DirectoryBlobStore",
    "Limits",
    "RocketMQ",
    "RocketMQConfig",
    "Session",
    "SessionEvent",
    "Timeouts",
    "__version__",
    "agent_events",
    "call_context",
    "create_gateway",
    "cursor_of",
]

_HOMES = {
    "AGENT_EVENTS_EXTENSION": "events",
    "CURSOR_EXTENSION": "cursor",
    "A2AServer": "server",
    "Address": "card",
    "AgentScopeExecutor": "executor",
    "AgentScopeRocketMQError": "errors",
    "BlobStore": "blobs",
    "Choice": "card",
    "Cursor": "cursor",
    "DirectoryBlobStore": "directory",
    "cursor_of": "cursor",
    "Limits": "config",
    "RocketMQ": "client",
    "RocketMQConfig": "config",
    "Session": "session",
    "SessionEvent": "replay",
    "Timeouts": "config",
    "agent_events": "events",
    "call_context": "client",
    "create_gateway": "gateway",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
