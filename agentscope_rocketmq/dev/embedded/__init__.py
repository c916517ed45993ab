"""The embedded broker: RocketMQ's gRPC protocol with LiteTopics in one Python process, for development and tests.

Rooms, in the order a message passes through them::

    broker       DevBroker: start, stop, topics and groups by program
    run          it as a program
    child        EmbeddedRocketMQ: that program, started, killed and started again
    servicer     the protocol's calls
    remoting     making topics and groups, as mqadmin does
    clients      telemetry streams and settings
    checks       what a proxy refuses about a message
    engine       sending, waking, timers, what gets old
    catalog      topics and groups
    attributes   what can be set on them
    queues       the messages
    store        SQLite, one thread, group commit
    reading      receiving, acking, seeking
    consumption  how far a group has read a queue: leased one by one, or in order
    lite         who reads which LiteTopics
    waiting      long polls that wait
    handles      receipt handles
    refusal      answers other than OK
    settings     limits and habits

docs/embedded-broker.md says what it models and what it does not.
"""

from __future__ import annotations

from agentscope_rocketmq.dev.embedded.broker import DevBroker
from agentscope_rocketmq.dev.embedded.child import EmbeddedRocketMQ

__all__ = ["DevBroker", "EmbeddedRocketMQ"]
