"""Give a unit the cheaper option that the solver rejected, if executing the step shows that it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ullage.mechanisms import KEEP, Option
from ullage.planner.model._model import model_of
from ullage.planner.plan._budget import Budget
from ullage.planner.study._choices import Choices
from ullage.planner.study._executed import Executed
from ullage.planner.study._links import assignment_of
from ullage.planner.study._study import Study
from ullage.solver._instance import StepModel
from ullage.solver._schedule import flat

# Ops executed on fake tensors while trying to relax single units: a bound on work, not on time, so that plans are the same on any
# machine. A GPT of 12 blocks has some thousand ops per step. Not tuned.
RELAX_WORK = 100_000
SLACK_BYTES = 4096  # the model may overestimate by this much although no homogeneous step showed it. Not tuned
# of a plan with runs: after so many units without a cheaper option the others are not tried. Not tuned
REFUSED_IN_A_ROW = 4


def relax(s: Study, choices: Choices, chosen: Executed, budget: Budget) -> dict[str, Option]:
    """Return the chosen assignment, with a cheaper option for each unit that still fits with it when executed, the most seconds first.

    If the model is exact, the solver leaves nothing to relax. An option is executed only if the model may have refused it wrongly,
    given by how much it overestimated executed steps. A plan that offloads is not relaxed.
    """
    assignment, peak = {u.fqn: chosen.assignment.get(u.fqn, KEEP) for u in s.units}, chosen.peak_bytes
    if any(o.offloads for o in assignment.values()):
        return assignment
    if any(o.place is not None for o in assignment.values()):
        return _relax_with_runs(s, model_of(s, choices), assignment, budget)
    model, work = model_of(s, choices), RELAX_WORK
    seen = _overestimate(s, model)
    # Equal units have the same option at the same cost and bytes. Once a trial of such a kind did not fit, others of that kind are
    # tried only if the model says a smaller peak for them.
    rejected: dict[tuple[str, int, float], int] = {}
    while work > 0:
        at = _choice(model, assignment)
        slack = max(model.peak(at) - peak, seen) + SLACK_BYTES
        tries = []
        for u, facts in enumerate(model.options):
            # the model does not know what offloading costs
            cheaper = [c for c in range(at[u]) if not facts[c].sent_bytes]
            if not cheaper:
                continue
            old, new = facts[at[u]], facts[cheaper[-1]]
            kind = new.option.name, new.held_bytes - old.held_bytes, new.seconds
            said = model.peak([*at[:u], cheaper[-1], *at[u + 1 :]])
            if said <= budget.room + slack and said < rejected.get(kind, said + 1):
                tries.append((new.seconds - old.seconds, u, new.option, kind, said))
        if not tries:
            break
        _, u, option, kind, said = min(tries, key=lambda t: (t[0], t[1]))
        s.progress("trying to relax single units")
        trial = s.execute({**assignment, model.units[u]: option})
        work -= trial.ops
        if _fits(s, trial, budget):
            assignment, peak = dict(trial.assignment), trial.peak_bytes
            rejected.clear()
        else:
            rejected[kind] = said
    return assignment


def _relax_with_runs(s: Study, model: StepModel, assignment: dict[str, Option], budget: Budget) -> dict[str, Option]:
    """Relax a plan with runs by execution alone: the model knows no selective options for units recomputed together.

    The last units come first, because their tensors are freed before the other units' backward.
    """
    work, refused = RELAX_WORK, 0
    for fqn, facts in reversed(list(zip(model.units, model.options, strict=True))):
        place, options = assignment[fqn].place, [o.option for o in facts]
        now = replace(assignment[fqn], place=None)
        cheaper = options[: options.index(now)] if now in options else []
        for option in reversed(cheaper):
            if work <= 0 or refused == REFUSED_IN_A_ROW:
                return assignment
            s.progress("trying to relax single units")
            trial = s.execute({**assignment, fqn: option if option == KEEP else replace(option, place=place)})
            work -= trial.ops
            if not _fits(s, trial, budget):
                refused += 1
                break
            assignment, refused = dict(trial.assignment), 0
    return assignment


def _fits(s: Study, trial: Executed, budget: Budget) -> bool:
    return trial.peak_with_update <= budget.room and s.execute_fresh(trial.assignment).peak_bytes <= budget.room


def _choice(model: StepModel, assignment: Mapping[str, Option]) -> list[int]:
    """Return the option index per unit; an option that the model has pruned counts as the cheapest one."""
    found = []
    for fqn, facts in zip(model.units, model.options, strict=True):
        found.append(next((i for i, o in enumerate(facts) if o.option == assignment[fqn]), 0))
    return found


def _overestimate(s: Study, model: StepModel) -> int:
    """Return by how much, at most, the model overestimated the peak of an executed homogeneous step."""
    seen = [0]
    for capture in s.captures.values():
        wanted = {f: capture.assignment.get(f, KEEP) for f in model.units}
        choice = _choice(model, wanted)
        if assignment_of(model, flat(choice)) == wanted:
            seen.append(model.peak(choice) - s.execute(capture.assignment).peak_with_update)
    return max(seen)
