"""What an agent says, as A2A events, and what a caller says, as an AgentScope message.

Pure mapping, no I/O. Every caller gets text and data blocks as artifacts. Thinking, tool calls, tool results and usage
have no place in A2A of their own: they travel as status updates to callers that ask for `AGENT_EVENTS_EXTENSION`.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Annotated, Any
from uuid import uuid4

from a2a.types import (
    AgentExtension,
    Artifact,
    Message,
    Part,
    Role,
    StreamResponse,
    Task,
    TaskArtifactUpdateEvent,
    TaskState,
    TaskStatus,
    TaskStatusUpdateEvent,
)
from a2a.utils.errors import InvalidParamsError
from agentscope.event import (
    AgentEvent,
    DataBlockDeltaEvent,
    DataBlockEndEvent,
    DataBlockStartEvent,
    EventType,
    TextBlockDeltaEvent,
    TextBlockEndEvent,
)
from agentscope.message import Base64Source, DataBlock, Msg, TextBlock, URLSource, UserMsg
from google.protobuf.json_format import MessageToDict
from pydantic import Field, TypeAdapter, ValidationError

__all__ = [
    "AGENT_EVENTS_EXTENSION",
    "ReplyUpdates",
    "agent_events",
    "agent_events_extension",
    "event_metadata",
    "message_to_msg",
    "part_data",
    "status_update",
]

AGENT_EVENTS_EXTENSION = "urn:agentscope-rocketmq:extension:agent-events:v1"
"""URI of the A2A extension that carries AgentScope's own events; also their key in an update's metadata."""

_DEFAULT_MEDIA_TYPE = "application/octet-stream"

# What only callers that ask for the extension get. Text and data blocks are artifacts already, the start and end of
# the reply are task states, what a parked agent waits for comes with the input-required status, and hints are the
# agent's private notes to its model.
_EXTENSION_EVENTS = frozenset(
    {
        EventType.MODEL_CALL_START,
        EventType.MODEL_CALL_END,
        EventType.THINKING_BLOCK_START,
        EventType.THINKING_BLOCK_DELTA,
        EventType.THINKING_BLOCK_END,
        EventType.TOOL_CALL_START,
        EventType.TOOL_CALL_DELTA,
        EventType.TOOL_CALL_END,
        EventType.TOOL_RESULT_START,
        EventType.TOOL_RESULT_TEXT_DELTA,
        EventType.TOOL_RESULT_DATA_DELTA,
        EventType.TOOL_RESULT_END,
    }
)

_AGENT_EVENT: TypeAdapter[AgentEvent] = TypeAdapter(Annotated[AgentEvent, Field(discriminator="type")])


def agent_events_extension() -> AgentExtension:
    """Describe the extension, for `capabilities.extensions` of an agent card."""
    return AgentExtension(
        uri=AGENT_EVENTS_EXTENSION,
        description=(
            "Thinking, tool calls, tool results and token usage as AgentScope events: "
            "the metadata of a status update holds the event's JSON under this URI."
        ),
        required=False,
    )


def agent_events(event: StreamResponse | TaskStatusUpdateEvent | Task) -> AgentEvent | None:
    """Read the AgentScope event that an A2A event carries.

    Args:
        event: What a client yields, one of its status updates, or a task. A task that waits for input still carries
            the question, so that a caller who comes back later finds it.

    Returns:
        The event: a step of the agent, or, with an input-required status, `RequireUserConfirmEvent` or
        `RequireExternalExecutionEvent`. None when there is none, or none that this version of AgentScope knows.
    """
    if isinstance(event, StreamResponse):
        payload = event.WhichOneof("payload")
        if payload == "status_update":
            event = event.status_update
        elif payload == "task":
            event = event.task
        else:
            return None
    # A store keeps the last event's metadata with the task: old news, unless the task still waits.
    if isinstance(event, Task) and event.status.state != TaskState.TASK_STATE_INPUT_REQUIRED:
        return None
    if AGENT_EVENTS_EXTENSION not in event.metadata:
        return None
    try:
        return _AGENT_EVENT.validate_python(MessageToDict(event.metadata)[AGENT_EVENTS_EXTENSION])
    except ValidationError:
        return None


def event_metadata(event: AgentEvent) -> dict[str, Any]:
    """Put an AgentScope event into the metadata of an A2A event.

    It is a JSON object, not a string with JSON in it, so that callers in any language read it as they read the rest.
    A2A metadata knows no integers, so numbers come back as floats inside free-form dictionaries; NaN and infinities
    become null.
    """
    text = json.dumps(event.model_dump(mode="json"), ensure_ascii=False)
    return {AGENT_EVENTS_EXTENSION: json.loads(_well_formed(text), parse_constant=lambda _: None)}


def message_to_msg(message: Message) -> Msg:
    """Turn an A2A message into AgentScope's: text, files by value and by URL, and data as JSON text.

    Args:
        message: What the caller sent.

    Raises:
        InvalidParamsError: It says nothing at all, or a part has no usable content.
    """
    blocks: list[TextBlock | DataBlock] = []
    for part in message.parts:
        kind = part.WhichOneof("content")
        media_type = part.media_type or _DEFAULT_MEDIA_TYPE
        if kind == "text":
            blocks.append(TextBlock(text=part.text))
        elif kind == "data":
            blocks.append(TextBlock(text=json.dumps(part_data(part), ensure_ascii=False, sort_keys=True)))
        elif kind == "raw":
            data = base64.b64encode(part.raw).decode("ascii")
            source = Base64Source(data=data, media_type=media_type)
            blocks.append(DataBlock(source=source, name=part.filename or None))
        elif kind == "url":
            try:
                link = URLSource.model_validate({"url": part.url, "media_type": media_type})
            except ValidationError:
                raise InvalidParamsError(
                    message=f"{part.url!r} is not a URL: send an absolute one, or the bytes as a raw part."
                ) from None
            blocks.append(DataBlock(source=link, name=part.filename or None))
    if not any(isinstance(block, DataBlock) or block.text.strip() for block in blocks):
        raise InvalidParamsError(message="The message is empty: send at least one part with content.")
    return UserMsg(name="user", content=blocks)


def part_data(part: Part) -> Any:
    """Return the JSON value of a data part, with whole numbers as integers again."""
    return _with_integers(MessageToDict(part.data))


def status_update(
    task_id: str,
    context_id: str,
    state: TaskState,
    *,
    text: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> TaskStatusUpdateEvent:
    """Make a status update of now.

    Args:
        task_id: The task.
        context_id: Its context.
        state: The state it is in now.
        text: What to tell the caller; None says nothing.
        metadata: Metadata of the update; None for none.
    """
    status = TaskStatus(state=state)
    status.timestamp.GetCurrentTime()
    if text is not None:
        status.message.CopyFrom(
            Message(
                message_id=uuid4().hex,
                task_id=task_id,
                context_id=context_id,
                role=Role.ROLE_AGENT,
                parts=[Part(text=text)],
            )
        )
    return TaskStatusUpdateEvent(task_id=task_id, context_id=context_id, status=status, metadata=metadata)


@dataclass(slots=True)
class _OpenData:
    """A data block that is still coming in."""

    media_type: str
    name: str | None
    url: str | None = None
    content: bytearray = field(default_factory=bytearray)


class ReplyUpdates:
    """Turns the events of one reply into A2A updates, each at once and in order.

    A text block is one artifact: its first delta makes it (`append=False`), each further delta is appended, an empty
    chunk closes it (`last_chunk=True`). Between two deltas nothing else goes out unless the caller asked for the
    extension, because AgentScope's `A2AAgent` would begin a new block after it. A data block is one artifact too, but
    goes out whole: the same `A2AAgent` takes every raw part for a file of its own.

    Args:
        task_id: The task that the reply belongs to.
        context_id: Its context.
        message_id: The message it answers. Artifacts are named after it and numbered, so that a run that begins anew
            after its worker died replaces those of the first.
        with_agent_events: Whether the caller asked for `AGENT_EVENTS_EXTENSION`.
    """

    def __init__(self, task_id: str, context_id: str, *, message_id: str, with_agent_events: bool) -> None:
        self._task_id = task_id
        self._context_id = context_id
        self._message_id = message_id
        self._artifacts = 0
        self._with_agent_events = with_agent_events
        self._open_texts: dict[str, str] = {}
        self._open_data: dict[str, _OpenData] = {}

    def of(self, event: AgentEvent) -> list[TaskArtifactUpdateEvent | TaskStatusUpdateEvent]:
        """Return the updates that an event means for the caller, often none."""
        match event:
            case TextBlockDeltaEvent(block_id=block, delta=delta):
                return [self._text(block, delta)] if delta else []
            case TextBlockEndEvent(block_id=block):
                return [self._end_of_text(block)] if block in self._open_texts else []
            case DataBlockStartEvent(block_id=block, media_type=media_type, name=name):
                self._open_data[block] = _OpenData(media_type, name)
            case DataBlockDeltaEvent(block_id=block, data=data, url=url):
                entry = self._open_data.setdefault(block, _OpenData(event.media_type, None))
                entry.url = url or entry.url
                # Each delta is base64 of its own, padding included.
                entry.content += base64.b64decode(data or "")
            case DataBlockEndEvent(block_id=block) if block in self._open_data:
                return [self._data(self._open_data.pop(block))]
            case _ if self._with_agent_events and event.type in _EXTENSION_EVENTS:
                working = TaskState.TASK_STATE_WORKING
                metadata = event_metadata(event)
                return [status_update(self._task_id, self._context_id, working, metadata=metadata)]
        return []

    def close(self) -> list[TaskArtifactUpdateEvent]:
        """Close the texts that a broken-off reply left open; an unfinished data block is dropped."""
        self._open_data.clear()
        return [self._end_of_text(block) for block in list(self._open_texts)]

    def _text(self, block: str, delta: str) -> TaskArtifactUpdateEvent:
        append = block in self._open_texts
        artifact_id = self._open_texts.setdefault(block, "") or self._new_artifact_id()
        self._open_texts[block] = artifact_id
        artifact = Artifact(artifact_id=artifact_id, parts=[Part(text=_well_formed(delta))])
        return self._update(artifact, append=append, last_chunk=False)

    def _end_of_text(self, block: str) -> TaskArtifactUpdateEvent:
        # Peers refuse an artifact without parts, so the closing chunk carries an empty text.
        artifact = Artifact(artifact_id=self._open_texts.pop(block), parts=[Part(text="")])
        return self._update(artifact, append=True, last_chunk=True)

    def _data(self, block: _OpenData) -> TaskArtifactUpdateEvent:
        part = Part(media_type=block.media_type, filename=block.name)
        if block.url is not None:
            part.url = block.url
        else:
            part.raw = bytes(block.content)
        artifact = Artifact(artifact_id=self._new_artifact_id(), name=block.name, parts=[part])
        return self._update(artifact, append=False, last_chunk=True)

    def _new_artifact_id(self) -> str:
        self._artifacts += 1
        return f"{self._message_id}-{self._artifacts}"

    def _update(self, artifact: Artifact, *, append: bool, last_chunk: bool) -> TaskArtifactUpdateEvent:
        return TaskArtifactUpdateEvent(
            task_id=self._task_id,
            context_id=self._context_id,
            artifact=artifact,
            append=append,
            last_chunk=last_chunk,
        )


def _well_formed(text: str) -> str:
    """Replace lone surrogates, which some models' JSON escapes leave behind and UTF-8 can't carry."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _with_integers(value: Any) -> Any:
    match value:
        case float() if value.is_integer():
            return int(value)
        case dict():
            return {key: _with_integers(item) for key, item in value.items()}
        case list():
            return [_with_integers(item) for item in value]
        case _:
            return value
