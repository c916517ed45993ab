"""Writes the golden messages anew: what real Java peers and this package say to each other over a real RocketMQ.

    python -m tests.wire.capture        minutes on a fresh machine (Maven, RocketMQ), half a minute after that

Each line of `java-client.jsonl` and `java-server.jsonl` is one message: which call it belongs to, whose it is, and its
body as it was on the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a2a.types import (
    CancelTaskRequest,
    DeleteTaskPushNotificationConfigRequest,
    GetExtendedAgentCardRequest,
    GetTaskPushNotificationConfigRequest,
    GetTaskRequest,
    ListTaskPushNotificationConfigsRequest,
    SubscribeToTaskRequest,
    TaskPushNotificationConfig,
)

from agentscope_rocketmq import RocketMQ, RocketMQConfig
from agentscope_rocketmq.card import card_to_dict, parse_card
from agentscope_rocketmq.dev import ApacheRocketMQ
from agentscope_rocketmq.envelope import RequestEnvelope, ResponseEnvelope
from agentscope_rocketmq.provision import apply, plan
from agentscope_rocketmq.rocketmq.producer import Producer
from tests.commanded import Commanded
from tests.conftest import Names
from tests.java.conftest import JavaReplies
from tests.java.peers import JavaCaller, JavaCallError, JavaServer
from tests.services import card_for, request, server_for
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from a2a.client import Client

FOLDER = Path(__file__).parent
WORKER = Names("Worker", "WorkerConsumerGroup")
JAVA_REPLIES = JavaReplies("Replies", "CID_JAVA_LITE")
PUSH = "http://127.0.0.1:9/push"


class Recorder:
    """Notes every envelope that this process sends or reads."""

    def __init__(self, path: Path) -> None:
        self.call = ""
        self._path = path
        self._lines: list[str] = []

    def note(self, kind: str, sender: str, body: bytes) -> None:
        line = {"call": self.call, "kind": kind, "from": sender, "body": body.decode()}
        self._lines.append(json.dumps(line, ensure_ascii=False))

    def noted(self, text: str) -> bool:
        """Whether a message with that in it was noted."""
        return any(text in line for line in self._lines)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        send = Producer.send

        async def noted_send(producer: Producer, message: Any, **options: Any) -> Any:
            self.note("response" if b'"end"' in message.body else "request", "ours", message.body)
            return await send(producer, message, **options)

        Producer.send = noted_send  # type: ignore[method-assign, assignment]
        try:
            with self._noting(RequestEnvelope, "request"), self._noting(ResponseEnvelope, "response"):
                yield
        finally:
            Producer.send = send  # type: ignore[method-assign]
        self._path.write_text("".join(f"{line}\n" for line in self._lines), encoding="utf-8")

    @contextlib.contextmanager
    def _noting(self, envelope: Any, kind: str) -> Iterator[None]:
        decode = envelope.decode

        def noted_decode(data: bytes) -> Any:
            self.note(kind, "java", data)
            return decode(data)

        envelope.decode = noted_decode
        try:
            yield
        finally:
            envelope.decode = decode


@contextlib.asynccontextmanager
async def cluster() -> AsyncIterator[RocketMQConfig]:
    """A RocketMQ of its own, so that topics have the same names in every capture."""
    apache = ApacheRocketMQ(on_progress=print)
    await asyncio.to_thread(apache.start)
    try:
        config = RocketMQConfig(
            endpoint=apache.endpoint,
            namesrv=apache.namesrv,
            reply_topic=JAVA_REPLIES.topic,
            reply_group="CID_LITE",
            state_topic="Servers",
            state_group="CID_SERVERS_LITE",
        )
        cards = [parse_card(card_for(config, WORKER.topic))]
        await apply(plan(cards, config, java_groups=[JAVA_REPLIES.group]), config)
        yield config
    finally:
        await asyncio.to_thread(apache.stop)


async def java_client(config: RocketMQConfig) -> None:
    """The Java client calls our server."""
    executor, recorder = Commanded(), Recorder(FOLDER / "java-client.jsonl")
    card = card_for(config, WORKER.topic)
    card["capabilities"]["extendedAgentCard"] = True
    extended = parse_card(card)
    extended.supported_interfaces[0].protocol_version = "0.3"

    async def any_url(_url: str) -> bool:
        return True

    async with (
        server_for(
            executor, config, WORKER.topic, card=card, extended_card=extended, push_url_validator=any_url
        ) as server,
        JavaCaller(lambda: server.bridges[0].counters.answered) as java,
    ):
        await java.connect(server.url, JAVA_REPLIES)
        await java.ask("send", text="count 1")

        async def ask(call: str, op: str, **arguments: Any) -> Any:
            recorder.call = call
            with contextlib.suppress(JavaCallError):
                return await java.ask(op, **arguments)

        async def stream(call: str, text: str, until: str | None = None) -> Any:
            recorder.call, name = call, uuid.uuid4().hex
            await java.call("stream", name=name, text=f"held {name} {text}")
            executor.open(name)
            return await java.call("events", name=name, until=until)

        with recorder.recording():
            task = (await ask("send", "send", text="count 2"))["id"]
            await ask("send, a message for an answer", "send", text="message 杭州")
            await ask("send, a failing executor", "send", text="raise sorry")
            await stream("stream", "count 2")
            await stream("stream, a failing executor", "raise sorry")
            await ask("stream, an unknown task", "streamed", name="x", text="count 1", taskId="no-such-task")
            await ask("get", "get", id=task)
            await ask("get, an unknown task", "get", id="no-such-task")
            begun = await stream("stream, to be cancelled", "wait for ever", "working")
            await ask("cancel", "cancel", id=begun[0]["id"])
            await ask("cancel, an ended task", "cancel", id=task)
            await ask("push config set", "pushSet", id=task, config="mine", url=PUSH)
            await ask("push config get", "pushGet", id=task, config="mine")
            await ask("push config list", "pushList", id=task)
            await ask("push config delete", "pushDelete", id=task, config="mine")
            await ask("extended card", "extendedCard")


async def java_server(config: RocketMQConfig) -> None:
    """Our client calls the Java server."""
    recorder = Recorder(FOLDER / "java-server.jsonl")
    async with (
        JavaServer(config, WORKER) as server,
        RocketMQ(config, card_cache=None) as rocketmq,
        await rocketmq.client(server.url, session="trip-42") as client,
    ):
        card = json.dumps(card_to_dict(await rocketmq.card(server.url)), indent=2, ensure_ascii=False)
        (FOLDER / "java-card.json").write_text(f"{card}\n", encoding="utf-8")
        await events_of(client, "count 1")

        async def stream(call: str, text: str, **fields: Any) -> Any:
            recorder.call = call
            return await events_of(client, text, **fields)

        async def ask(call: str, awaited: Any) -> Any:
            recorder.call = call
            with contextlib.suppress(Exception):
                return await awaited

        with recorder.recording():
            await stream("stream", "count 2")
            await stream("stream, a message for an answer", "message 杭州")
            await stream("stream, a task that fails", "fail sorry")
            await stream("stream, a question", "ask")
            configuration = client._config  # type: ignore[attr-defined]
            configuration.streaming = False
            [sent] = await stream("send", "count 2")
            task = sent.task.id
            await stream("send, a failing executor", "raise sorry")
            await ask("get", client.get_task(GetTaskRequest(id=task)))
            await ask("get, an unknown task", client.get_task(GetTaskRequest(id="no-such-task")))
            await ask("cancel, an ended task", client.cancel_task(CancelTaskRequest(id=task)))
            config_of_task = TaskPushNotificationConfig(task_id=task, id="mine", url=PUSH)
            await ask("push config set", client.create_task_push_notification_config(config_of_task))
            wanted = GetTaskPushNotificationConfigRequest(task_id=task, id="mine")
            await ask("push config get", client.get_task_push_notification_config(wanted))
            every = ListTaskPushNotificationConfigsRequest(task_id=task)
            await ask("push config list", client.list_task_push_notification_configs(every))
            deleted = DeleteTaskPushNotificationConfigRequest(task_id=task, id="mine")
            await ask("push config delete", client.delete_task_push_notification_config(deleted))
            await ask("extended card", client.get_extended_agent_card(GetExtendedAgentCardRequest()))
            configuration.streaming = True
            waiting = client.send_message(request("wait gate"))
            recorder.call = "stream, to be resubscribed"
            begun = [await anext(waiting) for _ in range(3)]
            recorder.call = "resubscribe"
            tap = client.subscribe(SubscribeToTaskRequest(id=begun[-1].artifact_update.task_id))
            tapped = asyncio.create_task(whole(tap))
            await until(lambda: recorder.noted("tasks/resubscribe"))
            # Nothing says that it listens: so ask for something else, which is answered after it.
            await ask("get, again", client.get_task(GetTaskRequest(id=task)))
            await stream("open the gate", "open gate")
            await whole(waiting)
            await tapped
            http = client._transport.httpx_client  # type: ignore[attr-defined]
            for call, body in {
                "no JSON": "{",
                "an unknown method": '{"jsonrpc":"2.0","id":1,"method":"tasks/dance","params":{}}',
                "bad parameters": '{"jsonrpc":"2.0","id":1,"method":"tasks/get","params":{"id":null}}',
                "bad parameters of a stream": '{"jsonrpc":"2.0","id":1,"method":"message/stream","params":{}}',
            }.items():
                await ask(call, http.post(server.url, content=body))


async def whole(stream: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in stream]


async def events_of(client: Client, text: str, **fields: Any) -> list[Any]:
    events = []
    with contextlib.suppress(Exception):
        async for event in client.send_message(request(text, **fields)):
            events.append(event)  # noqa: PERF401  (those before a failure count)
    return events


async def main() -> None:
    async with cluster() as config:
        await java_client(config)
    async with cluster() as config:
        await java_server(config)


if __name__ == "__main__":
    asyncio.run(main())
