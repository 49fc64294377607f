"""The timeline is the profile's and the plan's to the byte, at every event; what it names is what holds the peak."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ullage as ul
from tests.planner import models
from tests.planner.models import Mlp, Tower
from tests.small import blocks, next_byte, tiny
from tests.zoo import adamw, workload
from ullage.planner.decide._planner import smallest_bytes
from ullage.planner.plan._planned import execute_plan, study_plan
from ullage.planner.study._liveness import by_category, live_tensors, peak_op
from ullage.report import Timeline
from ullage.report._make import timeline_of

ROOFLINE: Any = {"costs": "roofline"}


def _against_the_study(work: ul.Workload, plan: ul.Plan | None, device: str | None = None) -> Timeline:
    """The timeline, after comparing every event with what the planner itself computes."""
    s = study_plan(work, plan, device, "roofline", None, None)
    steps = execute_plan(s, plan)
    first, later = s.capture_fresh(steps.assignment)
    found = timeline_of(s, steps, plan)
    session, workspace = first.session, s.device.facts.blas_workspace_bytes
    window = slice(first.ops.start, later.ops.stop)
    wanted = s.timeline(session).peak[window] + workspace
    assert len(found) == len(wanted) and (found.live_bytes == wanted).all()
    assert (sum(found.live_by_category.values()) == wanted).all()
    assert all((n >= 0).all() and n.any() for n in found.live_by_category.values())
    assert found.peak_bytes == wanted.max() == found.live_bytes[found.peak_event]
    for at in {found.peak_event, 0, len(found) - 1, *range(0, len(found), 97)}:
        live = live_tensors(session, s.costs(session), at + window.start)
        e = found.event(at)
        assert e.by_category == by_category(live, int(wanted[at]), workspace)
        alive = found.alive(at)
        key = [(x.nbytes, x.category, x.op, x.source) for x in alive]
        assert sorted(key) == sorted((t.nbytes, t.category, t.op, t.source) for t in live if t.nbytes)
        assert sum(h.nbytes for h in found.holdings(at)) == e.live_bytes
    for capture, step, name in ((first, steps.first, "first"), (later, steps.later, "later")):
        some = found.steps[name]
        assert getattr(found, f"{name}_step_peak_bytes") == found.live_bytes[some].max() == step.peak_bytes
        assert found.events.seconds.values[some].sum() == pytest.approx(step.seconds, rel=1e-12)
        assert found.live_bytes[peak_op(s.timeline(session), capture.ops) - window.start] == step.peak_bytes
    return found


@pytest.mark.parametrize("family", ["moe", "resnet", "shared", "lora", "lstm"])
def test_families(family: str) -> None:
    _against_the_study(workload(family), None)


def test_the_plain_step_is_the_profile() -> None:
    work = workload("gpt")
    found, profile = ul.timeline(work, **ROOFLINE), ul.profile(work, **ROOFLINE)
    e = found.peak
    assert (found.peak_bytes, e.by_category) == (profile.peak_bytes, profile.by_category)
    assert (e.phase, e.module, e.op, e.source) == (profile.phase, profile.module, profile.op, profile.source)
    later = [found.event(i) for i in range(found.first_events, len(found))]
    assert [(x.phase, x.module, x.op, x.live_bytes) for x in later] == profile.timeline


@pytest.mark.parametrize("policy", ["none", "every_block", "selective"])
def test_under_a_policy(policy: str) -> None:
    work = tiny()
    plan = ul.plan(work, policy=policy, **ROOFLINE)
    found = _against_the_study(work, plan)
    assert plan.bounds is not None and found.peak.by_category == plan.bounds.by_category
    assert found.peak_bytes == plan.predicted.peak_bytes and found.step_seconds == plan.predicted.step_seconds
    assert found.actions == {d.unit: d.action for d in plan.decisions}
    assert (found.plan_digest, found.policy, found.budget_bytes) == (plan.digest, policy, None)
    again = found.events.recomputed.values[found.steps["later"]].sum()
    assert again == sum(d.recomputed_ops for d in plan.decisions)
    assert ("recomputed" in found.live_by_category) == (policy != "none")


def test_units_rebuilt_together() -> None:
    work = models.tower()
    s = study_plan(work, None, None, "roofline", None, None)
    plan = ul.plan(work, smallest_bytes(s), **ROOFLINE)
    assert any(d.place is not None and d.place.depth for d in plan.decisions)
    found = _against_the_study(work, plan)
    assert found.peak_bytes == plan.predicted.peak_bytes <= plan.budget_bytes == found.budget_bytes
    assert any(action.endswith(" together") for action in found.actions.values())


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda: dataclasses.replace(tiny(autocast=torch.bfloat16), accumulate=3), id="micro-batches"),
        pytest.param(lambda: models.weights(foreach=True), id="optimizer"),
        pytest.param(lambda: _own_step(), id="own step"),
    ],
)
def test_other_steps(work: Any) -> None:
    found = _against_the_study(work(), None)
    assert ul.timeline(work(), **ROOFLINE) == found


def test_a_device_that_is_not_here() -> None:
    found = _against_the_study(tiny(), None, "h200")
    assert found.estimate and found.device == "h200" and "ESTIMATE" in str(found)
    assert set(found.live_by_category["library workspace"]) == {found.workspace_bytes} != {0}
    assert all(n % 512 == 0 for n in found.live_bytes)


def _own_step() -> ul.Workload:
    torch.manual_seed(0)
    model = Tower(*(Mlp(16, 64) for _ in range(3)))
    optimizer = torch.optim.AdamW(model.parameters())

    def step(m: nn.Module, x: Tensor) -> None:
        for part in x.chunk(2):
            m(part).backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return ul.Workload(model, torch.randn(64, 16), step=step)


def test_micro_batches_are_counted() -> None:
    work = dataclasses.replace(tiny(), accumulate=3)
    for w, n in ((work, 3), (_own_step(), 2), (tiny(), 1)):
        found = ul.timeline(w, **ROOFLINE)
        for some in found.steps.values():
            micro, phase = found.events.micro_batch.values[some], found.events.phase.values[some]
            assert (np.diff(micro) >= 0).all() and set(micro) == set(range(n))
            for k in range(n):
                assert {0, 1} <= set(phase[micro == k])  # its forward and its backward
            assert set(micro[phase == 2]) <= {n - 1}


class Hot(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.repeat(1, 64)
        return x + wide.view(len(x), 64, -1).sum(1)


def test_a_planted_hotspot_is_named() -> None:
    torch.manual_seed(0)
    work = ul.Workload(Tower(Mlp(16, 32), nn.Sequential(Mlp(16, 32), Hot()), Mlp(16, 32)), torch.randn(1024, 16))
    found = ul.timeline(work, **ROOFLINE)
    line = inspect.getsourcelines(Hot.forward)[1] + 1
    source, wide = f"report/test_timeline.py:{line}", 1024 * 16 * 64 * 4
    top = found.alive()[0]
    assert found.peak.module == top.module == "blocks.1.1" and found.peak.phase == "forward"
    assert (top.nbytes, top.source, top.op) == (wide, source, "aten.repeat.default")
    assert found.holdings()[0].module == "blocks.1.1" and found.holdings()[0].nbytes >= wide
    assert "blocks.1.1" in str(found).splitlines()[6]
    without = ul.Workload(Tower(Mlp(16, 32), nn.Sequential(Mlp(16, 32)), Mlp(16, 32)), torch.randn(1024, 16))
    assert found.peak_bytes - ul.timeline(without, **ROOFLINE).peak_bytes > wide // 2


def test_ops_of_a_replay_have_their_line() -> None:
    work = tiny()
    found = ul.timeline(work, ul.plan(work, policy="every_block", **ROOFLINE))
    again = [found.event(i) for i in np.flatnonzero(found.events.recomputed.values)]
    forward = {e.source for e in map(found.event, range(len(found))) if e.phase == "forward"}
    assert again and all(e.phase == "backward" and e.source.startswith("demo/_gpt.py:") for e in again)
    assert {e.source for e in again} < forward


def test_parameters_and_their_state_are_their_modules() -> None:
    work = tiny()
    found = ul.timeline(work, **ROOFLINE)
    alive = found.alive(len(found) - 1)
    sizes = {n: p.numel() * 4 for n, p in work.model.named_parameters()}
    assert {x.name: x.nbytes for x in alive if x.category == "parameter"} == sizes
    state = [x for x in alive if x.category == "optimizer state"]
    assert {x.name for x in state} == set(sizes)
    assert sorted(x.nbytes for x in state) == sorted([*sizes.values(), *sizes.values(), *(4 for _ in sizes)])
    assert all(x.module == x.name.rpartition(".")[0] for x in alive if x.name)
    gradients = [x for x in found.alive(found.first_events - 1) if x.category == "gradient"]
    assert {x.module for x in gradients} <= {name.rpartition(".")[0] for name in sizes}


def test_the_file(tmp_path: Path) -> None:
    work = tiny()
    plan = ul.plan(work, policy="every_block", **ROOFLINE)
    found = ul.timeline(work, plan)
    path, other = tmp_path / "timeline.json", tmp_path / "again.json"
    found.save(path)
    loaded = Timeline.load(path)
    assert loaded == found and str(loaded) == str(found) and (loaded.live_bytes == found.live_bytes).all()
    ul.timeline(work, plan).save(other)
    assert path.read_bytes() == other.read_bytes()
    assert path.stat().st_size < 12 * len(found)  # bytes per event


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version 2, but this ullage reads 1"),
        (lambda d: d.pop("version"), "missing required field `version`"),
        (lambda d: d.update(extra=1), "unknown field `extra`"),
        (lambda d: d["events"]["op"].update(data="eJwDAAAAAAE="), "its columns differ in length"),
        (lambda d: d["events"]["op"].update(data="AAAA"), "a column can't be unpacked"),
        (lambda d: d["events"]["op"].update(dtype="<u8"), "a column of '<u8'"),
        (lambda d: d["ops"].pop(), "a column names what is not in its list"),
        (lambda d: d.update(peak_bytes=d["peak_bytes"] + 1), "its peak is not that of its events"),
        (lambda d: d.update(peak_event=0), "its peak is not that of its events"),
    ],
)
def test_damaged_files(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    ul.timeline(blocks(layers=1), **ROOFLINE).save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ul.PlanError, match="timeline .*timeline.json: ") as caught:
        Timeline.load(path)
    assert message in str(caught.value)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ul.PlanError, match="nowhere.json: "):
        Timeline.load(tmp_path / "nowhere.json")
    plan: Any = "plan.json"
    with pytest.raises(ul.ArgumentError, match="a file is read by Plan.load"):
        ul.timeline(tiny(), plan)
    with pytest.raises(ul.ArgumentError, match="device='h100': the plan is for cpu"):
        ul.timeline(tiny(), ul.plan(tiny(), policy="none", **ROOFLINE), device="h100")
    with pytest.raises(ul.PlanMismatch):
        ul.timeline(models.tower(2), ul.plan(tiny(), policy="none", **ROOFLINE))


def test_left_as_found() -> None:
    work = ul.Workload(tiny().model, tiny().batch, loss=next_byte, optimizer=adamw)
    before = {n: p.clone() for n, p in work.model.named_parameters()}
    state = torch.get_rng_state()
    ul.timeline(work, **ROOFLINE)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in work.model.named_parameters())
