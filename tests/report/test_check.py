"""The gate: it passes what stays, and names what grew: by how many bytes, in which module and category."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import ullage as ul
from tests.small import blocks
from ullage.report import StepFacts
from ullage.report._check import _exceeded
from ullage.report._rows import Row, grouped, rows

ROOFLINE: Any = {"costs": "roofline"}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def before() -> ul.Baseline:
    return ul.check(blocks(), max_peak="1GiB", **ROOFLINE).now


def test_limits(before: ul.Baseline) -> None:
    peak = before.plain.peak_bytes
    assert peak == ul.profile(blocks(), **ROOFLINE).peak_bytes
    fits, exceeds = (ul.check(blocks(), max_peak=n, **ROOFLINE) for n in (peak, peak - 1))
    assert fits.ok and not fits.failures and str(fits).startswith("check ok: the plain step on cpu peaks at ")
    assert not exceeds.ok and len(exceeds.failures) == 1 and "is 1 B (1 bytes) above" in exceeds.failures[0]
    assert str(exceeds).startswith("check FAILED: ") and f"FAILED: {exceeds.failures[0]}" in str(exceeds)
    assert ul.check(blocks(), max_peak="100% of plain", **ROOFLINE).ok
    assert not ul.check(blocks(), max_peak="99% of plain", **ROOFLINE).ok


def test_nothing_changed(before: ul.Baseline) -> None:
    gate = ul.check(blocks(), against=before, **ROOFLINE)
    assert gate.ok and gate.now == before and not gate.units
    assert not any(r.change for r in (*gate.by_category, *gate.by_module, *gate.by_holding))
    assert "peak +0 B since the baseline's" in str(gate) and "by module" not in str(gate)


def test_what_grew_is_named(before: ul.Baseline) -> None:
    gate = ul.check(blocks(layers=4), against=before, **ROOFLINE)
    grown = gate.now.plain.peak_bytes - before.plain.peak_bytes
    assert not gate.ok and gate.failures == [f"the peak grew by {grown / 1024:.2f} KiB ({grown} bytes)"]
    for found in (gate.by_category, gate.by_module, gate.by_holding):
        assert sum(r.change for r in found) == grown
        assert sum(v or 0 for r in found for v in r.values[-1:]) == gate.now.plain.peak_bytes
    # the last one does not save its output, which nothing but a sum reads
    wanted = {"blocks.2": "saves +32.00 KiB (33.00 KiB before)", "blocks.3": "new, Sequential, saves 33.00 KiB"}
    assert gate.units == wanted
    new = [r for r in gate.by_module if r.name == "blocks.3"]
    assert new[0].values[0] == 0 and new[0].change > 0
    said = str(gate)
    assert "  by category\n    activation: +" in said and "\n    blocks.3: new, Sequential" in said
    shrunk = ul.check(blocks(layers=2), against=before, **ROOFLINE)
    assert shrunk.ok and shrunk.units["blocks.2"].startswith("gone, Sequential, saved ")


def test_growth_in_each_unit_is_one_line(before: ul.Baseline) -> None:
    gate = ul.check(blocks(batch=256), against=before, **ROOFLINE)
    kept = 128 * 64 * 4
    assert [r.values for r in gate.by_category if r.name == "activation"][0][1] > 0
    text = (
        "saves +65.00 KiB (65.00 KiB before)"  # the output, the input of gelu, and of each row a mean and a deviation
    )
    assert gate.units == {"blocks.0": text, "blocks.1": text, "blocks.2": "saves +33.00 KiB (33.00 KiB before)"}
    assert f"\n    blocks.0 .. blocks.1 (2): {text}\n" in str(gate)
    assert [r.change for r in gate.by_holding if r.name.endswith(", input")] == [kept]


def test_growth_that_is_allowed(before: ul.Baseline) -> None:
    grown = ul.check(blocks(layers=4), max_peak="1GiB", **ROOFLINE).now.plain.peak_bytes - before.plain.peak_bytes
    assert ul.check(blocks(layers=4), against=before, allow_growth=grown, **ROOFLINE).ok
    gate = ul.check(blocks(layers=4), against=before, allow_growth=grown - 1, **ROOFLINE)
    assert not gate.ok and gate.failures[0].endswith("KiB are allowed")


def test_a_budget_and_a_slowdown() -> None:
    gate = ul.check(blocks(), budget="80% of plain", max_slowdown=3, **ROOFLINE)
    plan = ul.plan(blocks(), "80% of plain", **ROOFLINE)
    assert gate.ok and gate.now.planned is not None and gate.now.judged is gate.now.planned
    assert gate.now.planned.peak_bytes == plan.predicted.peak_bytes
    assert gate.slowdown == plan.predicted.step_seconds / plan.baseline.step_seconds > 1
    assert {u: s.action for u, s in gate.now.units.items()} == {
        d.unit: d.action + (" together" if d.place is not None else "") for d in plan.decisions
    }
    same = ul.check(blocks(), plan=plan, max_slowdown=gate.slowdown, **ROOFLINE)
    assert same.ok and same.now.planned == gate.now.planned
    slow = ul.check(blocks(), plan=plan, max_slowdown=1, against=gate.now, **ROOFLINE)
    assert slow.failures == [f"the step takes {gate.slowdown:.3f} times the plain step's time, above 1"]


def test_a_slowdown_since_the_baseline() -> None:
    one = ul.plan(blocks(), policy="none", pin={"blocks.0": "recompute"}, **ROOFLINE)
    all_of_them = ul.plan(blocks(), policy="every_block", **ROOFLINE)
    accepted = ul.check(blocks(), plan=one, max_peak="1GiB", **ROOFLINE).now
    gate = ul.check(blocks(), plan=all_of_them, max_slowdown=1, against=accepted, **ROOFLINE)
    ratio = all_of_them.predicted.step_seconds / one.predicted.step_seconds
    assert ratio > 1 and gate.failures[-1] == f"the step takes {ratio:.3f} times the baseline's time, above 1"
    assert gate.units == dict.fromkeys(("blocks.1", "blocks.2"), "keep -> recompute")


def test_measured_times_are_not_compared_with_a_baseline_s(before: ul.Baseline) -> None:
    def measured(seconds: float) -> ul.Baseline:
        step = msgspec.structs.replace(before.plain, step_seconds=seconds)
        return msgspec.structs.replace(before, costs="measured", plain=step)

    notes: list[str] = []
    assert not list(_exceeded(measured(2.0), measured(1.0), None, 1.5, 0, notes))
    assert notes == ["times were measured here, so they are not compared with the baseline's"]


def test_a_budget_that_nothing_fits() -> None:
    accepted = ul.check(blocks(), budget="80% of plain", **ROOFLINE).now
    gate = ul.check(blocks(batch=512), budget="50KiB", against=accepted, max_peak=1, **ROOFLINE)
    assert not gate.ok and len(gate.failures) == 1 and "the smallest peak any plan reaches is" in gate.failures[0]
    assert gate.now.planned is None
    assert sum(r.change for r in gate.by_holding) == gate.now.plain.peak_bytes - accepted.plain.peak_bytes
    assert "plain step's peak +" in str(gate)


def test_a_baseline_s_file(before: ul.Baseline, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    before.save(path)
    assert ul.Baseline.load(path) == before and len(path.read_text().splitlines()) > 40
    assert ul.check(blocks(), against=path, **ROOFLINE).ok
    with pytest.raises(ul.PlanError, match="there is none; write it with `ullage check --update`"):
        ul.check(blocks(), against=tmp_path / "none.json", **ROOFLINE)
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ul.PlanError, match="version 2, but this ullage reads 1"):
        ul.Baseline.load(path)
    path.write_text("{")
    with pytest.raises(ul.PlanError, match="baseline .*baseline.json: "):
        ul.Baseline.load(path)


def test_what_can_not_be_checked(before: ul.Baseline) -> None:
    plan = ul.plan(blocks(), policy="every_block", **ROOFLINE)
    wrong: Any = {"peak": 1}
    for options, kind, message in (
        ({"plan": plan, "budget": "1MiB"}, ul.ArgumentError, "give one of them"),
        ({"max_slowdown": 0.5, "plan": plan}, ul.ArgumentError, "a number of 1 or more"),
        ({"max_slowdown": "fast", "plan": plan}, ul.ArgumentError, "a number of 1 or more"),
        ({"max_slowdown": 1.1}, ul.ArgumentError, "slower than what"),
        ({"against": wrong}, ul.ArgumentError, "expected a ullage.Baseline or its file, got dict"),
        ({"max_peak": "lots"}, ul.BudgetError, "max_peak='lots'"),
        ({"against": before, "allow_growth": "1% of plain"}, ul.ArgumentError, "a size with its unit"),
        ({"against": before, "plan": plan}, ul.PlanError, "it is of the plain step, but this check is of a plan"),
        ({"against": before, "device": "h200"}, ul.PlanError, "its device is cpu, but this check's is h200"),
        ({"against": msgspec.structs.replace(before, costs="measured")}, ul.PlanError, "its costs is measured"),
    ):
        with pytest.raises(kind, match=message):
            ul.check(blocks(), **{**ROOFLINE, **options})


def test_rows() -> None:
    found = rows([{"a": 5, "b": 1}, {"b": 9, "c": 2}, None])
    assert found == [Row("b", [1, 9, None]), Row("a", [5, 0, None]), Row("c", [0, 2, None])]
    assert [r.spread for r in found] == [8, 5, 2] and [r.change for r in found] == [0, 0, 0]
    assert rows([{"a": 3}, {"a": 1}])[0].change == -2
    assert grouped([("x", "1"), ("y", "1"), ("z", "2")]) == ["x .. y (2): 1", "z: 2"]


TESTS = """
import ullage as ul
from tests.small import blocks

