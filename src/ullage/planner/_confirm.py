"""From what the solver chooses to what is executed within the limit: tighten until it fits, and say so where nothing does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from ullage._bytes import format_bytes
from ullage._errors import BudgetInfeasible
from ullage.mechanisms import KEEP, RECOMPUTE, Option
from ullage.planner._finish import too_much_offloaded
from ullage.planner._links import assignment_of
from ullage.planner._live import peak_moment
from ullage.planner._model import model_of
from ullage.planner._moved import fits_tier, offloaded_bytes
from ullage.planner._peak import bounds_of
from ullage.planner._policies import policy_assignment
from ullage.planner._relax import relax
from ullage.planner._solve import Solution, smallest
from ullage.planner._solve import solve as solve_anew
from ullage.planner._study import StepCapture, Study, key_of
from ullage.planner._window import choose_window
from ullage.planner._with_tier import solve_with_tier, without_tier

MAX_TIGHTENINGS = 10

solve = lru_cache(maxsize=4)(solve_anew)  # `execute_choice` and `decide` ask for the same
with_tier = lru_cache(maxsize=4)(solve_with_tier)


def solution_of(s: Study, target: int, offload: bool = True) -> Solution | None:
    """What the solver finds within `target` bytes; where tensors may leave, the window that goes with it is noted."""
    model = model_of(s)
    if s.tier is None or s.pace is None:
        return solve(model, target)
    if not offload:
        return solve(without_tier(model), target)
    found = with_tier(model, s.pace, target, s.tier)
    if found is None:
        return None
    s.windows[key_of(assignment_of(model, found[0].schedule))] = found[1].window_bytes
    return found[0]


def optimal(s: Study, limit: int) -> tuple[dict[str, Option], float]:
    """The assignment that is executed within `limit`, and a lower bound on the seconds any such one adds.

    What is simulated while choosing is coarser than what is then executed. So that offload never makes a step slower, a
    choice that sends something is compared with the best one that sends nothing.
    """
    confirmed, bound = _confirmed(s, limit, offload=True)
    found = [confirmed]
    if s.tier is not None and (confirmed is None or any(o.offloads for o in confirmed.assignment.values())):
        found.append(_confirmed(s, limit, offload=False)[0])
    chosen = [c for c in found if c is not None]
    if not chosen:
        chosen = [smallest_step(s)]
        if s.fresh_peak(chosen[0].assignment) > limit:
            raise infeasible(s, limit + s.headroom_bytes, chosen[0])
    whole = [relax(s, c, limit) for c in chosen]
    for assignment in whole:
        choose_window(s, assignment, limit)
    if len(whole) > 1:
        whole.sort(key=lambda a: s.seconds(s.execute_fresh(a)[1]))
    return whole[0], bound


def _confirmed(s: Study, limit: int, offload: bool) -> tuple[StepCapture | None, float]:
    """What the solver chooses and execution shows to fit, None if there is none; and its lower bound."""
    model, target, bound = model_of(s), limit, None
    for _ in range(MAX_TIGHTENINGS):
        solution = solution_of(s, target, offload)
        if solution is None:
            break
        bound = solution.lower_bound if bound is None else bound
        trial = s.execute(assignment_of(model, solution.schedule))
        s.progress("confirming the plan")
        over = s.peak_with_update(trial) - limit
        if not fits_tier(s, trial):  # the model says less than what is sent
            break
        if over <= 0 and (over := s.fresh_peak(trial.assignment) - limit) <= 0:
            if not all(fits_tier(s, c) for c in s.execute_fresh(trial.assignment)):
                break
            return trial, bound
        target = min(target - over, solution.peak_bytes - 1)  # not the same again
    return None, bound or 0.0


def smallest_step(s: Study) -> StepCapture:
    """The executed step with the smallest peak, among the solver's choice, the homogeneous ones and the plain one; without windows."""
    s.windows.clear()
    model = model_of(s)
    candidates = [c for c in s.captures.values() if _allowed(s, c.assignment)]
    candidates.append(s.execute(assignment_of(model, smallest(model).schedule)))
    if s.tier is not None:
        candidates.append(s.execute(assignment_of(model, smallest(without_tier(model)).schedule)))
    candidates.append(s.execute(policy_assignment("every_block", s.units, s.options)))
    fitting = [c for c in candidates if fits_tier(s, c)]
    if not fitting:
        least = min(candidates, key=lambda c: offloaded_bytes(s, c))
        raise too_much_offloaded(s, least, "with these pins")
    return min(fitting, key=s.peak_with_update)


def _allowed(s: Study, assignment: Mapping[str, Option]) -> bool:
    return all(replace(assignment.get(f, KEEP), place=None) in options for f, options in s.options.items())


def infeasible(s: Study, limit: int, best: StepCapture, why: str = "") -> BudgetInfeasible:
    """The error that says how far down plans reach, and what holds them up there."""
    steps = s.execute_fresh(best.assignment)
    size = max(map(s.peak, steps)) + s.headroom_bytes
    phase, module, op = peak_moment(s, max(steps, key=s.peak))
    reasons_to_keep = (u.keep_reason or s.reasons.get((u.fqn, RECOMPUTE.name), "") for u in s.units)
    kept = Counter(filter(None, reasons_to_keep))
    reasons = "".join(f"; {n} units can only be kept: {reason}" for reason, n in kept.most_common(3))
    reasons += f"; {format_bytes(s.headroom_bytes)} of it are headroom" if s.headroom_bytes else ""
    reasons += f"; with {', '.join(s.restrictions)}" if s.restrictions else ""
    bounds = bounds_of(s, best.assignment, steps) if s.explains else None
    return BudgetInfeasible(
        f"budget {format_bytes(limit)}: {why}the smallest peak any plan reaches is {format_bytes(size)} ({size} bytes), "
        f"bound by {phase} in {module or '(root)'} at {op}{reasons}{bounds.hint if bounds is not None else ''}",
        limit,
        size,
        (phase, module, op),
        bounds,
    )
