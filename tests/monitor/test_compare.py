"""Monitored runs beside each other, and beside what was planned and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

import ullage as ul
from tests.monitor.running import Clock, monitor, steps
from tests.small import tiny
from ullage.monitor._jsonl import JsonlWriter
from ullage.monitor._records import Header, StepRecord
from ullage_cli._main import cli


def file(path: Path, seconds: list[float], **given: Any) -> Path:
    clock = Clock()
    with monitor(clock, jsonl=path, **given) as m:
        steps(m, clock, seconds)
    return path


def test_two_runs(tmp_path: Path) -> None:
    one = file(tmp_path / "a.jsonl", [0.5, 0.5, 8.0], samples_per_step=2, tokens_per_step=64)
    two = file(tmp_path / "b.jsonl", [0.25], samples_per_step=2)
    found = ul.compare(one, two)
    a, b = found.sides
    assert (a.what, b.what) == ("monitored over 3 steps on cpu", "monitored over 1 steps on cpu")
    assert (a.step_seconds, b.step_seconds) == (0.5, 0.25) and a.peak_bytes is b.peak_bytes is None
    assert (a.samples_per_second, b.samples_per_second, a.tokens_per_second, b.tokens_per_second) == (
        6 / 9,
        8.0,
        192 / 9,
        None,
    )
    lines = str(found).splitlines()
    assert "  peak                                         -             -             -" in lines
    assert "  step time                            500.00 ms     250.00 ms        -50.0%" in lines
    assert "  samples/s                                  0.7           8.0      +1100.0%" in lines
    assert "  tokens/s                                  21.3             -             -" in lines
    assert found.notes[0].startswith("A has no peak: torch's CPU allocator keeps no record of its peak")
    assert not found.units and "alive at the peak" not in str(found)


def test_a_run_on_a_gpu_beside_its_plan(tmp_path: Path) -> None:
    """Its file as a monitor on CUDA writes it."""
    plan = ul.plan(tiny(), policy="none", costs="roofline")
    header = Header(
        monitor_schema=1, ullage="0", torch="2", python="3", started="", host_cpu="", cores=1, device="cuda:0", device_name="NVIDIA H200", warmup=1
    )  # fmt: skip
    writer = JsonlWriter(tmp_path / "run.jsonl")
    writer.start(header)
    for k, (seconds, peak) in enumerate([(9.0, 3000), (0.25, 2000), (0.75, 1000)]):
        writer.write(StepRecord(step=k, time=0.0, step_time_s=seconds, max_allocated_bytes=peak, warmup=k == 0))
    writer.close()
    plan.save(tmp_path / "plan.json")
    found = ul.compare(tmp_path / "plan.json", tmp_path / "run.jsonl")
    side = found.sides[1]
    assert (side.peak_bytes, side.step_seconds, side.what) == (3000, 0.5, "monitored over 2 steps on NVIDIA H200")
    assert found.sides[0].peak_bytes == plan.predicted.peak_bytes
    assert not found.notes and "samples/s" not in str(found)


def test_objects_and_measurements(tmp_path: Path) -> None:
    clock = Clock()
    m = monitor(clock)
    steps(m, clock, [1.0], samples=8)
    measured = ul.measure(tiny(), steps=1)
    found = ul.compare(m.summary(), measured)
    assert [s.samples_per_second for s in found.sides] == [8.0, measured.samples_per_second]
    assert found.sides[0].name == "run" and found.sides[1].peak_bytes == measured.peak_bytes
    assert msgspec.convert(json.loads(msgspec.json.encode(found)), ul.Comparison) == found


def test_the_command(tmp_path: Path) -> None:
    one, two = file(tmp_path / "a.jsonl", [0.5]), file(tmp_path / "b.jsonl", [0.75])
    done = CliRunner().invoke(cli, ["compare", str(one), str(two)])
    assert done.exit_code == 0 and "500.00 ms     750.00 ms        +50.0%" in done.output
    said = json.loads(CliRunner().invoke(cli, ["compare", str(one), str(two), "--json"]).output)
    assert [s["step_seconds"] for s in said["sides"]] == [0.5, 0.75]


def test_files_of_no_steps_and_broken_ones(tmp_path: Path) -> None:
    none, one = file(tmp_path / "none.jsonl", []), file(tmp_path / "one.jsonl", [0.5])
    found = ul.compare(none, one)
    assert found.sides[
        0
    ].step_seconds is None and "  step time                                    -     500.00 ms             -" in str(
        found
    )
    one.write_bytes(one.read_bytes() + b"{}\n")
    with pytest.raises(ul.PlanError, match=r"one.jsonl, line 3: Object missing required field `step`"):
        ul.compare(none, one)
