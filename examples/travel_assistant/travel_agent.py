"""The travel agent as a service: it answers over HTTP and over RocketMQ, on the topic that its card names."""

import asyncio
import os

from agentscope_rocketmq import A2AServer
from examples.travel_assistant.agents import make_travel_agent
from examples.travel_assistant.cards import TRAVEL_CARD


async def main() -> None:
    server = A2AServer(make_travel_agent, card=TRAVEL_CARD)
    await server.serve(host="127.0.0.1", port=int(os.environ.get("TRAVEL_PORT", "10002")))


if __name__ == "__main__":
    asyncio.run(main())
