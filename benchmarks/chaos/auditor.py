"""Reads raw LiteTopics with the bare protocol and accounts for each request. It shares no code with the readers."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import grpc
from rocketmq.grpc_protocol import definition_pb2 as definition
from rocketmq.grpc_protocol import service_pb2 as service
from rocketmq.grpc_protocol import service_pb2_grpc as stubs

QUIET = 12.0  # seconds without a message after which all is read: more than two polls
POLLS = 4
ROUNDS = 2
NAMES_A_CALL = 100


@dataclass
class Run:
    """One run of a request, as it lies on the broker: its messages by number."""

    messages: dict[int, dict[str, Any]] = field(default_factory=dict)
    doubled: int = 0
    disordered: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether its last message is there, and all before it."""
        numbers = sorted(self.messages)
        return numbers == list(range(len(numbers))) and bool(self.messages[numbers[-1]].get("end"))

    @property
    def holes(self) -> int:
        """Messages that are missing before one that is there."""
        return max(self.messages, default=-1) + 1 - len(self.messages)

    def results(self) -> list[dict[str, Any]]:
        """The A2A results in it, in order."""
        found = []
        for number in sorted(self.messages):
            message = self.messages[number]
            body = message.get("responseBody") or ""
            texts = [body]
            if message.get("stream"):
                texts = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
            found += [json.loads(text) for text in texts if text]
        return found

    def ends(self) -> list[str]:
        """The final states in it."""
        states = []
        for response in self.results():
            result = response.get("result") or {}
            status = (result.get("task") or result.get("statusUpdate") or {}).get("status") or {}
            state = "error" if response.get("error") else str(status.get("state", ""))
            if state == "error" or state.rsplit("_", 1)[-1] in ("COMPLETED", "CANCELED", "FAILED", "REJECTED"):
                states.append(state.rsplit("_", 1)[-1].lower())
        return states

    def texts(self) -> list[str]:
        """The texts of its artifacts, in order."""
        found = []
        for response in self.results():
            result = response.get("result") or {}
            artifacts = (result.get("task") or {}).get("artifacts") or []
            if "artifactUpdate" in result:
                artifacts = [result["artifactUpdate"]["artifact"]]
            found += [part["text"].strip() for artifact in artifacts for part in artifact["parts"] if part.get("text")]
        return found


async def read(endpoint: str, topic: str, group: str, lite_topics: list[str]) -> list[list[dict[str, Any]]]:
    """All messages of LiteTopics, each from its first on, as JSON objects with one member more.

    That is `storedAt`: when the broker stored it, seconds since 1970.

    Args:
        endpoint: Where.
        topic: The LITE topic.
        group: A group that is bound to it and that nobody else reads with.
        lite_topics: Their names.
    """
    client = f"auditor-{uuid.uuid4().hex}"
    metadata = (
        ("x-mq-language", "PYTHON"),
        ("x-mq-protocol", "GRPC_V2"),
        ("x-mq-client-version", "5.1.2"),
        ("x-mq-client-id", client),
        ("x-mq-namespace", ""),
    )
    async with grpc.aio.insecure_channel(endpoint, options=(("grpc.max_receive_message_length", -1),)) as channel:
        stub = stubs.MessagingServiceStub(channel)
        telemetry = stub.Telemetry(metadata=metadata)
        settings = definition.Settings(client_type=definition.ClientType.LITE_PUSH_CONSUMER)
        settings.subscription.group.name = group
        settings.subscription.subscriptions.add(
            topic=definition.Resource(name=topic),
            expression=definition.FilterExpression(type=definition.FilterType.TAG, expression="*"),
        )
        await telemetry.write(service.TelemetryCommand(settings=settings))
        await telemetry.read()
        beating = asyncio.create_task(_beat(stub, metadata, group))
        logs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in lite_topics}
        try:
            # A broker overlooks a message now and then: each LiteTopic is looked into again behind the last one read.
            for _ in range(ROUNDS):
                await _read_on(stub, metadata, topic, group, logs)
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            telemetry.cancel()
    for name, log in logs.items():
        if sorted(log) != list(range(len(log))):
            raise AssertionError(f"LiteTopic {name} was not read whole: {len(log)} messages up to offset {max(log)}")
    return [[log[offset] for offset in sorted(log)] for log in logs.values()]


