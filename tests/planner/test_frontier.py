"""The curve of step time against peak: monotone, at or below every named policy, and each point a plan that holds."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

import ullage as ul
from tests.small import blocks, tiny
from tests.zoo import workload
from ullage.measure._measure import record_peak
from ullage.planner.answers import _frontier
from ullage.planner.answers._draw import terminal
from ullage.planner.answers._frontier import curve, spread
from ullage.planner.plan._budget import Budget
from ullage.planner.plan._policies import named_policies
from ullage.planner.study import _plain, _prepare, _study
from ullage.planner.study._study import Study

POLICIES = named_policies(offloads=False)


@pytest.fixture(scope="module")
def work() -> ul.Workload:
    return workload("gpt")


@pytest.fixture(scope="module")
def found(work: ul.Workload) -> ul.Frontier:
    return ul.frontier(work, 7, costs="roofline")


def test_it_is_monotone(found: ul.Frontier) -> None:
    assert len(found.points) == 7
    for a, b in zip(found.points, found.points[1:], strict=False):
        assert a.budget_bytes < b.budget_bytes and a.peak_bytes < b.peak_bytes and a.step_seconds > b.step_seconds
    for p in found.points:
        assert p.peak_bytes <= p.budget_bytes == p.plan.budget_bytes
        assert (p.peak_bytes, p.step_seconds) == (p.plan.predicted.peak_bytes, p.plan.predicted.step_seconds)


def test_its_ends_are_the_smallest_budget_and_the_plain_step(work: ul.Workload, found: ul.Frontier) -> None:
    first, last = found.points[0], found.points[-1]
    assert last.plan.predicted == last.plan.baseline and set(last.plan.counts()) == {"keep"}
    with pytest.raises(ul.BudgetInfeasible) as caught:
        ul.plan(work, first.budget_bytes - 1, costs="roofline")
    assert caught.value.smallest_bytes == first.budget_bytes


def test_no_named_policy_lies_below_it(work: ul.Workload, found: ul.Frontier) -> None:
    assert [p.policy for p in found.policies] == list(POLICIES)
    budgets = {p.budget_bytes for p in found.points}
    for p in found.policies:
        assert p.peak_bytes in budgets and p.step_seconds is not None and not p.reason
        assert found.within(p.peak_bytes).step_seconds <= p.step_seconds
    slower = [p for p in found.policies if found.within(p.peak_bytes or 0).step_seconds < (p.step_seconds or 0.0)]
    assert [p.policy for p in slower] == ["every_block", "every_n:2", "sqrt", "selective"]
    alone, row = ul.plan(work, policy="selective", costs="roofline").predicted, found.policies[-1]
    assert (row.peak_bytes, row.step_seconds) == (alone.peak_bytes, alone.step_seconds)


@pytest.mark.parametrize("at", range(7))
def test_a_point_is_a_plan_that_holds(at: int, work: ul.Workload, found: ul.Frontier, tmp_path: Path) -> None:
    point = found.points[at]
    point.plan.save(tmp_path / "plan.json")
    plan = ul.Plan.load(tmp_path / "plan.json")
    assert plan == point.plan
    assert record_peak(work, plan) == point.peak_bytes  # which applies it
    if at == 3:
        again = ul.plan(work, point.budget_bytes, costs="roofline")
        assert (
            msgspec.structs.replace(again, bounds=None) == plan
        )  # what bounds it is said of plans that are asked for alone


def test_one_study_and_no_assignment_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    studies, sessions, executed = [], [], []

    def counted(log: list[Any], call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            log.append(args)
            return call(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(_prepare, "study", counted(studies, _prepare.study))
    for module in (_plain, _study):
        monkeypatch.setattr(module, "Session", counted(sessions, module.Session))
    before = Study.capture_fresh

    def fresh(s: Study, assignment: Any) -> Any:
        executed.append(frozenset((f, o) for f, o in assignment.items() if o.name != "keep"))
        return before(s, assignment)

    monkeypatch.setattr(Study, "capture_fresh", fresh)
    result = ul.frontier(tiny(), 4, costs="roofline")
    assert len(studies) == 1 and len(result.points) == 4
    assert len(sessions) == 1 + len(set(executed) - {frozenset()}) < len(executed)


def test_a_file_round_trip(found: ul.Frontier, tmp_path: Path) -> None:
    path = tmp_path / "frontier.json"
    found.save(path)
    again = ul.Frontier.load(path)
    assert again == found and [p.plan.digest for p in again.points] == [p.plan.digest for p in found.points]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.update(version=2), "version 2, but this ullage reads 1"),
        (lambda d: d.update(points=[]), "it has no points"),
        (lambda d: d.pop("device"), "missing required field `device`"),
        (lambda d: d["points"][0]["plan"]["decisions"][0].update(action="forget"), "unknown action forget"),
    ],
)
def test_files_that_are_none(change: Callable[[Any], Any], match: str, found: ul.Frontier, tmp_path: Path) -> None:
    data = msgspec.to_builtins(found)
    change(data)
    path = tmp_path / "frontier.json"
    path.write_bytes(msgspec.json.encode(data))
    with pytest.raises(ul.PlanError, match=match):
        ul.Frontier.load(path)
    with pytest.raises(ul.PlanError, match=r"frontier nowhere.json: .*No such file"):
        ul.Frontier.load("nowhere.json")


def test_the_fastest_within_a_budget(found: ul.Frontier) -> None:
    a, b = found.points[:2]
    assert found.within(a.budget_bytes) == found.within(b.budget_bytes - 1) == a and found.within(b.budget_bytes) == b
    assert found.within("100% of plain") == found.points[-1]
    with pytest.raises(ul.BudgetInfeasible) as caught:
        found.within(a.budget_bytes - 1)
    assert caught.value.smallest_bytes == a.budget_bytes


def test_limits_are_spread() -> None:
    assert spread([0, 100], 5) == [25, 50, 75]
    assert spread([0, 10, 100], 5) == [40, 70]
    assert spread([0, 100], 2) == spread([0, 10, 100], 2) == spread([7], 5) == []
    assert spread([0, 2], 9) == [1]


def test_a_plan_within_a_smaller_budget_serves_a_larger_one(found: ul.Frontier) -> None:
    def made(peak: int, seconds: float, policy: str = "optimal") -> ul.Plan:
        p = found.points[0].plan
        at = msgspec.structs.replace(p.predicted, peak_bytes=peak, step_seconds=seconds)
        return msgspec.structs.replace(p, predicted=at, policy=policy)

    plans = [made(10, 5.0), made(20, 6.0), made(28, 4.0), made(30, 4.0, "sqrt"), made(40, 3.0), made(38, 2.0, "sqrt")]
    points = curve([10, 20, 30, 40], plans)
    assert [(p.budget_bytes, p.peak_bytes, p.step_seconds) for p in points] == [
        (10, 10, 5.0),
        (30, 28, 4.0),
        (40, 38, 2.0),
    ]


def test_policies_that_can_do_nothing_or_need_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = _prepare.choose_device
    small = lambda *a: dataclasses.replace(choose(*a), memory_bytes=200_000)  # noqa: E731
    monkeypatch.setattr(_prepare, "choose_device", small)
    result = ul.frontier(blocks(), 3, costs="roofline")
    reasons = {p.policy: p.reason for p in result.policies}
    assert reasons["selective"] == "no unit can do this: the plain step"
    assert reasons["none"] == "over the memory of cpu" and reasons["every_block"] == ""
    assert "selective: no unit can do this" in str(result) and "195.31 KiB of memory" in str(result)


def test_a_policy_that_can_not_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    decide = _frontier.decide

    def failing(s: Study, budget: Budget | None, policy: str = "optimal") -> ul.Plan:
        if policy == "sqrt":
            raise ul.CaptureError("blocks.0: it is Monday")
        return decide(s, budget, policy)

    monkeypatch.setattr(_frontier, "decide", failing)
    result = ul.frontier(blocks(), 2, costs="roofline")
    row = next(p for p in result.policies if p.policy == "sqrt")
    assert (row.peak_bytes, row.step_seconds, row.reason) == (None, None, "blocks.0: it is Monday")
    assert "sqrt: blocks.0: it is Monday" in str(result) and "d selective" in (terminal(result) or "")
    assert len(result.points) == 2


def test_points_of_a_step_of_its_own_are_within_their_budgets() -> None:
    work = blocks()
    optimizer = torch.optim.SGD(work.model.parameters())

    def step(m: nn.Module, x: Any) -> None:
        m(x).backward()
        optimizer.step()
        optimizer.zero_grad()

    result = ul.frontier(ul.Workload(work.model, work.batch, step=step), 2, costs="roofline")
    assert len(result.points) == 2 and all(p.peak_bytes <= p.budget_bytes for p in result.points)
    assert result.within(result.points[0].budget_bytes) == result.points[0]


def test_a_model_with_nothing_to_decide() -> None:
    work = ul.Workload(nn.Linear(4, 4), torch.ones(2, 4), loss=lambda y, x: y.sum())
    result = ul.frontier(work, costs="roofline")
    assert [p.peak_bytes for p in result.points] == [result.points[0].plan.baseline.peak_bytes]


@pytest.mark.parametrize("points", [1, 0, -3, 2.5, True, "12"])
def test_points_that_mean_nothing(points: Any) -> None:
    with pytest.raises(ul.ArgumentError, match="points=.*whole number of 2 or more"):
        ul.frontier(tiny(), points)


def test_a_table(found: ul.Frontier) -> None:
    lines = str(found).splitlines()
    assert lines[0].startswith("frontier for cpu, ") and lines[0].endswith("(costs: roofline)")
    assert len(lines) == 2 + 4 + 1 + len(found.points) + 1 + len(POLICIES)
    assert lines[-5].split() == ["29.71", "MiB", "45.41", "ms", "+0.0%", "none"]


def test_pictures(found: ul.Frontier, tmp_path: Path) -> None:
    for name, start in (("a.svg", b"<?xml"), ("a.png", b"\x89PNG"), ("a.PDF", b"%PDF")):
        found.plot(tmp_path / name)
        first = (tmp_path / name).read_bytes()
        assert first.startswith(start)
        found.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes() == first
    said = (tmp_path / "a.svg").read_text()
    assert all(p in said for p in POLICIES) and "step time, ms" in said and "peak, MiB" in said
    assert "memory of cpu" not in said
    found_here = msgspec.structs.replace(found, memory_bytes=25 * 2**20)
    found_here.plot(tmp_path / "a.svg")
    assert "memory of cpu" in (tmp_path / "a.svg").read_text()


def test_pictures_that_can_not_be_drawn(found: ul.Frontier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ul.ArgumentError, match=r"a.gif: a picture is one of .svg, .png, .pdf"):
        found.plot(tmp_path / "a.gif")
    with pytest.raises(ul.ArgumentError, match="no folder"):
        found.plot(tmp_path / "none" / "a.svg")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in ("matplotlib", "plotext") else find(n))
    with pytest.raises(ul.ArgumentError, match=r"a.svg: a picture needs matplotlib; pip install 'ullage\[plot\]'"):
        found.plot(tmp_path / "a.svg")
    assert not list(tmp_path.iterdir()) and terminal(found) is None


def test_a_plot_in_the_terminal(found: ul.Frontier) -> None:
    text = terminal(found, 70, 16)
    assert text is not None and text == terminal(found, 70, 16)
    lines = text.splitlines()
    assert len(lines) == 17 and max(map(len, lines)) <= 70 and "\x1b" not in text
    assert lines[-1] == "  o plans  a none  b every_block  c every_n:2  d sqrt  e selective"
    assert "step time, ms" in text and "peak, MiB" in text
    drawn = "".join(re.split("[│┤]", line)[1] for line in lines[2:-4])
    assert {c for c in drawn if c.isalpha()} == set("oabcde") and drawn.count("o") >= len(found.points) - 4
    assert "\x1b" in (terminal(found, color=True) or "")
