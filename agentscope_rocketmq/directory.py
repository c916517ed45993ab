"""The built-in blob store: a directory that callers and servers share, on one machine or by a network file system."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from agentscope_rocketmq.blobs import BlobStore
from agentscope_rocketmq.threads import Threads

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable

__all__ = ["DirectoryBlobStore"]

logger = logging.getLogger(__name__)

_KEY = re.compile(r"p-[0-9a-f]{32}")
# What is being written, and what a process that died left of that.
_UNFINISHED = re.compile(r"\.p-[0-9a-f]{32}\.[0-9a-f]{16}")
_CHUNK = 1024 * 1024
_BETWEEN_EXPIRIES = 3600.0
# A directory that hangs takes so many threads, and no others.
_THREADS = 8
# A writer that was cancelled waits so long for its file to be gone, which it is later otherwise.
_CLEAN_UP = 1.0


class DirectoryBlobStore(BlobStore):
    """Keeps each body as a file of a directory.

    A file is written under another name, synced, and renamed: it is there whole or not at all. Only the user whose
    process wrote it can read it (mode 0600, in a directory of mode 0700), so callers and servers run as one user, or
    the directory is mounted such. Files older than `keep` are deleted by whoever puts something there: at a process's
    first time, and every hour from then on.

    Its files are read and written in a few threads of its own: where the file system hangs, what is to be read or
    written there waits, and nothing else of the process.

    Args:
        path: The directory; made when something is first put there.
        name: See `BlobStore`.
        keep: Seconds for which a body is kept. Answers of a session can be replayed for so long, so it should be no
            less than what `provision --retention` says. Default: three days, as there.

    Attributes:
        path: The same.
        keep: The same.
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str, keep: float = 3 * 24 * 3600.0) -> None:
        super().__init__(name)
        self.path = Path(path)
        self.keep = keep
        self._expires_at = 0.0
        self._threads = Threads(_THREADS, name=f"blobs[{name}]")

    async def put(self, key: str, chunks: AsyncIterable[bytes]) -> None:
        """Keep a body.

        Raises:
            ValueError: The key is none.
            OSError: It can't be written.
        """
        final = self._file(key)
        unfinished = self.path / f".{key}.{secrets.token_hex(8)}"
        file = await self._threads.run(self._create, unfinished)
        try:
            async for chunk in chunks:
                await self._threads.run(file.write, chunk)
            await self._threads.run(_finish, file)
            await self._threads.run(self._publish, unfinished, final)
        except BaseException:
            dropping, _ = self._threads.submit(lambda: _drop(file, unfinished))
            await asyncio.wait({asyncio.wrap_future(dropping)}, timeout=_CLEAN_UP)
            raise
        if time.monotonic() >= self._expires_at:
            self._expires_at = time.monotonic() + _BETWEEN_EXPIRIES
            try:
                await self.expire()
            except OSError as error:
                logger.warning("Old bodies in %s are not deleted: %s", self.path, error)

    async def get(self, key: str) -> AsyncGenerator[bytes]:
        """Read a body.

        Raises:
            KeyError: Nothing is there.
            ValueError: The key is none.
            OSError: It can't be read.
        """
        try:
            file = await self._threads.run(_open, self._file(key))
        except FileNotFoundError:
            raise KeyError(key) from None
        try:
            while chunk := await self._threads.run(file.read, _CHUNK):
                yield chunk
        finally:
            # Where a read hangs, so does this.
            self._threads.submit(file.close)

    async def delete(self, key: str) -> None:
        """Let go of a body; nothing happens when it is not there.

        Raises:
            ValueError: The key is none.
            OSError: It can't be deleted.
        """
        await self._threads.run(self._file(key).unlink, missing_ok=True)

    async def expire(self, older_than: float | None = None) -> int:
        """Delete old bodies, and what processes that died left half written; other files are let be.

        Args:
            older_than: Seconds since a file was written; None takes `keep`.

        Returns:
            How many were deleted.

        Raises:
            OSError: The directory can't be read or written.
        """
        return await self._threads.run(self._expire, self.keep if older_than is None else older_than)

    def _expire(self, older_than: float) -> int:
        before = time.time() - older_than
        count = 0
        with contextlib.suppress(FileNotFoundError), os.scandir(self.path) as entries:
            for entry in entries:
                if not (_KEY.fullmatch(entry.name) or _UNFINISHED.fullmatch(entry.name)):
                    continue
                with contextlib.suppress(FileNotFoundError):  # somebody else cleans up as well
                    if entry.stat(follow_symlinks=False).st_mtime < before:
                        Path(entry.path).unlink()
                        count += 1
        return count

    def _file(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key of a body: 'p-' and 32 hexadecimal digits.")
        return self.path / key

    def _create(self, path: Path) -> BinaryIO:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb")

    def _publish(self, unfinished: Path, final: Path) -> None:
        unfinished.replace(final)
        directory = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(directory)  # or the name is lost with the machine
        finally:
            os.close(directory)


def _open(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")


def _finish(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _drop(file: BinaryIO, path: Path) -> None:
    # What can't be deleted is old some day.
    with contextlib.suppress(OSError):
        file.close()
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
