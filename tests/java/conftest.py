"""Topics, groups and processes of the Java peers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agentscope_rocketmq.provision import apply, plan
from tests.conftest import APACHE, EMBEDDED, Engine, engine_of, engines_of, unique

if TYPE_CHECKING:
    from agentscope_rocketmq import RocketMQConfig


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that asks for a `repetition` so many times as JAVA_REPETITIONS says: 3, and 20 in the long form."""
    if "repetition" in metafunc.fixturenames:
        metafunc.parametrize("repetition", range(int(os.environ.get("JAVA_REPETITIONS", "3"))))


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> Engine:
    """A real Apache RocketMQ, also where only the embedded broker is asked for: the reference insists on TLS."""
    chosen = engines_of(request.config)[-1]
    return engine_of(request.config, APACHE if chosen == EMBEDDED else chosen)


@dataclass(frozen=True)
class JavaReplies:
    """Where a Java client reads its answers."""

    topic: str
    group: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def java_replies(module_config: RocketMQConfig) -> JavaReplies:
    """A group of the reply topic as the Java client needs it: ordered, since it trusts the order of arrival."""
    replies = JavaReplies(module_config.reply_topic, unique("JavaReplyGroup"))
    await apply(plan([], module_config, java_groups=[replies.group]), module_config)
    return replies
