"""Options that fail in a captured step: that unit loses that option and says why, the others keep theirs, and the process lives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul
from ullage.capture import OptionFailed, Session
from ullage.planner.study._failed import TRIED_ALONE


class Block(nn.Module):
    """Saves what it computes from its input, not the input itself, so the plain step may write to that afterwards."""

    def __init__(self, dropout: bool = False) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(16))
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.1) if self.dropout else self.norm(x + self.shift)
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Net(nn.Module):
    """Writes to the residual in place after the blocks in `written`."""

    def __init__(self, how: str, written: tuple[int, ...]) -> None:
        super().__init__()
        self.entry = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(Block(how == "dropout") for _ in range(5))
        self.how, self.written = how, written

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for i, block in enumerate(self.blocks):
            h = block(x)
            if i not in self.written:
                x = x + h
            elif self.how == "mul_":
                x.mul_(0.9)
                x = x + h
            else:
                x += h
        return x.square().mean()


def _work(how: str, written: tuple[int, ...]) -> ul.Workload:
    torch.manual_seed(0)
    return ul.Workload(Net(how, written), torch.randn(64, 16))


@pytest.mark.parametrize("how", ["iadd", "mul_", "dropout"])
def test_a_residual_written_in_place_keeps_its_block_only(how: str) -> None:
    work = _work(how, (1,))
    plan = ul.plan(work, policy="every_block", costs="roofline")
    actions = {d.unit: d.action for d in plan.decisions}
    assert actions == {f"blocks.{i}": "keep" if i == 1 else "recompute" for i in range(5)}
    why = {d.unit: d.reason for d in plan.decisions}["blocks.1"]
    assert why.startswith("argument 0 was changed between forward and backward")
    assert ul.verify(work, plan, steps=1).ok


@pytest.mark.parametrize("how", ["iadd", "dropout"])
def test_where_every_residual_is_written_nothing_can_be_recomputed(how: str) -> None:
    work = _work(how, (0, 1, 2, 3, 4))
    with pytest.raises(
        ul.BudgetInfeasible, match="can only be kept: argument 0 was changed between forward and backward"
    ):
        ul.plan(work, "60% of plain", costs="roofline")
    ul.profile(work, costs="roofline")


def test_a_step_that_fails_only_when_options_are_mixed_is_planned_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option runs on all units at once, as it is captured; an assignment that the solver makes of them does not."""
    run, failures = Session.run, []

    def failing(self: Session, settings: Any = None, **options: Any) -> None:
        rebuilt = [f for f, s in (settings or {}).items() if s.option.action == "recompute"]
        if 0 < len(rebuilt) < 5 and not failures:
            failures.append(rebuilt[0])
            raise OptionFailed(rebuilt[0], "recompute", ValueError("it is odd"))
        run(self, settings, **options)

    monkeypatch.setattr(Session, "run", failing)
    plan = ul.plan(_work("iadd", ()), policy="every_n:2", costs="roofline")
    assert len(failures) == 1
    decided = {d.unit: (d.action, d.reason) for d in plan.decisions}
    assert decided.pop(failures[0]) == ("keep", "ValueError: it is odd")
    assert ("recompute", "policy every_n:2") in decided.values()


def test_a_class_loses_an_option_once_it_has_failed_on_some_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run, failed = Session.run, []

    def failing(self: Session, settings: Any = None, **options: Any) -> None:
        bad = [f for f, s in (settings or {}).items() if s.option.action == "recompute"]
        if bad:
            failed.append(bad[0])
            raise OptionFailed(bad[0], "recompute", ValueError("it is odd"))
        run(self, settings, **options)

    monkeypatch.setattr(Session, "run", failing)
    plan = ul.plan(_work("iadd", ()), policy="every_block", costs="roofline")
    assert failed == ["blocks.0", "blocks.1"] and len(failed) == TRIED_ALONE
    assert {d.reason for d in plan.decisions} == {"ValueError: it is odd"}


def test_what_a_person_pins_and_does_not_run_is_an_error_of_ours() -> None:
    with pytest.raises(ul.UllageError, match=r"blocks\.1.*argument 0 was changed between forward and backward"):
        ul.plan(_work("iadd", (1,)), "90% of plain", pin={"blocks.1": "recompute"}, costs="roofline")
