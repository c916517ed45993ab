"""Print a conversation as it happens: who speaks, and which topic each message takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentscope.event import (
    ReplyEndEvent,
    TextBlockDeltaEvent,
    TextBlockEndEvent,
    TextBlockStartEvent,
    ToolCallDeltaEvent,
    ToolCallStartEvent,
    ToolResultEndEvent,
    ToolResultStartEvent,
    ToolResultTextDeltaEvent,
)
from agentscope.message import ToolResultState
from agentscope.types import ReplyFinishedReason
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentscope.event import AgentEvent

__all__ = ["Route", "Terminal"]


@dataclass(frozen=True, slots=True)
class Route:
    """How messages travel between the supervisor and one worker.

    Attributes:
        agent: Name of the worker.
        request: Where requests go, for the eye: "topic WeatherAgentTask".
        reply: Where replies come back: "LiteTopic trip-42 of WorkerAgentResponse".
    """

    agent: str
    request: str
    reply: str


@dataclass(slots=True)
class _Call:
    """A tool call on its way."""

    route: Route | None = None
    arguments: str = ""
    answering: bool = False


class Terminal:
    """Prints the events of the supervisor's replies; colours only where the output is a terminal.

    Attributes:
        failed: Whether a worker or the supervisor itself failed, since this was last set to False.
    """

    def __init__(self, routes: Mapping[str, Route], *, console: Console | None = None) -> None:
        """Make a terminal.

        Args:
            routes: By the name of the supervisor's tool, where its messages go.
            console: Where to print; None is standard output.
        """
        self.failed = False
        self._routes = routes
        self._console = console or Console()
        self._calls: dict[str, _Call] = {}

    def note(self, text: str) -> None:
        """Print a line that nobody says."""
        self._print(f"{text}\n", style="dim")

    def show(self, event: AgentEvent) -> None:
        """Print an event, if there is something to see in it."""
        match event:
            case ToolCallStartEvent():
                route = self._routes.get(event.tool_call_name)
                self._calls[event.tool_call_id] = _Call(route)
            case ToolCallDeltaEvent():
                self._calls[event.tool_call_id].arguments += event.delta
            case ToolResultStartEvent():
                self._request(self._calls[event.tool_call_id])
            case ToolResultTextDeltaEvent():
                self._answer(self._calls[event.tool_call_id], event.delta)
            case ToolResultEndEvent():
                self._end_of_answer(self._calls.pop(event.tool_call_id), event.state)
            case TextBlockStartEvent():
                self._print("Supervisor > ", style="bold green")
            case TextBlockDeltaEvent():
                self._print(event.delta)
            case TextBlockEndEvent():
                self._print("\n")
            case ReplyEndEvent() if event.finished_reason != ReplyFinishedReason.COMPLETED:
                self.failed = True
                self.note(f"[Supervisor ended its reply: {event.finished_reason}]")
            case _:
                pass

    def _request(self, call: _Call) -> None:
        if call.route is not None:
            self._print(f"[Supervisor → {call.route.agent} · {call.route.request}]", style="cyan")
            # Older versions of Rich drop a space at the end of what is wider than the terminal.
            self._print(f" {_only_argument(call.arguments)}\n")

    def _answer(self, call: _Call, delta: str) -> None:
        if call.route is not None and not call.answering:
            call.answering = True
            self._print(f"[{call.route.agent} → Supervisor · {call.route.reply}]\n", style="cyan")
            self._print(f"{call.route.agent} > ", style="bold magenta")
        self._print(delta)

    def _end_of_answer(self, call: _Call, state: str) -> None:
        self._print("\n")
        if state != ToolResultState.SUCCESS:
            self.failed = True
            name = call.route.agent if call.route else "The tool"
            self.note(f"[{name} gave no answer: {state}]")

    def _print(self, text: str, *, style: str | None = None) -> None:
        self._console.print(text, end="", style=style, soft_wrap=True, markup=False, highlight=False, emoji=False)


def _only_argument(arguments: str) -> str:
    """The text in a tool call's arguments; the arguments as they stand where a model wrote no proper JSON."""
    try:
        values = json.loads(arguments)
    except ValueError:
        return arguments
    return "\n".join(map(str, values.values())) if isinstance(values, dict) else arguments
