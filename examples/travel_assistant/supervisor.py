"""The supervisor: a terminal to talk to. Its two tools are agents in other processes, reached over RocketMQ."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import signal
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import openai
from agentscope.message import Msg, UserMsg
from anyio.from_thread import start_blocking_portal

from agentscope_rocketmq import RocketMQ, RocketMQConfig
from agentscope_rocketmq.card import Address
from agentscope_rocketmq.errors import AgentScopeRocketMQError
from agentscope_rocketmq.session import lite_topic_name
from examples.travel_assistant.agents import make_supervisor, stream_answer
from examples.travel_assistant.cards import TRAVEL_CARD, WEATHER_CARD
from examples.travel_assistant.terminal import Route, Terminal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from agentscope.agent import A2AAgent, Agent
    from anyio.from_thread import BlockingPortal

__all__ = ["Conversation", "main", "open_conversation"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A supervisor that was started, and the terminal it speaks on."""

    supervisor: Agent
    terminal: Terminal

    async def answer(self, text: str) -> None:
        """Answer a question on the terminal."""
        async for event in self.supervisor.reply_stream(UserMsg(name="user", content=text)):
            if not isinstance(event, Msg):
                self.terminal.show(event)


@asynccontextmanager
async def open_conversation(session: str, *, config: RocketMQConfig | None = None) -> AsyncIterator[Conversation]:
    """Connect the supervisor with the two workers.

    Args:
        session: Name of the conversation: its LiteTopic takes the workers' answers.
        config: Where RocketMQ is; None takes the environment.
    """
    async with (
        RocketMQ(config) as rocketmq,
        await rocketmq.agent(WEATHER_CARD, session=session) as weather,
        await rocketmq.agent(TRAVEL_CARD, session=session) as travel,
    ):
        supervisor = make_supervisor(
            session,
            ask_weather=partial(stream_answer, weather),
            ask_travel=partial(stream_answer, travel),
        )
        terminal = Terminal(
            {
                "ask_weather_agent": _route(rocketmq, weather, session),
                "ask_travel_agent": _route(rocketmq, travel, session),
            }
        )
        terminal.note(f"[session {session}]")
        yield Conversation(supervisor, terminal)


def _route(rocketmq: RocketMQ, agent: A2AAgent, session: str) -> Route:
    config = rocketmq.config
    secret = config.a2a_secret.get_secret_value() if config.a2a_secret else None
    return Route(
        agent.name,
        request=f"topic {Address.parse(rocketmq.choice(agent).url).topic}",
        reply=f"LiteTopic {lite_topic_name(session, secret=secret)} of {config.reply_topic}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer one question, or one after the other at the prompt.

    The terminal keeps the main thread, so that line editing and Ctrl-C work as everywhere; the agents run in an event loop beside it.

    Args:
        arguments: Command line; None takes that of the process.

    Returns:
        Exit code: 0, or 1 where a question could not be answered.
    """
    parser = argparse.ArgumentParser(prog="supervisor", description="Ask about the weather, or for a trip plan.")
    parser.add_argument("--ask", metavar="TEXT", help="answer this one question, without a prompt")
    parser.add_argument("--session", help="name of the conversation (default: a random one)")
    options = parser.parse_args(arguments)
    session = options.session or f"trip-{secrets.token_hex(4)}"
    # As Ctrl-C, so that connections are closed in order.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        with (
            start_blocking_portal() as portal,
            portal.wrap_async_context_manager(open_conversation(session)) as conversation,
        ):
            if options.ask is None:
                _talk(portal, conversation)
            else:
                _answer(portal, conversation, options.ask)
            return int(conversation.terminal.failed)
    except AgentScopeRocketMQError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _talk(portal: BlockingPortal, conversation: Conversation) -> None:
    """Read questions until the user leaves."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415  (gives input() its line editing)
    while True:
        try:
            text = input("You > ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text.lower() in {"exit", "quit", "退出"}:
            return
        if text:
            _answer(portal, conversation, text)
            conversation.terminal.failed = False


def _answer(portal: BlockingPortal, conversation: Conversation, text: str) -> None:
    answer = portal.start_task_soon(conversation.answer, text)
    try:
        answer.result()
    except (AgentScopeRocketMQError, openai.OpenAIError) as error:
        conversation.terminal.failed = True
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
    except BaseException:
        answer.cancel()
        raise


if __name__ == "__main__":
    sys.exit(main())
