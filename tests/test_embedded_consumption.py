"""How groups read queues: the rules, and random histories held against them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agentscope_rocketmq.dev.embedded.consumption import Competing, InOrder, Lease
from agentscope_rocketmq.dev.embedded.queues import Queue

NOW = 1_000_000


def terms(visible_ms, client=None, until_ms=0):
    return Lease(0, 0, visible_ms, client, until_ms)


def competing(end):
    rows: dict[int, Lease | None] = {}
    place = Competing(
        Queue(1, "T", 0, end=end), next_offset=0, leases={}, moved=lambda _: None, changed=rows.__setitem__
    )
    return place, rows


def in_order(end):
    return InOrder(Queue(1, "T", 0, "s", end=end), committed=0, moved=lambda _: None)


def test_leased_messages_come_again_when_due_before_new_ones():
    place, _ = competing(10)
    first = place.take(3, now_ms=NOW, serial=1, lease=terms(NOW + 100))
    assert [delivery.offset for delivery in first] == [0, 1, 2]
    place.done(1)
    again = place.take(3, now_ms=NOW + 100, serial=2, lease=terms(NOW + 200))
    assert [(delivery.offset, delivery.attempt) for delivery in again] == [(0, 2), (2, 2), (3, 1)]


def test_what_the_broker_renews_is_not_due_while_the_client_lives():
    place, _ = competing(2)
    place.take(1, now_ms=NOW, serial=1, lease=terms(NOW + 100))
    place.take(1, now_ms=NOW, serial=2, lease=terms(NOW + 100, "client", NOW + 1000))
    place.extend(NOW + 100, 50, alive=lambda _: True)
    due = place.take(5, now_ms=NOW + 100, serial=3, lease=terms(NOW + 500))
    assert [delivery.offset for delivery in due] == [0]
    place.extend(NOW + 150, 50, alive=lambda _: False)
    assert [d.offset for d in place.take(5, now_ms=NOW + 150, serial=4, lease=terms(NOW + 500))] == [1]


def test_a_queue_read_in_order_is_blocked_by_its_batch_alone():
    place = in_order(10)
    batch = place.take(4, now_ms=NOW, serial=1, lease=terms(NOW + 100), attempt_id="a")
    assert [delivery.offset for delivery in batch] == [0, 1, 2, 3]
    place.done(0)
    place.done(2)
    assert place.committed == 1
    assert not place.has_work(NOW + 99)
    assert place.take(4, now_ms=NOW + 99, serial=2, lease=terms(NOW + 200), attempt_id="b") == []
    again = place.take(4, now_ms=NOW + 100, serial=3, lease=terms(NOW + 200), attempt_id="b")
    assert [(delivery.offset, delivery.attempt) for delivery in again] == [(1, 2), (2, 2), (3, 2), (4, 1)]
    assert not place.holds(1, 1)
    for delivery in again:
        place.done(delivery.offset)
    assert (place.committed, place.has_work(NOW + 100)) == (5, True)


def test_a_suspended_batch_does_not_count_as_an_attempt():
    place = in_order(2)
    place.take(2, now_ms=NOW, serial=1, lease=terms(NOW + 100), attempt_id="")
    place.suspend(visible_ms=NOW + 10)
    again = place.take(2, now_ms=NOW + 10, serial=2, lease=terms(NOW + 100), attempt_id="")
    assert [delivery.attempt for delivery in again] == [1, 1]


steps = st.lists(
    st.tuples(st.sampled_from(["take", "ack", "wait", "grow", "hide"]), st.integers(0, 7)), min_size=1, max_size=60
)


@given(steps)
def test_every_message_is_leased_to_one_at_a_time_until_it_is_acked(history):
    place, rows = competing(0)
    now, serial = NOW, 0
    held: dict[int, int] = {}
    acked: set[int] = set()
    for step, number in history:
        if step == "grow":
            place.queue.end += number
        elif step == "wait":
            now += 30 * number
            held = {offset: due for offset, due in held.items() if due > now}
        elif step == "take":
            serial += 1
            for delivery in place.take(number, now_ms=now, serial=serial, lease=terms(now + 100)):
                assert delivery.offset not in held
                assert delivery.offset not in acked
                held[delivery.offset] = now + 100
        elif held:
            offset = sorted(held)[number % len(held)]
            if step == "ack":
                place.done(offset)
                acked.add(offset)
                del held[offset]
            else:
                serial += 1
                place.renew(offset, serial=serial, visible_ms=now + 200)
                held[offset] = now + 200
    rest = place.take(1000, now_ms=now + 1000, serial=serial + 1, lease=terms(now + 2000))
    assert {delivery.offset for delivery in rest} | acked == set(range(place.queue.end))
    assert {offset for offset, lease in rows.items() if lease is not None}.isdisjoint(acked)


@given(steps)
def test_a_queue_read_in_order_never_skips_nor_overtakes(history):
    place = in_order(0)
    now, serial = NOW, 0
    batch: list[int] = []
    acked: set[int] = set()
    due = 0
    for step, number in history:
        if step == "grow":
            place.queue.end += number
        elif step == "wait":
            now += 30 * number
        elif step == "take":
            serial += 1
            taken = place.take(number, now_ms=now, serial=serial, lease=terms(now + 100), attempt_id=str(serial))
            if taken:
                assert not set(batch) - acked or due <= now
                offsets = [delivery.offset for delivery in taken]
                assert offsets == list(range(place.committed, place.committed + len(offsets)))
                assert set(range(place.committed)) <= acked
                batch, due = offsets, now + 100
                acked -= set(offsets)
        elif step == "ack" and (open_ := [offset for offset in batch if offset not in acked]):
            offset = open_[number % len(open_)]
            place.done(offset)
            acked.add(offset)
