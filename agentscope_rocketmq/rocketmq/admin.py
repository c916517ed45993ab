"""Topics and consumer groups of a RocketMQ cluster, by the protocol that its own `mqadmin` speaks.

The gRPC protocol can't create anything. This is the small part of RocketMQ's older *remoting* protocol that
provisioning needs: a frame of length, header length, JSON header and body over TCP, to the name server for the list of
brokers and to each broker for its topics and groups. No Java is needed for it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import itertools
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from agentscope_rocketmq.config import parse_endpoints
from agentscope_rocketmq.errors import (
    BrokerError,
    BrokerUnreachable,
    ClosedError,
    ConfigurationError,
    IllegalRequest,
    NotAuthorized,
    Throttled,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentscope_rocketmq.config import RocketMQConfig

__all__ = ["Admin", "GroupSettings", "TopicSettings"]

# org.apache.rocketmq.remoting.protocol.RequestCode
_UPDATE_AND_CREATE_TOPIC = 17
_GET_BROKER_CLUSTER_INFO = 106
_UPDATE_AND_CREATE_SUBSCRIPTION_GROUP = 200
_DELETE_SUBSCRIPTION_GROUP = 207
_DELETE_TOPIC_IN_BROKER = 215
_DELETE_TOPIC_IN_NAMESRV = 216
_GET_TOPIC_CONFIG = 351
_GET_SUBSCRIPTION_GROUP_CONFIG = 352

# org.apache.rocketmq.remoting.protocol.ResponseCode
_SUCCESS = 0
_SYSTEM_BUSY = 2
_NO_PERMISSION = 16
_TOPIC_NOT_EXIST = 17
_SUBSCRIPTION_GROUP_NOT_EXIST = 26
_INVALID_PARAMETER = 29
_FLOW_CONTROL = 215
_SAYS_AUTHENTICATION = re.compile(r"authenticat|authoriz|signature|AclException|No accessKey|username", re.IGNORECASE)

_MASTER = "0"
_READ_AND_WRITE = 6
_HEADER_LENGTH_BYTES = 4
_MOST_FRAME_BYTES = 64 * 1024 * 1024
# fastjson writes the keys of a map of numbers without quotes, which is not JSON: {0:"10.0.0.1:10911"}.
_BARE_KEY = re.compile(r"([{,])(\d+):")


@dataclass(frozen=True, slots=True)
class TopicSettings:
    """A topic as a broker has it.

    Attributes:
        name: Full name, namespace included (`NS%topic`).
        attributes: `message.type`, `lite.topic.expiration`, … Absent ones have RocketMQ's default.
        read_queues: Queues that consumers read.
        write_queues: Queues that producers write; a PRIORITY topic's levels.
        permission: 2 write, 4 read, 6 both.
    """

    name: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    read_queues: int = 8
    write_queues: int = 8
    permission: int = _READ_AND_WRITE

    @property
    def message_type(self) -> str:
        """`NORMAL`, `LITE`, `PRIORITY`, and so on."""
        return self.attributes.get("message.type", "NORMAL")


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """A consumer group as a broker has it.

    Attributes:
        name: Full name, namespace included (`NS%group`).
        attributes: `lite.bind.topic`, `lite.sub.model`, … Absent ones have RocketMQ's default.
        ordered: Whether the official clients hand over the messages of a queue or LiteTopic one at a time (`mqadmin
            updateSubGroup -o true`); this package's own consumers keep the order either way. Writing False leaves a
            group that is ordered as it is.
    """

    name: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    ordered: bool = False


class Admin:
    """A client of one cluster's name server and brokers. Use it as an async context manager.

    A broker is addressed by its `host:port` as `brokers()` gives it. Connections are plain TCP, opened at first use.

    Args:
        namesrv: `host:port` of the name server; several separated by `;`.
        access_key: Access key of a user that may create topics and groups; None sends calls unsigned.
        secret_key: Secret key that belongs to it.
        timeout: Seconds that each call may take, connecting included.

    Raises:
        ConfigurationError: `namesrv` is malformed.
    """

    def __init__(
        self,
        namesrv: str,
        *,
        access_key: str | None = None,
        secret_key: str | None = None,
        timeout: float = 10.0,
    ) -> None:
        self.namesrvs = parse_endpoints(namesrv)
        self._access_key = access_key
        self._secret_key = secret_key
        self._timeout = timeout
        self._connections: dict[str, _Connection] = {}
        self._closed = False

    @classmethod
    def from_config(cls, config: RocketMQConfig, *, namesrv: str | None = None) -> Self:
        """A client with a configuration's credentials.

        Args:
            config: Where name server, credentials and connect timeout come from.
            namesrv: Another name server than the configuration's.

        Raises:
            ConfigurationError: Neither names a name server.
        """
        address = namesrv or config.namesrv
        if address is None:
            raise ConfigurationError(
                "Topics and groups are made through the name server: set ROCKETMQ_NAMESRV (or --namesrv) "
                "to its host:port, usually port 9876."
            )
        secret = config.secret_key.get_secret_value() if config.secret_key is not None else None
        return cls(address, access_key=config.access_key, secret_key=secret, timeout=config.timeouts.connect)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections. Repeated calls are safe."""
        self._closed = True
        connections, self._connections = list(self._connections.values()), {}
        for connection in connections:
            connection.close()

    async def brokers(self, *, cluster: str | None = None) -> dict[str, str]:
        """The master brokers of a cluster.

        Args:
            cluster: Its name; None takes the only one that the name server knows.

        Returns:
            Broker name -> `host:port`, as the broker announces itself; empty when none has registered yet.

        Raises:
            ConfigurationError: No such cluster, or several and none was chosen.
            BrokerError: The name server does not answer or refuses.
        """
        body = await self._ask_namesrv(_GET_BROKER_CLUSTER_INFO, {}, "Listing the brokers")
        information = _decode_json(body, "cluster information")
        clusters: Mapping[str, list[str]] = information.get("clusterAddrTable") or {}
        if cluster is None:
            if len(clusters) > 1:
                raise ConfigurationError(
                    f"The name server knows several clusters ({', '.join(sorted(clusters))}): choose one."
                )
            names = [name for members in clusters.values() for name in members]
        elif cluster in clusters:
            names = clusters[cluster]
        else:
            raise ConfigurationError(
                f"The name server knows no cluster {cluster!r}; it has: {', '.join(sorted(clusters)) or 'none'}."
            )
        table = information.get("brokerAddrTable") or {}
        addresses = {name: table.get(name, {}).get("brokerAddrs", {}).get(_MASTER) for name in sorted(names)}
        return {name: address for name, address in addresses.items() if address}

    async def topic(self, broker: str, name: str) -> TopicSettings | None:
        """A topic as a broker has it, or None when it has no such topic."""
        body = await self._ask(
            broker,
            _GET_TOPIC_CONFIG,
            {"topic": name},
            f"Reading topic {name!r}",
            absent=_TOPIC_NOT_EXIST,
        )
        if body is None:
            return None
        found = _decode_json(body, f"topic {name!r}")
        return TopicSettings(
            name=name,
            attributes=dict(found.get("attributes") or {}),
            read_queues=int(found.get("readQueueNums", 0)),
            write_queues=int(found.get("writeQueueNums", 0)),
            permission=int(found.get("perm", 0)),
        )

    async def put_topic(self, broker: str, topic: TopicSettings) -> None:
        """Create a topic on a broker, or change it: queues and permission as given, attributes added or replaced.

        Attributes that `topic` does not name stay as they are. All go out in one write: a LITE topic whose
        `lite.topic.expiration` came in a later one would never expire.

        Raises:
            IllegalRequest: The broker does not accept the name or an attribute.
            NotAuthorized: The credentials are missing, wrong or lack the permission.
            BrokerError: It failed otherwise.
        """
        await self._ask(
            broker,
            _UPDATE_AND_CREATE_TOPIC,
            {
                "topic": topic.name,
                "defaultTopic": "TBW102",
                "readQueueNums": topic.read_queues,
                "writeQueueNums": topic.write_queues,
                "perm": topic.permission,
                "topicFilterType": "SINGLE_TAG",
                "topicSysFlag": 0,
                "order": "false",
                "attributes": ",".join(f"+{key}={value}" for key, value in topic.attributes.items()),
            },
            f"Writing topic {topic.name!r}",
        )

    async def delete_topic(self, broker: str, name: str) -> None:
        """Delete a topic with all its messages from a broker, and its route from the name servers."""
        doing = f"Deleting topic {name!r}"
        await self._ask(broker, _DELETE_TOPIC_IN_BROKER, {"topic": name}, doing)
        for namesrv in self.namesrvs:
            await self._ask(namesrv, _DELETE_TOPIC_IN_NAMESRV, {"topic": name}, doing)

    async def group(self, broker: str, name: str) -> GroupSettings | None:
        """A consumer group as a broker has it, or None when it has no such group."""
        found = await self._group_fields(broker, name)
        if found is None:
            return None
        attributes = dict(found.get("attributes") or {})
        return GroupSettings(name=name, attributes=attributes, ordered=found.get("consumeMessageOrderly") is True)

    async def put_group(self, broker: str, group: GroupSettings) -> None:
        """Create a consumer group on a broker, or change it: attributes added or replaced, all else stays.

        Raises:
            IllegalRequest: The broker does not accept the name or an attribute.
            NotAuthorized: The credentials are missing, wrong or lack the permission.
            BrokerError: It failed otherwise.
        """
        # A write replaces the group's other settings (retries, …) as a whole: send back what is there.
        fields = await self._group_fields(broker, group.name) or {"groupName": group.name}
        fields["attributes"] = {f"+{key}": value for key, value in group.attributes.items()}
        if group.ordered:
            fields["consumeMessageOrderly"] = True
        await self._ask(
            broker,
            _UPDATE_AND_CREATE_SUBSCRIPTION_GROUP,
            {},
            f"Writing group {group.name!r}",
            body=json.dumps(fields).encode(),
        )

    async def delete_group(self, broker: str, name: str) -> None:
        """Delete a consumer group and its offsets from a broker."""
        await self._ask(
            broker,
            _DELETE_SUBSCRIPTION_GROUP,
            {"groupName": name, "cleanOffset": "true"},
            f"Deleting group {name!r}",
        )

    async def _group_fields(self, broker: str, name: str) -> dict[str, Any] | None:
        body = await self._ask(
            broker,
            _GET_SUBSCRIPTION_GROUP_CONFIG,
            {"group": name},
            f"Reading group {name!r}",
            absent=_SUBSCRIPTION_GROUP_NOT_EXIST,
        )
        return None if body is None else _decode_json(body, f"group {name!r}")

    async def _ask_namesrv(self, code: int, fields: Mapping[str, object], doing: str) -> bytes:
        failures: list[str] = []
        for address in self.namesrvs:
            try:
                return await self._ask(address, code, fields, doing) or b""
            except BrokerUnreachable as error:
                failures.append(str(error))
        raise BrokerUnreachable(" ".join(failures), transient=True)

    async def _ask(
        self,
        address: str,
        code: int,
        fields: Mapping[str, object],
        doing: str,
        *,
        body: bytes = b"",
        absent: int | None = None,
    ) -> bytes | None:
        """One call: the answer's body, or None when it has the code `absent`."""
        if self._closed:
            raise ClosedError("This admin client is closed.")
        extra = {key: str(value) for key, value in fields.items()}
        if self._access_key is not None and self._secret_key is not None:
            extra = _sign(extra, body, self._access_key, self._secret_key)
        connection = self._connections.setdefault(address, _Connection(address))
        try:
            async with asyncio.timeout(self._timeout):
                answer = await connection.call(code, extra, body)
        except TimeoutError:
            raise BrokerUnreachable(
                f"{doing}: no answer from {address} within {self._timeout:g} s. {_REACH}", transient=True
            ) from None
        except (OSError, EOFError) as error:
            text = f"{doing}: {address} can't be reached ({error}). {_REACH}"
            raise BrokerUnreachable(text, transient=True) from error
        if answer.code == _SUCCESS:
            return answer.body
        if answer.code == absent:
            return None
        raise _refusal(answer, f"{doing} at {address}")


