"""The supervisor as a service, for those who talk to it through a gateway: an agent like the two that it asks."""

import asyncio
import os
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

from agentscope.agent import Agent

from agentscope_rocketmq import A2AServer, RocketMQ
from examples.travel_assistant.agents import make_supervisor, stream_answer
from examples.travel_assistant.cards import SUPERVISOR_CARD, TRAVEL_CARD, WEATHER_CARD


def make(rocketmq: RocketMQ, session: str) -> Agent:
    """Make the supervisor of a session.

    It asks in a session of its own: the user's is read by the gateway that the user talks to.
    """

    async def ask(card: Path, text: str) -> AsyncIterator[str]:
        async with await rocketmq.agent(card, session=f"supervisor-{session}") as agent:
            async for delta in stream_answer(agent, text):
                yield delta

    return make_supervisor(session, ask_weather=partial(ask, WEATHER_CARD), ask_travel=partial(ask, TRAVEL_CARD))


async def main() -> None:
    async with RocketMQ() as rocketmq:
        server = A2AServer(partial(make, rocketmq), card=SUPERVISOR_CARD)
        await server.serve(host="127.0.0.1", port=int(os.environ.get("SUPERVISOR_PORT", "10003")))


if __name__ == "__main__":
    asyncio.run(main())
