"""What bounds a plan: what is alive at the peak, and levers that do what they say when they are pulled."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import ullage as ul
from tests.planner import models
from tests.planner.models import LOGITS, ROWS, VOCABULARY, WIDTH, ChunkedHead, HugeHead, Mlp, Pair, Tower
from tests.small import tiny
from tests.zoo import FAMILIES, workload
from ullage.mechanisms import RECOMPUTE
from ullage.planner.explain._names import glob_of, matching
from ullage.planner.study._liveness import categories
from ullage.planner.study._prepare import study

ROOFLINE: Any = {"costs": "roofline"}


def _levers(found: ul.Bounds) -> dict[str, ul.Lever]:
    return {x.what: x for x in found.levers}


@pytest.mark.parametrize("policy", ["none", "every_block"])
def test_bounds_of_a_plan_are_those_of_its_step(policy: str) -> None:
    work = tiny()
    plan = ul.plan(work, policy=policy, **ROOFLINE)
    found = ul.bounds(work, plan)
    assert found.peak_bytes == plan.predicted.peak_bytes == sum(found.by_category.values())
    assert (found.phase, found.module, found.op) == (plan.predicted.phase, plan.predicted.module, plan.predicted.op)
    step_peak = getattr(plan.predicted, f"{found.step}_step_peak_bytes")
    assert step_peak == found.peak_bytes
    assert plan.bounds is not None and plan.bounds.holdings == found.holdings
    inside = found.by_category.get("inside the op", 0)
    assert sum(h.nbytes for h in found.holdings) == found.peak_bytes - inside
    assert [x.peak_bytes for x in found.levers] == sorted(x.peak_bytes for x in found.levers)
    assert all(x.nbytes > 0 and x.peak_bytes < found.peak_bytes and x.how for x in found.levers)


def test_the_plain_step_is_the_profile() -> None:
    work = tiny()
    found, profile = ul.bounds(work, **ROOFLINE), ul.profile(work, **ROOFLINE)
    assert found.peak_bytes == profile.peak_bytes and found.by_category == profile.by_category
    assert found.tensors == sorted(profile.largest, key=lambda t: -t.nbytes)[:20]
    assert found.source == profile.source == "tests/small.py:15"


def test_bytes_taken_out_are_those_of_a_sum_over_storages() -> None:
    s = study(tiny(), None, "roofline")
    ledger, trace = s.ledger(s.plain_session), s.plain_session.trace
    some = np.arange(len(trace.storages)) % 3 == 0
    for op in range(0, ledger.size, 7):
        alive = [t for t, taken in zip(trace.storages, some, strict=True) if taken and t.birth <= op <= t.death]
        assert ledger.alive_bytes(some)[op] == sum(t.nbytes for t in alive)
        # no kernel of this step holds more than its outputs, so nothing is left without its storages but for tensors of numbers
    everything = ledger.alive_bytes(np.ones(len(trace.storages), np.bool_))
    born_inside = ledger.timeline.peak - everything
    assert (born_inside >= 0).all()
    outputs = np.array([s.costs(s.plain_session)[i].internal_bytes for i in trace.signature])
    assert (born_inside <= outputs + np.array(trace.numbers)).all()


def test_a_huge_head() -> None:
    found = ul.bounds(models.head(HugeHead), **ROOFLINE)
    levers = _levers(found)
    gone, chunked = levers["logits and loss"], levers["logits and loss but for 1/8"]
    # the saved log-softmax, the gradient of nll_loss, that of log_softmax; the loss and a count of rows
    assert gone.nbytes == chunked.nbytes == 3 * LOGITS + 8
    assert found.peak_bytes - chunked.peak_bytes == 3 * LOGITS * 7 // 8 + 7
    assert gone.peak_bytes < LOGITS // 4 and gone.module == "blocks.1.down"
    assert found.levers[0] == gone and (found.phase, found.module) == ("backward", "")

    real = ul.profile(models.head(ChunkedHead), **ROOFLINE).peak_bytes
    made = 4 * (ROWS * WIDTH + VOCABULARY * WIDTH)  # gradients of the hidden states and of the weight, made in forward
    small = 8 * ROWS + 16 * ROWS // 8 + 1024  # which rows, ids of a chunk
    assert chunked.peak_bytes + made <= real <= chunked.peak_bytes + made + small


def test_optimizer_temporaries() -> None:
    found = ul.bounds(models.weights(foreach=True), **ROOFLINE)
    levers = _levers(found)
    fused, loop = levers["optimizer temporaries"], levers["optimizer temporaries of all parameters at once"]
    parameters = 4 * sum(p.numel() for p in models.weights().model.parameters())
    assert found.phase == "optimizer" and fused.nbytes == loop.nbytes == found.by_category["optimizer temporary"]
    assert fused.nbytes == parameters
    assert loop.executed and not fused.executed
    assert loop.peak_bytes == ul.profile(models.weights(foreach=False), **ROOFLINE).peak_bytes
    assert fused.peak_bytes == ul.profile(models.weights(fused=True), **ROOFLINE).peak_bytes
    assert fused.peak_bytes < loop.peak_bytes < found.peak_bytes
    assert loop.seconds > 0
    state = levers["optimizer state"]
    assert state.nbytes == 2 * parameters + 4 * len(list(models.weights().model.parameters()))  # moments, step counts
    assert state.peak_bytes == found.peak_bytes - state.nbytes and state.phase == "optimizer"
    assert levers["gradients"].nbytes == parameters


def test_a_unit_s_own_backward_and_finer_units() -> None:
    plan = ul.plan(models.wide(), policy="every_block", **ROOFLINE)
    assert plan.bounds is not None
    own = next(x for x in plan.bounds.levers if "its own backward" in x.what)
    finer = ["blocks.*.first", "blocks.*.second"]
    assert own.executed and str(finer) in own.how and own.what.startswith("what one Pair")
    split = ul.plan(models.wide(), policy="every_block", units=finer, **ROOFLINE)
    assert own.peak_bytes == split.predicted.peak_bytes < plan.predicted.peak_bytes
    assert own.seconds == pytest.approx(split.predicted.step_seconds - plan.predicted.step_seconds, rel=1e-9)
    # these have no parts: the bytes are taken out instead
    assert split.bounds is not None
    last = next(x for x in split.bounds.levers if "its own backward" in x.what)
    assert not last.executed and last.what.startswith("what one Mlp") and "micro-batch" in last.how


def test_activations_that_could_still_be_dropped() -> None:
    torch.manual_seed(0)
    work = ul.Workload(Tower(*(Mlp(16, 256) for _ in range(3)), Pair(16, 256), Pair(16, 256)), torch.randn(1024, 16))
    found = ul.bounds(work, **ROOFLINE)
    levers = {x.how: x for x in found.levers if "activations kept by" in x.what}
    assert len(levers) == 2
    for names, pins in (
        ("blocks.0, blocks.1, blocks.2", {"blocks.[012]": "recompute"}),
        ("blocks.3, blocks.4", {"blocks.[34]": "recompute"}),
    ):
        lever = levers[f"a smaller budget, or pin {names} to recompute"]
        pinned = ul.plan(work, policy="none", pin=pins, **ROOFLINE)
        assert lever.executed and lever.peak_bytes == pinned.predicted.peak_bytes
        assert lever.seconds == pytest.approx(pinned.predicted.step_seconds - pinned.baseline.step_seconds, rel=1e-9)
    saved = 2 * 1024 * 256 * 4  # of up and of gelu; x + ... is the next one's input and stays
    assert sorted(x.nbytes for x in levers.values()) == [3 * saved, 2 * (2 * saved + 1024 * 16 * 4)]


def test_inputs_of_rebuilt_units() -> None:
    torch.manual_seed(0)
    work = ul.Workload(Tower(*(Mlp(64, 64) for _ in range(12))), torch.randn(1024, 64))
    plan = ul.plan(work, policy="every_block", **ROOFLINE)
    assert plan.bounds is not None
    inputs = next(x for x in plan.bounds.levers if x.what.startswith("inputs of 12 units"))
    per_unit = 1024 * 64 * 4
    held = plan.bounds.by_category["activation"]
    assert per_unit <= inputs.nbytes <= 11 * per_unit  # the first one's input is the batch, which stays
    assert inputs.nbytes <= held and plan.bounds.peak_bytes - inputs.peak_bytes <= 11 * per_unit


class _Step(nn.Module):
    def __init__(self, to_none: bool) -> None:
        super().__init__()
        self.to_none = to_none

    def work(self) -> ul.Workload:
        torch.manual_seed(0)
        model = Tower(*(Mlp(64, 64) for _ in range(3)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(m: nn.Module, x: torch.Tensor) -> None:
            optimizer.zero_grad(set_to_none=self.to_none)
            m(x).backward()
            optimizer.step()

        return ul.Workload(model, torch.randn(1024, 64), step=step)


def test_gradients_that_nothing_sets_to_none() -> None:
    kept, freed = ul.bounds(_Step(False).work(), **ROOFLINE), ul.bounds(_Step(True).work(), **ROOFLINE)
    parameters = 4 * sum(p.numel() for p in _Step(False).work().model.parameters())
    lever = _levers(kept)["gradients kept from the step before"]
    assert kept.step == "later" and lever.nbytes == kept.by_category["gradient"] == parameters
    assert lever.executed and "set_to_none=True" in lever.how
    assert lever.peak_bytes == kept.peak_bytes - parameters == freed.peak_bytes
    assert "gradients kept from the step before" not in _levers(freed)


def test_gradients_that_were_there() -> None:
    work = models.weights(foreach=True)
    for p in work.model.parameters():
        p.grad = torch.zeros_like(p)
    found = ul.bounds(work, **ROOFLINE)
    lever = _levers(found)["gradients that were there before the step"]
    assert lever.nbytes == 4 * sum(p.numel() for p in work.model.parameters())
    for p in work.model.parameters():
        p.grad = None
    assert lever.peak_bytes == ul.bounds(work, **ROOFLINE).peak_bytes == found.peak_bytes - lever.nbytes


def test_what_a_step_of_one_s_own_leaves_behind_has_a_name() -> None:
    s = study(_Step(True).work(), None, "roofline")
    trace = s.plain_session.trace
    last = len(trace.phase) - 1
    assert trace.phase[last] == "optimizer"
    pairs = zip(trace.storages, categories(trace), strict=True)
    alive = [category for t, category in pairs if t.birth <= last <= t.death]
    assert alive.count("gradient") == 12 and alive.count("parameter") == 12


@pytest.mark.parametrize(
    "family", ["shared", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "shared")]
)
def test_families(family: str) -> None:
    """The slow ones alone show that the bytes of each family's peak add up, and that it has levers."""
    work = workload(family)
    plan = ul.plan(work, policy="every_block", **ROOFLINE)
    found = plan.bounds
    assert found is not None and sum(found.by_category.values()) == found.peak_bytes == plan.predicted.peak_bytes
    assert found.levers and str(found).count("\n      ") >= 2 * len(found.levers)


