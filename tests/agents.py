"""Real AgentScope agents without a network: a scripted chat model behind the real `Agent`.

Each `make_…` function here is what `AgentScopeExecutor` and `A2AServer` take, or returns it.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from typing import Any

from agentscope.agent import Agent, InjectionConfig, ReActConfig
from agentscope.credential import CredentialBase
from agentscope.formatter import OpenAIChatFormatter
from agentscope.message import Base64Source, DataBlock, Msg, TextBlock, ThinkingBlock, ToolCallBlock, URLSource
from agentscope.model import ChatModelBase, ChatResponse, ChatUsage
from agentscope.permission import PermissionBehavior, PermissionDecision
from agentscope.tool import FunctionTool, ToolBase, Toolkit

Chunk = str | TextBlock | ThinkingBlock | DataBlock | ToolCallBlock | ChatUsage
Script = Callable[[list[Msg]], AsyncIterator[Chunk]]
"""From the messages that the model sees to what it streams; a plain string is a text delta."""

ALLOWED = PermissionDecision(behavior=PermissionBehavior.ALLOW, message="always allowed")


class ScriptedModel(ChatModelBase):
    """A chat model that streams what a script says."""

    def __init__(self, script: Script) -> None:
        super().__init__(
            credential=CredentialBase(), model="scripted", parameters=self.Parameters(), stream=True, max_retries=0
        )
        self.formatter = OpenAIChatFormatter()
        self._script = script

    async def _call_api(self, _model: str, messages: list[Msg], **_options: Any) -> AsyncIterator[ChatResponse]:  # type: ignore[override]
        async def stream() -> AsyncIterator[ChatResponse]:
            async for chunk in self._script(messages):
                match chunk:
                    case str():
                        yield ChatResponse(content=[TextBlock(id="text", text=chunk)], is_last=False)
                    case ChatUsage():
                        yield ChatResponse(content=[], is_last=False, usage=chunk)
                    case _:
                        yield ChatResponse(content=[chunk], is_last=False)

        return stream()


def scripted(
    script: Script,
    *tools: ToolBase,
    name: str = "agent",
    system_prompt: str = "You follow a script.",
    **react: Any,
) -> Agent:
    """Make an agent whose model follows a script. `react` are options of AgentScope's `ReActConfig`."""
    return Agent(
        name,
        system_prompt,
        ScriptedModel(script),
        Toolkit(tools=list(tools)),
        react_config=ReActConfig(**react),
        injection_config=InjectionConfig(inject_runtime_state=False),
    )


def allowed(function: Any) -> FunctionTool:
    """Make a tool that needs no permission."""
    return FunctionTool(function, permission=ALLOWED)


def user_texts(messages: list[Msg]) -> list[str]:
    """What the user has said so far, in order."""
    return [message.get_text_content() or "" for message in messages if message.role == "user"]


def tool_results(messages: list[Msg]) -> list[str]:
    """The results of the current reply's tool calls, in order."""
    results = [block for message in messages for block in message.get_content_blocks("tool_result")]
    return [
        block.output
        if isinstance(block.output, str)
        else "".join(part.text for part in block.output if isinstance(part, TextBlock))
        for block in results
    ]


def make_echo_agent(session_id: str) -> Agent:
    """Answers with all that it was told in this conversation: shows order and memory."""

    async def script(messages: list[Msg]) -> AsyncIterator[Chunk]:
        yield "echo:"
        yield " | ".join(user_texts(messages))

    return scripted(script, name="echo")


def make_streaming_agent(chunks: int, *, delta: str = "chunk {} ") -> Callable[[str], Agent]:
    """Streams a number of text deltas, each with its number."""

    async def script(messages: list[Msg]) -> AsyncIterator[Chunk]:
        for number in range(chunks):
            yield delta.format(number)
            await asyncio.sleep(0)

    return lambda _session_id: scripted(script, name="streaming")


def make_silent_agent(session_id: str) -> Agent:
    """Answers with no text at all."""

    async def script(messages: list[Msg]) -> AsyncIterator[Chunk]:
        yield ""

    return scripted(script, name="silent")


def make_failing_agent(session_id: str) -> Agent:
    """Fails in the middle of its answer when it is told to, else echoes."""

    async def script(messages: list[Msg]) -> AsyncIterator[Chunk]:
        yield "so far so good"
        if user_texts(messages)[-1] == "fail":
            raise ConnectionError("the password of the model is hunter2")

    return scripted(script, name="failing")


