"""Bounded waits, shared by the tests."""

from __future__ import annotations

import asyncio
import socket

LIMIT = 60.0  # seconds; far beyond what anything here takes, so that only a real hang meets it


async def take(items, count, *, limit=LIMIT):
    """The next so many of an async iterator, which stays usable."""
    taken: list = []
    async with asyncio.timeout(limit):
        while len(taken) < count:
            taken.append(await anext(items))
    return taken


async def until(condition, *, limit=LIMIT):
    """Until a condition that nothing announces holds (a counter, a process that ends)."""
    async with asyncio.timeout(limit):
        while not condition():
            await asyncio.sleep(0.02)


def closed_port():
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def root_cause(error):
    """The error that began it: ours, beneath httpx's, beneath the a2a-sdk's."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
