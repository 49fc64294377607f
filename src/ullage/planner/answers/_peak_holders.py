"""`bounds`: the tensors that hold the peak of a plan's step, or of the plain one."""

from __future__ import annotations

from ullage._progress import Progress, callback, shows_progress
from ullage.measure._state import captures
from ullage.planner.explain._levers import MOST_RUNS
from ullage.planner.explain._peak import Bounds, bounds_of
from ullage.planner.plan._plan import Plan
from ullage.planner.plan._planned import execute_plan, study_plan
from ullage.planner.plan._profile import Profile
from ullage.planner.study._choices import ALL
from ullage.workload import Workload


@shows_progress
@captures
def bounds(
    work: Workload,
    plan: Plan | None = None,
    device: str | None = None,
    costs: str = "auto",
    *,
    profile: Profile | None = None,
    progress: Progress = None,
) -> Bounds:
    """Find the tensors that hold the peak of a plan's step, or of the plain one, and the levers that would lower it.

    Args:
        work: the workload; left as found.
        plan: any plan for this model, also one edited by hand; None is the plain step.
        device: as in `ullage.plan`; a plan has its own.
        costs: "auto" or "roofline"; a plan has its own.
        profile: take op costs from this profile instead of measuring again.
        progress: called with a line at each stage; None shows one on a terminal after 2 s, False nothing.

    Raises:
        ArgumentError: `plan` is not a plan, or `device` is given beside one.
        PlanMismatch: the plan is for another model.
        CaptureError, WorkloadError, DeviceError: see their docstrings.
    """
    progress = callback(progress)
    s = study_plan(work, plan, device, costs, profile, progress)
    s.progress("running the step")
    return bounds_of(s, ALL, execute_plan(s, plan), runs=MOST_RUNS)
