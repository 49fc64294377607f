"""Steps around single ops and small models whose bytes autograd's formulas decide, against the allocator's record."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from _op_steps import steps

import ullage as ul
import ullage.planner.study._study
from ullage.capture._timeline import OpCost
from ullage.cost import HostCost
from ullage.measure._measure import _peaks
from ullage.measure._state import preserved

# autograd's formula takes another way on tensor subclasses, which the tensors of a capture are
BRANCHING = [
    "__getitem__",
    "clamp",
    "cummax",
    "cumprod",
    "gather",
    "index_select",
    "linalg.householder_product",
    "linalg.vander",
    "logdet",
    "masked.prod",
    "max.reduction_no_dim",
    "max.reduction_with_dim",
    "median",
    "mode",
    "nanquantile",
    "nn.functional.binary_cross_entropy",
    "ormqr",
    "prod",
    "repeat_interleave",
    "take",
    "take_along_dim",
    "topk",
    "trace",
]
# gradients that autograd reduces or that have no memory; kernels that want other values; states of generators
OTHERS = ["nn.functional.rms_norm", "outer", "sgn", "lu_unpack", "normal.number_mean", "nn.functional.embedding_bag"]
HANG_ON_VALUES = ["index_fill", "masked_fill", "masked_scatter"]


@pytest.fixture(autouse=True)
def no_host_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ullage.planner.study._study, "measure_host", HostCost)


def predicted_and_recorded(name: str) -> tuple[ul.Profile, list[int], list[int]]:
    (step,) = steps({name})
    profile = ul.profile(step.workload())
    inst = step.workload().instance()
    with preserved(inst) as state:
        recorded = _peaks(inst, state)[1]
    return profile, [profile.first_step_peak_bytes, profile.later_step_peak_bytes], [recorded[0], recorded[2]]


@pytest.mark.parametrize("name", BRANCHING + OTHERS)
def test_exact_to_the_byte(name: str) -> None:
    _, predicted, recorded = predicted_and_recorded(name)
    assert predicted == recorded


@pytest.mark.parametrize("name", HANG_ON_VALUES)
def test_an_upper_bound_is_said_to_be_one(name: str) -> None:
    profile, predicted, recorded = predicted_and_recorded(name)
    assert all(p >= r for p, r in zip(predicted, recorded, strict=True))
    assert [n for n in profile.notes if "as an upper bound" in n]


class Routed(nn.Module):
    """Chooses, gathers and multiplies along a dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        weights, index = y.topk(3, -1)
        chosen = x.gather(-1, index).sigmoid().cumprod(-1) * weights
        return x + y * chosen.amax(-1, keepdim=True) + x.max(-1, keepdim=True).values


def routed(tokens: int = 51) -> ul.Workload:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(11, 13), *(Routed(13) for _ in range(3)))
    return ul.Workload(
        model, torch.randn(7, tokens, 11), loss=lambda y, _: y.square().mean(), optimizer=torch.optim.SGD
    )


@pytest.mark.parametrize("tokens", [5, 51])  # the states of generators that units compare are more than the 5's tensors
def test_formulas_under_a_plan(tokens: int) -> None:
    work = routed(tokens)
    profile = ul.profile(work)
    plan = ul.plan(work, policy="every_block", profile=profile)
    for source, found in ((profile, ul.measure(work, steps=1)), (plan.predicted, ul.measure(work, plan, steps=1))):
        peaks = [source.first_step_peak_bytes, source.later_step_peak_bytes]
        assert peaks == [found.step_peaks[0], found.step_peaks[2]]


def test_planning_from_a_profile_measures_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = ul.profile(routed())
    read = {k: v for k, v in profile.op_costs.items() if k.startswith("node ")}
    assert any("CumprodBackward0" in k and v.internal_bytes > 1 for k, v in read.items())

    def refused(*_: Any) -> OpCost:
        raise AssertionError("a node is measured")

    monkeypatch.setattr("ullage.planner.study._nodes.measure_node", refused)
    ul.plan(routed(), policy="every_block", profile=profile)


def test_bags_none_of_which_is_empty_are_predicted_to_the_byte() -> None:
    work = ul.Workload(
        nn.EmbeddingBag(50, 32, mode="max"), torch.arange(128).view(16, 8) % 50, loss=lambda out, _: out.sum()
    )
    profile = ul.profile(work)
    assert profile.peak_bytes == ul.measure(work, steps=1).peak_bytes
    assert any("_embedding_bag_backward.default depend on values" in n for n in profile.notes)