_REACH = (
    "Name server and brokers must be reachable from here under the addresses they announce "
    "(brokerIP1 and listenPort of broker.conf)."
)


@dataclass(frozen=True, slots=True)
class _Answer:
    code: int
    remark: str
    body: bytes


class _Connection:
    """One TCP connection, one call at a time; opened anew after any failure."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._one_at_a_time = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def call(self, code: int, fields: Mapping[str, str], body: bytes) -> _Answer:
        async with self._one_at_a_time:
            done = False
            try:
                if self._streams is None:
                    host, _, port = self._address.rpartition(":")
                    self._streams = await asyncio.open_connection(host.strip("[]"), int(port))
                reader, writer = self._streams
                number = next(self._numbers)
                writer.write(_encode_frame(code, number, fields, body))
                await writer.drain()
                answer = await _read_answer(reader, number)
                done = True
            finally:
                # Also after a cancellation: half a frame may be in the stream.
                if not done:
                    self.close()
        return answer

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def _encode_frame(code: int, number: int, fields: Mapping[str, str], body: bytes) -> bytes:
    header = json.dumps(
        {
            "code": code,
            "language": "PYTHON",
            "version": _VERSION,
            "opaque": number,
            "flag": 0,
            "extFields": fields,
            "serializeTypeCurrentRPC": "JSON",
        }
    ).encode()
    # The top byte of the header length is the header's encoding; 0 is JSON.
    return b"".join(
        (
            (4 + len(header) + len(body)).to_bytes(4, "big"),
            len(header).to_bytes(4, "big"),
            header,
            body,
        )
    )


# The number of 5.5.0 (org.apache.rocketmq.common.MQVersion): name servers write older clients looser JSON.
_VERSION = 513


async def _read_answer(reader: asyncio.StreamReader, number: int) -> _Answer:
    while True:
        length = int.from_bytes(await reader.readexactly(4), "big")
        if not _HEADER_LENGTH_BYTES <= length <= _MOST_FRAME_BYTES:
            raise EOFError(f"{length} is no length of a RocketMQ frame: is another service listening there?")
        frame = await reader.readexactly(length)
        header_length = int.from_bytes(frame[1:4], "big")
        try:
            header = json.loads(frame[4 : 4 + header_length])
            if header["opaque"] == number and header["flag"] & 1:
                return _Answer(int(header["code"]), str(header.get("remark") or ""), frame[4 + header_length :])
        except (ValueError, KeyError, TypeError) as error:
            raise EOFError("what came back is no RocketMQ frame: is another service listening there?") from error


def _sign(fields: Mapping[str, str], body: bytes, access_key: str, secret_key: str) -> dict[str, str]:
    """Add what the brokers' access control checks: HMAC-SHA1 over the values, in the order of their keys, and body."""
    signed = {**fields, "AccessKey": access_key}
    content = "".join(signed[key] for key in sorted(signed)).encode() + body
    digest = hmac.new(secret_key.encode(), content, hashlib.sha1).digest()
    return {**signed, "Signature": base64.b64encode(digest).decode()}


def _refusal(answer: _Answer, doing: str) -> BrokerError:
    remark = answer.remark.strip().splitlines()[0][:500].rstrip(". ") if answer.remark.strip() else "no reason given"
    text = f"{doing} was refused: {remark} (code {answer.code})."
    if answer.code == _NO_PERMISSION or _SAYS_AUTHENTICATION.search(remark):
        return NotAuthorized(
            f"{text} Check ROCKETMQ_ACCESS_KEY and ROCKETMQ_SECRET_KEY, and that this user may manage topics and "
            "groups."
        )
    if answer.code == _INVALID_PARAMETER:
        return IllegalRequest(text)
    if "unsupported key" in remark:
        return IllegalRequest(f"{text} The attributes of LiteTopics need Apache RocketMQ 5.5 or newer.")
    if answer.code in (_SYSTEM_BUSY, _FLOW_CONTROL):
        return Throttled(text, transient=True)
    return BrokerError(text)


def _decode_json(body: bytes, what: str) -> dict[str, Any]:
    text = body.decode(errors="replace")
    for candidate in (text, _BARE_KEY.sub(r'\1"\2":', text)):
        try:
            value = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    raise BrokerError(f"RocketMQ's {what} can't be read: it is not JSON.")
