"""The official clients as processes behind pipes: `python_client.py`, and the Maven project in `java`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any, Self

from tests.maven import built, java
from tests.waiting import LIMIT

HERE = Path(__file__).parent


def command_of(language: str, home: Path) -> list[str]:
    """What starts a client that logs into a home folder of its own."""
    if language == "python":
        return [sys.executable, str(HERE / "python_client.py")]
    target = built(HERE / "java", "process-classes")
    return [*java(home), "-cp", os.pathsep.join((f"{target}/classes", f"{target}/lib/*")), "clients.OfficialClient"]


class OfficialError(Exception):
    """What the client raised."""


class OfficialClient:
    """One process with official clients in it, which does what it is told.

    Args:
        language: `python` or `java`.
        endpoint: Of the RocketMQ to use.
        home: An empty folder; the clients write their logs there.

    Attributes:
        delivered: What its listeners were called with.
    """

    def __init__(self, language: str, endpoint: str, home: Path) -> None:
        self.delivered: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._language = language
        self._endpoint = endpoint
        self._home = home
        self._process: Any = None
        self._reading: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        command = await asyncio.to_thread(command_of, self._language, self._home)
        self._process = await asyncio.create_subprocess_exec(
            *command,
            self._endpoint,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "HOME": str(self._home), "LC_ALL": "C.UTF-8"},
        )
        self._reading = asyncio.create_task(self._read(), name="official-client.read")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._reading is not None
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        await self._reading

    async def _read(self) -> None:
        while line := await self._process.stdout.readline():
            said = json.loads(line)
            if "event" in said:
                self.delivered.put_nowait(said["event"])
            else:
                self._answers.put_nowait(said)
        self._answers.put_nowait({"error": "its process ended"})

    async def ask(self, do: str, **arguments: Any) -> Any:
        """Have it do something; see `python_client.Commands`.

        Raises:
            OfficialError: The client raised something.
        """
        self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        async with asyncio.timeout(LIMIT):
            answer = await self._answers.get()
        if "error" in answer:
            raise OfficialError(answer["error"])
        return answer["answer"]

    async def take(self, count: int) -> list[dict[str, Any]]:
        """The next so many deliveries to its listeners."""
        async with asyncio.timeout(LIMIT):
            return [await self.delivered.get() for _ in range(count)]

    async def close(self) -> None:
        """Close all clients in it, and its process."""
        await self.ask("close")
        self._process.stdin.close()
        async with asyncio.timeout(LIMIT):
            await self._process.wait()
