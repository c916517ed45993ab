"""A chat model that needs no key and no network: a policy decides what a language model would, by rules.

For AgentScope it is a model like any other: it reads the conversation and the results of its tool calls, answers with
tool calls or text, and streams both in small pieces.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentscope.credential import CredentialBase
from agentscope.formatter import OpenAIChatFormatter
from agentscope.message import Msg, TextBlock, ToolCallBlock, ToolResultBlock, ToolResultState
from agentscope.model import ChatModelBase, ChatResponse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence

    from agentscope.tool import ToolChoice

__all__ = ["CallTool", "OfflineModel", "Policy", "Say", "ToolResult", "Turn"]

_STRUCTURED_OUTPUT = "generate_structured_output"
_SUMMARY_START = "<system-info>"
_REMEMBERED = 8
_REMEMBERED_LENGTH = 200
_PIECE = re.compile(r"\s*(?:[\u4e00-\u9fff]{1,4}|\S+?(?=[\s\u4e00-\u9fff]|$))|\s+")


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool called in this turn gave back.

    Attributes:
        tool: Name of the tool.
        text: Its text.
        failed: Whether it ended in an error.
    """

    tool: str
    text: str
    failed: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """What a policy sees.

    Attributes:
        questions: Everything the user said, oldest first; the last is the one to answer.
        results: The tools called since then, in order.
    """

    questions: tuple[str, ...]
    results: tuple[ToolResult, ...]

    def result(self, tool: str) -> ToolResult | None:
        """The result of a tool in this turn, or None where it was not called yet."""
        return next((result for result in self.results if result.tool == tool), None)


@dataclass(frozen=True, slots=True)
class Say:
    """Answer with a text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallTool:
    """Call a tool before answering."""

    tool: str
    arguments: Mapping[str, str]


Policy = Callable[[Turn], Say | CallTool]
"""Decides what comes next."""


class OfflineModel(ChatModelBase):
    """A model that follows a policy.

    Attributes:
        policy: What to do next, given the conversation so far.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__(credential=CredentialBase(), model="offline", parameters=self.Parameters(), stream=True)
        self.formatter = OpenAIChatFormatter()
        self.policy = policy

    async def _call_api(
        self,
        model_name: str,  # noqa: ARG002
        messages: list[Msg],
        tools: list[dict[str, Any]] | None = None,
        tool_choice: ToolChoice | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> AsyncGenerator[ChatResponse, None]:
        turn = _turn(messages)
        if tool_choice is not None and tool_choice.mode == _STRUCTURED_OUTPUT:
            return _stream(_summary(turn, tools or []))
        return _stream(self.policy(turn))


def _turn(messages: Sequence[Msg]) -> Turn:
    questions: list[str] = []
    results: list[ToolResult] = []
    for message in messages:
        if message.role == "user":
            questions.extend(_said(message.get_text_content() or ""))
            results.clear()
        results.extend(map(_result, message.get_content_blocks("tool_result")))
    return Turn(tuple(questions), tuple(results))


def _result(block: ToolResultBlock) -> ToolResult:
    output = block.output
    if not isinstance(output, str):
        output = "".join(part.text for part in output if isinstance(part, TextBlock))
    return ToolResult(block.name, output, failed=block.state != ToolResultState.SUCCESS)


def _summary(turn: Turn, tools: Sequence[Mapping[str, Any]]) -> CallTool:
    """Answer AgentScope's request to summarise a long conversation: the latest questions, a line each, in the first field.

    The last "question" is that request itself.
    """
    first, *others = tools[0]["function"]["parameters"]["properties"]
    latest = turn.questions[:-1][-_REMEMBERED:]
    text = "\n".join(" ".join(question.split())[:_REMEMBERED_LENGTH] for question in latest)
    return CallTool(_STRUCTURED_OUTPUT, {first: text} | dict.fromkeys(others, "-"))


def _said(text: str) -> list[str]:
    """What the user said in a message; a summary stands for the questions in it."""
    if not text.startswith(_SUMMARY_START):
        return [text]
    return [line for line in text.splitlines() if line and not line.startswith(("<", "#", "-"))]


async def _stream(step: Say | CallTool) -> AsyncGenerator[ChatResponse, None]:
    block_id = uuid.uuid4().hex
    for piece in _pieces(step):
        block = (
            TextBlock(id=block_id, text=piece)
            if isinstance(step, Say)
            else ToolCallBlock(id=block_id, name=step.tool, input=piece)
        )
        yield ChatResponse(content=[block], is_last=False)


def _pieces(step: Say | CallTool) -> Iterator[str]:
    text = step.text if isinstance(step, Say) else json.dumps(step.arguments, ensure_ascii=False)
    return (match[0] for match in _PIECE.finditer(text))
