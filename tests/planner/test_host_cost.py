"""Host time counts as step time where op times are measured, and nowhere else."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import ullage as ul
from tests.small import tiny
from ullage.capture._timeline import OpCost
from ullage.cost import HostCost, find_device, host_cost_in, measure_host
from ullage.cost._host import _line
from ullage.mechanisms import KEEP, RECOMPUTE
from ullage.planner.model._model import model_of
from ullage.planner.study._prepare import study
from ullage.planner.study._study import Study

GIVEN = HostCost(full=2e-3, full_op=3e-5, selective=1e-3, selective_op=1e-5)


def _studied(cost: HostCost | None) -> Study:
    return study(tiny(), None, "roofline", known_costs=cost.as_costs() if cost is not None else None)


def test_options_cost_what_their_replays_do() -> None:
    bare, s = _studied(None), _studied(GIVEN)
    ops = s.forward_ops["blocks.0"]
    assert ops == s.forward_ops["blocks.1"] > 10
    wanted = {"keep": 0.0, "recompute": 2e-3 + 3e-5 * ops, "select": 1e-3 + 1e-5 * ops}
    before, after = ({o.option: o.seconds for o in model_of(x).options[0]} for x in (bare, s))
    added = {o: after[o] - before[o] for o in before.keys() & after.keys()}
    assert {o.action for o in added} == {"keep", "recompute", "select"}
    assert added == {o: pytest.approx(wanted[o.action], abs=1e-12) for o in added}


def test_an_executed_step_has_them_too() -> None:
    bare, s = _studied(None), _studied(GIVEN)
    assignment = {u.fqn: RECOMPUTE if u.block else KEEP for u in s.units}
    executed = s.capture(assignment)
    added = s.execute(assignment).seconds - bare.execute(assignment).seconds
    blocks = sum(u.block for u in s.units)
    again = sum(executed.session.trace.recomputed[i] for i in range(executed.ops.start, executed.ops.stop))
    assert again > 0 and added == pytest.approx(blocks * 2e-3 + again * 3e-5, abs=1e-12)
    assert s.plain_steps.seconds == bare.plain_steps.seconds


def test_ops_of_forward_backward_and_replays() -> None:
    """What modules and autograd take: per op, not in the optimizer."""
    bare, s = _studied(None), _studied(HostCost(forward_op=1e-5, backward_op=3e-5))
    for option in (KEEP, RECOMPUTE):
        assignment = {u.fqn: option if u.block else KEEP for u in s.units}
        capture = s.capture(assignment)
        trace, ops = capture.session.trace, range(capture.ops.start, capture.ops.stop)
        forward = sum(trace.phase[i] == "forward" or trace.recomputed[i] for i in ops)
        backward = sum(trace.phase[i] == "backward" and not trace.recomputed[i] for i in ops)
        added = s.execute(assignment).seconds - bare.execute(assignment).seconds
        assert added == pytest.approx(forward * 1e-5 + backward * 3e-5, abs=1e-12)


def test_measured_ones_are_part_of_a_profile() -> None:
    profile = ul.profile(tiny())
    found = host_cost_in(profile.op_costs)
    # of a whole replay: which part of it is an offset and which grows by the op, noise may shift
    assert found is not None and found.replays(False, 1, 20) > 0 and found.replays(True, 1, 20) > 0
    assert host_cost_in(ul.profile(tiny(), costs="roofline").op_costs) in (None, HostCost())


def test_none_on_a_cuda_device() -> None:
    s = study(tiny(), None, "roofline")
    here = dataclasses.replace(s.device, facts=find_device("h200"), estimate=False, tensors="cuda")
    there = dataclasses.replace(s, device=here, costs_mode="measured", known_costs=dict[str, OpCost]())
    assert there.host_cost == HostCost()
    there = dataclasses.replace(s, costs_mode="measured", known_costs=dict[str, OpCost]())
    assert there.host_cost != HostCost()


def test_measuring_leaves_the_generator() -> None:
    before = torch.get_rng_state()
    found = measure_host()
    assert torch.equal(torch.get_rng_state(), before)
    assert min(dataclasses.astuple(found)) >= 0 < found.full + found.full_op


@pytest.mark.parametrize(
    ("ops", "seconds", "wanted"),
    [
        ([10, 30], [3.0, 5.0], (2.0, 0.1)),
        ([10, 30], [3.0, 1.0], (2.0, 0.0)),
        ([10, 30], [1.0, 7.0], (0.0, 0.22)),
        ([10, 30], [0.0, 0.0], (0.0, 0.0)),
    ],
)
def test_a_line_is_never_below_zero(ops: list[int], seconds: list[float], wanted: tuple[float, float]) -> None:
    """Where the line through both would be, it is the nearest one with a slope, or an offset, of zero."""
    assert _line(ops, seconds) == pytest.approx(wanted, abs=1e-12)
