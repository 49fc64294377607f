"""What a handle reports: planned beside observed."""

from __future__ import annotations

import pytest

import ullage as ul
from tests.small import tiny
from ullage.workload import run_step


@pytest.fixture(scope="module")
def plan() -> ul.Plan:
    return ul.plan(tiny(), policy="every_block", costs="roofline")


def test_report_counts(plan: ul.Plan) -> None:
    work = tiny()
    with plan.apply(work.model) as handle:
        assert "never ran under the plan" in str(handle.report())
        for _ in range(3):
            run_step(work.instance())
        report = handle.report()
    blocks = [u for u in report.units if u.action == "recompute"]
    assert [(u.fired, u.recomputed) for u in blocks] == [(3, 3)] * 2
    assert all(u.planned_bytes_freed > 0 for u in blocks)
    assert report.planned_peak_bytes == plan.predicted.peak_bytes and report.larger_batches == 0
    assert "blocks.1" in str(report) and "never ran" not in str(report)
    assert handle.report() == report  # removed, and still there to be read


def test_accumulation_counts_every_micro_batch() -> None:
    one = tiny()
    work = ul.Workload(one.model, one.batch, loss=one.loss, optimizer=one.optimizer, accumulate=3)
    with ul.plan(work, policy="every_block", costs="roofline").apply(work.model) as handle:
        run_step(work.instance())
        blocks = [u for u in handle.report().units if u.action == "recompute"]
    assert [(u.fired, u.recomputed) for u in blocks] == [(3, 3)] * 2
