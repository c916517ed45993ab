"""A program for the a2a-sdk 0.3: reads the card at a base URL, asks that agent, and prints the text of its answer.

PYTHONPATH=where-a2a-sdk-0.3-is python tests/old_sdk_caller.py URL TEXT
"""

from __future__ import annotations

import asyncio
import sys
from importlib.metadata import version
from typing import Any

import httpx
from a2a.client import A2ACardResolver, ClientConfig, ClientFactory


async def main(url: str, text: str) -> str:
    """Ask, in the ways of that version."""
    import a2a.types

    old: Any = a2a.types
    async with httpx.AsyncClient(timeout=30) as http:
        card = await A2ACardResolver(http, url).get_agent_card()
        client: Any = ClientFactory(ClientConfig(httpx_client=http)).create(card)
        part = old.Part(root=old.TextPart(text=text))
        message = old.Message(message_id="m", role=old.Role.user, parts=[part])
        answer = ""
        async for task, event in client.send_message(message):
            if getattr(event, "kind", "") == "artifact-update":
                answer += "".join(part.root.text for part in event.artifact.parts)
            elif event is None:
                answer += "".join(part.root.text for artifact in task.artifacts or [] for part in artifact.parts)
        return answer


if __name__ == "__main__":
    assert version("a2a-sdk").startswith("0.3."), version("a2a-sdk")
    print(asyncio.run(main(*sys.argv[1:])))
