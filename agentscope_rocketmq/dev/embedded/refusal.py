"""Answers other than OK: what a handler raises, and the protocol's `Status` for it."""

from __future__ import annotations

from typing import Any

from agentscope_rocketmq.rocketmq.protocol import definition

__all__ = ["OK", "Code", "Refused", "not_modelled", "status"]

Code: Any = definition.Code


class Refused(Exception):  # noqa: N818  (it is an answer)
    """The broker says no.

    Attributes:
        code: The protocol's `Code`.
        text: What is wrong, for the caller to read.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def not_modelled(what: str) -> Refused:
    """The refusal of what only a real RocketMQ does.

    Args:
        what: It, in the plural: `Delayed messages`.
    """
    return Refused(
        Code.NOT_IMPLEMENTED,
        f"{what} are not modelled by the embedded development broker: use a real Apache RocketMQ "
        "(`agentscope-rocketmq dev --engine apache` starts one)",
    )


def status(code: int, text: str | None = None) -> Any:
    """The protocol's `Status`; without a text the code's name, as a proxy does."""
    return definition.Status(code=code, message=Code.Name(code) if text is None else text)


# The most frequent one. Putting it into a message copies it.
OK: Any = status(Code.OK)
