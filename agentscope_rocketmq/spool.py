"""Bodies that come and go in parts.

Those that come are held in memory while they are small, beyond that in a temporary file without a name: a process that
is killed leaves nothing of them behind. What one client, or one server, holds is bounded as a whole, and what nothing
is added to any more is dropped.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Self

from agentscope_rocketmq.envelope import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from agentscope_rocketmq.config import Limits

__all__ = ["InParts", "Spool", "Spools", "Whole"]

_CHUNK = 1024 * 1024


class Spools:
    """Where a process puts the bodies that it puts together.

    Args:
        most: Bytes that one body may have.
        total: Bytes that all may have at one time.
        in_memory: Bytes of one body that are held in memory; a larger one is in a temporary file.

    Attributes:
        claimed: Bodies fetched from a blob store for the message that is being read, by key; or why one can't be had.
    """

    def __init__(self, *, most: int, total: int, in_memory: int) -> None:
        self.most = most
        self.total = total
        self.in_memory = in_memory
        self.held = 0
        self.claimed: dict[str, Spool | str] = {}
        self._open: weakref.WeakSet[Spool] = weakref.WeakSet()

    @classmethod
    def of(cls, limits: Limits, *, most: int) -> Spools:
        """As the limits say.

        Args:
            limits: `spooled_bytes` and `spool_from_bytes` count here.
            most: Bytes that one body may have.
        """
        return cls(most=most, total=limits.spooled_bytes, in_memory=limits.spool_from_bytes)

    def open(self, *, on_close: Callable[[], None] | None = None) -> Spool:
        """A body to be put together; to be closed.

        Args:
            on_close: Called once when it is.
        """
        spool = Spool(self, on_close=on_close)
        self._open.add(spool)
        return spool

    def expire(self, seconds: float) -> None:
        """Close those to which nothing was added for so long."""
        now = time.monotonic()
        for spool in list(self._open):
            if now - spool.written_at > seconds:
                spool.close()


class Spool:
    """One body; made by `Spools.open`.

    Attributes:
        size: Bytes it has so far.
        written_at: When something was added last, on the clock of `time.monotonic`.
    """

    def __init__(self, spools: Spools, *, on_close: Callable[[], None] | None = None) -> None:
        self.size = 0
        self.written_at = time.monotonic()
        self._spools = spools
        self._on_close = on_close
        self._file = tempfile.SpooledTemporaryFile(max_size=spools.in_memory)  # noqa: SIM115  (closed by close)
        self._sha256 = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """SHA-256 of what it has, in hexadecimal."""
        return self._sha256.hexdigest()

    @property
    def closed(self) -> bool:
        """Whether it was let go of."""
        return self._file.closed

    def write(self, data: bytes) -> None:
        """Add further bytes.

        Raises:
            OverflowError: It would be larger than a body may be, or all together larger than all may be; the message
                says which.
        """
        spools = self._spools
        if self.size + len(data) > spools.most:
            raise OverflowError(f"it has more than the {spools.most} bytes that are taken here")
        if spools.held + len(data) > spools.total:
            raise OverflowError(
                f"with it more than {spools.total} bytes of large bodies would be held here at one time"
            )
        self._file.write(data)
        self._sha256.update(data)
        self.size += len(data)
        spools.held += len(data)
        self.written_at = time.monotonic()

    def chunks(self) -> Iterator[bytes]:
        """All of it, from the start, a MiB at a time."""
        self._file.seek(0)
        while data := self._file.read(_CHUNK):
            yield data

    def read(self) -> bytes:
        """All of it."""
        self._file.seek(0)
        return self._file.read()

    def close(self) -> None:
        """Let go of it. Repeated calls are safe."""
        if not self._file.closed:
            self._file.close()
            self._spools.held -= self.size
            if self._on_close is not None:
                self._on_close()

    def __del__(self) -> None:
        # Readers of a session are dropped without ceremony, with what was coming in for them.
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Whole:
    """Puts a body together from its parts, which come in order.

    Args:
        spools: Where.
        midway: Whether the first ones of a body may have come before; what is left of it is passed over.

    Attributes:
        headless: Whether that was so.
    """

    def __init__(self, spools: Spools, *, midway: bool) -> None:
        self.headless = False
        self._spools = spools
        self._midway = midway
        self._spool: Spool | None = None
        self._due = 0

    def add(self, part: Part) -> str | None:
        """Take the next part; return the body when it is the last one.

        Raises:
            ValueError: They do not belong together; the message says why.
            OverflowError: The body is larger than may be held.
        """
        if part.index == 0:
            self.drop()
            self._midway = False
        elif self._midway:
            self.headless = True  # it began before
            return None
        if part.claim is not None:
            found = self._spools.claimed.get(part.claim.key, "it was not fetched")
            if isinstance(found, str):
                raise ValueError(f"the body of one of its messages can't be had: {found}")
            return found.read().decode("utf-8", "replace")
        if part.index != self._due:
            raise ValueError(f"part {self._due} of its body is missing")
        self._due += 1
        if self._spool is None:
            self._spool = self._spools.open()
        if self._spool.closed:
            raise ValueError("the next part of its body did not come in time")
        self._spool.write(part.data)
        if not part.is_last:
            return None
        if (self._spool.size, self._spool.sha256) != (part.size, part.sha256):
            raise ValueError("its body is not what was sent: size or SHA-256 differ")
        text = self._spool.read().decode("utf-8", "replace")
        self.drop()
        return text

    def drop(self) -> None:
        """Let go of what came so far."""
        if self._spool is not None:
            self._spool.close()
        self._spool, self._due = None, 0


class InParts:
    """Takes a body apart, while it may still come.

    Args:
        chunks: What there is of it.

    Attributes:
        size: Bytes it has so far.
        pending: Bytes of it that were not taken yet.
    """

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.size = 0
        self.pending = 0
        self._chunks: deque[memoryview] = deque()
        self._index = 0
        self._sha256 = hashlib.sha256()
        for chunk in chunks:
            self.add(chunk)

    def add(self, chunk: bytes) -> None:
        """More of it."""
        if chunk:
            self._chunks.append(memoryview(chunk))
            self.size += len(chunk)
            self.pending += len(chunk)

    def take(self, most: int, *, last: bool) -> Part:
        """The next part, of so many bytes at most; with the marks of the last one where it is."""
        pieces = []
        room = most
        while self._chunks and room:
            piece = self._chunks.popleft()
            if len(piece) > room:
                self._chunks.appendleft(piece[room:])
                piece = piece[:room]
            pieces.append(piece)
            room -= len(piece)
        data = b"".join(pieces)
        self.pending -= len(data)
        self._sha256.update(data)
        index, self._index = self._index, self._index + 1
        if not last:
            return Part(index=index, data=data)
        return Part(index=index, data=data, size=self.size, sha256=self._sha256.hexdigest())
