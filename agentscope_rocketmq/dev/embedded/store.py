"""The SQLite file behind the broker: one thread, one connection, all that waits in one transaction (group commit).

What is put while a transaction is being written goes into the next one, so the more there is to do the less each
costs. All state of this class belongs to the event loop; only the methods at the end run in the thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from agentscope_rocketmq.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["Store", "StoreFailed"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_VERSION = 2
# Table -> how many of its columns are its key, and its columns.
_TABLES: dict[str, tuple[int, str]] = {
    "message": (1, "id INTEGER, store_ms INTEGER NOT NULL, data BLOB NOT NULL"),
    "meta": (1, "name TEXT, value BLOB NOT NULL"),
    "topic": (1, "name TEXT, queues INTEGER NOT NULL, readable INTEGER NOT NULL, attributes TEXT NOT NULL"),
    "consumer_group": (
        1,
        "id INTEGER, name TEXT NOT NULL, known INTEGER NOT NULL, attributes TEXT NOT NULL, ordered INTEGER, "
        "max_attempts INTEGER NOT NULL",
    ),
    "queue": (
        1,
        "id INTEGER, topic TEXT NOT NULL, number INTEGER NOT NULL, lite_topic TEXT, first INTEGER NOT NULL, "
        "oldest_ms INTEGER NOT NULL",
    ),
    "position": (2, "grp INTEGER, queue INTEGER, next INTEGER NOT NULL"),
    "lease": (
        3,
        "grp INTEGER, queue INTEGER, offset INTEGER, "
        "attempt INTEGER NOT NULL, serial INTEGER NOT NULL, visible_ms INTEGER NOT NULL",
    ),
}
# Rows a statement, at most; SQLite takes 32,766 parameters.
_ROWS = 256
_PAGE_CACHE_KIB = 8 * 1024
# How long a transaction waits for company: where nobody waits for it, and where many do. One that is alone does not.
_LINGER = 0.02
_GATHER = 0.005


class StoreFailed(Exception):  # noqa: N818
    """Writing failed (disk full, file gone): the broker must be restarted."""


@dataclass(slots=True)
class _Batch:
    """What one transaction will hold."""

    puts: dict[str, dict[tuple[Any, ...], tuple[Any, ...] | None]] = field(default_factory=dict)
    purges: list[tuple[int, int]] = field(default_factory=list)
    after: list[Callable[[], None]] = field(default_factory=list)
    done: asyncio.Future[None] | None = None

    def __bool__(self) -> bool:
        return bool(self.puts or self.purges)


class Store:
    """Tables of small rows and the messages.

    Args:
        folder: Where to keep it all; None keeps it in a temporary file that is gone at the end.
        fsync: Whether a commit waits for the disk.

    Attributes:
        durable: Whether what is committed is kept.
        unwritten_bytes: Size of the messages that are not committed yet.
    """

    def __init__(self, folder: Path | None, *, fsync: bool) -> None:
        self.durable = folder is not None
        self.unwritten_bytes = 0
        self._folder = folder
        self._fsync = fsync
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rocketmq-store")
        self._batch = _Batch()
        self._in_flight: _Batch | None = None
        self._unwritten: dict[int, bytes] = {}
        self._writing: asyncio.Task[None] | None = None
        self._failure: StoreFailed | None = None
        self._connection: sqlite3.Connection

    async def open(self) -> None:
        """Open the file, making it where there is none.

        Raises:
            ConfigurationError: Another broker has the folder open, or it can't be used.
        """
        try:
            await self._in_thread(self._open)
        except BaseException:
            self._thread.shutdown()
            raise

    async def aclose(self) -> None:
        """Write what is left, and close."""
        while self._writing is not None:
            await self._writing
        await self._in_thread(self._connection.close)
        self._thread.shutdown()

    def put(self, table: str, key: tuple[Any, ...], row: tuple[Any, ...] | None) -> None:
        """Insert or replace a row, or delete it (None), in the next transaction."""
        self._check()
        self._batch.puts.setdefault(table, {})[key] = row
        self._schedule()

    def append(self, key: int, store_ms: int, data: bytes) -> None:
        """Add a message in the next transaction; it can be read at once."""
        self.put("message", (key,), (store_ms, data))
        self._unwritten[key] = data
        self.unwritten_bytes += len(data)

    def purge(self, first: int, end: int) -> None:
        """Delete the messages from `first` to before `end` in the next transaction."""
        self._check()
        self._batch.purges.append((first, end))
        self._schedule()

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Call this when everything put so far is committed; in order. At once where nothing is durable anyway."""
        if self.durable:
            self._batch.after.append(callback)
        else:
            callback()

    async def committed(self) -> None:
        """Until everything put so far is committed; at once where nothing is durable anyway.

        Raises:
            StoreFailed: It can't be written.
        """
        if self.durable:
            await self.written()
        else:
            self._check()

    async def written(self) -> None:
        """Until everything put so far is in the file.

        Raises:
            StoreFailed: It can't be written.
        """
        self._check()
        batch = self._batch or self._in_flight
        if batch is None:
            return
        if batch.done is None:
            batch.done = asyncio.get_running_loop().create_future()
        await asyncio.shield(batch.done)

    def unwritten(self, key: int) -> bytes | None:
        """A message that is not committed yet."""
        return self._unwritten.get(key)

    async def read(self, first: int, end: int, *, most: int, most_bytes: int) -> list[tuple[int, bytes]]:
        """The committed messages from `first` to before `end`: at most so many, and none after so many bytes."""
        return await self._in_thread(lambda: self._read(first, end, most, most_bytes))

    async def find(self, first: int, end: int, at_ms: int) -> int:
        """The first committed message from `first` to before `end` stored at that time or later; `end` if none is."""
        return await self._in_thread(lambda: self._find(first, end, at_ms))

    async def rows(self, sql: str) -> list[Any]:
        """The rows of a query."""
        return await self._in_thread(lambda: self._connection.execute(sql).fetchall())

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _schedule(self) -> None:
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all(), name="rocketmq-store.write")

    async def _write_all(self) -> None:
        crowded = False
        try:
            while self._batch:
                if not self.durable or crowded:
                    await asyncio.sleep(_GATHER if self.durable else _LINGER)
                batch = self._in_flight = self._batch
                self._batch = _Batch()
                try:
                    await self._in_thread(lambda written=batch: self._write(written))  # type: ignore[misc]
                except Exception as error:  # noqa: BLE001  (whatever it is, what was to be written is lost: stop)
                    self._fail(error, batch)
                    return
                crowded = len(batch.puts.get("message", ())) > 1
                for key, row in batch.puts.get("message", {}).items():
                    if self._unwritten.pop(key[0], None) is not None and row is not None:
                        self.unwritten_bytes -= len(row[1])
                for callback in batch.after:
                    callback()
                if batch.done is not None:
                    batch.done.set_result(None)
        finally:
            self._writing = self._in_flight = None

    def _fail(self, error: Exception, batch: _Batch) -> None:
        self._failure = StoreFailed(f"the broker can't write its store ({error}): make room and restart it")
        # A full disk is explained by its words.
        trace = None if isinstance(error, sqlite3.Error) else error
        logger.error("The embedded broker stops taking messages: %s", self._failure, exc_info=trace)
        for lost in (batch, self._batch):
            if lost.done is not None:
                lost.done.set_exception(self._failure)
                # Whoever waited may be gone.
                lost.done.exception()

    # ---- in the thread ----

    def _open(self) -> None:
        name = ""  # SQLite's own temporary file: in memory until it is large, and gone with the connection.
        try:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                name = str(self._folder / "broker.db")
            self._connection = sqlite3.connect(name, timeout=0, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise ConfigurationError(f"The data folder {self._folder} can't be used ({error}).") from error
        try:
            self._prepare()
        except sqlite3.Error as error:
            self._connection.close()
            raise ConfigurationError(
                f"{name} can't be used ({error}): another broker may have it open; stop that one, or choose another "
                "data folder."
            ) from error
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        execute = self._connection.execute
        if self.durable:
            # One process has the file, and keeps it.
            execute("PRAGMA locking_mode = EXCLUSIVE")
        execute(f"PRAGMA synchronous = {'FULL' if self.durable and self._fsync else 'OFF'}")
        execute(f"PRAGMA journal_mode = {'WAL' if self.durable else 'OFF'}")
        execute(f"PRAGMA cache_size = -{_PAGE_CACHE_KIB}")
        execute("BEGIN IMMEDIATE")
        version = execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise ConfigurationError(
                f"The data in {self._folder} was written by another version of this package (format {version}; this "
                f"one has format {_VERSION}): choose another folder, or delete it."
            )
        if version == 0:
            for table, (_, columns) in _TABLES.items():
                rowid = "" if table == "message" else " WITHOUT ROWID"
                execute(f"CREATE TABLE {table} ({columns}, PRIMARY KEY ({_key_of(table)})){rowid}")
            execute(f"PRAGMA user_version = {_VERSION}")
        execute("COMMIT")

    def _write(self, batch: _Batch) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            for table, rows in batch.puts.items():
                keys, columns = _TABLES[table]
                stored = [(*key, *row) for key, row in rows.items() if row is not None]
                self._many(f"INSERT OR REPLACE INTO {table}", columns.count(",") + 1, stored)
                deleted = [key for key, row in rows.items() if row is None]
                self._many(f"DELETE FROM {table} WHERE ({_key_of(table)}) IN", keys, deleted)  # noqa: S608
            for first, end in batch.purges:
                self._connection.execute("DELETE FROM message WHERE id >= ? AND id < ?", (first, end))
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _many(self, head: str, width: int, rows: Sequence[tuple[Any, ...]]) -> None:
        """Run a statement on rows, as few times as possible.

        Each step of a statement gives the interpreter lock away and waits for the event loop to get it back: many
        rows in one step are far quicker than `executemany`. Rows of nothing fill up to a power of two, so that there
        are few statement texts and SQLite prepares each once.
        """
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            size = 1 << (len(part) - 1).bit_length()
            names = ", ".join(f"column{number}" for number in range(1, width + 1))
            values = ", ".join([f"({', '.join('?' * width)})"] * size)
            tail = f"SELECT {names} FROM (VALUES {values}) WHERE column1 IS NOT NULL"  # noqa: S608
            parameters = itertools.chain(*part, [None] * (width * (size - len(part))))
            self._connection.execute(f"{head} ({tail})" if head.endswith("IN") else f"{head} {tail}", tuple(parameters))

    def _read(self, first: int, end: int, most: int, most_bytes: int) -> list[tuple[int, bytes]]:
        sql = "SELECT id, data FROM message WHERE id >= ? AND id < ? ORDER BY id LIMIT ?"
        rows, size = [], 0
        with contextlib.closing(self._connection.execute(sql, (first, end, most))) as found:
            for key, data in found:
                rows.append((key, data))
                size += len(data)
                if size >= most_bytes:
                    break
        return rows

    def _find(self, first: int, end: int, at_ms: int) -> int:
        # Store times grow with the ids of a queue, and its ids have no holes.
        while first < end:
            middle = (first + end) // 2
            row = self._connection.execute("SELECT store_ms FROM message WHERE id = ?", (middle,)).fetchone()
            if row is not None and row[0] >= at_ms:
                end = middle
            else:
                first = middle + 1
        return first


def _key_of(table: str) -> str:
    keys, columns = _TABLES[table]
    return ", ".join(column.split()[0] for column in columns.split(", ")[:keys])
