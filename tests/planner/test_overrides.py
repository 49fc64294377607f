"""What a person decides: pins and what they cost, forbidden actions, headroom, fewer actions."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import ullage as ul
from tests.planner.models import Mlp, Tower, tower
from tests.small import tiny
from ullage.planner.plan._overrides import Overrides

ROOFLINE: Any = {"costs": "roofline"}
BUDGET = "72% of plain"


def _actions(plan: ul.Plan) -> list[str]:
    return [d.action for d in plan.decisions]


@pytest.fixture(scope="module")
def work() -> ul.Workload:
    return tower()


@functools.cache
def _profiled() -> tuple[ul.Workload, ul.Profile]:
    return (work := tower()), ul.profile(work, **ROOFLINE)


def planned(*arguments: Any, **options: Any) -> ul.Plan:
    """A plan of the tower, which is captured once for all of them."""
    work, profile = _profiled()
    return ul.plan(work, *arguments, profile=profile, **options)


@pytest.fixture(scope="module")
def free() -> ul.Plan:
    """The plan without overrides."""
    return planned(BUDGET)


def test_nothing_overridden_is_nothing_said(free: ul.Plan) -> None:
    assert _actions(free) == ["select:gelu[0]"] * 4 + ["keep"] * 2
    assert not free.pins and not free.forbidden and not free.headroom_bytes
    assert not any(w in str(free) for w in ("  pin ", "forbidden", "headroom", "simple:"))


def test_pins_and_what_each_costs(free: ul.Plan) -> None:
    pins = {"blocks.[01]": "keep", "blocks.5": "select", "blocks.4": "recompute"}
    plan = planned(BUDGET, pin=pins)
    assert [a[0] for a in _actions(plan)] == [
        "k",
        "k",
        plan.decisions[2].action[0],
        plan.decisions[3].action[0],
        "r",
        "s",
    ]
    assert plan.decisions[0].reason == "pinned by 'blocks.[01]'" and "pinned" not in plan.decisions[2].reason
    assert plan.budget_bytes is not None and plan.predicted.peak_bytes <= plan.budget_bytes
    assert plan.predicted.step_seconds > free.predicted.step_seconds
    assert [(c.pin, c.action, c.units) for c in plan.pins] == [
        ("blocks.[01]", "keep", 2),
        ("blocks.5", "select", 1),
        ("blocks.4", "recompute", 1),
    ]
    for cost in plan.pins:  # the difference of two plans
        without = planned(BUDGET, pin={g: a for g, a in pins.items() if g != cost.pin})
        assert cost.seconds == plan.predicted.step_seconds - without.predicted.step_seconds
        assert cost.nbytes == plan.predicted.peak_bytes - without.predicted.peak_bytes
        assert f"pin {cost.pin}={cost.action}" in str(plan)
    assert sum(c.seconds for c in plan.pins) > 0


def test_a_level_that_the_planner_would_not_think_of() -> None:
    level = "select:addmm[0,1]"
    for given in ({"budget": "60% of plain"}, {"policy": "none"}):
        plan = planned(pin={"blocks.[12]": level}, **given)
        assert [i for i, a in enumerate(_actions(plan)) if a == level] == [1, 2]
        assert plan.decisions[1].recomputed_ops > 0


def test_a_pin_that_costs_nothing_and_one_against_the_budget(free: ul.Plan) -> None:
    same = planned(BUDGET, pin={"blocks.0": "select:gelu[0]"})
    assert same.decisions[1:] == free.decisions[1:] and same.pins[0].seconds == 0 and same.pins[0].nbytes == 0
    with pytest.raises(ul.BudgetInfeasible, match=r"with blocks\.\* pinned to keep") as caught:
        planned(BUDGET, pin={"blocks.*": "keep"})
    assert caught.value.smallest_bytes == free.baseline.peak_bytes


def test_a_pin_below_a_budget_that_all_would_fit(free: ul.Plan) -> None:
    plan = planned("100% of plain", pin={"blocks.3": "recompute"})
    assert _actions(plan) == ["keep"] * 3 + ["recompute"] + ["keep"] * 2
    assert plan.pins[0].seconds == plan.predicted.step_seconds - free.baseline.step_seconds > 0
    assert plan.pins[0].nbytes == plan.predicted.peak_bytes - free.baseline.peak_bytes < 0


@pytest.mark.parametrize(
    ("policy", "pins", "expected"),
    [
        ("every_block", {"blocks.0": "keep", "blocks.[45]": "select"}, "krrrss"),
        ("none", {"blocks.2": "recompute"}, "kkrkkk"),
        ("selective", {"blocks.*": "recompute"}, "rrrrrr"),
    ],
)
def test_pins_override_a_policy(policy: str, pins: dict[str, str], expected: str) -> None:
    plain, plan = (planned(policy=policy, pin=p) for p in (None, pins))
    assert "".join(a[0] for a in _actions(plan)) == expected
    if len(pins) == 1:
        assert plan.pins[0].seconds == plan.predicted.step_seconds - plain.predicted.step_seconds
        assert plan.pins[0].nbytes == plan.predicted.peak_bytes - plain.predicted.peak_bytes


def test_forbidden_actions(free: ul.Plan) -> None:
    plan = planned(BUDGET, forbid=["select"])
    assert _actions(plan) == ["recompute"] * 2 + ["keep"] * 4
    assert plan.forbidden == ["select"] and "forbidden: select" in str(plan)
    assert plan.predicted.step_seconds > free.predicted.step_seconds
    one_level = planned(BUDGET, forbid=["select:gelu[0]", "recompute"])
    assert not {"select:gelu[0]", "recompute"} & set(_actions(one_level))
    no_keep = planned("100% of plain", forbid=["keep"])
    assert "keep" not in _actions(no_keep) and no_keep.predicted.step_seconds > free.baseline.step_seconds
    assert set(_actions(planned(policy="every_block", forbid=["recompute"]))) == {"keep"}
    exception = planned(BUDGET, forbid=["select"], pin={"blocks.0": "select"})
    assert [a[0] for a in _actions(exception)].count("s") == 1


def test_the_smallest_peak_obeys_too() -> None:
    with pytest.raises(ul.BudgetInfeasible, match="select forbidden") as caught:
        planned("300KiB", forbid=["select", "recompute"])
    assert caught.value.smallest_bytes == planned(policy="none").predicted.peak_bytes
    with pytest.raises(ul.BudgetInfeasible, match="blocks.0 pinned to keep") as caught:
        planned("300KiB", pin={"blocks.0": "keep"})
    smallest = caught.value.smallest_bytes
    plan = planned(smallest, pin={"blocks.0": "keep"})
    assert plan.predicted.peak_bytes <= smallest and plan.decisions[0].action == "keep"


def test_headroom(free: ul.Plan) -> None:
    assert free.budget_bytes is not None
    plan = planned(free.budget_bytes, headroom="1MiB")
    less = planned(free.budget_bytes - 2**20)
    assert plan.budget_bytes == free.budget_bytes and plan.headroom_bytes == 2**20
    assert plan.predicted == less.predicted and _actions(plan) == _actions(less) != _actions(free)
    assert "headroom" in str(plan)
    with pytest.raises(ul.BudgetInfeasible, match=r"1.00 MiB of it are headroom") as caught:
        planned("2MiB", headroom="1MiB")
    smallest = caught.value.smallest_bytes
    assert planned(smallest, headroom="1MiB").predicted.peak_bytes <= smallest - 2**20
    with pytest.raises(ul.BudgetInfeasible):
        planned(smallest - 1, headroom="1MiB")


def test_fewer_actions() -> None:
    best = planned("60% of plain")
    assert len(set(_actions(best))) == 3
    plan = planned("60% of plain", simple=True)
    assert len(set(_actions(plan))) == 2
    slower = plan.predicted.step_seconds / best.predicted.step_seconds - 1
    assert 0 < slower <= 0.01
    assert plan.notes == [f"simple: 2 actions instead of 3, which changes the step time by {slower:+.2%}"]
    assert plan.budget_bytes is not None and plan.predicted.peak_bytes <= plan.budget_bytes
    assert plan.lower_bound_seconds == pytest.approx(best.lower_bound_seconds) and plan.gap == pytest.approx(
        slower, abs=1e-6
    )
    one = planned("60% of plain", simple=0.5)
    assert len(set(_actions(one))) == 1 and one.predicted.step_seconds <= 1.5 * best.predicted.step_seconds
    strict = planned("60% of plain", simple=slower / 2)
    assert _actions(strict) == _actions(best) and "no plan with fewer than 3 actions" in strict.notes[-1]


def test_fewer_actions_with_a_pin() -> None:
    plan = planned("84% of plain", simple=0.1, pin={"blocks.5": "select:matmul_attention"})
    assert plan.decisions[5].action == "select:matmul_attention"
    assert len(set(_actions(plan))) <= 2
    assert plan.pins[0].pin == "blocks.5"


def test_units_that_are_rebuilt_together_but_for_pinned_ones() -> None:
    torch.manual_seed(0)
    work = ul.Workload(Tower(*(Mlp(64, 64) for _ in range(8))), torch.randn(1024, 64))
    with pytest.raises(ul.BudgetInfeasible) as caught:
        ul.plan(work, 1, **ROOFLINE)
    budget = caught.value.smallest_bytes
    free = ul.plan(work, budget, **ROOFLINE)
    assert sum(d.place is not None for d in free.decisions) > 4
    with pytest.raises(ul.BudgetInfeasible) as caught:
        ul.plan(work, budget, pin={"blocks.4": "keep"}, **ROOFLINE)
    plan = ul.plan(work, caught.value.smallest_bytes, pin={"blocks.4": "keep"}, **ROOFLINE)
    pinned, after = plan.decisions[4], plan.decisions[5]
    assert pinned.action == "keep" and pinned.place is None
    assert after.place is None or after.place.depth == 0  # nobody rebuilds its input
    assert any(d.place is not None for d in plan.decisions)
    simple = ul.plan(work, budget + 2**20, simple=0.5, **ROOFLINE)
    assert len({(d.action, d.place is not None) for d in simple.decisions}) <= 2


class Drawing(Mlp):
    """Can only be kept."""

    def __init__(self) -> None:
        super().__init__(16, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * torch.rand(16, generator=torch.Generator().manual_seed(0))


def _mixed() -> ul.Workload:
    torch.manual_seed(0)
    return ul.Workload(Tower(Mlp(16, 256), Mlp(16, 256), Drawing(), Drawing()), torch.randn(64, 16))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"pin": {"layers.*": "keep"}},
            r"pin 'layers\.\*': no unit has such a name; the units are blocks\.0, blocks\.1",
        ),
        (
            {"pin": {"blocks.*.up": "keep"}},
            r"blocks\.0\.up is a module but no unit: units=\['blocks\.\*\.up'\] would make",
        ),
        (
            {"pin": {"blocks.0": "select:attention"}},
            r"pin 'blocks\.0'=select:attention: blocks\.0 can't have it: there is ",
        ),
        (
            {"pin": {"blocks.*": "recompute"}},
            r"blocks\.2 can't have it: it draws from a torch.Generator that nothing in it leads to .*; possible: keep",
        ),
        (
            {"pin": {"*0": "keep", "blocks.*": "select"}},
            r"'\*0'=keep and pin 'blocks\.\*'=select contradict .* match blocks\.0",
        ),
        ({"pin": {"blocks.0": "drop"}}, r"pin 'blocks\.0'='drop': no such action; expected keep, recompute, select"),
        ({"pin": {"blocks.0": "keep:all"}}, "no such action"),
        ({"pin": {"blocks.0": None}}, "no such action"),
        ({"pin": ["blocks.0"]}, "expected a mapping"),
        ({"forbid": "select"}, "expected a collection of actions"),
        ({"forbid": ["swap"]}, "forbid 'swap': no such action"),
        (
            {"forbid": ["keep"]},
            r"forbid keep: nothing is left for blocks\.2; possible there: keep \(it draws from",
        ),
        (
            {"forbid": ["keep", "select", "recompute"]},
            r"nothing is left for blocks\.0; possible there: keep, recompute, sel",
        ),
        ({"simple": 2.0}, "simple=2.0: expected True, False or a share"),
        ({"simple": "yes"}, "simple='yes'"),
    ],
)
def test_bad_overrides(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ul.ArgumentError, match=message):
        ul.plan(_mixed(), "90% of plain", **given, **ROOFLINE)


def test_a_pin_without_which_there_would_be_no_plan() -> None:
    plan = ul.plan(_mixed(), "200% of plain", forbid=["keep"], pin={"blocks.[23]": "keep"}, **ROOFLINE)
    assert [a[0] for a in _actions(plan)] == ["s", "s", "k", "k"]
    assert plan.pins[0].seconds == plan.pins[0].nbytes == 0


def test_overrides_that_mean_nothing() -> None:
    work = _mixed()
    with pytest.raises(ul.ArgumentError, match="taken off the budget, and there is none"):
        ul.plan(work, policy="none", headroom="1MiB", **ROOFLINE)
    with pytest.raises(ul.ArgumentError, match="simple: policy 'sqrt' chooses nothing"):
        ul.plan(work, policy="sqrt", simple=True, **ROOFLINE)
    with pytest.raises(ul.BudgetError, match="headroom='lots'"):
        ul.plan(work, "1MiB", headroom="lots", **ROOFLINE)
    assert (
        Overrides(headroom=0).headroom_bytes(1, None) == 0
        and Overrides(headroom="1KiB").headroom_bytes(1, None) == 1024
    )


def test_an_option_that_fails_can_t_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    from ullage.capture import OptionFailed, Session

    run = Session.run

    def failing(self: Session, settings: Any = None, **options: Any) -> None:
        bad = [f for f, s in (settings or {}).items() if s.option.action == "select"]
        if bad:
            raise OptionFailed(bad[0], settings[bad[0]].option.name, ValueError("it is odd"))
        run(self, settings, **options)

    monkeypatch.setattr(Session, "run", failing)
    with pytest.raises(
        ul.ArgumentError, match=r"blocks\.5 can't have it: ValueError: it is odd; possible: keep, recompute"
    ):
        planned(BUDGET, pin={"blocks.5": "select"})


def test_a_plan_with_overrides_is_data(tmp_path: Path) -> None:
    plan = planned(BUDGET, pin={"blocks.0": "keep"}, forbid=["select"], headroom=1000)
    plan.save(tmp_path / "plan.json")
    loaded = ul.Plan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.digest == plan.digest
    assert loaded.pins[0].pin == "blocks.0" and loaded.forbidden == ["select"] and loaded.headroom_bytes == 1000
    other = msgspec.structs.replace(plan, headroom_bytes=0)
    assert other.digest != plan.digest


def test_a_pinned_plan_is_exact() -> None:
    work = tiny()
    plan = ul.plan(work, "95% of plain", pin={"blocks.0": "recompute", "blocks.1": "select:attention"}, **ROOFLINE)
    assert [d.action for d in plan.decisions][:2] == ["recompute", "select:attention"]
    assert ul.verify(work, plan, steps=1).ok
    assert ul.measure(work, plan, steps=1).peak_bytes <= plan.predicted.peak_bytes
