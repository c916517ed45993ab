"""TCP ports of 127.0.0.1 that the kernel chooses and nobody else gets."""

from __future__ import annotations

import contextlib
import os
import socket
import sys

from agentscope_rocketmq.errors import ConfigurationError

__all__ = ["Ports"]

_ATTEMPTS = 100


class Ports:
    """Ports held for servers that start, die and start again under the same number.

    On Linux each port stays bound here, with SO_REUSEADDR and without listening: a server that sets SO_REUSEADDR too
    (every Java server does) may listen on it, while the kernel gives it to nobody else. Elsewhere the port is merely
    free at the time it is chosen.
    """

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    def choose(self, *, also_below: int = 0) -> int:
        """A free port.

        Args:
            also_below: Reserve the port this much below it, too; 0 for none.
        """
        for _ in range(_ATTEMPTS):
            port = self._bind(0)
            if not also_below:
                return port
            with contextlib.suppress(OSError):
                self._bind(port - also_below)
                return port
        raise ConfigurationError("No free pair of TCP ports was found on 127.0.0.1.")

    def take(self, port: int) -> int:
        """Reserve this very port.

        Raises:
            ConfigurationError: Somebody has it.
        """
        try:
            # Listening for a moment finds out about a listener on any address of this machine.
            with socket.create_server(("", port)):
                pass
            return self._bind(port)
        except OSError as error:
            raise ConfigurationError(
                f"Port {port} can't be used ({os.strerror(error.errno or 0)}): stop what listens there, or choose "
                "another port."
            ) from error

    def close(self) -> None:
        """Give all of them back."""
        while self._sockets:
            self._sockets.pop().close()

    def _bind(self, port: int) -> int:
        holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", port))
            chosen = int(holder.getsockname()[1])
        except BaseException:
            holder.close()
            raise
        if sys.platform == "linux":
            self._sockets.append(holder)
        else:
            holder.close()
        return chosen
