"""What a blob store is: where large bodies may lie, so that the broker carries only claim checks for them."""

from __future__ import annotations

import abc
import re
from typing import TYPE_CHECKING

from agentscope_rocketmq.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable

__all__ = ["BlobStore"]

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class BlobStore(abc.ABC):
    """Keeps large bodies for callers and servers that share it; derive from it for one of your own.

    Keys are made by this package, 128 random bits each, and used for one body each. It also checks size and SHA-256 of
    what is read. Whatever a method raises, but for the `KeyError` of `get`, counts as a failure of the store.

    Args:
        name: The name by which the sides know that they share it: the same on both, another for another store. 1-64
            letters, digits, '.', '_', '-'.

    Raises:
        ConfigurationError: The name is not of that form.
    """

    def __init__(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"{name!r} is no name of a blob store: use 1-64 letters, digits, '.', '_', '-', the same on both sides."
            )
        self.name = name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @abc.abstractmethod
    async def put(self, key: str, chunks: AsyncIterable[bytes]) -> None:
        """Keep a body; it is there, durably and whole, when this returns, and not before.

        Args:
            key: Its name, `p-` and 32 hexadecimal digits.
            chunks: Its bytes, a MiB at a time or so. An error that comes out of it means that there is no such body.
        """

    @abc.abstractmethod
    def get(self, key: str) -> AsyncGenerator[bytes]:
        """Read a body, a MiB at a time or so; it may be closed before its end.

        Args:
            key: Its name. It comes from a message, and its form is checked.

        Raises:
            KeyError: Nothing is there.
        """

    @abc.abstractmethod
    async def delete(self, key: str) -> None:
        """Let go of a body; nothing happens when it is not there."""
