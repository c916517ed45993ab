"""Workers and callers killed, paused and cut off while they work, in a short form: nothing lost, nothing doubled."""

from __future__ import annotations

import json

import pytest

from benchmarks.chaos.auditor import Run, runs_of
from benchmarks.chaos.work import Chaos, provisioned


async def test_work_under_faults_has_one_end_each(engine, tmp_path):
    config, card = await provisioned(engine.endpoint, engine.namesrv)
    chaos = Chaos(config, card, tmp_path, seed=7, rate=2.0, seconds=15.0, pause=8.0)
    report = await chaos.run()
    report.print()
    assert report.wrong == []
    assert report.figures["calls sent"] > 5
    assert report.kills_in_streams >= 1


def message(seq, *, attempt=0, text=None, state=None, end=False):
    result: dict = {"artifactUpdate": {"artifact": {"parts": [{"text": text}]}}} if text else {}
    if state:
        result = {"statusUpdate": {"status": {"state": f"TASK_STATE_{state}"}}}
    body = f"data: {json.dumps({'result': result})}\n\n" if result else None
    fields = {"requestId": "r", "seq": seq, "attempt": attempt, "run": "x", "stream": True, "end": end}
    return fields | ({"responseBody": body} if body else {})


def run_of(*messages) -> Run:
    [runs] = runs_of([list(messages)]).values()
    [run] = runs.values()
    return run


def test_the_auditor_sees_what_is_missing_doubled_or_disordered():
    good = [message(0, text="c:0 "), message(1, text="c:1 "), message(2, state="COMPLETED", end=True)]
    run = run_of(*good)
    assert (run.is_whole, run.holes, run.doubled, run.disordered) == (True, 0, 0, 0)
    assert (run.texts(), run.ends()) == (["c:0", "c:1"], ["completed"])
    assert run_of(good[0], good[2]).holes == 1
    assert not run_of(good[0], good[2]).is_whole
    assert not run_of(*good[:2]).is_whole
    assert run_of(good[0], *good).doubled == 1
    assert run_of(good[1], good[0], good[2]).disordered == 1
    assert run_of(good[0], message(1, state="FAILED"), good[2]).ends() == ["failed", "completed"]


@pytest.mark.parametrize("answer", [{}, {"requestId": "r"}, {"kind": "opening"}])
def test_the_auditor_passes_by_what_is_no_response(answer):
    assert runs_of([[answer]]) == {}