def test_stays(ullage_check):
    gate = ullage_check(blocks(), max_peak="1GiB", against="base.json", costs="roofline")
    assert isinstance(gate, ul.CheckResult) and gate.ok

def test_target(ullage_check):
    ullage_check("{target}", max_peak="1GiB", costs="roofline")

def test_too_much(ullage_check):
    ullage_check(blocks(), max_peak=1000, costs="roofline")
"""


def test_the_fixture(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Baselines lie beside the test."""
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "test_it.py").write_text(TESTS.replace("{target}", f"{ROOT}/tests/small.py:blocks"))
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)

    def run(*more: str) -> str:
        own = [
            "-q",
            "-p",
            "ullage_pytest",
            "-p",
            "no:cacheprovider",
            "--import-mode=importlib",
            f"--rootdir={tmp_path}",
        ]
        pytest.main([*own, *more, "inner"])
        return str(capsys.readouterr().out)

    first = run()
    assert "2 failed, 1 passed" in first and "there is none; write it with" in first
    assert "check FAILED: the plain step on cpu peaks at" in first and "above 1000 B" in first
    assert "1 failed, 2 passed" in run("--ullage-update") and ul.Baseline.load(inner / "base.json").device == "cpu"
    assert "1 failed, 2 passed" in run()


def test_the_plugin_is_light() -> None:
    light = "import sys, ullage_pytest; sys.exit('torch' in sys.modules or 'ullage' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", light], env=environment).returncode == 0


def test_facts_are_those_of_the_timeline(before: ul.Baseline) -> None:
    found = ul.timeline(blocks(), **ROOFLINE)
    assert StepFacts.of(found) == before.plain
    assert json.loads(msgspec.json.encode(before))["plain"]["by_category"] == found.peak.by_category
