"""A terminal that talks to the supervisor through gateways: plain HTTP, and nobody notices when a gateway dies.

python -m examples.travel_assistant.gateway_terminal --gateway URL --gateway URL [--ask TEXT] [--session NAME]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import secrets
import sys
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
from a2a.types import StreamResponse
from google.protobuf.json_format import ParseDict

from agentscope_rocketmq import AGENT_EVENTS_EXTENSION, agent_events
from agentscope_rocketmq.card import read_card, rocketmq_addresses
from agentscope_rocketmq.sse import EventParser
from examples.travel_assistant.cards import TRAVEL_CARD, WEATHER_CARD
from examples.travel_assistant.terminal import Route, Terminal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from agentscope_rocketmq.sse import Event

__all__ = ["Talk", "main"]

DELAY = 0.2
"""Seconds before the next gateway is tried."""
GIVE_UP = 60.0
"""Seconds after which a question is given up that no gateway answers."""

_ENDED = {"TASK_STATE_COMPLETED", "TASK_STATE_FAILED", "TASK_STATE_CANCELED", "TASK_STATE_REJECTED"}


class NobodyAnswers(Exception):  # noqa: N818  (what happened)
    """No gateway answers, or one refuses or ends the answer with an error; says why."""


@dataclass
class Talk:
    """A conversation through gateways.

    Attributes:
        gateways: Their URLs; the next one is tried when one dies.
        session: Name of the conversation.
        note: Told, once an outage, that no gateway answers and that they are tried again.
        moves: How often it went on at another gateway.
    """

    gateways: Sequence[str]
    session: str
    note: Callable[[str], None]
    moves: int = 0
    _now: int = 0
    _cursor: str | None = None
    _http: httpx.AsyncClient = field(default_factory=lambda: httpx.AsyncClient(timeout=httpx.Timeout(10.0, read=30.0)))

    async def ask(self, text: str) -> AsyncIterator[StreamResponse]:
        """Ask, and stream the events of the answer, each once, whatever happens to gateways meanwhile."""
        question: Any = {"messageId": uuid.uuid4().hex, "contextId": self.session, "role": "ROLE_USER"}
        question["parts"] = [{"text": text}]
        asked = {"jsonrpc": "2.0", "id": 1, "method": "SendStreamingMessage", "params": {"message": question}}
        begun, failed = False, 0
        loop = asyncio.get_running_loop()
        deadline = loop.time() + GIVE_UP
        while True:
            why = "the answer broke off"
            try:
                async for event in self._events(None if begun else asked):
                    begun, failed, deadline = True, 0, loop.time() + GIVE_UP
                    said = json.loads(event.data)
                    if "error" in said:
                        raise NobodyAnswers(_message(event.data))
                    self._cursor = event.id
                    response = ParseDict(said["result"], StreamResponse(), ignore_unknown_fields=True)
                    yield response
                    if _state(response) in _ENDED:
                        return
            except httpx.TransportError as error:
                why = str(error) or type(error).__name__
            if loop.time() > deadline:
                raise NobodyAnswers(f"No gateway answers: {why}")
            failed += 1
            if failed == len(self.gateways):
                self.note(f"[no gateway answers ({why}); trying again for {GIVE_UP:g} s]")
            self._now = (self._now + 1) % len(self.gateways)
            self.moves += 1
            await asyncio.sleep(DELAY)

    async def _events(self, asked: Any) -> AsyncIterator[Event]:
        """The events of a new question, or those after the last one that is known."""
        url = self.gateways[self._now]
        if asked is not None:
            headers = {"A2A-Version": "1.0", "A2A-Extensions": AGENT_EVENTS_EXTENSION}
            opened = self._http.stream("POST", url, json=asked, headers=headers)
        else:
            headers = {"Last-Event-ID": self._cursor or ""}
            opened = self._http.stream("GET", f"{url}/sessions/{quote(self.session, safe='')}/events", headers=headers)
        async with opened as response:
            if response.is_client_error:
                raise NobodyAnswers(_message((await response.aread()).decode()))
            if not response.is_success:
                return
            parser = EventParser()
            async for chunk in response.aiter_bytes():
                for event in parser.feed(chunk):
                    if event.name is not None:
                        return  # this gateway sends its clients elsewhere
                    yield event

    async def aclose(self) -> None:
        """End it."""
        await self._http.aclose()


def _message(text: str) -> str:
    """What a JSON-RPC error says; of anything else, all of it."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text


def _state(response: StreamResponse) -> str:
    kind = response.WhichOneof("payload")
    if kind not in ("status_update", "task"):
        return ""
    status = response.status_update.status if kind == "status_update" else response.task.status
    name: str = type(status).DESCRIPTOR.fields_by_name["state"].enum_type.values_by_number[status.state].name
    return name


async def _answer(talk: Talk, terminal: Terminal, text: str) -> None:
    async for response in talk.ask(text):
        event = agent_events(response)
        if event is not None:
            terminal.show(event)
        elif (state := _state(response)) in _ENDED and state != "TASK_STATE_COMPLETED":
            terminal.failed = True
            terminal.note(f"[the answer ended: {state}]")


def _routes(session: str) -> dict[str, Route]:
    def route(card: Any) -> Route:
        read = read_card(card)
        return Route(
            read.name, f"topic {rocketmq_addresses(read)[0].topic}", f"LiteTopic of session supervisor-{session}"
        )

    return {"ask_weather_agent": route(WEATHER_CARD), "ask_travel_agent": route(TRAVEL_CARD)}


async def _talk(options: argparse.Namespace) -> int:
    session = options.session or f"trip-{secrets.token_hex(4)}"
    terminal = Terminal(_routes(session))
    talk = Talk(options.gateway, session, terminal.note)
    terminal.note(f"[session {session}]")
    try:
        while True:
            text = options.ask
            if text is None:
                try:
                    text = (await asyncio.to_thread(input, "You > ")).strip()
                except EOFError:
                    print()
                    return 0
                if text.lower() in {"exit", "quit", "退出"}:
                    return 0
            if text:
                try:
                    await _answer(talk, terminal, text)
                except NobodyAnswers as error:
                    terminal.failed = True
                    print(f"\n{error}", file=sys.stderr)
            if options.ask is not None:
                if options.show_moves:
                    print(f"went on at another gateway: {talk.moves}", file=sys.stderr)
                return int(terminal.failed)
            terminal.failed = False
    finally:
        await talk.aclose()


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer one question, or one after the other at the prompt.

    Args:
        arguments: Command line; None takes that of the process.

    Returns:
        Exit code: 0, or 1 where a question could not be answered.
    """
    parser = argparse.ArgumentParser(prog="gateway_terminal", description="Talk to the supervisor through gateways.")
    parser.add_argument("--gateway", action="append", required=True, metavar="URL", help="may be repeated")
    parser.add_argument("--ask", metavar="TEXT", help="answer this one question, without a prompt")
    parser.add_argument("--session", help="name of the conversation (default: a random one)")
    parser.add_argument("--show-moves", action="store_true", help="say at the end how often a gateway had to be left")
    options = parser.parse_args(arguments)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415  (gives input() its line editing)
    try:
        return asyncio.run(_talk(options))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
