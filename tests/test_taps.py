"""A stream and those who subscribed to it, in one session: each event is heard once, in order, whoever brings it."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from agentscope_rocketmq.taps import Taps


def chunk(text: str, *, task: str = "t", rpc_id: str = "1") -> str:
    """An artifact update of A2A 0.3; like texts make like events, as real agents do."""
    artifact = {"artifactId": "a", "parts": [{"kind": "text", "text": text}]}
    result = {"kind": "artifact-update", "taskId": task, "contextId": "c", "artifact": artifact}
    return json.dumps({"jsonrpc": "2.0", "id": rpc_id, "result": result})


def status(state: str, time: int = 0, *, task: str = "t", rpc_id: str = "1") -> str:
    told = {"state": state, "timestamp": f"2026-01-01T00:00:{time:02}Z"}
    # A Java server says of a question too that it is the last event of its stream.
    result = {"kind": "status-update", "taskId": task, "contextId": "c", "status": told, "final": state != "working"}
    return json.dumps({"jsonrpc": "2.0", "id": rpc_id, "result": result})


@given(st.data(), st.booleans())
def test_a_stream_and_its_taps_are_one_stream(data, midway):
    # Read from the middle, a session does not show whose stream it is: then like texts may change places.
    texts = data.draw(st.lists(st.sampled_from("abcdefgh"), max_size=8, unique=midway))
    stream = [status("working"), *(chunk(text) for text in texts), status("completed", 1)]
    taps = Taps(midway=midway)
    sources = {"stream": list(stream)}
    heard = []
    begun = 0
    while any(sources.values()):
        if begun < 2 and len(sources["stream"]) < len(stream) and data.draw(st.booleans()):
            # From some event on that its stream has not brought yet: the tap may be quicker, or slower.
            sources[f"tap-{begun}"] = list(sources["stream"])
            begun += 1
        name = data.draw(st.sampled_from([name for name in sorted(sources) if sources[name]]))
        raw = sources[name].pop(0)
        if not taps.is_repeat(name, raw.replace('"id": "1"', f'"id": "{name}"')):
            heard.append(raw)
        if not sources[name]:
            taps.close(name)
    assert heard == stream


def test_what_came_before_a_tap_that_is_heard_first_is_not_lost():
    taps = Taps(midway=True)
    assert not taps.is_repeat("tap", chunk("b"))
    assert not taps.is_repeat("stream", chunk("a"))
    assert taps.is_repeat("stream", chunk("b"))


def test_a_task_that_goes_on_with_a_new_message_may_say_the_same_again():
    taps = Taps()
    first = [status("working"), chunk("yes"), status("input-required", 1)]
    assert [taps.is_repeat("first", raw) for raw in first] == [False] * 3
    taps.close("first")
    # It came to listen at the last moment.
    assert taps.is_repeat("late tap", first[-1])
    taps.close("late tap")
    assert [taps.is_repeat("second", raw) for raw in (chunk("yes"), status("completed", 2))] == [False] * 2
    taps.close("second")
    assert taps.is_repeat("late", chunk("yes"))
    assert taps.is_repeat("late", status("completed", 2))


def test_two_tasks_may_say_the_same():
    taps = Taps()
    assert not taps.is_repeat("one", chunk("yes", task="1"))
    assert not taps.is_repeat("two", chunk("yes", task="2"))


def test_what_is_no_event_of_a_task_is_no_repeat():
    taps = Taps()
    for raw in ("[]", "no JSON", '{"result":null}', '{"error":{"code":1}}', '{"result":{"kind":"message"}}'):
        assert not taps.is_repeat("one", raw)
        assert not taps.is_repeat("two", raw)
    taps.close("nobody")


def test_memory_is_bounded():
    taps = Taps()
    for number in range(10_000):
        assert not taps.is_repeat("one", chunk(str(number)))
        assert taps.is_repeat("two", chunk(str(number)))
    assert len(taps._tasks["t"].events) <= 8192
    for number in range(2000):
        taps.is_repeat("one", chunk("", task=str(number)))
    assert len(taps._tasks) <= 1024