class Gate:
    """Tells the test that an agent has arrived, and holds the agent until the test opens it."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.open = asyncio.Event()


def make_blocked_agent(gate: Gate, **react: Any) -> Callable[[str], Agent]:
    """Says "begin", waits at the gate, then says "end"; told "again" it tells what it remembers instead."""

    async def script(messages: list[Msg]) -> AsyncIterator[Chunk]:
        if user_texts(messages)[-1] == "again":
            yield " | ".join(message.get_text_content() or "" for message in messages[1:])
            return
        yield "begin "
        gate.arrived.set()
        await gate.open.wait()
        yield "end"

    return lambda _session_id: scripted(script, name="blocked", **react)


def make_blocked_tool_agent(gate: Gate, closed: list[str]) -> Callable[[str], Agent]:
    """Calls a tool that waits at the gate; `closed` collects how the tool call ended, as the model sees it."""

    async def wait() -> str:
        """Wait at the gate."""
        gate.arrived.set()
        await gate.open.wait()
        return "opened"

    async def script(messages: list[Msg]) -> AsyncIterator[Chunk]:
        if user_texts(messages)[-1] == "again":
            closed.extend(tool_results(messages))
            yield "again"
        elif results := tool_results(messages):
            yield results[-1]
        else:
            yield ToolCallBlock(id="call-1", name="wait", input="{}")

    return lambda _session_id: scripted(script, allowed(wait), name="blocked_tool")


def make_adding_agent(session_id: str) -> Agent:
    """Thinks, calls the tool `add`, and tells the result; reports usage."""

    async def add(a: int, b: int) -> AsyncIterator[str]:
        """Add two numbers."""
        yield str(a + b)

    async def script(messages: list[Msg]) -> AsyncIterator[Chunk]:
        if results := tool_results(messages):
            yield "it is "
            yield results[-1]
        else:
            yield ThinkingBlock(id="thought", thinking="let me add")
            yield ToolCallBlock(id="call-1", name="add", input='{"a": 1, "b": 2}')
        yield ChatUsage(input_tokens=11, output_tokens=7, time=0.1)

    return scripted(script, allowed(add), name="adding")


def make_data_agent(content: bytes, *, media_type: str = "image/png", pieces: int = 4) -> Callable[[str], Agent]:
    """Says a word and then sends a file in several pieces."""

    async def script(messages: list[Msg]) -> AsyncIterator[Chunk]:
        yield "here: "
        size = -(-len(content) // pieces)
        for start in range(0, len(content), size):
            data = base64.b64encode(content[start : start + size]).decode()
            yield DataBlock(id="file", source=Base64Source(data=data, media_type=media_type))

    return lambda _session_id: scripted(script, name="data")


def make_describing_agent(session_id: str) -> Agent:
    """Tells what blocks the last message had: `text:…`, `data:TYPE:SIZE:NAME`, `url:TYPE:URL:NAME`."""

    async def script(messages: list[Msg]) -> AsyncIterator[Chunk]:
        told = []
        for block in messages[-1].content:
            if isinstance(block, TextBlock):
                told.append(f"text:{block.text}")
            elif isinstance(block, DataBlock) and isinstance(block.source, Base64Source):
                size = len(base64.b64decode(block.source.data))
                told.append(f"data:{block.source.media_type}:{size}:{block.name}")
            elif isinstance(block, DataBlock) and isinstance(block.source, URLSource):
                told.append(f"url:{block.source.media_type}:{block.source.url}:{block.name}")
        yield " ".join(told)

    return scripted(script, name="describing")


class AskingTool(FunctionTool):
    """A function that needs the user's permission for each call of its own."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)

    async def match_rule(self, *_arguments: Any, **_options: Any) -> bool:
        return False


def make_confirming_agent(deleted: list[str], *paths: str) -> Callable[[str], Agent]:
    """Deletes paths (into `deleted`), for each of which it needs the user's permission."""

    async def delete(path: str) -> str:
        """Delete a file."""
        deleted.append(path)
        return f"deleted {path}"

    async def script(messages: list[Msg]) -> AsyncIterator[Chunk]:
        if messages[-1].role == "user" and user_texts(messages)[-1] != "delete":
            yield "something else"
        elif results := tool_results(messages):
            yield "; ".join(results)
        else:
            for number, path in enumerate(paths, start=1):
                yield ToolCallBlock(id=f"call-{number}", name="delete", input=f'{{"path": "{path}"}}')

    return lambda _session_id: scripted(script, AskingTool(delete), name="confirming")


class ExternalTool(ToolBase):
    """A tool that somebody else executes."""

    name = "measure"
    description = "Measure the temperature of a place."
    is_concurrency_safe = True
    is_read_only = True
    is_external_tool = True

    def __init__(self) -> None:
        super().__init__()
        self.input_schema = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
        self.metadata_schema = {
            "type": "object",
            "properties": {"celsius": {"type": "integer"}},
            "required": ["celsius"],
        }

    async def check_permissions(self, *_arguments: Any, **_options: Any) -> PermissionDecision:
        return ALLOWED


def make_external_agent(session_id: str) -> Agent:
    """Needs a measurement that its caller must make."""

    async def script(messages: list[Msg]) -> AsyncIterator[Chunk]:
        if results := tool_results(messages):
            yield f"measured: {results[-1]}"
        else:
            yield ToolCallBlock(id="call-1", name="measure", input='{"place": "杭州"}')

    return scripted(script, ExternalTool(), name="external")
