"""Predicted peaks against the allocator's own record; promise and exactness on the same runs."""

from __future__ import annotations

import pytest

import ullage as ul
from tests.zoo import FAMILIES, workload

FAST = ["gpt", "resnet", "shared", "lora", "moe"]
SEEN = ["gpt2", "llama", "bert", "vit", "unet"]


def check(name: str) -> None:
    work = workload(name)
    profile = ul.profile(work)
    plain = ul.measure(work, steps=1)
    for predicted, measured in (
        (profile.first_step_peak_bytes, plain.step_peaks[0]),
        (profile.later_step_peak_bytes, plain.step_peaks[2]),
    ):
        assert abs(predicted - measured) <= 0.01 * measured
        assert abs(predicted - measured) <= 0.02 * (measured - plain.start_bytes)
    try:
        plan = ul.plan(work, "75% of plain", profile=profile)
    except ul.BudgetInfeasible as error:
        plan = ul.plan(work, error.smallest_bytes, profile=profile)
    planned = ul.measure(work, plan, steps=1)
    assert plan.budget_bytes is not None and planned.peak_bytes <= plan.budget_bytes
    assert abs(plan.predicted.peak_bytes - planned.peak_bytes) <= 0.01 * planned.peak_bytes
    assert sum(d.recomputed_ops for d in plan.decisions) > 0
    result = ul.verify(work, plan)
    result.raise_if_failed()
    assert result.replays > 0


@pytest.mark.parametrize("name", FAST)
def test_family(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [n for n in FAMILIES if n in SEEN])
def test_other_family(name: str) -> None:
    check(name)


def test_nothing_is_recomputed_at_the_plain_peak() -> None:
    work = workload("gpt")
    plan = ul.plan(work, ul.measure(work, steps=1).peak_bytes)
    assert {d.action for d in plan.decisions} == {"keep"}


def test_smallest_is_no_higher_than_every_block() -> None:
    work = workload("gpt")
    blocks = ul.measure(work, ul.plan(work, policy="every_block"), steps=1).peak_bytes
    with pytest.raises(ul.BudgetInfeasible) as caught:
        ul.plan(work, 1000)
    assert caught.value.smallest_bytes <= blocks
    assert caught.value.bound_by[0] == "backward"
