"""The embedded broker by itself: start and stop, first use, provisioning, renewal, expiration, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import sqlite3

import pytest

from agentscope_rocketmq.dev import DevBroker
from agentscope_rocketmq.dev.embedded import broker as broker_module
from agentscope_rocketmq.dev.embedded.engine import Engine
from agentscope_rocketmq.dev.embedded.handles import Handles
from agentscope_rocketmq.dev.embedded.reading import Reader
from agentscope_rocketmq.dev.embedded.settings import Settings
from agentscope_rocketmq.dev.embedded.store import Store
from agentscope_rocketmq.errors import BrokerError, ClosedError, ConfigurationError, TopicNotFound, TopicTypeMismatch
from agentscope_rocketmq.rocketmq.admin import Admin, GroupSettings, TopicSettings
from agentscope_rocketmq.rocketmq.connection import Connection
from agentscope_rocketmq.rocketmq.lite import LiteConsumer, LiteLost, Position
from agentscope_rocketmq.rocketmq.message import Message
from agentscope_rocketmq.rocketmq.producer import Producer
from agentscope_rocketmq.rocketmq.protocol import definition, service
from tests.contract.wire import Code, Peer, attempts, bodies, message, offsets, peer_of, resource
from tests.waiting import LIMIT, take, until

# ---- start, stop ----


async def test_it_tells_its_endpoint_only_while_it_runs():
    broker = DevBroker()
    with pytest.raises(ClosedError, match="async with"):
        _ = broker.endpoint
    async with broker:
        host, _, port = broker.endpoint.rpartition(":")
        assert (host, int(port) > 0) == ("127.0.0.1", True)
    with pytest.raises(ClosedError):
        _ = broker.namesrv
    await broker.aclose()


async def test_it_runs_once_and_its_close_goes_on_when_the_caller_is_cancelled():
    broker = DevBroker()
    await broker.start()
    with pytest.raises(ClosedError, match="another one"):
        await broker.start()
    async with peer_of(broker, "SIMPLE_CONSUMER", "G", "T") as waiting:
        poll = asyncio.create_task(waiting.poll("G", "T", wait=20))
        engine = broker._engine
        assert engine is not None
        await until(lambda: any(map(len, engine._waiters.get("T", {}).values())))
        closing = asyncio.create_task(broker.aclose())
        await until(lambda: broker._closing.begun)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        # A poll ends as if its time was over, not with an error.
        status, messages = await poll
        assert (status.code, messages) == (Code.MESSAGE_NOT_FOUND, [])
        await broker.aclose()
    assert broker._closing.done
    with pytest.raises(ClosedError):
        await broker.start()


async def test_what_a_client_subscribes_after_its_good_bye_ends_with_its_stream():
    async with DevBroker() as broker:
        engine = broker._engine
        assert engine is not None
        async with peer_of(broker, "LITE_PUSH_CONSUMER", "G", "L") as peer:
            await peer.call("NotifyClientTermination", service.NotifyClientTerminationRequest(group=resource("G")))
            assert (await peer.sync("G", "L", "PARTIAL_ADD", ["s"])).code == Code.OK
            assert len(engine.subscriptions) == 1
        await until(lambda: len(engine.subscriptions) == 0)


async def test_who_subscribes_without_a_telemetry_stream_is_forgotten():
    async with (
        DevBroker(settings=Settings(lite_quota=2)) as broker,
        peer_of(broker, "LITE_PUSH_CONSUMER", "G", "L") as stays,
        contextlib.AsyncExitStack() as peers,
    ):
        assert (await stays.sync("G", "L", "PARTIAL_ADD", ["s"])).code == Code.OK
        engine = broker._engine
        assert engine is not None
        for action, names, code in (
            ("PARTIAL_REMOVE", ["s"], Code.OK),
            ("COMPLETE_REMOVE", [], Code.OK),
            ("COMPLETE_ADD", [], Code.OK),
            ("PARTIAL_ADD", ["a b"], Code.ILLEGAL_LITE_TOPIC),
            ("PARTIAL_ADD", ["a", "b", "c"], Code.LITE_SUBSCRIPTION_QUOTA_EXCEEDED),
        ):
            peer = Peer(broker.endpoint)
            peers.push_async_callback(peer.aclose)
            assert (await peer.sync("G", "L", action, names)).code == code
            assert list(engine.subscriptions._clients) == [stays.id]
        assert (await peer.sync("G", "L", "PARTIAL_ADD", ["a", "b"])).code == Code.OK
        assert len(engine.subscriptions) == 3
        await engine.tidy()
        assert (list(engine.subscriptions._clients), len(engine.subscriptions)) == ([stays.id], 1)


async def test_a_start_that_fails_leaves_no_timers_behind(tmp_path):
    async with (
        DevBroker(data=tmp_path) as broker,
        peer_of(broker) as producer,
        peer_of(broker, "SIMPLE_CONSUMER", "G", "T") as reader,
    ):
        await producer.send(message("T"))
        await reader.take("G", "T")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigurationError):
        await DevBroker(taken.getsockname()[1], tmp_path).start()
    assert [found for found in gc.get_objects() if isinstance(found, Engine) and found._alarms] == []


async def test_a_port_that_is_taken_is_refused_with_the_remedy():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"{port}.*another"):
            await DevBroker(port).start()
    async with DevBroker() as first:
        with pytest.raises(ConfigurationError):
            await DevBroker(int(first.endpoint.rpartition(":")[2])).start()


async def test_a_data_folder_serves_one_broker_at_a_time(tmp_path):
    async with DevBroker(data=tmp_path):
        with pytest.raises(ConfigurationError, match="another broker"):
            await DevBroker(data=tmp_path).start()
    async with DevBroker(data=tmp_path):
        pass


async def test_a_data_folder_that_is_none_or_of_another_version_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ConfigurationError, match="can't be used"):
        await DevBroker(data=file).start()
    folder = tmp_path / "folder"
    async with DevBroker(data=folder):
        pass
    connection = sqlite3.connect(folder / "broker.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigurationError, match=r"another version.*99"):
        await DevBroker(data=folder).start()


async def test_a_restart_keeps_topics_groups_messages_and_places(tmp_path):
    async with DevBroker(data=tmp_path) as broker:
        await broker.create_topic("P", "PRIORITY", queues=4)
        await broker.create_group("Shared", lite_bind_topic="L", exclusive=False, lite_quota=5)
        async with peer_of(broker) as producer, peer_of(broker, "SIMPLE_CONSUMER", "G", "T") as reader:
            for number in range(6):
                await producer.send(message("T", str(number)))
            await producer.send_lite("L", "s", *range(4))
            got = await reader.take("G", "T", 6, invisible=10)
            kept = {body: item for body, item in zip(bodies(got), got, strict=True) if int(body) >= 3}
            await reader.ack("G", "T", [item for body, item in zip(bodies(got), got, strict=True) if int(body) < 3])
            async with peer_of(broker, "LITE_PUSH_CONSUMER", "LG", "L") as lite:
                await lite.sync("LG", "L", "PARTIAL_ADD", ["s"])
                batch = await lite.take("LG", "L", 4)
                await lite.ack("LG", "L", batch[:2])
                await lite.sync("LG", "L", "COMPLETE_ADD", ["unread"])
                await producer.send_lite("L", "unread", 1)
                batch += await lite.take("LG", "L")
    async with DevBroker(data=tmp_path) as broker:
        async with Admin(broker.namesrv) as admin:
            (address,) = (await admin.brokers()).values()
            priority, shared = await admin.topic(address, "P"), await admin.group(address, "Shared")
            assert priority is not None
            assert shared is not None
            assert (priority.message_type, priority.write_queues) == ("PRIORITY", 4)
            assert shared.attributes == {
                "lite.bind.topic": "L",
                "lite.sub.model": "Shared",
                "lite.sub.client.quota": "5",
            }
        async with (
            peer_of(broker, "SIMPLE_CONSUMER", "G", "T") as reader,
            peer_of(broker, "LITE_PUSH_CONSUMER", "LG", "L") as lite,
        ):
            # Leases hold over the restart: a handle from before acks its message, the others come when they are due.
            answer = await reader.ack("G", "T", [kept["3"]])
            assert answer.status.code == Code.OK
            # Which batch of a LiteTopic was out is not kept: it comes again, and nobody is told that it was acked.
            late = await lite.ack("LG", "L", batch)
            invalid = Code.INVALID_RECEIPT_HANDLE
            assert [entry.status.code for entry in late.entries] == [Code.OK, Code.OK, *[invalid] * 3]
            await lite.sync("LG", "L", "PARTIAL_ADD", ["s"])
            assert offsets(await lite.take("LG", "L", 2)) == [2, 3]
            again = await reader.take("G", "T", 2)
            assert (sorted(bodies(again)), attempts(again)) == (["4", "5"], [2, 2])


async def test_a_place_written_while_its_topic_goes_does_not_hinder_the_next_start(tmp_path):
    async with DevBroker(data=tmp_path) as broker, peer_of(broker, "LITE_PUSH_CONSUMER", "LG", "L") as lite:
        await lite.sync("LG", "L", "PARTIAL_ADD", ["s"])
        await lite.send_lite("L", "s", "1")
        engine = broker._engine
        assert engine is not None
        option = definition.OffsetOption(timestamp=1 << 60)
        topic, group = engine.catalog.topics["L"], engine.catalog.groups["LG"]
        seeking = asyncio.create_task(Reader(engine, Handles(b"")).seek(group, topic, "s", option))
        await asyncio.sleep(0)  # It waits for the store now.
        engine.catalog.delete_topic("L")
        await seeking
    for _ in range(2):
        async with DevBroker(data=tmp_path) as broker:
            positions = await broker._store.rows("SELECT * FROM position")
    assert positions == []


async def test_dead_letters_that_somebody_looked_for_before_there_were_any_are_kept(tmp_path):
    async with (
        DevBroker(data=tmp_path) as broker,
        peer_of(broker) as producer,
        peer_of(broker, "SIMPLE_CONSUMER", "G", "T") as reader,
    ):
        await producer.call("QueryRoute", service.QueryRouteRequest(topic=resource("%DLQ%G")))
        await producer.send(message("T", "bad"))
        (bad,) = await reader.take("G", "T")
        handle = bad.system_properties.receipt_handle
        request = service.ForwardMessageToDeadLetterQueueRequest(
            group=resource("G"), topic=resource("T"), receipt_handle=handle
        )
        assert (await reader.call("ForwardMessageToDeadLetterQueue", request)).status.code == Code.OK
    async with (
        DevBroker(data=tmp_path) as broker,
        peer_of(broker, "SIMPLE_CONSUMER", "Letters", "%DLQ%G") as letters,
    ):
        assert bodies(await letters.take("Letters", "%DLQ%G")) == ["bad"]


# ---- topics and groups ----


async def test_first_use_makes_and_types_topics_and_groups():
    async with DevBroker() as broker, Connection(broker.endpoint) as connection, Producer(connection) as producer:
        await producer.send(Message(topic="Requests", body=b"1"))
        with pytest.raises(TopicTypeMismatch):
            await producer.send(Message(topic="Requests", body=b"1", lite_topic="s"))
        async with LiteConsumer(connection, "Replies", "RepliesGroup") as first:
            await first.subscribe(["s"])
            with pytest.raises(TopicTypeMismatch):
                await producer.send(Message(topic="Replies", body=b"1"))
            await producer.send(Message(topic="Replies", body=b"1", lite_topic="s"))
            # A group made this way is exclusive.
            async with LiteConsumer(connection, "Replies", "RepliesGroup") as second:
                await second.subscribe(["s"], at=Position.first())
                assert [type(item) for item in await take(first.batches(), 2)][-1] is LiteLost


async def test_strict_wants_topics_made():
    async with (
        DevBroker(strict=True) as broker,
        Connection(broker.endpoint) as connection,
        Producer(connection) as producer,
    ):
        with pytest.raises(TopicNotFound, match="Requests"):
            await producer.send(Message(topic="Requests", body=b"1"))
        await broker.create_topic("Requests")
        await producer.send(Message(topic="Requests", body=b"1"))


async def test_what_it_does_not_model_is_refused_and_names_the_real_broker():
    async with DevBroker() as broker, peer_of(broker) as peer:
        for kind in ("DELAY", "TRANSACTION", "MIXED"):
            with pytest.raises(ConfigurationError, match="Apache RocketMQ"):
                await broker.create_topic("T", kind)
        delayed = message("Delayed")
        delayed.system_properties.delivery_timestamp.GetCurrentTime()
        transaction = message("Transactions", message_type=4)
        end = service.EndTransactionRequest(topic=resource("T"), message_id="m", transaction_id="t")
        recall = service.RecallMessageRequest(topic=resource("T"), recall_handle="h")
        for answer in (
            await peer.send(delayed),
            await peer.send(transaction),
            await peer.call("EndTransaction", end),
            await peer.call("RecallMessage", recall),
        ):
            assert answer.status.code == Code.NOT_IMPLEMENTED
            assert "--engine apache" in answer.status.message


async def test_bad_topics_and_groups_are_refused_by_program_too():
    async with DevBroker() as broker:
        await broker.create_topic("N")
        for making, words in (
            (broker.create_topic("a b"), "illegal characters"),
            (broker.create_topic("N", "LITE"), "expected type is NORMAL"),
            (broker.create_group("a b"), "illegal characters"),
            (broker.create_group("G", lite_bind_topic="N"), "expected type is NORMAL"),
        ):
            with pytest.raises(ConfigurationError, match=words):
                await making


async def test_topics_and_groups_are_made_changed_and_deleted_as_mqadmin_does():
    async with DevBroker() as broker, Admin(broker.namesrv) as admin:
        (address,) = (await admin.brokers()).values()
        assert await admin.topic(address, "L") is None
        await admin.put_topic(address, TopicSettings("L", {"message.type": "LITE", "lite.topic.expiration": "15"}))
        made = await admin.topic(address, "L")
        assert made is not None
        assert made.attributes == {"message.type": "LITE", "lite.topic.expiration": "15"}
        assert await admin.group(address, "G") is None
        await admin.put_group(address, GroupSettings("G", {"lite.bind.topic": "L", "lite.sub.model": "Exclusive"}))
        await admin.put_group(address, GroupSettings("G", {"lite.sub.client.quota": "3"}))
        group = await admin.group(address, "G")
        assert group is not None
        assert (group.attributes["lite.sub.model"], group.attributes["lite.sub.client.quota"]) == ("Exclusive", "3")
        for bad in ({"lite.sub.model": "Odd"}, {"lite.sub.client.quota": "many"}):
            with pytest.raises(BrokerError):
                await admin.put_group(address, GroupSettings("G", bad))
        async with peer_of(broker) as producer:
            await producer.send_lite("L", "s", 1)
            await admin.delete_topic(address, "L")
            await admin.delete_group(address, "G")
            assert (await admin.topic(address, "L"), await admin.group(address, "G")) == (None, None)
            await producer.send(message("L"))


async def test_the_provisioning_port_survives_garbage():
    async with DevBroker() as broker:
        host, _, port = broker.namesrv.rpartition(":")
        for garbage in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\0\0\0\x08\0\0\0\x04null",
            b"\0\0\0\x06\0\0\0\x02{}",
            b"\xff" * 64,
        ):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(garbage)
            writer.write_eof()
            async with asyncio.timeout(LIMIT):
                assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
        async with Admin(broker.namesrv) as admin:
            assert list(await admin.brokers()) == ["embedded"]


# ---- consuming ----


async def test_a_fifo_topic_is_read_in_order_one_batch_a_queue():
    async with DevBroker() as broker, peer_of(broker) as producer:
        await broker.create_topic("F", "FIFO", queues=1)
        for number in range(5):
            await producer.send(message("F", str(number), message_group=f"g{number}"))
        async with peer_of(broker, "PUSH_CONSUMER", "G", "F") as reader:
            batch = await reader.take("G", "F", count=2)
            await reader.ack("G", "F", batch[1:])
            for item in batch[:1]:
                await reader.hide("G", "F", item, 0.5)
            again = await reader.take("G", "F", count=3)
            assert (bodies(again), attempts(again)) == (["0", "1", "2"], [2, 2, 1])
            await reader.ack("G", "F", again)
            assert bodies(await reader.take("G", "F", 2)) == ["3", "4"]
            request = service.QueryAssignmentRequest(topic=resource("F"), group=resource("G"))
            answer = await reader.call("QueryAssignment", request)
            assert [assignment.message_queue.id for assignment in answer.assignments] == [0]


async def test_a_message_that_is_delivered_too_often_becomes_a_dead_letter():
    async with DevBroker() as broker, peer_of(broker) as producer:
        await broker.create_group("G", max_attempts=2)
        await producer.send(message("T", "poison", message_id="ID"))
        async with peer_of(broker, "SIMPLE_CONSUMER", "G", "T") as reader:
            for attempt in (1, 2):
                (got,) = await reader.take("G", "T")
                assert attempts([got]) == [attempt]
                await reader.hide("G", "T", got, 0)
            _, messages = await reader.poll("G", "T")
            assert messages == []
        async with peer_of(broker, "SIMPLE_CONSUMER", "Undertaker", "%DLQ%G") as undertaker:
            (dead,) = await undertaker.take("Undertaker", "%DLQ%G")
            letter = dead.system_properties.dead_letter_queue
            assert (bodies([dead]), letter.topic, letter.message_id) == (["poison"], "T", "ID")


async def test_the_broker_renews_for_a_client_until_it_is_gone():
    settings = Settings(auto_renew_invisible=0.3, min_invisible=0.1, min_long_poll=0.1)
    async with (
        DevBroker(settings=settings) as broker,
        peer_of(broker) as producer,
        peer_of(broker, "SIMPLE_CONSUMER", "G", "T") as other,
    ):
        async with peer_of(broker, "SIMPLE_CONSUMER", "G", "T") as holder:
            await producer.send(message("T"))
            held = await holder.take("G", "T", auto_renew=True)
            _, messages = await other.poll("G", "T", wait=1.5)
            assert messages == []
            # Hidden by hand it is the client's business again.
            assert (await holder.hide("G", "T", held[0], 0.2)).status.code == Code.OK
            (again,) = await other.take("G", "T")
            await other.ack("G", "T", [again])
            await producer.send(message("T", "2"))
            await holder.take("G", "T", auto_renew=True)
        assert bodies(await other.take("G", "T")) == ["2"]


async def test_the_broker_renews_a_lite_batch_too():
    settings = Settings(auto_renew_invisible=0.3, min_invisible=0.1, min_long_poll=0.1)
    async with contextlib.AsyncExitStack() as stack:
        broker = await stack.enter_async_context(DevBroker(settings=settings))
        await broker.create_group("G", lite_bind_topic="L", exclusive=False)
        producer = await stack.enter_async_context(peer_of(broker))
        other = await stack.enter_async_context(peer_of(broker, "LITE_PUSH_CONSUMER", "G", "L"))
        async with peer_of(broker, "LITE_PUSH_CONSUMER", "G", "L") as holder:
            await holder.sync("G", "L", "PARTIAL_ADD", ["s"])
            await producer.send_lite("L", "s", 1)
            await holder.take("G", "L", auto_renew=True)
            await other.sync("G", "L", "PARTIAL_ADD", ["s"])
            _, messages = await other.poll("G", "L", wait=1.5)
            assert messages == []
        assert bodies(await other.take("G", "L")) == ["1"]


# ---- what gets old, what goes wrong ----


class Clock:
    def __init__(self):
        self.seconds = 1_800_000_000.0

    def __call__(self):
        return self.seconds


@contextlib.asynccontextmanager
async def engine_with(clock, **settings):
    store = Store(None, fsync=False)
    await store.open()
    engine = Engine(store, Settings(**settings), alive=lambda _: True, evicted=lambda *_: None, now=clock)
    try:
        yield engine
    finally:
        engine.close()
        await store.aclose()


async def test_a_lite_topic_expires_some_minutes_after_its_last_message_and_begins_anew():
    clock = Clock()
    async with engine_with(clock) as engine:
        topic = engine.catalog.put_topic("L", {"message.type": "LITE", "lite.topic.expiration": "15"}, queues=8)
        for _ in range(2):
            await engine.send([message("L", lite_topic="s")], peer="")
            clock.seconds += 14 * 60
            await engine.tidy()
        assert topic.lite["s"].end == 2
        clock.seconds += 2 * 60
        await engine.tidy()
        assert topic.lite == {}
        await engine.send([message("L", "anew", lite_topic="s")], peer="")
        assert (topic.lite["s"].first, topic.lite["s"].end) == (0, 1)
        assert b"anew" in await engine.log.read(topic.lite["s"], 0)


async def test_messages_past_the_retention_are_deleted_and_offsets_go_on():
    clock = Clock()
    async with engine_with(clock, retention=100.0, cache_bytes=0) as engine:
        engine.catalog.put_topic("L", {"message.type": "LITE"}, queues=8)
        for body in ("old", "older than it seems", "new"):
            await engine.send([message("L", body, lite_topic="s")], peer="")
            clock.seconds += 40
        await engine.tidy()
        queue = engine.catalog.topics["L"].lite["s"]
        assert (queue.first, queue.end) == (1, 3)
        assert await engine.log.read(queue, 0) is None
        assert b"new" in await engine.log.read(queue, 2)
        clock.seconds += 1000
        await engine.tidy()
        assert (queue.first, queue.end) == (3, 3)
        await engine.send([message("L", "next", lite_topic="s")], peer="")
        assert (queue.first, queue.end) == (3, 4)


async def test_deliveries_are_numbered_on_over_a_restart_though_the_clock_goes_back(tmp_path):
    clock = Clock()
    last = -1
    for _ in range(3):
        store = Store(tmp_path, fsync=False)
        await store.open()
        engine = Engine(store, Settings(), alive=lambda _: True, evicted=lambda *_: None, now=clock)
        await engine.load()
        assert engine.first_serial > last
        last = next(engine.serials)
        engine.close()
        await store.aclose()
        clock.seconds -= 3600


async def test_a_topic_may_be_deleted_while_its_old_messages_are():
    clock = Clock()
    async with engine_with(clock, retention=100.0) as engine:
        for name in ("s1", "s2"):
            await engine.send([message("L", lite_topic=name)], peer="")
        clock.seconds += 1000
        tidying = asyncio.create_task(engine.tidy())
        await asyncio.sleep(0)  # It waits for the store now.
        engine.catalog.delete_topic("L")
        await tidying
        await engine.store.written()
        assert await engine.store.rows("SELECT * FROM queue") == []


@pytest.mark.parametrize("kind", ["NORMAL", "LITE"])
async def test_a_poll_goes_on_with_a_topic_that_was_deleted_and_made_anew(kind):
    lite = {"lite_topic": "s"} if kind == "LITE" else {}
    client_type = "LITE_PUSH_CONSUMER" if lite else "SIMPLE_CONSUMER"
    async with (
        DevBroker(settings=Settings(max_long_poll=LIMIT)) as broker,
        peer_of(broker) as producer,
        peer_of(broker, client_type, "G", "T") as reader,
    ):
        if lite:
            await reader.sync("G", "T", "PARTIAL_ADD", ["s"])
        else:
            await broker.create_topic("T")
        engine = broker._engine
        assert engine is not None
        poll = asyncio.create_task(reader.poll("G", "T", wait=LIMIT))
        clients = engine.subscriptions._clients
        await until(lambda: len(clients[reader.id].waiters) if lite else len(engine._waiters))
        engine.catalog.delete_topic("T")
        await broker.create_topic("T", kind)
        await producer.send(message("T", "anew", **lite))
        async with asyncio.timeout(LIMIT):
            assert bodies((await poll)[1]) == ["anew"]


async def test_what_is_old_is_deleted_later_when_it_can_not_be_now(monkeypatch, caplog):
    monkeypatch.setattr(broker_module, "_TIDY_INTERVAL", 0.0)
    async with DevBroker() as broker:
        tidied = asyncio.Event()
        answers = iter([RuntimeError("not now")])

        async def tidy():
            for error in answers:
                raise error
            tidied.set()

        monkeypatch.setattr(broker._engine, "tidy", tidy)
        async with asyncio.timeout(LIMIT):
            await tidied.wait()
    assert "not now" in caplog.text


async def test_a_reader_that_lags_does_not_read_large_messages_far_ahead():
    store = Store(None, fsync=False)
    await store.open()
    for key in range(10):
        store.append(key, 0, bytes(400))
    await store.written()
    for most, most_bytes, found in ((64, 1, 1), (64, 401, 2), (64, 1000, 3), (3, 10_000, 3), (64, 10_000, 10)):
        assert [key for key, _ in await store.read(0, 10, most=most, most_bytes=most_bytes)] == list(range(found))
    await store.aclose()


async def test_a_full_disk_ends_the_taking_of_messages_with_words(tmp_path, caplog):
    async with DevBroker(data=tmp_path) as broker, peer_of(broker) as producer:
        assert (await producer.send(message("T"))).status.code == Code.OK
        broker._store._connection.execute("PRAGMA max_page_count = 20")
        async with asyncio.timeout(LIMIT):
            while (answer := await producer.send(message("T", bytes(100_000)))).status.code == Code.OK:
                continue
        assert answer.status.code == Code.INTERNAL_SERVER_ERROR
        assert "full" in answer.status.message
        assert "full" in (await producer.send(message("T"))).status.message
    assert "stops taking messages" in caplog.text
    assert "Traceback" not in caplog.text


async def test_no_more_lite_topics_and_topics_are_made_than_it_may_hold():
    async with DevBroker(settings=Settings(max_lite_topics=2, max_topics=2)) as broker, peer_of(broker) as peer:
        three = [message("L", lite_topic=name) for name in ("a", "b", "c")]
        assert (await peer.send(*three)).status.code == Code.LITE_TOPIC_QUOTA_EXCEEDED
        assert broker._engine is not None
        assert broker._engine.catalog.queues == {}  # All of them or none.
        for name in ("a", "b", "a"):
            assert (await peer.send(message("L", lite_topic=name))).status.code == Code.OK
        refused = await peer.send(message("L", lite_topic="c"))
        assert refused.status.code == Code.LITE_TOPIC_QUOTA_EXCEEDED
        assert (await peer.send(message("T"))).status.code == Code.OK
        answer = await peer.send(message("OneTooMany"))
        assert answer.status.code == Code.TOPIC_NOT_FOUND
        assert "makes no more" in answer.status.message


async def test_a_sender_that_is_too_fast_is_told_so():
    async with (
        DevBroker(settings=Settings(max_unwritten_bytes=1, max_body_bytes=100)) as broker,
        peer_of(broker) as peer,
    ):
        answers = await asyncio.gather(*(peer.send(message("T", bytes(100))) for _ in range(200)))
        codes = {answer.status.code for answer in answers}
        assert codes == {Code.OK, Code.TOO_MANY_REQUESTS}
        async with asyncio.timeout(LIMIT):
            while (await peer.send(message("T"))).status.code != Code.OK:
                continue
