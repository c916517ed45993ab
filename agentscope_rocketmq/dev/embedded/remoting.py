"""As much of RocketMQ's *remoting* protocol as provisioning needs, so that its tools work here unchanged.

A name server that knows one broker, and that broker, on one TCP port: reading, writing and deleting of topics and
groups. `agentscope_rocketmq.rocketmq.admin` is the other side of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any

from agentscope_rocketmq.dev.embedded.refusal import Code, Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from agentscope_rocketmq.dev.embedded.catalog import Catalog
    from agentscope_rocketmq.dev.embedded.store import Store

__all__ = ["Remoting"]

logger = logging.getLogger(__name__)

# org.apache.rocketmq.remoting.protocol.ResponseCode
_SUCCESS = 0
_SYSTEM_ERROR = 1
_NOT_SUPPORTED = 3
_TOPIC_NOT_EXIST = 17
_GROUP_NOT_EXIST = 26
_INVALID_PARAMETER = 29

_MOST_BYTES = 1024 * 1024
_MOST_QUEUES = 1024
# What mqadmin's examples and real brokers call it.
_CLUSTER = "DefaultCluster"
_RESPONSE = 1
_READ_AND_WRITE = 6


class Remoting:
    """The TCP server.

    Args:
        catalog: Topics and groups.
        store: Where they are kept.
        broker_name: What the broker is called.
    """

    def __init__(self, catalog: Catalog, store: Store, *, broker_name: str) -> None:
        self._catalog = catalog
        self._store = store
        self._broker_name = broker_name
        self._server: asyncio.Server
        self._connections: set[asyncio.StreamWriter] = set()
        # org.apache.rocketmq.remoting.protocol.RequestCode
        self._handlers: Mapping[int, Callable[[Mapping[str, str], bytes], Any]] = {
            17: self._put_topic,
            106: self._cluster,
            200: self._put_group,
            207: self._delete_group,
            215: self._delete_topic,
            216: lambda _fields, _body: None,  # the name server's part of deleting a topic
            351: self._topic,
            352: self._group,
        }
        self.address = ""

    async def start(self, host: str, port: int) -> None:
        """Listen; 0 lets the kernel choose a port. `address` tells it."""
        self._server = await asyncio.start_server(self._serve, host, port)
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def aclose(self) -> None:
        """Stop listening and cut what is connected."""
        self._server.close()
        for writer in list(self._connections):
            writer.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            # Whoever hangs up or talks something else is let go.
            with contextlib.suppress(EOFError, OSError, ValueError, KeyError, TypeError, AttributeError):
                while True:
                    await self._answer_one(reader, writer)
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = int.from_bytes(await reader.readexactly(4), "big")
        if length > _MOST_BYTES:
            raise ValueError("too long")
        frame = await reader.readexactly(length)
        # The top byte of the header's length is its encoding; 0 is JSON.
        end = 4 + int.from_bytes(frame[1:4], "big")
        request = json.loads(frame[4:end])
        answer = {"opaque": request["opaque"], "flag": _RESPONSE, "language": "PYTHON", "version": request["version"]}
        body = b""
        try:
            handler = self._handlers.get(int(request["code"]))
            if handler is None:
                text = f"the embedded broker does not know request {request['code']}: use its gRPC port"
                answer |= {"code": _NOT_SUPPORTED, "remark": text}
            else:
                found = handler(request.get("extFields") or {}, frame[end:])
                body = b"" if found is None else json.dumps(found).encode()
                await self._store.committed()
                answer |= {"code": _SUCCESS}
        except Refused as refused:
            code = {Code.TOPIC_NOT_FOUND: _TOPIC_NOT_EXIST, Code.CONSUMER_GROUP_NOT_FOUND: _GROUP_NOT_EXIST}
            answer |= {"code": code.get(refused.code, _INVALID_PARAMETER), "remark": refused.text}
        header = json.dumps(answer).encode()
        writer.write((4 + len(header) + len(body)).to_bytes(4, "big") + len(header).to_bytes(4, "big") + header + body)
        await writer.drain()

    def _cluster(self, _fields: Mapping[str, str], _body: bytes) -> Any:
        name = self._broker_name
        return {
            "brokerAddrTable": {name: {"brokerName": name, "cluster": _CLUSTER, "brokerAddrs": {"0": self.address}}},
            "clusterAddrTable": {_CLUSTER: [name]},
        }

    def _topic(self, fields: Mapping[str, str], _body: bytes) -> Any:
        topic = self._catalog.topics.get(fields["topic"])
        if topic is None or topic.type is None:
            raise Refused(Code.TOPIC_NOT_FOUND, f"topic {fields['topic']} does not exist")
        return {
            "topicName": topic.name,
            "readQueueNums": topic.readable,
            "writeQueueNums": topic.width,
            "perm": _READ_AND_WRITE,
            "attributes": topic.attributes,
        }

    def _put_topic(self, fields: Mapping[str, str], _body: bytes) -> None:
        pairs = (pair.removeprefix("+").partition("=") for pair in fields.get("attributes", "").split(",") if pair)
        attributes = {name: value for name, _, value in pairs}
        queues, readable = (max(1, min(_MOST_QUEUES, int(fields[f"{what}QueueNums"]))) for what in ("write", "read"))
        self._catalog.put_topic(fields["topic"], attributes, queues=queues, readable=readable)

    def _delete_topic(self, fields: Mapping[str, str], _body: bytes) -> None:
        self._catalog.delete_topic(fields["topic"])

    def _group(self, fields: Mapping[str, str], _body: bytes) -> Any:
        group = self._catalog.groups.get(fields["group"])
        if group is None or not group.known:
            raise Refused(Code.CONSUMER_GROUP_NOT_FOUND, f"subscription group {fields['group']} does not exist")
        return {
            "groupName": group.name,
            "consumeMessageOrderly": bool(group.ordered),
            "retryMaxTimes": group.max_attempts - 1,
            "attributes": group.attributes,
        }

    def _put_group(self, _fields: Mapping[str, str], body: bytes) -> None:
        wanted = json.loads(body)
        attributes = {name.removeprefix("+"): str(value) for name, value in (wanted.get("attributes") or {}).items()}
        retries = wanted.get("retryMaxTimes")
        self._catalog.put_group(
            wanted["groupName"],
            attributes,
            ordered=True if wanted.get("consumeMessageOrderly") else None,
            max_attempts=None if retries is None else int(retries) + 1,
        )

    def _delete_group(self, fields: Mapping[str, str], _body: bytes) -> None:
        self._catalog.delete_group(fields["groupName"])
