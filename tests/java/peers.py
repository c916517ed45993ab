"""Java peers as processes: a server on the reference's own routes, and its client behind a pipe."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx

from tests.maven import built, java

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from agentscope_rocketmq import RocketMQConfig
    from tests.conftest import Names
    from tests.java.conftest import JavaReplies

PROJECT = Path(__file__).parent
START_SECONDS = 120.0
ANSWER_SECONDS = 90.0
MISSED_AFTER = 10  # seconds; the reference itself waits for two minutes
MOST_MISSED = 2


def build() -> Path:
    """The folder of the built application."""
    return built(PROJECT, "package") / "quarkus-app"


class _Process:
    """A JVM with a home folder of its own, which is where the RocketMQ client writes its log."""

    def __init__(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="java-peer-"))
        self._process: asyncio.subprocess.Process | None = None
        self.log = self._home / "log.txt"

    async def launch(self, *arguments: str, properties: Mapping[str, str], piped: bool) -> asyncio.subprocess.Process:
        options = [f"-D{name}={value}" for name, value in properties.items()]
        with self.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *java(self._home),
                *options,
                *arguments,
                cwd=self._home,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
                stdin=asyncio.subprocess.PIPE if piped else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if piped else log,
                stderr=log,
                limit=2**24,
            )
        return self._process

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    async def stop(self) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()
        shutil.rmtree(self._home, ignore_errors=True)


class JavaServer:
    """The reference's server (`RocketMQA2AServerRoutes` in Quarkus) around the executor `peers.Commanded`.

    Args:
        config: The endpoint, and the LITE topic and group on which the server's instances are addressed.
        names: Topic that it takes requests from, and its group.
        name: Name in its card.
        answer: Text that it answers with when a message is no command of it; None has it echo.
    """

    def __init__(self, config: RocketMQConfig, names: Names, *, name: str = "java", answer: str | None = None) -> None:
        self._process = _Process()
        self._answer = answer
        self.properties = {
            "rocketMQEndpoint": config.endpoint,
            "bizTopic": names.topic,
            "bizConsumerGroup": names.group,
            "workAgentResponseTopic": config.state_topic,
            "workAgentResponseGroupID": config.state_group,
            "peer.name": name,
        }
        """What it is told at its start."""
        self.url = ""
        """Its HTTP endpoint, where its card is."""

    async def __aenter__(self) -> Self:
        if self._answer is not None:
            file = self._process.log.with_name("answer.txt")
            file.write_text(self._answer, encoding="utf-8")
            self.properties["peer.answer"] = str(file)
        try:
            built = await asyncio.to_thread(build)
            process = await self._process.launch(
                "-jar", str(built / "quarkus-run.jar"), properties=self.properties, piped=False
            )
            async with asyncio.timeout(START_SECONDS):
                while not self._ready():
                    assert process.returncode is None, self._process.said()
                    await asyncio.sleep(0.05)
                # What it loads for its first answer takes it seconds on a busy machine.
                async with httpx.AsyncClient(timeout=START_SECONDS) as http:
                    (await http.get(f"{self.url}/.well-known/agent-card.json")).raise_for_status()
        except BaseException as error:
            error.add_note(self._process.said() if self._process.log.exists() else "it was not built")
            await self._process.stop()
            raise
        return self

    def _ready(self) -> bool:
        said = self._process.said()
        # It starts all the same when it can't reach RocketMQ, and says so in its log only.
        assert "RocketMQA2AServerRoutes error" not in said, said
        found = re.search(r"Listening on: (http://\S+)", said)
        self.url = found[1] if found else ""
        return bool(found) and "RocketMQA2AServerRoutes init successfully" in said

    async def __aexit__(self, *_: object) -> None:
        await self._process.stop()


class JavaCallError(Exception):
    """A call of the Java client failed.

    Attributes:
        type: Class of the innermost exception, without its package.
        code: JSON-RPC code; None for other failures.
    """

    def __init__(self, described: Mapping[str, Any]) -> None:
        super().__init__(described["message"])
        self.type: str = described["type"]
        self.code: int | None = described.get("code")


class JavaCaller:
    """The reference's client (`RocketMQTransport` in the a2a-java-sdk's `Client`), driven through `peers.Caller`.

    Args:
        answered: How many requests the servers that it calls have answered so far.
    """

    def __init__(self, answered: Callable[[], int]) -> None:
        self._process = _Process()
        self._answered = answered

    async def __aenter__(self) -> Self:
        try:
            built = await asyncio.to_thread(build)
            classes = [str(built / folder / "*") for folder in ("app", "lib/main", "lib/boot")]
            self._pipes = await self._process.launch(
                "-cp", os.pathsep.join(classes), "peers.Caller", properties={}, piped=True
            )
        except BaseException:
            await self._process.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._process.stop()

    async def connect(self, card: str | Mapping[str, Any], replies: JavaReplies) -> Any:
        """Have it read a card, itself or from its URL; returns what it read."""
        return await self.call(
            "connect",
            card=card,
            replyTopic=replies.topic,
            replyGroup=replies.group,
            liteTopic=uuid.uuid4().hex,
        )

    async def ask(self, op: str, **arguments: Any) -> Any:
        """Call the server; again when the client missed the answer.

        `RocketMQUtil.getResult` and `RocketMQTransport.sendMessageStreaming` register whoever waits for an answer only
        after they have sent the request; an answer that is quicker than that is lost. It happens in the first call,
        while the JVM still loads classes, and later on a busy machine. Only where the server did answer is it that.
        """
        for _ in range(MOST_MISSED):
            answered = self._answered()
            try:
                return await self.call(op, **arguments, seconds=MISSED_AFTER)
            except JavaCallError as error:
                if error.type != "Timeout":
                    raise
            assert self._answered() > answered, "the server has not answered"
        return await self.call(op, **arguments)

    async def call(self, op: str, **arguments: Any) -> Any:
        """Have it do something, and return what came of it.

        Raises:
            JavaCallError: It failed.
        """
        assert self._pipes.stdin is not None
        assert self._pipes.stdout is not None
        line = {"op": op, **{name: value for name, value in arguments.items() if value is not None}}
        self._pipes.stdin.write(json.dumps(line).encode() + b"\n")
        async with asyncio.timeout(ANSWER_SECONDS):
            answer = await self._pipes.stdout.readline()
        assert answer, self._process.said()
        found = json.loads(answer)
        if "error" in found:
            raise JavaCallError(found["error"])
        return found["result"]
