"""Update the bytes and seconds of an existing plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from msgspec import structs

from ullage.mechanisms import KEEP, Option
from ullage.planner.decide._finish import finish
from ullage.planner.model._model import model_of
from ullage.planner.plan._budget import Budget
from ullage.planner.plan._plan import Decision, Plan
from ullage.planner.plan._planned import execute_plan
from ullage.planner.study._choices import ALL, Choices
from ullage.planner.study._options import capture_also, capture_options
from ullage.planner.study._study import Study


def restate(s: Study, plan: Plan) -> Plan:
    """Return a plan with the bytes and seconds of this study; its decisions and their reasons stay.

    A plan's file may have been edited by hand, and its times were measured on another day.
    """
    steps = execute_plan(s, plan)
    alone = {f: replace(o, place=None) for f, o in steps.assignment.items()}
    _capture_missing(s, alone)
    choices = Choices({f: list(dict.fromkeys([KEEP, o])) for f, o in alone.items()})
    reasons = {d.unit: d.reason for d in plan.decisions}
    budget = Budget(plan.budget_bytes) if plan.budget_bytes is not None else None
    made = finish(s, choices, steps, budget, plan.policy, 0.0, reasons)
    known = _known(s, choices) if len(s.captures) > 1 else {}
    return structs.replace(
        made,
        decisions=[_as_found(d, alone[d.unit] in known.get(d.unit, alone.values())) for d in made.decisions],
        lower_bound_seconds=min(plan.lower_bound_seconds, made.predicted.step_seconds),
        gap=plan.gap,
        headroom_bytes=plan.headroom_bytes,
        forbidden=plan.forbidden,
        pins=plan.pins,
    )


def _capture_missing(s: Study, alone: Mapping[str, Option]) -> None:
    """Capture the plan's options that the planner did not find itself."""
    if all(o == KEEP for o in alone.values()):
        return
    capture_options(s)
    options = ALL.of(s)
    more: dict[Option, list[str]] = {}
    for fqn, option in alone.items():
        if option not in options[fqn]:
            more.setdefault(option, []).append(fqn)
    for option, fqns in more.items():
        capture_also(s, option, fqns)


def _known(s: Study, choices: Choices) -> dict[str, set[Option]]:
    model = model_of(s, choices)
    return {f: {o.option for o in options} for f, options in zip(model.units, model.options, strict=True)}


def _as_found(d: Decision, in_model: bool) -> Decision:
    """Set the freed bytes to zero for an option that the model leaves out because it holds no less than keep does."""
    return d if in_model else structs.replace(d, bytes_freed=0)