async def _beat(stub: Any, metadata: Any, group: str) -> None:
    request = service.HeartbeatRequest(client_type=definition.ClientType.LITE_PUSH_CONSUMER)
    request.group.name = group
    while True:
        with contextlib.suppress(grpc.RpcError):
            await stub.Heartbeat(request, metadata=metadata, timeout=10)
        await asyncio.sleep(4)


async def _subscribe(
    stub: Any, metadata: Any, topic: str, group: str, names: list[str], action: str, offset: int | None = None
) -> None:
    request = service.SyncLiteSubscriptionRequest(
        action=definition.LiteSubscriptionAction.Value(action),
        topic=definition.Resource(name=topic),
        group=definition.Resource(name=group),
        lite_topic_set=names,
    )
    if offset is not None:
        request.offset_option.offset = offset
    answer = await stub.SyncLiteSubscription(request, metadata=metadata, timeout=30)
    if answer.status.code != definition.Code.OK:
        raise AssertionError(f"The auditor can't read {topic}: {answer.status}")


async def _read_on(
    stub: Any, metadata: Any, topic: str, group: str, logs: dict[str, dict[int, dict[str, Any]]]
) -> None:
    names = list(logs)
    for start in range(0, len(names), NAMES_A_CALL):
        await _subscribe(stub, metadata, topic, group, names[start : start + NAMES_A_CALL], "PARTIAL_REMOVE")
    by_offset: dict[int, list[str]] = defaultdict(list)
    for name, log in logs.items():
        by_offset[len(log)].append(name)
    for offset, group_of_names in by_offset.items():
        for start in range(0, len(group_of_names), NAMES_A_CALL):
            some = group_of_names[start : start + NAMES_A_CALL]
            await _subscribe(stub, metadata, topic, group, some, "PARTIAL_ADD", offset)
    loop = asyncio.get_running_loop()
    heard_at = loop.time()

    async def reading() -> None:
        nonlocal heard_at
        while loop.time() - heard_at < QUIET:
            messages = await _poll(stub, metadata, topic, group)
            if not messages:
                continue
            heard_at = loop.time()
            ack = service.AckMessageRequest()
            ack.group.name, ack.topic.name = group, topic
            for message in messages:
                system = message.system_properties
                is_gzip = system.body_encoding == definition.Encoding.GZIP
                said = json.loads(gzip.decompress(message.body) if is_gzip else message.body)
                stored_at = system.store_timestamp.ToNanoseconds() / 1e9
                logs[system.lite_topic][system.queue_offset] = said | {"storedAt": stored_at}
                ack.entries.add(
                    message_id=system.message_id, receipt_handle=system.receipt_handle, lite_topic=system.lite_topic
                )
            await stub.AckMessage(ack, metadata=metadata, timeout=30)

    # Apart from each other: one that waits for messages holds up no other.
    await asyncio.gather(*(reading() for _ in range(POLLS)))


async def _poll(stub: Any, metadata: Any, topic: str, group: str) -> list[Any]:
    request = service.ReceiveMessageRequest(
        group=definition.Resource(name=group),
        message_queue=definition.MessageQueue(topic=definition.Resource(name=topic), id=-1),
        filter_expression=definition.FilterExpression(type=definition.FilterType.TAG, expression="*"),
        batch_size=32,
        attempt_id=uuid.uuid4().hex,
    )
    request.invisible_duration.FromSeconds(30)
    request.long_polling_timeout.FromSeconds(5)
    messages = []
    with contextlib.suppress(grpc.RpcError):
        async for answer in stub.ReceiveMessage(request, metadata=metadata, timeout=12):
            if answer.HasField("message"):
                messages.append(answer.message)  # noqa: PERF401  (what came before a failure counts)
    return messages


def runs_of(logs: list[list[dict[str, Any]]]) -> dict[str, dict[tuple[int, str], Run]]:
    """The runs of each request in LiteTopics, by attempt and run."""
    requests: dict[str, dict[tuple[int, str], Run]] = defaultdict(lambda: defaultdict(Run))
    for log in logs:
        for message in log:
            if "seq" not in message or "requestId" not in message:
                continue  # the record that opens a session
            run = requests[message["requestId"]][message["attempt"], message["run"]]
            number = message["seq"]
            run.doubled += number in run.messages
            run.disordered += number not in run.messages and number < max(run.messages, default=-1)
            run.messages[number] = message
    return requests
