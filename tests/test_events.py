"""The mapping between AgentScope's events and A2A's, without a server."""

from __future__ import annotations

import base64
import math
from collections import defaultdict

import pytest
from a2a.types import (
    Message,
    Part,
    Role,
    StreamResponse,
    Task,
    TaskArtifactUpdateEvent,
    TaskState,
    TaskStatusUpdateEvent,
)
from agentscope.event import (
    AgentEvent,
    DataBlockDeltaEvent,
    DataBlockEndEvent,
    DataBlockStartEvent,
    HintBlockEvent,
    ModelCallEndEvent,
    TextBlockDeltaEvent,
    TextBlockEndEvent,
    TextBlockStartEvent,
    ThinkingBlockDeltaEvent,
    ToolCallDeltaEvent,
    ToolResultEndEvent,
)
from agentscope.message import ToolResultState
from google.protobuf.json_format import MessageToJson, Parse
from hypothesis import given
from hypothesis import strategies as st

from agentscope_rocketmq.events import (
    AGENT_EVENTS_EXTENSION,
    ReplyUpdates,
    agent_events,
    agent_events_extension,
    event_metadata,
    message_to_msg,
    status_update,
)

WORKING = TaskState.TASK_STATE_WORKING


def updates_of(
    *events: AgentEvent, with_agent_events: bool = False
) -> list[TaskArtifactUpdateEvent | TaskStatusUpdateEvent]:
    reply = ReplyUpdates("task", "context", message_id="m", with_agent_events=with_agent_events)
    return [update for event in events for update in reply.of(event)]


def over_the_wire(update: TaskStatusUpdateEvent) -> StreamResponse:
    response = StreamResponse()
    Parse(MessageToJson(StreamResponse(status_update=update)), response)
    return response


@given(st.lists(st.tuples(st.sampled_from("abc"), st.text(st.characters(codec="utf-8"), max_size=5)), max_size=30))
def test_each_text_block_is_one_artifact_that_begins_grows_and_ends(deltas: list[tuple[str, str]]):
    said: dict[str, str] = defaultdict(str)
    for block, delta in deltas:
        said[block] += delta
    events: list[AgentEvent] = [TextBlockStartEvent(reply_id="r", block_id=block) for block in said]
    events += [TextBlockDeltaEvent(reply_id="r", block_id=block, delta=delta) for block, delta in deltas]
    events += [TextBlockEndEvent(reply_id="r", block_id=block) for block in said]
    chunks: dict[str, list[TaskArtifactUpdateEvent]] = defaultdict(list)
    for update in updates_of(*events):
        assert isinstance(update, TaskArtifactUpdateEvent)
        chunks[update.artifact.artifact_id].append(update)
    texts = ["".join(update.artifact.parts[0].text for update in found) for found in chunks.values()]
    assert sorted(texts) == sorted(text for text in said.values() if text)
    for found in chunks.values():
        assert [update.append for update in found] == [False] + [True] * (len(found) - 1)
        assert [update.last_chunk for update in found] == [False] * (len(found) - 1) + [True]


def test_a_broken_off_reply_closes_its_text_and_drops_its_unfinished_file():
    reply = ReplyUpdates("task", "context", message_id="m", with_agent_events=False)
    [begun] = reply.of(TextBlockDeltaEvent(reply_id="r", block_id="b", delta="half"))
    reply.of(DataBlockDeltaEvent(reply_id="r", block_id="d", media_type="image/png", data="aGFsZg=="))
    [closed] = reply.close()
    assert closed.artifact.artifact_id == begun.artifact.artifact_id
    assert closed.append
    assert closed.last_chunk
    assert [part.WhichOneof("content") for part in closed.artifact.parts] == ["text"]
    assert reply.close() == []
    assert reply.of(DataBlockEndEvent(reply_id="r", block_id="d")) == []


@given(st.lists(st.binary(max_size=20), min_size=1))
def test_the_pieces_of_a_file_are_put_together(pieces: list[bytes]):
    [update] = updates_of(
        DataBlockStartEvent(reply_id="r", block_id="d", media_type="image/png", name="a.png"),
        *(
            DataBlockDeltaEvent(
                reply_id="r", block_id="d", media_type="image/png", data=base64.b64encode(piece).decode()
            )
            for piece in pieces
        ),
        DataBlockEndEvent(reply_id="r", block_id="d"),
    )
    assert isinstance(update, TaskArtifactUpdateEvent)
    [part] = update.artifact.parts
    assert (part.raw, part.media_type, part.filename) == (b"".join(pieces), "image/png", "a.png")
    assert not update.append
    assert update.last_chunk


