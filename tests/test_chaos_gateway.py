"""The gateway's chaos run in short: the same code as `scripts/chaos gateway`, with fewer of everything."""

from __future__ import annotations

from benchmarks.chaos.gateway import IN_FLIGHT, run


async def test_streams_survive_the_kills_of_their_gateways_and_the_auditor_finds_nothing_missing(config, make_topic):
    names = await make_topic("NORMAL")
    report = await run(config, topic=names.topic, sessions=20, events=100, kills=2, interval=0.5, seed=3)
    assert report.wrong == []
    assert report.delivered == 20 * 100
    assert len(report.in_flight) == 2
    assert min(report.in_flight) >= IN_FLIGHT
    assert len(report.opening) >= 2 * 20 * IN_FLIGHT
