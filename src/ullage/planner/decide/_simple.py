"""Fewer distinct actions: among plans hardly slower than the best, find one that a person can keep in mind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ullage._errors import BudgetInfeasible
from ullage.mechanisms import KEEP, RECOMPUTE, Option
from ullage.planner.decide._confirm import optimal
from ullage.planner.model._model import model_of
from ullage.planner.plan._budget import Budget
from ullage.planner.study._choices import Choices
from ullage.planner.study._executed import Steps
from ullage.planner.study._study import Study
from ullage.solver._solve import solve

TOGETHER = "recomputed together"
_MARGIN = 1.001  # a set is still executed if the solver's time is above the limit by no more than this: the executed step may differ


def fewer_actions(s: Study, choices: Choices, best: Steps, tolerance: float, budget: Budget) -> tuple[Steps, str]:
    """Return the steps with the fewest distinct actions that are at most `tolerance` slower, and a note about them.

    First one action for all units is tried, then keep and one more, then the best of these and one more, and so on. Of each size,
    the set that the solver finds cheapest is decided in full, and its executed step is compared. So a set of the same size that
    only execution would show to be faster can be missed.

    Args:
        s: the study.
        choices: the options to choose from.
        best: the steps of the best plan.
        tolerance: share of its step time that may be added.
        budget: the budget.
    """
    most = count_actions(best.assignment)
    if most == 1:
        return best, ""
    allowed = best.seconds * (1 + tolerance)
    base: frozenset[str] = frozenset()
    for size in range(1, most):
        s.progress(f"looking for a plan with fewer actions ({size})")
        chosen, seconds = _cheapest(s, choices, base, budget)
        if seconds <= allowed * _MARGIN:
            found = _decided(s, _only(s, choices, chosen), budget)
            if found is not None and count_actions(found.assignment) < most and found.seconds <= allowed:
                fewer, change = count_actions(found.assignment), found.seconds / best.seconds - 1
                return (
                    found,
                    f"simple: {_actions(fewer)} instead of {most}, which changes the step time by {change:+.2%}",
                )
        base = chosen if size > 1 else frozenset({KEEP.name})
    return best, f"simple: no plan with fewer than {_actions(most)} is within {tolerance:.1%} of this step time"


def count_actions(assignment: Mapping[str, Option]) -> int:
    """Return how many distinct actions there are; being recomputed together with others counts as one of its own."""
    return len({(o.name, o.place is not None) for o in assignment.values()})


def _cheapest(s: Study, choices: Choices, base: frozenset[str], budget: Budget) -> tuple[frozenset[str], float]:
    """Return the cheapest set of `base` and one more action by the solver, and the seconds of its step."""
    kinds = {o.name for options in choices.of(s).values() for o in options} | {TOGETHER}
    found = []
    for kind in sorted(kinds - base):
        model = model_of(s, _only(s, choices, base | {kind}))
        solution = solve(model, budget.room)
        if solution is not None:
            found.append((model.base_seconds + solution.seconds, kind))
    return (base | {min(found)[1]}, min(found)[0]) if found else (base, float("inf"))


def _decided(s: Study, choices: Choices, budget: Budget) -> Steps | None:
    try:
        return optimal(s, choices, budget)[0]
    except BudgetInfeasible:  # the solver's choice does not fit when it is executed
        return None


def _only(s: Study, choices: Choices, actions: frozenset[str]) -> Choices:
    """Return the choices with these actions only; a unit that has none of them keeps all its options."""
    names = actions | ({RECOMPUTE.name} if TOGETHER in actions else frozenset())
    left = {f: [o for o in options if o.name in names] or options for f, options in choices.of(s).items()}
    return replace(choices, allowed=left, together=TOGETHER in actions)


def _actions(n: int) -> str:
    return "1 action" if n == 1 else f"{n} actions"