def test_an_infeasible_budget_says_what_would_lower_it() -> None:
    with pytest.raises(ul.BudgetInfeasible) as caught:
        ul.plan(models.head(HugeHead), "2MiB", **ROOFLINE)
    error = caught.value
    assert error.bounds is not None and error.bounds.peak_bytes == error.smallest_bytes
    assert error.bounds.levers[0].what == "logits and loss" and "fused linear cross-entropy" in str(error)


def test_an_estimate_says_so() -> None:
    found = ul.bounds(models.weights(), device="h200")
    assert found.estimate and "ESTIMATE" in str(found)
    assert found.by_category["library workspace"] == ul.devices()["h200"].blas_workspace_bytes
    assert "optimizer temporaries of all parameters at once" in _levers(found)  # foreach is the default there
    assert sum(found.by_category.values()) == found.peak_bytes


def test_bad_arguments() -> None:
    work, other = tiny(), models.wide()
    plan = ul.plan(work, policy="every_block", **ROOFLINE)
    with pytest.raises(ul.ArgumentError, match=r"Plan.load"):
        ul.bounds(work, "plan.json")  # type: ignore[arg-type]
    with pytest.raises(ul.ArgumentError, match="the plan is for cpu"):
        ul.bounds(work, plan, device="h200")
    with pytest.raises(ul.PlanMismatch, match="another model"):
        ul.bounds(other, plan)


