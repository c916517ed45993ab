"""`EmbeddedRocketMQ`: the embedded broker in a process of its own."""

from __future__ import annotations

import json
import socket
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

from agentscope_rocketmq.dev.folders import temporary_folder
from agentscope_rocketmq.dev.ports import Ports
from agentscope_rocketmq.dev.process import Process, Starter
from agentscope_rocketmq.errors import BrokerUnreachable, ClosedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["EmbeddedRocketMQ"]

START_TIMEOUT = 60.0
"""Seconds until it must listen; under one on an idle machine."""

STOP_TIMEOUT = 15.0
"""Seconds that it may take to end by itself, writing what is left."""

_LOCALHOST = "127.0.0.1"
_RETRY_INTERVAL = 0.02


class EmbeddedRocketMQ:
    """A `DevBroker` in a process of its own, for programs without an event loop, and for faults: it can be killed.

    Use it as a (plain) context manager. Its methods block: call them in a thread where an event loop runs. It keeps
    its ports over restarts. On Linux its process is killed with the program that started it.

    Args:
        port: Port of the gRPC endpoint; 0 lets the kernel choose.
        data: See `DevBroker`.
        **options: Further arguments of `DevBroker`, as far as JSON can carry them.

    Attributes:
        endpoint: `127.0.0.1:PORT` for `ROCKETMQ_ENDPOINT`.
        namesrv: `127.0.0.1:PORT` for `ROCKETMQ_NAMESRV`.
    """

    def __init__(self, port: int = 0, data: Path | None = None, **options: Any) -> None:
        self.endpoint = ""
        self.namesrv = ""
        self._port = port
        self._arguments: Mapping[str, Any] = {"data": None if data is None else str(data.absolute()), **options}
        self._resources: ExitStack | None = None
        self._process: Process | None = None

    def start(self) -> None:
        """Start it and wait until it can be used; after `kill`, on the same ports.

        Raises:
            BrokerUnreachable: It did not come up; the message quotes its output.
            ConfigurationError: The port is in use.
        """
        try:
            if self._process is None:
                self._prepare()
            self._running().start()
            self._wait()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop it in an orderly way and give its ports back. Repeated calls are safe."""
        resources, self._resources = self._resources, None
        process, self._process = self._process, None
        if resources is not None and process is not None:
            with resources:
                process.stop(timeout=STOP_TIMEOUT)

    def kill(self) -> None:
        """End it at once, as `kill -9` does; `start` brings it back."""
        self._running().kill()

    def terminate(self) -> None:
        """End it in an orderly way, as SIGTERM does; `start` brings it back."""
        self._running().stop(timeout=STOP_TIMEOUT)

    def pause(self) -> None:
        """Freeze it: connections stay open, nobody answers."""
        self._running().pause()

    def resume(self) -> None:
        """Let a frozen one go on."""
        self._running().resume()

    @property
    def pid(self) -> int | None:
        """Its process id; None while it does not run."""
        return self._process.pid if self._process is not None else None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _running(self) -> Process:
        if self._process is None:
            raise ClosedError("This broker is not running.")
        return self._process

    def _prepare(self) -> None:
        with ExitStack() as resources:
            folder = resources.enter_context(temporary_folder("rocketmq-embedded-"))
            ports = Ports()
            resources.callback(ports.close)
            port = ports.take(self._port) if self._port else ports.choose()
            namesrv_port = ports.choose()
            starter = Starter()
            resources.callback(starter.close)
            arguments = {**self._arguments, "port": port, "namesrv_port": namesrv_port}
            command = (sys.executable, "-m", "agentscope_rocketmq.dev.embedded.run", json.dumps(arguments))
            self._process = Process("embedded broker", command, folder=folder, starter=starter)
            self.endpoint, self.namesrv = f"{_LOCALHOST}:{port}", f"{_LOCALHOST}:{namesrv_port}"
            self._resources = resources.pop_all()

    def _wait(self) -> None:
        process, deadline = self._running(), time.monotonic() + START_TIMEOUT
        host, _, port = self.namesrv.rpartition(":")
        while True:
            # It opens this port when everything else is there.
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
            except OSError:
                if not process.running or time.monotonic() >= deadline:
                    happened = "does not listen" if process.running else "ended"
                    raise BrokerUnreachable(f"The embedded broker {happened}.\n{process.output_tail()}") from None
                time.sleep(_RETRY_INTERVAL)
            else:
                return
