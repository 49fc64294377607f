"""The study of an existing plan or of the plain step, for questions about it (bounds, timeline, report, restate)."""

from __future__ import annotations

from collections.abc import Callable

from ullage._errors import ArgumentError
from ullage.cost import device_name
from ullage.mechanisms import KEEP
from ullage.planner.plan._plan import Plan
from ullage.planner.plan._profile import Profile
from ullage.planner.study._executed import Steps
from ullage.planner.study._prepare import study, with_units
from ullage.planner.study._study import Study
from ullage.workload import Reads, Workload, reading


def study_plan(
    work: Workload,
    plan: Plan | None,
    device: str | None,
    costs: str,
    profile: Profile | None,
    progress: Callable[[str], None] | None,
) -> Study:
    """Capture the plain step, for a question about a plan (None: about the plain step itself).

    Raises:
        ArgumentError: `plan` is not a plan, or `device` is given beside one.
        PlanMismatch: the plan is for another model, or modules of it are in another mode.
        CaptureError, WorkloadError, DeviceError: see their docstrings.
    """
    if plan is not None:
        device, costs = _of_plan(plan, device, costs)
        if isinstance(work, Workload) and work.reads == Reads():
            work = reading(work, plan.values, plan.assume)
    known = profile.op_costs if profile is not None else None
    s = study(work, device, costs, None, known, progress, plan.tier if plan is not None else None)
    if plan is None:
        return s
    plan.check_model(s.session.inst.model)
    plan.check_modes(s.evaluation)
    names = [d.unit for d in plan.decisions]
    return s if names == [u.fqn for u in s.units] else with_units(s, names)  # the plan was made with `units=`


def execute_plan(s: Study, plan: Plan | None) -> Steps:
    """Execute the steps of a plan, or the plain ones, on the study of their workload."""
    if plan is None:
        return s.plain_steps
    assignment = {u.fqn: KEEP for u in s.units} | {d.unit: d.settings().option for d in plan.decisions}
    return s.execute_fresh(assignment, plan.tier.window_bytes if plan.tier is not None else 0)


def _of_plan(plan: Plan, device: str | None, costs: str) -> tuple[str | None, str]:
    if not isinstance(plan, Plan):
        raise ArgumentError(
            f"plan: expected a ullage.Plan, got {type(plan).__name__}; a file is read by Plan.load(path)"
        )
    if device is not None and device != plan.device and device_name(device) != plan.device:
        raise ArgumentError(f"device={device!r}: the plan is for {plan.device}; leave it out, or plan for {device}")
    return plan.device if plan.estimate else None, "roofline" if plan.costs == "roofline" else costs
