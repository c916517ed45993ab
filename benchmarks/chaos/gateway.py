"""Streams through two gateways, of which the one that has them ends again and again: by kill -9, or told to (SIGTERM).

    scripts/chaos gateway [--engine embedded|apache|HOST:PORT] [--sessions 200] [--events 500] [--kills 10]
                          [--interval 0.4] [--seed 1] [--rolling]

Each client asks once and follows its answer; when its gateway ends it goes on at the other one with the id of the last
event it has. An auditor then compares what each client got with the raw LiteTopics and with the agent's own ledger.
Exits non-zero when an event was lost, doubled or out of order, when too few streams were in flight at a kill, or when
it took 3 s from a kill to the next event.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from pydantic import SecretStr

from agentscope_rocketmq.dev.ports import Ports
from benchmarks.chaos import streams
from benchmarks.chaos.clients import Client
from benchmarks.chaos.streams import Process, Report, Size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agentscope_rocketmq import RocketMQConfig

__all__ = ["run"]

_READY_SECONDS = 120.0


async def run(config: RocketMQConfig, topic: str, size: Size, *, rolling: bool = False) -> Report:
    """Run it.

    Args:
        config: The cluster; topics and groups exist.
        topic: The agent's topic.
        size: How much of everything; a session is that of a client, and what ends is a gateway.
        rolling: Whether gateways are told to end, rather than killed.
    """
    config = config.model_copy(update={"a2a_secret": SecretStr(secrets.token_hex(16))})
    report = Report()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        async with streams.agent(config, topic, folder) as ledger:
            async with _gateways(config, topic, folder) as gateways:
                clients = [Client(list(gateways), size.question) for _ in range(size.sessions)]
                chaos = _Chaos(gateways, report, clients)
                await chaos.run(size, rolling=rolling)
            await streams.account(
                config,
                chaos.clients,
                report,
                ledger=ledger,
                events=size.events,
                killed_at=chaos.killed_at,
            )
    return report


@contextlib.asynccontextmanager
async def _gateways(config: RocketMQConfig, topic: str, folder: Path) -> AsyncIterator[dict[str, Process]]:
    """Two gateways, by URL."""
    agent_card = str(streams.written_card(config, topic, folder))
    command_line = "from agentscope_rocketmq.cli import main; main()"
    with contextlib.closing(Ports()) as ports:
        gateways = {}
        for number in range(2):
            port = ports.choose()
            command = ["-c", command_line, "gateway", "--agent", agent_card, "--port", str(port)]
            process = Process(f"gateway-{number}", command, streams.environment(config), folder)
            gateways[f"http://127.0.0.1:{port}"] = process
        try:
            for process in gateways.values():
                await process.start()
            await asyncio.gather(*(_ready(url) for url in gateways))
            yield gateways
        finally:
            await asyncio.gather(*(process.kill() for process in gateways.values()))


async def _ready(url: str) -> None:
    async with asyncio.timeout(_READY_SECONDS), httpx.AsyncClient() as http:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get(f"{url}/readyz")).status_code == 200:
                    return
            await asyncio.sleep(0.1)


class _Chaos:
    """Clients that follow their answers while gateways end."""

    def __init__(self, gateways: dict[str, Process], report: Report, clients: list[Client]) -> None:
        self.clients = clients
        self.killed_at: list[float] = []
        self._gateways = gateways
        self._report = report

    async def run(self, size: Size, *, rolling: bool) -> None:
        """All of it, to the end of the last answer."""
        chance = random.Random(size.seed)  # noqa: S311  (moments)
        timeout = httpx.Timeout(60.0, read=60.0)
        unbounded = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=timeout, limits=unbounded) as http, asyncio.TaskGroup() as group:
            for client in self.clients:
                group.create_task(client.run(http))
            active, other = self._gateways
            for _ in range(size.kills):
                await self._all_at(active)
                await _ready(other)
                await asyncio.sleep(chance.uniform(0.2, 5 * size.interval))
                at_it = sum(client.at == active for client in self.clients)
                self._report.in_flight.append(at_it / len(self.clients))
                self.killed_at.append(time.time())
                process = self._gateways[active]
                await (process.stop() if rolling else process.kill())
                active, other = other, active
                await self._all_at(active)
                # Only now: its start takes a core for a second, which is that of another machine as a rule.
                await process.start()

    async def _all_at(self, url: str) -> None:
        async with asyncio.timeout(_READY_SECONDS):
            while any(client.at != url and not client.over for client in self.clients):  # noqa: ASYNC110  (all of many)
                await asyncio.sleep(0.05)


if __name__ == "__main__":
    sys.exit(
        streams.command_line("chaos gateway", __doc__, run, "rolling: gateways are told to end (SIGTERM), not killed")
    )
