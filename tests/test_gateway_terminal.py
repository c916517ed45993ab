"""The example's terminal that talks through gateways, where they are away or refuse."""

from __future__ import annotations

import contextlib
import json

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from agentscope_rocketmq.gateway.refusal import Refusal
from agentscope_rocketmq.httpserver import listen, serve_http
from agentscope_rocketmq.sse import render_event
from examples.travel_assistant import gateway_terminal
from examples.travel_assistant.gateway_terminal import NobodyAnswers, Talk
from tests.waiting import closed_port

TASK = {"task": {"id": "t", "contextId": "c", "status": {"state": "TASK_STATE_WORKING"}}}


@pytest.fixture
async def gateway():
    """A gateway whose answers break off after the task, and end with an error where one goes on with them."""
    asked = []

    async def call(_request):
        return _stream(json.dumps({"jsonrpc": "2.0", "id": 1, "result": TASK}), event_id="1")

    async def events(request):
        asked.append(request.path_params["session"])
        return _stream(Refusal(504, "timeout", "The agent went silent.").body())

    async def refuses(_request):
        return Refusal(403, "wrong-owner", "Not yours.").response()

    async def is_none(_request):
        return PlainTextResponse("Nothing here.", status_code=404)

    routes = [
        Route("/", call, methods=["POST"]),
        Route("/refuses", refuses, methods=["POST"]),
        Route("/none", is_none, methods=["POST"]),
        Route("/sessions/{session:path}/events", events),
    ]
    with contextlib.closing(listen("127.0.0.1", 0)) as listening:
        async with serve_http(Starlette(routes=routes), listening, 1.0):
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked


def _stream(data, **fields):
    return Response(render_event(data, **fields), media_type="text/event-stream")


async def answer(*gateways, session="trip"):
    """What came, what was noted, and why it ended."""
    noted: list[str] = []
    talk = Talk(gateways, session, noted.append)
    came = []
    with pytest.raises(NobodyAnswers) as error:
        async for response in talk.ask("hello"):
            came += [response.task.id]
    await talk.aclose()
    return came, noted, str(error.value)


async def test_an_error_that_ends_an_answer_is_told_in_its_words_whatever_the_session_is_called(gateway):
    url, asked = gateway
    came, _, why = await answer(url, session="a/b ?#")
    assert (came, asked, why) == (["t"], ["a/b ?#"], "The agent went silent.")


async def test_a_refusal_is_told_in_its_words(gateway):
    url, _ = gateway
    assert await answer(f"{url}/refuses") == ([], [], "Not yours.")
    assert await answer(f"{url}/none") == ([], [], "Nothing here.")


async def test_where_no_gateway_answers_that_is_said_once_before_it_is_given_up(monkeypatch):
    monkeypatch.setattr(gateway_terminal, "DELAY", 0.01)
    monkeypatch.setattr(gateway_terminal, "GIVE_UP", 0.5)
    came, noted, why = await answer(*(f"http://127.0.0.1:{closed_port()}" for _ in range(2)))
    assert (came, len(noted)) == ([], 1)
    assert noted[0].startswith("[no gateway answers")
    assert why.startswith("No gateway answers")
