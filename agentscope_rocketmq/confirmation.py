"""What a parked agent waits for, and how a caller's message answers it.

An AgentScope agent parks its reply when a tool call needs a human's permission or is to be executed by somebody else.
The A2A task is then input-required; the next message in the task is the answer:

=============  ======================================================================================================
waits for      answers
=============  ======================================================================================================
a permission   a plain yes or no (English or Chinese), or a data part `{"confirmed": true}` for all calls, or
               `{"confirmed": [{"id": "call-1", "confirmed": true}, …]}` for each. Calls left out are asked again.
a result       a data part `{"results": [{"id": "call-1", "output": …, "state": "success", "metadata": {…}}, …]}`;
               `output` is text or any JSON, `state` (`success` or `error`) and `metadata` may be left out.
=============  ======================================================================================================

An answer says yes or no, never what to call: a caller can't change a tool's name, arguments or permission rules.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from agentscope.event import (
    ConfirmResult,
    ExternalExecutionResultEvent,
    RequireExternalExecutionEvent,
    RequireUserConfirmEvent,
    UserConfirmResultEvent,
)
from agentscope.message import ToolCallState, ToolResultBlock, ToolResultState
from jsonschema import ValidationError as SchemaError  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentscope_rocketmq.events import part_data

if TYPE_CHECKING:
    from a2a.types import Message
    from agentscope.agent import Agent
    from agentscope.message import ToolCallBlock

__all__ = ["Answer", "Question", "UnclearAnswer", "pending_question", "question_text", "read_answer"]

Question: TypeAlias = RequireUserConfirmEvent | RequireExternalExecutionEvent
"""What a parked agent waits for."""

Answer: TypeAlias = UserConfirmResultEvent | ExternalExecutionResultEvent
"""What makes it go on."""

_YES = re.compile(
    "yes|yes please|y|yeah|ok|okay|sure|go ahead|confirm|confirmed|approve|approved|allow|allowed|agree|agreed|"
    "是|是的|好|好的|可以|行|确认|同意|允许|批准"
)
_NO = re.compile(
    "no|no thanks|n|nope|cancel|stop|don't|dont|deny|denied|reject|rejected|refuse|refused|disagree|disagreed|"
    "不|不是|不行|不好|不要|不可以|不同意|不允许|否|取消|拒绝"
)


class UnclearAnswer(ValueError):  # noqa: N818  (named after what happened, as in errors.py)
    """A message does not answer the question; its text tells the caller why."""


class _Verdict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    id: str
    confirmed: bool


class _Verdicts(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    confirmed: bool | list[_Verdict]


class _Result(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    id: str
    output: Any
    state: Literal["success", "error"] = "success"
    metadata: dict[str, Any] = Field(default_factory=dict)


class _Results(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    results: list[_Result]


def pending_question(agent: Agent) -> Question | None:
    """Tell what an agent waits for: permissions first, then results; None when it is not parked."""
    calls = agent.state.get_awaiting_tool_calls(agent.name)
    asking = [call for call in calls if call.state == ToolCallState.ASKING]
    if asking:
        return RequireUserConfirmEvent(reply_id=agent.state.reply_id, tool_calls=asking)
    if calls:
        return RequireExternalExecutionEvent(reply_id=agent.state.reply_id, tool_calls=calls)
    return None


def question_text(question: Question) -> str:
    """Put a question into words, with every tool and its complete arguments."""
    calls = "\n".join(f"- {call.name}({call.input})" for call in question.tool_calls)
    if isinstance(question, RequireUserConfirmEvent):
        return f"The agent asks for permission to call:\n{calls}\nAnswer yes or no."
    example = {"results": [{"id": call.id, "output": "…"} for call in question.tool_calls]}
    return (
        f"The agent waits for the result of:\n{calls}\n"
        f"Answer with a data part: {json.dumps(example, ensure_ascii=False)}"
    )


async def read_answer(agent: Agent, question: Question, message: Message) -> Answer:
    """Read a caller's message as the answer to a question.

    Args:
        agent: The agent that asked.
        question: What it asked, from `pending_question`.
        message: What the caller sent.

    Raises:
        UnclearAnswer: The message does not answer the question; the agent stays parked.
    """
    calls = {call.id: call for call in question.tool_calls}
    if isinstance(question, RequireUserConfirmEvent):
        verdicts = _verdicts(message, calls)
        return UserConfirmResultEvent(
            reply_id=question.reply_id,
            confirm_results=[
                ConfirmResult(confirmed=confirmed, tool_call=calls[call_id]) for call_id, confirmed in verdicts.items()
            ],
        )
    results = [
        ToolResultBlock(
            id=result.id,
            name=calls[result.id].name,
            output=_output_text(result.output),
            state=ToolResultState(result.state),
            metadata=result.metadata,
        )
        for result in _results(message, calls)
    ]
    for result in results:
        tool = await agent.toolkit.get_tool(result.name)
        if tool is not None:
            try:
                await tool.check_external_result(result)
            except SchemaError as error:
                raise UnclearAnswer(
                    f"The metadata of result {result.id!r} is not what the tool needs: {error.message}"
                ) from error
    return ExternalExecutionResultEvent(reply_id=question.reply_id, execution_results=results)


def _verdicts(message: Message, calls: dict[str, ToolCallBlock]) -> dict[str, bool]:
    data = _data(message)
    if data is None:
        return dict.fromkeys(calls, _yes_or_no(message))
    confirmed = _parsed(_Verdicts, data).confirmed
    if isinstance(confirmed, bool):
        return dict.fromkeys(calls, confirmed)
    verdicts = {verdict.id: verdict.confirmed for verdict in confirmed}
    _check_ids([verdict.id for verdict in confirmed], calls)
    return verdicts


def _results(message: Message, calls: dict[str, ToolCallBlock]) -> list[_Result]:
    data = _data(message)
    if data is None:
        raise UnclearAnswer("The answer has no data part.")
    results = _parsed(_Results, data).results
    _check_ids([result.id for result in results], calls)
    return results


def _check_ids(ids: list[str], calls: dict[str, ToolCallBlock]) -> None:
    if not ids or len(set(ids)) < len(ids) or not calls.keys() >= set(ids):
        raise UnclearAnswer(f"The answer must name each call once, of: {', '.join(calls)}.")


def _data(message: Message) -> Any:
    """Return the value of the one data part, None when there is none."""
    values = [part_data(part) for part in message.parts if part.HasField("data")]
    if len(values) > 1:
        raise UnclearAnswer("The answer has more than one data part.")
    return values[0] if values else None


_Model = TypeVar("_Model", bound=BaseModel)


def _parsed(model: type[_Model], data: Any) -> _Model:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_context=False, include_url=False)[0]
        where = ".".join(str(step) for step in problem["loc"]) or "the data part"
        raise UnclearAnswer(f"The answer can't be read: {where}: {problem['msg']}") from error


def _yes_or_no(message: Message) -> bool:
    text = " ".join(part.text for part in message.parts if part.HasField("text"))
    # NFKC folds full-width forms; the apostrophe of "don't" is the one punctuation mark inside a word.
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    kept = (char if char == "'" or unicodedata.category(char)[0] in "LNM" else " " for char in folded)
    answer = " ".join("".join(kept).split())
    if _YES.fullmatch(answer):
        return True
    if _NO.fullmatch(answer):
        return False
    raise UnclearAnswer("The answer is neither a clear yes nor a clear no.")


def _output_text(output: Any) -> str:
    return output if isinstance(output, str) else json.dumps(output, ensure_ascii=False, sort_keys=True)
