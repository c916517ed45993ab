"""Child processes that never outlive the program that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Process", "Starter", "tied"]

KILL_TIMEOUT = 10.0
"""Seconds until the kernel must have buried a killed process."""

# Runs between us and the program: asks the kernel (PR_SET_PDEATHSIG is 1) to kill what it becomes when its parent
# dies, be it by kill -9, and gives up when the parent was gone before it asked.
_TRAMPOLINE = """\
import ctypes, os, signal, sys
parent, program = int(sys.argv[1]), sys.argv[2:]
if ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0) != 0 or os.getppid() != parent:
    os._exit(1)
os.execv(program[0], program)
"""


def tied(command: Sequence[str]) -> list[str]:
    """That command, as one that the kernel kills when the thread that starts it ends, be its program killed.

    On Linux; elsewhere it is returned as it is.

    Args:
        command: Absolute path of the program, and its arguments.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _TRAMPOLINE, str(os.getpid()), *command]


class Starter:
    """Starts processes that the kernel kills when this one ends.

    The kernel looks at the *thread* that started a process, so all of them are started by one thread that lives as
    long as this object. This holds on Linux; elsewhere a program that is itself killed by `kill -9` leaves them behind.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="process-starter")

    def start(self, command: Sequence[str], *, folder: Path) -> subprocess.Popen[bytes]:
        """Start a program, its output going to `output.log` in its folder.

        Args:
            command: Absolute path of the program, and its arguments.
            folder: Its working directory.
        """
        return self._thread.submit(_spawn, tied(command), folder).result()

    def close(self) -> None:
        """End the thread, and with it (on Linux) every process that still runs. Repeated calls are safe."""
        self._thread.shutdown()


def _spawn(command: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "output.log").open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A Ctrl-C in the terminal goes to the whole group: whoever started the process decides when it stops.
            start_new_session=True,
        )


class Process:
    """One program that can be started, stopped, killed, paused and started again.

    Args:
        name: What to call it in messages.
        command: Absolute path of the program, and its arguments.
        folder: Its working directory, which also takes its output; made if need be.
        starter: What starts it.
    """

    def __init__(self, name: str, command: Sequence[str], *, folder: Path, starter: Starter) -> None:
        self.name = name
        self.folder = folder
        self._command = command
        self._starter = starter
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended (a paused one has not)."""
        return self._child is not None and self._child.poll() is None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs, else None."""
        return self._child.pid if self._child is not None and self.running else None

    def start(self) -> None:
        """Start it unless it runs already."""
        if not self.running:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._child = self._starter.start(self._command, folder=self.folder)

    def stop(self, *, timeout: float) -> None:
        """Ask it to end (SIGTERM), wait, and kill it when it does not. Nothing happens when it is not running.

        Args:
            timeout: Seconds that it may take to end by itself.
        """
        if self._child is None or not self.running:
            return
        self._child.terminate()
        # A paused process would not hear of it.
        self._child.send_signal(signal.SIGCONT)
        try:
            self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once (SIGKILL). Nothing happens when it is not running."""
        if self._child is not None:
            self._child.kill()
            self._child.wait(KILL_TIMEOUT)

    def pause(self) -> None:
        """Freeze it (SIGSTOP): its connections stay open and nobody answers on them."""
        if self._child is not None:
            self._child.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen one go on (SIGCONT)."""
        if self._child is not None:
            self._child.send_signal(signal.SIGCONT)

    def output_tail(self, lines: int = 15) -> str:
        """The last lines of its output."""
        path = self.folder / "output.log"
        if not path.exists():
            return ""
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
