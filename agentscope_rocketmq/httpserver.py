"""HTTP served by this process: an ASGI app on a socket, its addresses, and the signals that end it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from typing import TYPE_CHECKING, Any

import uvicorn

from agentscope_rocketmq.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["EVERY_ADDRESS", "base_url", "listen", "reachable", "serve_http", "shown", "stop_signals"]

logger = logging.getLogger(__name__)

EVERY_ADDRESS = frozenset({"0.0.0.0", "::", ""})  # noqa: S104  (compared, not bound)
"""Hosts that stand for all addresses of a machine."""

_HTTP_START_SECONDS = 10.0
_RESOLVE_SECONDS = 2.0
# Longer than clients keep idle connections: one that the server closes first may break a request on its way.
_KEEP_ALIVE = 75
# Milliseconds for which a client may leave what it was sent unacknowledged before its connection is given up.
_GIVE_UP = 120_000


class _HTTPServer(uvicorn.Server):
    """uvicorn, without its hold on the process's signals: whoever serves has them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serve_http(app: Any, listening: socket.socket, drain: float) -> Any:
    """Serve an ASGI app on a listening socket; at the end, what is under way gets `drain` seconds.

    Gives a function that brings the end about, and waits for it, before the context ends.
    """
    server = _HTTPServer(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="auto",
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=max(1, round(drain)),
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listening]), name="a2a-server.http")

    async def stop() -> None:
        server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)

    try:
        async with asyncio.timeout(_HTTP_START_SECONDS):
            while not server.started:
                if serving.done():
                    await serving
                    raise ConfigurationError("The HTTP server ended while starting: see its log.")
                await asyncio.sleep(0.01)
        yield stop
    finally:
        await stop()


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        ConfigurationError: The address can't be served on.
    """
    try:
        # Without a host it is every address of both families, as it is with "::".
        every = host in {"::", ""} and socket.has_dualstack_ipv6()
        family, _, _, _, address = socket.getaddrinfo("::" if every else host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address[:2], family=family, backlog=2048, dualstack_ipv6=every)
    except OSError as error:
        raise ConfigurationError(
            f"HTTP can't be served on {host}:{port}: {error.strerror or error}. Choose another port (0 lets the "
            "system choose), or stop what uses it."
        ) from error
    listening.setblocking(False)
    # Connections have it from here: asyncio sets it only on sockets made with their protocol's number. Without it, the
    # second half of a small answer waits 40 ms for the acknowledgement of the first.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GIVE_UP)
    return listening


def shown(host: str) -> str:
    """The host at which this machine reaches a server of that address."""
    return "127.0.0.1" if host in EVERY_ADDRESS else host


async def reachable(host: str) -> str:
    """The host at which others may reach a server of that address."""
    if host not in EVERY_ADDRESS:
        return host
    name = socket.gethostname()
    try:
        async with asyncio.timeout(_RESOLVE_SECONDS):
            await asyncio.get_running_loop().getaddrinfo(name, None)
    except (OSError, UnicodeError):
        logger.warning(
            "Serving on every address, but this machine's host name %r can't be resolved: the card names loopback. "
            "Give public_url for callers on other machines.",
            name,
        )
        return shown(host)
    return name


def base_url(host: str, port: int) -> str:
    """The URL of a host and a port."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set; where signals can't be had (a thread, Windows), it is never set."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    taken: list[signal.Signals] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, stopped.set)
            taken.append(number)
    try:
        yield stopped
    finally:
        for taken_one in taken:
            loop.remove_signal_handler(taken_one)
