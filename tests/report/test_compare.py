"""Side by side: every table adds up to the peaks above it, and what differs is what was changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

import ullage as ul
from tests.planner.models import tower
from tests.small import blocks, tiny
from ullage.report._rows import Row
from ullage.report._sides import NO_MODULE, NOT_LISTED

ROOFLINE: Any = {"costs": "roofline"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of each kind, of one workload."""
    at, work = tmp_path_factory.mktemp("compared"), tiny()
    plan = ul.plan(work, policy="none", pin={"blocks.0": "recompute"}, **ROOFLINE)
    plan.save(at / "plan.json")
    ul.profile(work, **ROOFLINE).save(at / "profile.json")
    ul.timeline(work, plan).save(at / "timeline.json")
    ul.check(work, plan=plan, max_peak="1GiB").now.save(at / "baseline.json")
    (at / "measurement.json").write_bytes(msgspec.json.encode(ul.measure(work, plan, 1)))
    return at


def _adds_up(found: ul.Comparison) -> None:
    for table in (found.by_category, found.by_module):
        for k, s in enumerate(found.sides):
            values = [r.values[k] for r in table]
            if s.by_category is None:
                assert set(values) <= {None}
            else:
                assert sum(v or 0 for v in values) == s.peak_bytes and None not in values


def test_two_plans() -> None:
    work = tower(4)
    one = ul.plan(work, policy="none", pin={"blocks.[01]": "recompute"}, **ROOFLINE)
    two = ul.plan(work, policy="every_block", **ROOFLINE)
    found = ul.compare(one, two)
    _adds_up(found)
    assert [(s.peak_bytes, s.step_seconds) for s in found.sides] == [
        (p.predicted.peak_bytes, p.predicted.step_seconds) for p in (one, two)
    ]
    assert [(u.unit, u.actions) for u in found.units] == [(f"blocks.{k}", ["keep", "recompute"]) for k in (2, 3)]
    assert found.same_units == 2 and not found.notes
    assert sum(r.change for r in found.by_category) == two.predicted.peak_bytes - one.predicted.peak_bytes
    lines = str(found).splitlines()
    assert "  units that differ (2 do not)" in lines and "    blocks.2 .. blocks.3 (2): A keep; B recompute" in lines
    assert max(map(len, lines)) <= 80
    change = two.predicted.step_seconds / one.predicted.step_seconds - 1
    assert next(line for line in lines if "step time" in line).endswith(f"{change:+.1%}")


def test_all_kinds(folder: Path) -> None:
    names = [str(folder / f"{kind}.json") for kind in ("profile", "plan", "timeline", "baseline", "measurement")]
    found = ul.compare(*names)
    _adds_up(found)
    assert [s.name for s in found.sides] == names
    assert [s.what for s in found.sides] == [
        "profile, plain step", "plan (none)", "timeline, plan (none)", "baseline, plan", "measured over 1 steps",
    ]  # fmt: skip
    plan = ul.Plan.load(names[1])
    assert [s.peak_bytes for s in found.sides[1:]] == [plan.predicted.peak_bytes] * 4  # the measured one too
    assert [u.actions for u in found.units] == [["keep", "recompute", "recompute", "recompute", None]]
    for table in (found.by_category, found.by_module):  # three that say the same of one plan
        assert all(r.values[1] == r.values[2] == r.values[3] for r in table)
    assert "blocks.0: A keep; BCD recompute; E -" in str(found)


def test_parameters_are_their_modules_where_all_know_it(folder: Path) -> None:
    held = sum(3 * p.numel() * 4 + 4 for p in tiny().model.parameters())  # itself, two moments, a count of steps
    timeline, baseline = (folder / f"{kind}.json" for kind in ("timeline", "baseline"))
    known, unknown = ul.compare(timeline, baseline), ul.compare(timeline, folder / "plan.json")
    _adds_up(known)
    sizes = [{r.name: r.values[0] or 0 for r in c.by_module} for c in (known, unknown)]
    assert sizes[1][NO_MODULE] - sizes[0][NO_MODULE] == held
    assert sizes[0]["embed"] == 3 * 256 * 32 * 4 + 4 and "embed" not in sizes[1]


def test_a_plan_that_lists_the_largest_only(folder: Path) -> None:
    plan = ul.Plan.load(folder / "plan.json")
    assert plan.bounds is not None
    few = msgspec.structs.replace(plan, bounds=msgspec.structs.replace(plan.bounds, holdings=plan.bounds.holdings[:2]))
    found = ul.compare(plan, few)
    _adds_up(found)
    missing = sum(h.nbytes for h in plan.bounds.holdings[2:])
    assert Row(NOT_LISTED, [0, missing]) in found.by_module
    none = ul.compare(plan, msgspec.structs.replace(plan, bounds=None))
    _adds_up(none)
    assert none.notes == ["B does not say what is alive at its peak; a timeline of it does"]
    assert "by category: the same" in str(none)


def test_what_does_not_compare_is_said(folder: Path) -> None:
    there = ul.plan(tiny(), policy="none", device="h200")
    found = ul.compare(folder / "plan.json", there)
    _adds_up(found)
    assert found.notes == ["devices differ: cpu, h200"]
    other = ul.compare(folder / "plan.json", ul.plan(blocks(), policy="none", **ROOFLINE))
    assert {tuple(u.actions) for u in other.units} == {("recompute", "keep"), ("keep", None), (None, "keep")}


def test_one_as_it_was(folder: Path) -> None:
    found = ul.compare(folder / "plan.json", folder / "plan.json")
    assert not found.units and not any(r.change for r in found.by_module)
    said = str(found)
    assert "by category: the same" in said and "by module: the same" in said and "units" not in said


def test_what_can_not_be_compared(folder: Path, tmp_path: Path) -> None:
    plan = ul.Plan.load(folder / "plan.json")
    wrong: Any = {"peak": 1}
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "cut.json").write_text("{")
    (tmp_path / "measurement.json").write_text('{"step_peaks": 1}')
    for given, kind, message in (
        ([plan], ul.ArgumentError, "expected 2 to 26 .*, got 1"),
        ([plan, wrong], ul.ArgumentError, "got a dict"),
        ([plan, tmp_path / "none.json"], ul.PlanError, "none.json: can't be read"),
        ([plan, tmp_path / "cut.json"], ul.PlanError, "cut.json: not whole JSON of ullage"),
        ([plan, tmp_path / "other.json"], ul.PlanError, "other.json: is no plan, profile, timeline"),
        ([plan, tmp_path / "measurement.json"], ul.PlanError, "measurement .*: Expected `array`"),
    ):
        with pytest.raises(kind, match=message):
            ul.compare(*given)


def test_as_json(folder: Path) -> None:
    found = ul.compare(folder / "plan.json", folder / "profile.json")
    data = json.loads(msgspec.json.encode(found))
    assert msgspec.convert(data, ul.Comparison) == found
