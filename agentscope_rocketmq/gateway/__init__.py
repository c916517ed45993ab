"""The gateway: plain A2A clients over HTTP and server-sent events in front of agents on RocketMQ.

::

    app             create_gateway; routes, who may ask, start and stop
    agents          the agents' cards, kept fresh, and the cards that are served for them
    questions       JSON-RPC requests as they come
    calls           from a request to an agent's topic, and back from a reply channel
    replays         what happened after a cursor, then what happens
    conversations   the sessions in use
    cursors         the ids of events
    streams         server-sent events to one client
    refusal         errors as HTTP answers
"""

from __future__ import annotations

from agentscope_rocketmq.gateway.app import Gateway, create_gateway

__all__ = ["Gateway", "create_gateway"]
