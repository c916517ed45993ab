"""The command `agentscope-rocketmq`, one module for each of its commands.

What a command needs is imported inside it: `--help` must not load AgentScope or gRPC.
"""

from __future__ import annotations

import sys

import typer

from agentscope_rocketmq.cli.deadletters import dead_letters
from agentscope_rocketmq.cli.dev import dev
from agentscope_rocketmq.cli.gateway import gateway, token
from agentscope_rocketmq.cli.provision import provision
from agentscope_rocketmq.errors import AgentScopeRocketMQError, ConfigurationError

__all__ = ["app", "main"]

_FAILED = 1
_MISUSED = 2

app = typer.Typer(
    name="agentscope-rocketmq",
    help="AgentScope agents talk A2A reliably through Apache RocketMQ LiteTopics.",
    no_args_is_help=True,
    # A failure is a sentence; a bug is a plain traceback without the values of variables in it.
    pretty_exceptions_enable=False,
)
app.command()(dev)
app.command()(gateway)
app.command()(provision)
app.command()(token)
app.add_typer(dead_letters, name="dead-letters")


def main() -> None:
    """Run the command line; ends the process with 0, 1 (it failed) or 2 (it was asked for something impossible)."""
    try:
        app()
    except AgentScopeRocketMQError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_MISUSED if isinstance(error, ConfigurationError) else _FAILED)
