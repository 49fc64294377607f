"""The snapshot of a real run: torch's tools read it, and its peak is the allocator's, the measured and the predicted one."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.cuda._memory_viz as viz

import ullage as ul
from tests.report.test_exports import _of, _peak
from tests.small import tiny
from ullage.measure import record_allocations
from ullage.measure._allocator import record_steps
from ullage_cli._main import run


@pytest.mark.parametrize("policy", ["none", "every_block"])
def test_its_peak_is_the_measured_and_the_predicted_one(policy: str, tmp_path: Path) -> None:
    work = tiny()
    plan = ul.plan(work, policy=policy)
    found = ul.record_snapshot(work, plan, tmp_path / "run.pickle")
    assert pickle.loads((tmp_path / "run.pickle").read_bytes()) == found
    steps = ul.measure(work, plan, steps=1).step_peaks
    assert _peak(found) == max(steps[:2]) == plan.predicted.peak_bytes
    assert _peak(_of(viz.trace_plot(found))) == plan.predicted.peak_bytes
    assert "segments: 1" in viz.segsum(found)
    frames = {f["name"] for e in found["device_traces"][0] for f in e["frames"]}
    assert {"aten::addmm", "before the step"} <= frames and any(n.startswith("autograd::engine") for n in frames)


def test_everything_is_left_as_found() -> None:
    work = tiny()
    before = {k: v.clone() for k, v in work.model.state_dict().items()}
    ul.record_snapshot(work)
    assert all(v.equal(before[k]) for k, v in work.model.state_dict().items())
    assert not any("forward" in m.__dict__ for m in work.model.modules())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, factory = tmp_path / "run.pickle", Path(__file__).parents[1] / "small.py"
    assert run(["measure", f"{factory}:tiny", "--steps", "1", "--snapshot", str(path)]) == 0
    assert f"written to {path}" in capsys.readouterr().out
    assert "segments: 1" in viz.segsum(pickle.loads(path.read_bytes()))


def test_what_an_earlier_recording_saw_allocated_is_not_counted() -> None:
    """The profiler knows those blocks, and the collector may free them in the middle of a later step."""
    held: list[torch.Tensor] = []
    record_allocations(lambda: held.append(torch.empty(1000, dtype=torch.uint8)))

    def step() -> None:
        held.clear()
        made = torch.empty(64, dtype=torch.uint8)
        del made

    assert [[e.nbytes for e in run] for run in record_steps(step, 2)] == [[64, -64], [64, -64]]