def test_units_of_the_plan_s_own() -> None:
    plan = ul.plan(models.wide(), policy="every_block", units=["blocks.*.first"], **ROOFLINE)
    assert ul.bounds(models.wide(), plan).peak_bytes == plan.predicted.peak_bytes


def test_a_plan_of_before_is_read_as_it_was(tmp_path: Path) -> None:
    plan = ul.plan(tiny(), policy="every_block", **ROOFLINE)
    old = msgspec.structs.replace(plan, bounds=None)
    old.save(tmp_path / "old.json")
    assert not {"bounds", "pins", "forbidden", "headroom_bytes"} & set(
        msgspec.json.decode((tmp_path / "old.json").read_bytes())
    )
    assert ul.Plan.load(tmp_path / "old.json") == old
    plan.save(tmp_path / "new.json")
    assert ul.Plan.load(tmp_path / "new.json") == plan and ul.Plan.load(tmp_path / "new.json").bounds == plan.bounds


def test_globs() -> None:
    units = ["a.0.x", "a.1.x", "a.2.x", "b.0.x", "c"]
    assert matching("a.*", units) == units[:3] and matching("*x", units) == units[:4]
    assert glob_of(units[:3], units) == "a.*.x"
    assert glob_of(units[:2], units) == "a.0.x, a.1.x"  # a.*.x would be one too many
    assert glob_of(units[:1], units) == "a.0.x" and glob_of(["c", "a.0.x"], units) == "c, a.0.x"
    assert glob_of([f"u{i}" for i in range(5)], [f"u{i}" for i in range(6)]) == "u0 .. u4 (5 units)"


