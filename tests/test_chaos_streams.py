"""The chaos runs of streams in short: the same code as `scripts/chaos gateway|supervisor`, with fewer of everything."""

from __future__ import annotations

import pytest

from benchmarks.chaos import gateway, streams, supervisor
from benchmarks.chaos.streams import IN_FLIGHT, Heard, Move, Report, Size

SIZE = Size(sessions=20, events=100, kills=2, interval=0.5, seed=3)


def check(report: Report) -> None:
    assert report.wrong == []
    assert report.delivered == SIZE.sessions * SIZE.events
    assert len(report.in_flight) == SIZE.kills
    assert min(report.in_flight) >= IN_FLIGHT
    assert len(report.opening) >= SIZE.kills * SIZE.sessions * IN_FLIGHT
    assert report.table("short").row_count


@pytest.mark.parametrize("rolling", [False, True])
async def test_streams_survive_the_ends_of_their_gateways_and_the_auditor_finds_nothing_missing(
    config, make_topic, rolling
):
    names = await make_topic("NORMAL")
    report = await gateway.run(config, names.topic, SIZE, rolling=rolling)
    check(report)
    assert report.repeated == 0


async def test_sessions_survive_the_kills_of_their_supervisor_and_the_auditor_finds_nothing_missing(config, make_topic):
    names = await make_topic("NORMAL")
    check(await supervisor.run(config, names.topic, SIZE))


class Read:
    def __init__(self, *numbers: int) -> None:
        self.session = "s"
        self.heard = [Heard(number, f"cursor-{place}", 10.0 + place) for place, number in enumerate(numbers)]
        self.moves = [Move(5.0, 1.0, 8.0, 0)]


@pytest.mark.parametrize(
    ("heard", "said", "stored", "wrong"),
    [
        ([0, 1, 2], [0, 1, 2], [0, 1, 2], []),
        ([0, 2], [0, 1, 2], [0, 1, 2], ["reader: 1 lost, 0 doubled"]),
        ([0, 1, 1, 2], [0, 1, 2], [0, 1, 2], ["reader: 0 lost, 1 doubled"]),
        ([0, 2, 1], [0, 1, 2], [0, 1, 2], ["reader: 0 lost, 0 doubled"]),
        ([0, 1, 2], [0, 1], [0, 1, 2], ["ledger: 1 lost"]),
        ([0, 1, 2], [0, 1, 2], [0, 2], ["LiteTopic: 1 lost"]),
    ],
)
def test_what_was_lost_doubled_or_disordered_anywhere_is_told(heard, said, stored, wrong):
    report = Report()
    streams.compare(Read(*heard), said, stored, 3, report)
    assert len(report.wrong) == len(wrong)
    assert all(part in text for part, text in zip(wrong, report.wrong, strict=True))


def test_a_gap_is_counted_from_the_kill_without_what_the_reader_waited_for_itself():
    report = Report()
    streams.time_moves(Read(7), {7: 6.0}, [2.0, 5.0], report)
    assert report.opening == [2.0]  # from the request at 8 to 10
    assert report.gaps == [4.0]  # from the kill at 5 and a second of delay
    streams.time_moves(Read(7), {7: 9.5}, [5.0], report)
    assert report.opening[1] == report.gaps[1] == 0.5  # it was not there before
