"""Execute the solver's choice and lower its target until the executed step fits the budget; explain it if none does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from ullage._bytes import format_bytes
from ullage._errors import BudgetInfeasible
from ullage.mechanisms import KEEP, RECOMPUTE, Option
from ullage.planner.decide._finish import too_much_offloaded
from ullage.planner.decide._relax import relax
from ullage.planner.decide._window import choose_window
from ullage.planner.explain._peak import bounds_of
from ullage.planner.model._model import composed, model_of
from ullage.planner.model._with_tier import solve_with_tier, without_tier
from ullage.planner.plan._budget import Budget
from ullage.planner.plan._policies import policy_assignment
from ullage.planner.study._choices import ALL, Choices
from ullage.planner.study._executed import Executed, Steps
from ullage.planner.study._links import assignment_of
from ullage.planner.study._study import Study
from ullage.solver._solve import Solution, smallest
from ullage.solver._solve import solve as solve_anew

# Solver's choices that are executed before the smallest step is taken instead. Each lowers the target by the excess that its
# execution showed. Not tuned.
MAX_TIGHTENINGS = 10

solve = lru_cache(maxsize=4)(solve_anew)  # offload or not, and a pin's cost, ask for the same solutions
with_tier = lru_cache(maxsize=4)(solve_with_tier)


def solution_of(s: Study, choices: Choices, target: int, offload: bool = True) -> tuple[Solution, int] | None:
    """Return the solver's solution within `target` bytes and its window; None if there is none."""
    seen, window = composed(s, choices), 0
    if s.tier is None or not offload:
        found = solve(seen.model if s.tier is None else without_tier(seen.model), target)
    else:
        sent = with_tier(seen.model, seen.pace, target, s.tier)
        found, window = (sent[0], sent[1].window_bytes) if sent is not None else (None, 0)
    return (found, window) if found is not None else None


def optimal(s: Study, choices: Choices, budget: Budget, explain: bool = False) -> tuple[Steps, float]:
    """Return executed steps within the budget, and a lower bound on the seconds that any such steps add.

    The simulation during the choice is coarser than execution. So a choice that offloads is compared, executed, with the best one
    that does not: offloading never makes a step slower.
    """
    confirmed, bound = _confirmed(s, choices, budget, offload=True)
    found = [confirmed]
    if s.tier is not None and (confirmed is None or any(o.offloads for o in confirmed.assignment.values())):
        found.append(_confirmed(s, choices, budget, offload=False)[0])
    chosen = [c for c in found if c is not None]
    if not chosen:
        chosen = [smallest_step(s, choices)]
        if s.execute_fresh(chosen[0].assignment).peak_bytes > budget.room:
            raise infeasible(s, choices, budget, chosen[0], explain=explain)
    whole = [choose_window(s.execute_fresh(relax(s, choices, c, budget)), budget) for c in chosen]
    return min(whole, key=lambda steps: steps.seconds), bound


def _confirmed(s: Study, choices: Choices, budget: Budget, offload: bool) -> tuple[Executed | None, float]:
    """Return the first of the solver's choices that fits when executed (None if there is none), and its lower bound."""
    model, target, bound = model_of(s, choices), budget.room, None
    for tightenings in range(MAX_TIGHTENINGS):
        solved = solution_of(s, choices, target, offload)
        if solved is None:
            break
        solution, window = solved
        bound = solution.lower_bound if bound is None else bound
        assignment = assignment_of(model, solution.schedule)
        s.progress("confirming the plan")
        if (
            not tightenings
        ):  # the model is off by some bytes at most, so this fits mostly: no later step is executed by itself
            s.execute_fresh(assignment, window)
        trial = s.execute(assignment, window)
        over = trial.peak_with_update - budget.room
        if not trial.fits_tier:  # the step offloads more than the model said, and a lower target would not change that
            break
        if over <= 0:
            steps = s.execute_fresh(trial.assignment, window)
            over = steps.peak_bytes - budget.room
            if over <= 0:
                return (trial, bound) if steps.fits_tier else (None, bound)
        target = min(target - over, solution.peak_bytes - 1)  # below its own peak, so that it is not chosen again
    return None, bound or 0.0


def smallest_step(s: Study, choices: Choices = ALL) -> Executed:
    """Return the executed step with the smallest peak among the solver's choice, homogeneous ones and the plain one; without windows."""
    model, options = model_of(s, choices), choices.of(s)
    candidates = [c.assignment for c in s.captures.values() if _allowed(options, c.assignment)]
    candidates.append(assignment_of(model, smallest(model).schedule))
    if s.tier is not None:
        candidates.append(assignment_of(model, smallest(without_tier(model)).schedule))
    candidates.append(policy_assignment("every_block", s.units, options))
    executed = [s.execute(a) for a in candidates]
    fitting = [e for e in executed if e.fits_tier]
    if not fitting:
        raise too_much_offloaded(min(executed, key=lambda e: e.offloaded_bytes), "with these pins")
    return min(fitting, key=lambda e: e.peak_with_update)


def _allowed(options: Mapping[str, list[Option]], assignment: Mapping[str, Option]) -> bool:
    return all(replace(assignment.get(f, KEEP), place=None) in of_unit for f, of_unit in options.items())


def infeasible(
    s: Study, choices: Choices, budget: Budget, best: Executed, why: str = "", explain: bool = False
) -> BudgetInfeasible:
    """Return the error that names the smallest peak of any plan, and what holds it."""
    steps = s.execute_fresh(best.assignment)
    size = steps.peak_bytes + budget.reserve
    phase, module, op = max(steps.both, key=lambda e: e.peak_bytes).moment
    reasons_to_keep = (u.keep_reason or s.reasons.get((u.fqn, RECOMPUTE.name), "") for u in s.units)
    kept = Counter(filter(None, reasons_to_keep))
    reasons = "".join(f"; {n} units can only be kept: {reason}" for reason, n in kept.most_common(3))
    reasons += f"; {format_bytes(budget.reserve)} of it are headroom" if budget.reserve else ""
    reasons += f"; with {', '.join(choices.restrictions)}" if choices.restrictions else ""
    bounds = bounds_of(s, choices, steps) if explain else None
    return BudgetInfeasible(
        f"budget {format_bytes(budget.total)}: {why}the smallest peak any plan reaches is {format_bytes(size)} ({size} bytes), "
        f"bound by {phase} in {module or '(root)'} at {op}{reasons}{bounds.hint if bounds is not None else ''}",
        budget.total,
        size,
        (phase, module, op),
        bounds,
    )