def test_the_capture_knows_what_goes_in_and_out_of_a_call() -> None:
    s = study(models.wide(), None, "roofline")
    calls = {c.fqn: c for c in s.plain_session.calls if c.first_op >= s.captures["keep"].ops.start}
    storages = {id(t): t for t in s.plain_session.trace.storages}
    for a, b in itertools.pairwise([calls[f"blocks.{i}"] for i in range(4)]):
        assert a.records_out == b.records_in and len(a.records_out) == 1
        (only,) = (storages[i] for i in a.records_out)
        assert a.first_op <= only.birth < a.last_op and only.nbytes == 1024 * 16 * 4
    assert all(storages[i].category == "input" for i in calls["blocks.0"].records_in)


def test_early_stop_leaves_no_module_behind() -> None:
    s = study(models.wide(), None, "roofline")  # the last tensor a block saves is that of a module below it
    first, later = s.capture_fresh(dict.fromkeys(s.options, RECOMPUTE))
    trace, stacks = first.session.trace, first.session.tracker.stacks
    assert any(trace.recomputed)
    ops = range(first.ops.start, later.ops.stop)
    forward = [stacks[trace.stack[i]] for i in ops if trace.phase[i] == "forward"]
    assert {s[:1] for s in forward} == {(), ("",)}  # outside the model, or in the root
    assert all(len(stacks[trace.stack[i]]) <= 4 for i in ops)  # root, block, half, layer


def test_an_op_without_a_node_does_not_take_the_name_of_the_one_before() -> None:
    s = study(tiny(), None, "roofline")  # embed(ids) is followed by arange, which makes no node
    trace, session = s.plain_session.trace, s.plain_session
    funcs = [str(session.signatures[i].func) for i in trace.signature]
    found = [session.tracker.stacks[trace.stack[i]] for i, f in enumerate(funcs) if "embedding_dense_backward" in f]
    assert found == [("", "position"), ("", "embed")] * 2
