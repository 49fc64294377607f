"""A study and the assignment of a plan that exists already: what is asked of a plan, or of the plain step, starts here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ullage._errors import ArgumentError
from ullage.capture._units import unit_facts
from ullage.mechanisms import KEEP, Option
from ullage.planner._options import find_options
from ullage.planner._prepare import saved_bytes, study
from ullage.planner._study import Study, key_of
from ullage.workload import Workload

if TYPE_CHECKING:
    from ullage.planner._plan import Plan
    from ullage.planner._profile import Profile


def study_plan(
    work: Workload,
    plan: Plan | None,
    device: str | None,
    costs: str,
    profile: Profile | None,
    progress: Callable[[str], None] | None,
) -> tuple[Study, dict[str, Option]]:
    """Capture the plain step, and say what a plan (None: the plain step) does with each unit.

    Raises:
        ArgumentError: `plan` is not a plan, or `device` is given beside one.
        PlanMismatch: the plan is for another model, or modules of it are in another mode.
        CaptureError, WorkloadError, DeviceError: see their docstrings.
    """
    if plan is not None:
        device, costs = _of_plan(plan, device, costs)
    s = study(work, device, costs, None, profile.op_costs if profile is not None else None, progress)
    if plan is not None:
        plan.check_model(s.session.inst.model)
        plan.check_modes(s.evaluation)
        names = [d.unit for d in plan.decisions]
        if names != [u.fqn for u in s.units]:  # it was made with units= of its own
            s.units = unit_facts(s.session, saved_bytes(s), names)
        s.tier = plan.tier
    find_options(s)
    assignment = {u.fqn: KEEP for u in s.units}
    assignment |= {d.unit: d.settings().option for d in plan.decisions} if plan is not None else {}
    if plan is not None and plan.tier is not None:
        s.windows[key_of(assignment)] = plan.tier.window_bytes
    return s, assignment


def _of_plan(plan: Plan, device: str | None, costs: str) -> tuple[str | None, str]:
    from ullage.planner._plan import Plan

    if not isinstance(plan, Plan):
        raise ArgumentError(
            f"plan: expected a ullage.Plan, got {type(plan).__name__}; a file is read by Plan.load(path)"
        )
    if device is not None and device != plan.device:
        raise ArgumentError(f"device={device!r}: the plan is for {plan.device}; leave it out, or plan for {device}")
    return plan.device if plan.estimate else None, "roofline" if plan.costs == "roofline" else costs
