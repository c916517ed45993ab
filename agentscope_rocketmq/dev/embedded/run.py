"""The embedded broker as a program: until a signal asks for its end.

python -m agentscope_rocketmq.dev.embedded.run '{"port": 8081}'     what `EmbeddedRocketMQ` starts
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.dev.embedded.broker import DevBroker
from agentscope_rocketmq.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["run_embedded"]

_SWITCH_INTERVAL = 0.0005
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_embedded(
    port: int = 8081,
    data: Path | str | None = None,
    *,
    on_ready: Callable[[DevBroker], None] = lambda _: None,
    **options: Any,
) -> None:
    """Run a broker in this thread, which must be the main one, until SIGINT, SIGTERM or SIGHUP; then stop cleanly.

    Args:
        port: See `DevBroker`.
        data: See `DevBroker`.
        on_ready: Called once it listens.
        **options: Further arguments of `DevBroker`.

    Raises:
        ConfigurationError: A port is taken, or the data folder can't be used.
    """
    # The store's thread waits for the interpreter lock at every statement; this process has nothing else to do.
    sys.setswitchinterval(_SWITCH_INTERVAL)
    asyncio.run(_run(DevBroker(port, data, **options), on_ready))


async def _run(broker: DevBroker, on_ready: Callable[[DevBroker], None]) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stopped.set)
    async with broker:
        on_ready(broker)
        await stopped.wait()


if __name__ == "__main__":
    try:
        run_embedded(**json.loads(sys.argv[1]))
    except ConfigurationError as problem:
        sys.exit(f"error: {problem}")
