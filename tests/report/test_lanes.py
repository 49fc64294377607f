"""What leaves memory and comes back, as the timeline, the trace and the page show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ullage as ul
from tests.report.browser import Opened, needs_browser
from tests.small import tiny
from ullage.report import StepReport, Transfer


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> StepReport:
    work = tiny()
    at = tmp_path_factory.mktemp("disk")
    plan = ul.plan(work, policy="offload", costs="roofline", disk_directory=at, disk_budget="32MiB")
    return ul.report(work, plan, points=None, title="tiny")


def of(shown: StepReport, step: str, out: bool) -> list[Transfer]:
    assert shown.planned is not None
    return [x for x in shown.planned.transfers if x.step == step and x.out == out]


def test_transfers_are_those_of_the_plan(shown: StepReport) -> None:
    t, traffic = shown.planned, shown.plan.predicted.traffic
    assert t is not None and traffic is not None and not shown.plain.transfers
    for step, some in t.steps.items():
        out, back = of(shown, step, True), of(shown, step, False)
        assert sum(x.nbytes for x in out) == traffic.sent_bytes > 0
        assert sum(x.nbytes for x in back) == traffic.fetched_bytes
        begin, seconds = float(t.start_seconds[some.start]), float(t.events.seconds.values[some].sum())
        for lane in (out, back):
            ends = [x.start_seconds + x.seconds for x in lane]
            assert all(
                a <= b.start_seconds + 1e-12 for a, b in zip(ends, lane[1:], strict=False)
            )  # one after the other
            assert lane[0].start_seconds >= begin and ends[-1] <= begin + seconds + 1e-12
    later = t.events.seconds.values[t.steps["later"]].sum()
    assert later == pytest.approx(t.step_seconds, rel=1e-12) and traffic.stalled_seconds > 0
    assert t.step_seconds == shown.plan.predicted.step_seconds


def test_lanes_of_the_trace(shown: StepReport, tmp_path: Path) -> None:
    assert shown.planned is not None
    shown.planned.export(tmp_path / "t.json")
    events: list[dict[str, Any]] = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert (names[4], names[5]) == ("offloaded", "brought back")
    for tid, out in ((4, True), (5, False)):
        slices = [e for e in events if e["ph"] == "X" and e["tid"] == tid]
        wanted = [*of(shown, "first", out), *of(shown, "later", out)]
        assert [e["args"]["bytes"] for e in slices] == [x.nbytes for x in wanted]
        assert [e["ts"] for e in slices] == pytest.approx([1e6 * x.start_seconds for x in wanted], abs=2e-3)
        assert [e["dur"] for e in slices] == pytest.approx([1e6 * x.seconds for x in wanted], abs=2e-3)


@needs_browser
def test_lanes_of_the_page(shown: StepReport, browser: Any, tmp_path: Path) -> None:
    shown.export(tmp_path / "report.html")
    opened = Opened(browser, tmp_path / "report.html")
    bars = opened.js("() => document.getElementById('lanes').data.map((t) => [t.y[0], t.x.length])")
    first = shown.planned is not None and shown.planned.peak_event < shown.planned.first_events
    step = "first" if first else "later"
    assert bars == [["out", len(of(shown, step, True))], ["back", len(of(shown, step, False))]]
    said = opened.page.locator("#lanes-said")
    assert said.inner_text().startswith("offloaded ") and f"{len(of(shown, step, True))} tensors" in said.inner_text()
    opened.page.get_by_role("button", name="Plain", exact=True).click()
    assert not said.is_visible()
    opened.page.get_by_role("button", name="Planned", exact=True).click()
    assert said.is_visible()
    opened.check()
