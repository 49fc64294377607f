"""Bytes that any plan leaves as they are: a budget below them is refused after the first capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ullage._bytes import format_bytes
from ullage._errors import BudgetInfeasible
from ullage.planner.plan._budget import Budget
from ullage.planner.study._study import Study


def floor_of(s: Study) -> int:
    """A peak that no plan goes below: the optimizer's update, or the bytes alive before a step, whichever is more."""
    start = int(s.timeline(s.plain_session).before[s.plain[1].ops.start])
    return max(s.update_peak_bytes, start)


def hopeless(s: Study, budget: Budget, decided: Callable[[], Any]) -> BudgetInfeasible:
    """The error for a budget below the floor. It looks for the smallest peak, the work of a whole plan, when it is asked for it.

    Args:
        s: the study.
        budget: the budget.
        decided: plans within it, and so raises the error that knows the smallest peak.
    """
    inst, floor = s.plain_session.inst, floor_of(s) + budget.reserve
    updating = s.update_peak_bytes >= floor_of(s)
    sizes = {
        "parameters": sum(p.numel() * p.element_size() for p in inst.model.parameters()),
        "gradients": sum(p.numel() * p.element_size() for p in inst.model.parameters() if p.requires_grad)
        if updating
        else 0,
        "optimizer state": s.setup.optimizer_bytes,
    }
    held = ", ".join(f"{name} {format_bytes(n)}" for name, n in sizes.items() if n)
    less = "an optimizer with less state, " if sizes["optimizer state"] > 3 * s.setup.trained else ""
    temporaries = ", and the update's temporaries" if updating else ""
    reserve = f"; {format_bytes(budget.reserve)} of it are headroom" if budget.reserve else ""

    def later() -> BudgetInfeasible:
        try:
            decided()
        except BudgetInfeasible as error:
            return error
        raise AssertionError("a plan below its own floor")

    return BudgetInfeasible(
        f"budget {format_bytes(budget.total)}: the smallest peak any plan reaches is {format_bytes(floor)} ({floor} bytes) or more, "
        f"because no plan changes what is there outside forward and backward: {held}{temporaries}{reserve}. It takes "
        f"{less}fewer trained parameters (LoRA), or state sharded over devices (FSDP, ZeRO); budget='smallest' finds the smallest",
        budget.total,
        later=later,
    )
