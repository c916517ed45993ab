"""Claim checks: bodies that lie in a blob store, put there for a message and fetched for one."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
from typing import TYPE_CHECKING

from agentscope_rocketmq.envelope import Claim, ClaimedBody, ResponseEnvelope
from agentscope_rocketmq.errors import BlobStoreError, EnvelopeError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agentscope_rocketmq.blobs import BlobStore
    from agentscope_rocketmq.spool import Spool, Spools

__all__ = ["Claims", "new_key", "put_body", "store_failed"]

logger = logging.getLogger(__name__)

_CHUNK = 1024 * 1024
# A store has the send timeout for each so many bytes, as parts have.
_TIMED = 4 * 1024 * 1024
_CLAIM = b'{"part":{"store":'
_DELETE_SECONDS = 10.0


def new_key() -> str:
    """A key that nobody can guess."""
    return f"p-{secrets.token_hex(16)}"


def store_failed(store: BlobStore, what: str, error: BaseException, *, limit: str) -> BlobStoreError:
    """The error for a store that failed.

    Args:
        store: The store.
        what: What it was to do.
        error: How it failed.
        limit: How long it could take, with the setting that says so.
    """
    why = f"it took longer than {limit}" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
    return BlobStoreError(f"Blob store {store.name!r} could not {what}: {why}. See that it can be reached, try again.")


async def put_body(store: BlobStore, request_id: str, body: bytes, *, timeout: float) -> ClaimedBody:  # noqa: ASYNC109
    """Put the body of a request into the store.

    Args:
        store: The store.
        request_id: Id of the request.
        body: Its body.
        timeout: Seconds that each 4 MiB may take.

    Raises:
        BlobStoreError: It could not be put there.
    """

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), _CHUNK):
            yield body[start : start + _CHUNK]

    key = new_key()
    limit = f"{timeout:g} s for each 4 MiB (Timeouts.send)"
    sha256 = await asyncio.to_thread(lambda: hashlib.sha256(body).hexdigest())
    try:
        async with asyncio.timeout(timeout * (1 + len(body) // _TIMED)):
            await store.put(key, chunks())
    except Exception as error:
        raise store_failed(store, f"keep the body of request {request_id}", error, limit=limit) from error
    return ClaimedBody(claim=Claim(store=store.name, key=key), size=len(body), sha256=sha256)


class Claims:
    """Fetches bodies from a process's blob store.

    Args:
        store: The store; None where there is none.
        spools: Where they are put.
        patience: Seconds to wait for the next piece of one.
    """

    def __init__(self, store: BlobStore | None, *, spools: Spools, patience: float) -> None:
        self._store = store
        self._spools = spools
        self._patience = patience

    async def fetch(self, claim: Claim, spool: Spool, *, size: int, sha256: str) -> None:
        """Fetch a body.

        Args:
            claim: Where it is.
            spool: Where to put it.
            size: Bytes that it must have.
            sha256: SHA-256 that it must have.

        Raises:
            EnvelopeError: It is not there, or not what was put there, or larger than may be taken here, or in a store
                that this process does not have. The message begins with "it".
            BlobStoreError: The store failed.
        """
        store = self._store
        if store is None or store.name != claim.store:
            raise EnvelopeError(
                f"it is in blob store {claim.store!r}, and this process has {store or 'none'}. Give it that store as "
                "RocketMQConfig.blobs"
            )
        if size > self._spools.most:
            raise EnvelopeError(f"it has {size} bytes, and {self._spools.most} are taken here")
        try:
            await self._copy(store, claim.key, spool, size)
        except EnvelopeError:
            raise
        except KeyError:
            raise EnvelopeError(
                f"it is not in blob store {store.name!r} any more: it was deleted, or older than that keeps"
            ) from None
        except OverflowError as error:
            raise EnvelopeError(str(error)) from None
        except Exception as error:
            limit = f"{self._patience:g} s for a piece (Timeouts.parts)"
            raise store_failed(store, f"read {claim.key}", error, limit=limit) from error
        if (spool.size, spool.sha256) != (size, sha256):
            raise EnvelopeError(f"what blob store {store.name!r} has is not it: size or SHA-256 differ")

    async def _copy(self, store: BlobStore, key: str, spool: Spool, size: int) -> None:
        async with contextlib.aclosing(store.get(key)) as chunks:
            while True:
                async with asyncio.timeout(self._patience):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                if spool.size + len(chunk) > size:
                    raise EnvelopeError(f"what blob store {store.name!r} has is not it: it is larger")
                await asyncio.to_thread(spool.write, chunk)

    @staticmethod
    def is_claim(body: bytes) -> bool:
        """Whether a message of a response refers to a blob store."""
        return body.startswith(_CLAIM)

    @contextlib.asynccontextmanager
    async def held(self, body: bytes) -> AsyncIterator[None]:
        """Have at hand, while the context lasts, what a message of a response refers to; or why it can't be had."""
        part = None
        if self.is_claim(body):
            with contextlib.suppress(EnvelopeError):  # whoever reads it finds the same
                part = ResponseEnvelope.decode(body).part
        if part is None or part.claim is None:
            yield
            return
        with self._spools.open() as spool:
            try:
                await self.fetch(part.claim, spool, size=part.size or 0, sha256=part.sha256 or "")
                self._spools.claimed[part.claim.key] = spool
            except (EnvelopeError, BlobStoreError) as error:
                logger.warning("The body that a message refers to can't be had: %s", error)
                self._spools.claimed[part.claim.key] = str(error)
            try:
                yield
            finally:
                self._spools.claimed.pop(part.claim.key, None)

    async def delete(self, claim: Claim) -> None:
        """Let go of a body that nobody needs any more; what can't be deleted now expires."""
        if self._store is None or self._store.name != claim.store:
            return
        try:
            async with asyncio.timeout(_DELETE_SECONDS):
                await self._store.delete(claim.key)
        except Exception as error:  # noqa: BLE001  (whatever a store raises)
            failure = store_failed(self._store, f"delete {claim.key}", error, limit=f"{_DELETE_SECONDS:g} s")
            logger.warning("%s", failure)