def test_a_file_by_url_stays_a_url():
    [update] = updates_of(
        DataBlockStartEvent(reply_id="r", block_id="d", media_type="image/png"),
        DataBlockDeltaEvent(reply_id="r", block_id="d", media_type="image/png", url="https://example.com/a.png"),
        DataBlockEndEvent(reply_id="r", block_id="d"),
    )
    assert isinstance(update, TaskArtifactUpdateEvent)
    [part] = update.artifact.parts
    assert (part.url, part.media_type, part.filename) == ("https://example.com/a.png", "image/png", "")


def test_lone_surrogates_do_not_break_the_stream():
    [update] = updates_of(TextBlockDeltaEvent(reply_id="r", block_id="b", delta="a\ud83db\U0001f600"))
    assert isinstance(update, TaskArtifactUpdateEvent)
    assert update.artifact.parts[0].text == "a\ufffdb\U0001f600"
    [status] = updates_of(ToolCallDeltaEvent(reply_id="r", tool_call_id="c", delta='"\ud83d"'), with_agent_events=True)
    assert isinstance(status, TaskStatusUpdateEvent)
    found = agent_events(over_the_wire(status))
    assert isinstance(found, ToolCallDeltaEvent)
    assert found.delta == '"\ufffd"'


def test_an_agent_event_survives_json_with_its_integers():
    sent = ModelCallEndEvent(reply_id="r", input_tokens=12, output_tokens=3)
    [status] = updates_of(sent, with_agent_events=True)
    assert isinstance(status, TaskStatusUpdateEvent)
    assert status.status.state == WORKING
    assert not status.status.HasField("message")
    assert agent_events(over_the_wire(status)) == sent
    assert agent_events(status) == sent


def test_numbers_that_json_does_not_know_become_null():
    sent = ToolResultEndEvent(
        reply_id="r",
        tool_call_id="c",
        state=ToolResultState.SUCCESS,
        metadata={"nan": math.nan, "inf": math.inf, "n": 1},
    )
    [status] = updates_of(sent, with_agent_events=True)
    assert isinstance(status, TaskStatusUpdateEvent)
    found = agent_events(over_the_wire(status))
    assert isinstance(found, ToolResultEndEvent)
    assert found.metadata == {"nan": None, "inf": None, "n": 1}


@pytest.mark.parametrize(
    "event",
    [
        HintBlockEvent(reply_id="r", block_id="h", hint="secret"),
        TextBlockStartEvent(reply_id="r", block_id="b"),
        TextBlockEndEvent(reply_id="r", block_id="b"),
        TextBlockDeltaEvent(reply_id="r", block_id="b", delta=""),
    ],
)
def test_what_no_caller_gets(event: AgentEvent):
    assert updates_of(event, with_agent_events=True) == []


def test_without_the_extension_no_agent_event_goes_out():
    assert updates_of(ThinkingBlockDeltaEvent(reply_id="r", block_id="b", delta="hm")) == []


def test_agent_events_finds_nothing_where_there_is_nothing_to_find():
    metadata = event_metadata(ModelCallEndEvent(reply_id="r", input_tokens=1, output_tokens=1))
    old_news = Task(id="t", metadata=metadata)
    old_news.status.state = TaskState.TASK_STATE_COMPLETED
    unknown = status_update("t", "c", WORKING, metadata={AGENT_EVENTS_EXTENSION: {"type": "FROM_THE_FUTURE"}})
    for event in (
        status_update("t", "c", WORKING),
        unknown,
        old_news,
        StreamResponse(message=Message(message_id="m")),
        StreamResponse(artifact_update=TaskArtifactUpdateEvent(task_id="t")),
    ):
        assert agent_events(event) is None
    old_news.status.state = TaskState.TASK_STATE_INPUT_REQUIRED
    assert agent_events(old_news) is not None
    assert agent_events(StreamResponse(task=old_news)) is not None


def test_the_extension_is_optional():
    extension = agent_events_extension()
    assert extension.uri == AGENT_EVENTS_EXTENSION
    assert not extension.required


def test_a_message_with_a_file_needs_no_text():
    message = Message(message_id="m", role=Role.ROLE_USER, parts=[Part(raw=b"x")])
    [block] = message_to_msg(message).get_content_blocks("data")
    assert block.source.media_type == "application/octet-stream"
