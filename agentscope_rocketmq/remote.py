"""AgentScope's `A2AAgent` over a carrier whose workers may die: the final message holds each text once.

`A2AAgent` turns what comes into text blocks at once and knows no way to take one back. When a run of the remote agent
was cut and another one began, the blocks of the first stay out of the final message here.
"""

from __future__ import annotations

from contextlib import aclosing
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from a2a.client import ClientCallInterceptor
from agentscope.agent import A2AAgent
from agentscope.event import DataBlockStartEvent, TextBlockStartEvent
from agentscope.message import Msg

from agentscope_rocketmq.rerun import RESTART_EXTENSION

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from a2a.client.interceptors import AfterArgs, BeforeArgs
    from agentscope.event import AgentEvent

__all__ = ["NotesRestarts", "RemoteAgent"]


class _Reply:
    """One reply as it comes in: the blocks of the run under way, and those of runs that were cut."""

    def __init__(self) -> None:
        self.blocks: set[str] = set()
        self.cut: set[str] = set()

    def has(self, block: Any) -> bool:
        """Whether a block is of the last run, and no artifact that the seam emptied."""
        return block.id not in self.cut and getattr(block, "text", None) != ""


_reply: ContextVar[_Reply | None] = ContextVar("reply", default=None)


class NotesRestarts(ClientCallInterceptor):
    """Tells the reply under way that its run was cut and another one begins."""

    async def before(self, args: BeforeArgs) -> None:
        """Nothing to do."""

    async def after(self, args: AfterArgs) -> None:
        """Look for the status event at the seam of two runs."""
        reply = _reply.get()
        update = getattr(args.result, "status_update", None)
        if reply is not None and update is not None and RESTART_EXTENSION in update.metadata:
            reply.cut |= reply.blocks
            reply.blocks.clear()


class RemoteAgent(A2AAgent):
    """An `A2AAgent` whose client has `NotesRestarts` among its interceptors.

    While it streams, the events of a cut run stand before those of the run that took over, since what was shown can't
    be taken back. The final message has the blocks of the last run only.
    """

    async def reply_stream(
        self,
        inputs: Msg | list[Msg] | None = None,
        yield_final_msg: bool = False,  # noqa: FBT001, FBT002  (AgentScope's interface)
    ) -> AsyncGenerator[AgentEvent | Msg, None]:
        """As `A2AAgent.reply_stream`."""
        reply = _Reply()
        async with aclosing(super().reply_stream(inputs, yield_final_msg=True)) as stream:
            while True:
                # Set for each step alone: between two of them the context is the caller's.
                token = _reply.set(reply)
                try:
                    item = await anext(stream, None)
                finally:
                    _reply.reset(token)
                if item is None:
                    return
                if isinstance(item, TextBlockStartEvent | DataBlockStartEvent):
                    reply.blocks.add(item.block_id)
                if isinstance(item, Msg):
                    if not yield_final_msg:
                        continue
                    if reply.cut:
                        item.content = [block for block in item.content if reply.has(block)]
                yield item

    async def reply(self, inputs: Msg | list[Msg] | None = None) -> Msg:
        """As `A2AAgent.reply`."""
        final = None
        async with aclosing(self.reply_stream(inputs, yield_final_msg=True)) as stream:
            async for item in stream:
                if isinstance(item, Msg):
                    final = item
        if final is None:
            raise RuntimeError("The remote agent's reply ended without a message.")
        return final
