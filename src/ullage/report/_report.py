"""`report`: one study, and all that a page shows of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec import structs

from ullage._bytes import format_bytes
from ullage._errors import ArgumentError
from ullage._progress import Progress, callback, shows_progress
from ullage.measure._measure import Measurement
from ullage.measure._state import captures
from ullage.planner import Plan, Profile
from ullage.planner.answers._frontier import check_points, frontier_of
from ullage.planner.decide._planner import decide, study_and_plan
from ullage.planner.decide._restate import restate
from ullage.planner.explain._peak import bounds_of
from ullage.planner.plan._planned import execute_plan, study_plan
from ullage.planner.study._choices import ALL
from ullage.report._make import plain_timeline_of, planned_timeline_of
from ullage.report._overview import Measured, StepReport
from ullage.report._sides import read
from ullage.workload import Workload

Given = Measurement | str | Path


@shows_progress
@captures
def report(
    work: Workload,
    plan: Plan | None = None,
    *,
    budget: int | str | None = None,
    points: int | None = 12,
    measured: Given | Sequence[Given] | None = None,
    title: str | None = None,
    device: str | None = None,
    costs: str = "auto",
    profile: Profile | None = None,
    progress: Progress = None,
) -> StepReport:
    """Gather timeline, plan, frontier and measurements of a step for a page: `report(work, budget="6GiB").export("report.html")`.

    Everything comes from one study, so that the plan, its timeline and the frontier share their times.

    Args:
        work: what is trained; left as found, the model itself never runs.
        plan: any plan for this model; its bytes and seconds are found anew. Without one, and without a budget, the page is
            about the plain step.
        budget: plan for this, as `ullage.plan` does.
        points: of the frontier, which takes most of the time; None leaves it out.
        measured: what `ullage.measure` found, or the file of it (what `ullage measure --json` prints), or several.
        title: what is trained; default: the class of the model.
        device: None (where the model is) or a name of the device table; a plan has its own.
        costs: "auto" or "roofline", as in `ullage.plan`; a plan has its own.
        profile: take op costs from this profile instead of measuring again.
        progress: called with a line at each stage; None shows one on a terminal after 2 s, False nothing.

    Raises:
        ArgumentError: both a plan and a budget, a number of points that means nothing, or a measurement that is none or is
            of a plan where there is no plan here.
        BudgetError: the budget can't be read.
        BudgetInfeasible: no plan fits it.
        PlanMismatch: the plan is for another model.
        PlanError: the measurement can't be read.
        CaptureError, WorkloadError, DeviceError: see their docstrings.
    """
    progress = callback(progress)
    if plan is not None and budget is not None:
        raise ArgumentError("plan and budget: give one of them; a plan has its own budget")
    if points is not None:
        check_points(points)
    notes: list[str] = []
    runs = _measured(measured, plan, budget is not None, notes)
    if budget is not None:
        s, made = study_and_plan(work, budget, device, costs=costs, profile=profile, progress=progress)
    else:
        s = study_plan(work, plan, device, costs, profile, progress)
        made = restate(s, plan) if plan is not None else decide(s, None, "none")
    if made.bounds is None:
        made = structs.replace(made, bounds=bounds_of(s, ALL, execute_plan(s, plan)))
    s.progress("laying out the timelines")
    plain = plain_timeline_of(s)
    planned = planned_timeline_of(s, made) if plan is not None or budget is not None else None
    if plan is not None and plan.predicted.peak_bytes != made.predicted.peak_bytes:
        before, now = (format_bytes(p.predicted.peak_bytes) for p in (plan, made))
        notes.append(f"the plan's file says a peak of {before}, but it is {now}: edited by hand, or another torch")
    return StepReport(
        title=title or type(s.session.inst.model).__name__,
        plan=made,
        plain=plain,
        planned=planned,
        frontier=frontier_of(s, points) if points is not None else None,
        measured=runs,
        notes=[*notes, *s.setup.defaults, *made.notes, *filter(None, [made.endurance])],
    )


def _measured(
    given: Given | Sequence[Given] | None, plan: Plan | None, planned: bool, notes: list[str]
) -> list[Measured]:
    """The measurements, each set beside the step that it is of."""
    if given is None:
        return []
    several = [given] if isinstance(given, Measurement | str | Path) else list(given)
    runs = []
    for k, one in enumerate(several):
        name = Path(one).name if isinstance(one, str | Path) else f"measurement {k + 1}" if k else "measurement"
        found = read(one) if isinstance(one, str | Path) else one
        if not isinstance(found, Measurement):
            raise ArgumentError(
                f"measured: {name} is a {type(found).__name__}; expected a ullage.Measurement, or what `ullage measure --json` prints"
            )
        runs.append(_run(name, found, plan, planned or plan is not None, notes))
    return runs


def _run(name: str, m: Measurement, plan: Plan | None, planned: bool, notes: list[str]) -> Measured:
    if m.plan_digest and not planned:
        raise ArgumentError(f"measured: {name} was measured under a plan; give the plan too, or measure the plain step")
    if m.plan_digest is None:
        what = "under the plan" if planned else "of the plain step"
        notes.append(f"{name} does not say which step was measured; taken as one {what}")
    elif m.plan_digest and (plan is None or m.plan_digest != plan.digest):
        notes.append(f"{name} was measured under another plan than this one ({m.plan_digest[:8]})")
    return Measured(name=name, planned=planned and m.plan_digest != "", measurement=m)
