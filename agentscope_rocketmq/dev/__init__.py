"""Brokers for development and tests, started and stopped from Python.

::

    embedded   RocketMQ's protocol in Python, without Java: in this process, or in one of its own
    apache     a real Apache RocketMQ: name server, broker and proxy as processes of this machine
    maven      gets its jars into a cache folder
    process    child processes that never outlive their parent
    readiness  does a LiteTopic really answer?
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentscope_rocketmq.dev.apache import ApacheRocketMQ
    from agentscope_rocketmq.dev.embedded import DevBroker, EmbeddedRocketMQ

__all__ = ["ApacheRocketMQ", "DevBroker", "EmbeddedRocketMQ"]


def __getattr__(name: str) -> object:
    # Lazily: the command line's help must not load gRPC.
    if name == "ApacheRocketMQ":
        return importlib.import_module("agentscope_rocketmq.dev.apache").ApacheRocketMQ
    if name in ("DevBroker", "EmbeddedRocketMQ"):
        return getattr(importlib.import_module("agentscope_rocketmq.dev.embedded"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
