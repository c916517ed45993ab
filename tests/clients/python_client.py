"""The official Python client behind a pipe: one command a line in, one answer or event a line out, as JSON.

A process of its own, since importing that client makes log folders in the home directory and configures logging.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from typing import Any

from rocketmq import (
    ClientConfiguration,
    ConsumeResult,
    Credentials,
    FilterExpression,
    LitePushConsumer,
    Message,
    MessageListener,
    Producer,
    PushConsumer,
    SimpleConsumer,
    TransactionChecker,
    TransactionResolution,
)
from rocketmq.v5.exception import InternalErrorException

_output = threading.Lock()


def say(**line: Any) -> None:
    with _output:
        print(json.dumps(line), flush=True)


def described(message: Any) -> dict[str, Any]:
    return {
        "id": message.message_id,
        "topic": message.topic,
        "body": message.body.decode(),
        "tag": message.tag,
        "keys": list(message.keys),
        "properties": message.properties,
        "message_group": message.message_group,
        "lite_topic": message.lite_topic,
        "attempt": message.delivery_attempt,
    }


class Listener(MessageListener):  # type: ignore[misc]
    """Says what comes; fails as often with a message as its property `fail` says."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()

    def consume(self, message: Any) -> Any:
        fails = self.failures[message.message_id] < int(message.properties.get("fail", "0"))
        self.failures[message.message_id] += fails
        say(event=described(message))
        return ConsumeResult.FAILURE if fails else ConsumeResult.SUCCESS


class Checker(TransactionChecker):  # type: ignore[misc]
    def check(self, message: Any) -> Any:  # noqa: ARG002  (the client's interface)
        return TransactionResolution.ROLLBACK


class Commands:
    """What can be asked of it, by name."""

    def __init__(self, endpoint: str) -> None:
        self.configuration = ClientConfiguration(endpoint, Credentials(), request_timeout=10)
        self.started: list[Any] = []
        self.received: dict[str, Any] = {}
        self.producer: Any = None
        self.simple_consumer: Any = None
        self.lite_consumer: Any = None

    def start(self, client: Any) -> Any:
        client.startup()
        self.started.append(client)
        return client

    def producer_of(self, topic: str) -> None:
        self.producer = self.start(Producer(self.configuration, [topic], Checker()))

    def send(self, topic: str, body: str, **options: Any) -> str:
        message = Message()
        message.topic, message.body = topic, body.encode()
        if "key" in options:
            message.keys = options["key"]
        for name, value in options.get("properties", {}).items():
            message.add_property(name, value)
        for name in ("tag", "message_group", "lite_topic", "priority"):
            if name in options:
                setattr(message, name, options[name])
        if "delay" in options:
            message.delivery_timestamp = int(time.time() + options["delay"])
        if "transaction" not in options:
            return str(self.producer.send(message).message_id)
        transaction = self.producer.begin_transaction()
        receipt = self.producer.send(message, transaction)
        transaction.commit()
        return str(receipt.message_id)

    def simple(self, group: str, topic: str, tag: str = "*") -> None:
        subscription = {topic: FilterExpression(tag)}
        self.simple_consumer = self.start(SimpleConsumer(self.configuration, group, subscription, await_duration=5))

    def receive(self, count: int) -> list[dict[str, Any]]:
        messages = self.receive_once_known(count)
        self.received.update((message.message_id, message) for message in messages)
        return [described(message) for message in messages]

    def receive_once_known(self, count: int) -> Any:
        # Version 5.1.2 starts a simple consumer without waiting until the broker has taken its settings.
        while True:
            try:
                return self.simple_consumer.receive(count, 30)
            except InternalErrorException as error:
                if "settings" not in str(error):
                    raise
                time.sleep(0.05)

    def ack(self, message_id: str) -> None:
        self.simple_consumer.ack(self.received[message_id])

    def hide(self, message_id: str, seconds: int) -> None:
        self.simple_consumer.change_invisible_duration(self.received[message_id], seconds)

    def push(self, group: str, topic: str, tag: str = "*") -> None:
        subscription = {topic: FilterExpression(tag)}
        self.start(PushConsumer(self.configuration, group, Listener(), subscription))

    def lite(self, group: str, topic: str) -> None:
        self.lite_consumer = self.start(LitePushConsumer(self.configuration, group, topic, Listener()))

    def subscribe(self, name: str) -> None:
        self.lite_consumer.subscribe_lite(name)
        # Version 5.1.2 sends the letters of the name; the name itself goes out when all subscriptions are sent again,
        # which it does by itself every 30 s.
        self.lite_consumer.subscribe_lite_all()

    def unsubscribe(self, name: str) -> None:
        self.lite_consumer.unsubscribe_lite(name)

    def close(self) -> None:
        while self.started:
            self.started.pop().shutdown()


def main() -> None:
    commands = Commands(sys.argv[1])
    for line in sys.stdin:
        command = json.loads(line)
        try:
            say(answer=getattr(commands, command.pop("do"))(**command))
        except Exception as error:
            say(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
