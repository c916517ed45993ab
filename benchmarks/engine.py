"""The RocketMQ to measure on, with topics and groups of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq import RocketMQConfig
from agentscope_rocketmq.dev import ApacheRocketMQ, EmbeddedRocketMQ
from agentscope_rocketmq.provision import apply, plan

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

EMBEDDED, APACHE = "embedded", "apache"


@contextlib.asynccontextmanager
async def provisioned(
    engine: str, make_card: Callable[[str, str], dict[str, Any]], *, broker_options: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[Any, Any]]:
    """A configuration and a card whose topics and groups exist, on a launched or a given RocketMQ.

    Args:
        engine: `embedded` and `apache` launch one; `HOST:PORT` is the endpoint of one that runs, whose name server is
            `ROCKETMQ_NAMESRV`.
        make_card: Endpoint and topic -> card.
        broker_options: More lines of broker.conf for the `apache` that is launched.
    """
    with contextlib.ExitStack() as stack:
        if engine in (EMBEDDED, APACHE):
            launched: ApacheRocketMQ | EmbeddedRocketMQ
            if engine == EMBEDDED:
                launched = EmbeddedRocketMQ()
            else:
                launched = ApacheRocketMQ(on_progress=print, broker_options=broker_options)
            await asyncio.to_thread(launched.start)
            stack.callback(launched.stop)
            endpoint, namesrv = launched.endpoint, launched.namesrv
        else:
            endpoint, namesrv = engine, os.environ.get("ROCKETMQ_NAMESRV", "127.0.0.1:9876")
        run = uuid.uuid4().hex[:8]
        config = RocketMQConfig(
            endpoint=endpoint,
            namesrv=namesrv,
            reply_topic=f"BenchReply-{run}",
            reply_group=f"BenchReplyGroup-{run}",
            state_topic=f"BenchState-{run}",
            state_group=f"BenchStateGroup-{run}",
        )
        card = make_card(endpoint, f"BenchTask-{run}")
        await apply(plan([card], config), config)
        yield config, card
