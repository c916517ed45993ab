"""Folders that one process uses at a time, and of which nothing is left, however that one ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from agentscope_rocketmq.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["file_lock", "temporary_folder"]

_LOCK = ".lock"


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A new folder among the system's temporary ones; it is removed at the end.

    A process that is killed (`kill -9`) can't remove its own: the next one that asks for the same prefix does.

    Args:
        prefix: How its name begins.
    """
    _remove_leftovers(prefix)
    # Under a name that nobody looks for until its lock is held.
    folder = Path(tempfile.mkdtemp(prefix=f".{prefix}"))
    try:
        with file_lock(folder / _LOCK, timeout=0):
            folder = folder.rename(folder.with_name(folder.name.removeprefix(".")))
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(prefix: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        # The temporary folder is everybody's: what is not ours is not looked into, and links are not followed.
        with contextlib.suppress(OSError, ConfigurationError):
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or not (folder / _LOCK).is_file():
                continue
            with file_lock(folder / _LOCK, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def file_lock(path: Path, *, timeout: float) -> Iterator[None]:
    """Hold a lock file; the operating system lets go of it when the process ends, however it ends.

    Args:
        path: The file, made if need be; it stays.
        timeout: Seconds to wait for another process that holds it; 0 does not wait.

    Raises:
        ConfigurationError: Another process still holds it.
    """
    deadline = time.monotonic() + timeout
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ConfigurationError(f"{path.parent} is in use by another process.") from None
                time.sleep(0.1)
        yield
