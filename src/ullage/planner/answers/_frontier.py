"""The curve of step time against peak: from one study, a plan for each of several budgets, and named policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from ullage._bytes import format_bytes, format_seconds, parse_budget
from ullage._errors import ArgumentError, BudgetError, BudgetInfeasible, CaptureError, PlanError
from ullage._files import write_whole
from ullage._progress import Progress, callback, shows_progress
from ullage._writers import write
from ullage.measure._state import captures
from ullage.planner.decide._planner import decide, smallest_bytes
from ullage.planner.plan._budget import Budget
from ullage.planner.plan._plan import Plan, check_actions
from ullage.planner.plan._policies import mechanism_of, named_policies
from ullage.planner.plan._profile import Profile
from ullage.planner.study._prepare import prepare
from ullage.planner.study._study import Study
from ullage.planner.study._tiers import TierRequest, choose_tier
from ullage.workload import Workload, reading

VERSION = 1


class FrontierPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fastest plan found whose step stays within a budget.

    Attributes:
        budget_bytes: bytes of the budget.
        peak_bytes: bytes of the predicted peak.
        step_seconds: seconds of the predicted step.
        plan: the plan.
    """

    budget_bytes: int
    peak_bytes: int
    step_seconds: float
    plan: Plan


class PolicyPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A named policy's predicted peak and step time.

    Attributes:
        policy: its name.
        peak_bytes: bytes; None if the policy can't be run.
        step_seconds: seconds; None if the policy can't be run.
        reason: why it can't be run, or "".
    """

    policy: str
    peak_bytes: int | None
    step_seconds: float | None
    reason: str


class Frontier(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Step time against peak. From each point to the next the peak grows and the step gets faster, strictly.

    Attributes:
        version: of the file's format.
        device: name of the device.
        estimate: whether that device is not here.
        costs: "measured" or "roofline".
        memory_bytes: memory of the device, or None if that is not known.
        points: the smallest peak first; the last is the plain step unless a plan with a smaller peak is as fast.
        policies: the named policies, as `plan(policy=...)` plans them.
    """

    version: int
    device: str
    estimate: bool
    costs: str
    memory_bytes: int | None
    points: list[FrontierPoint]
    policies: list[PolicyPoint]

    def within(self, budget: int | str) -> FrontierPoint:
        """Return the fastest point within a budget.

        Raises:
            BudgetError: the budget can't be read.
            BudgetInfeasible: every point is above it.
        """
        least = self.points[0]
        plain = least.plan.baseline.peak_bytes
        limit = parse_budget(budget).resolve(plain, self.memory_bytes)
        found = [p for p in self.points if p.budget_bytes <= limit]
        if not found:
            at = least.plan.predicted
            said = f"budget {format_bytes(limit)}: the smallest this frontier has a plan for is {format_bytes(least.budget_bytes)}"
            raise BudgetInfeasible(said, limit, least.budget_bytes, (at.phase, at.module, at.op))
        return found[-1]

    def save(self, path: str | Path) -> None:
        """Write the frontier, plans included, as JSON."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> Frontier:
        """Read a frontier; PlanError if it is not one, or if it is newer than what this version reads."""
        try:
            found = msgspec.json.decode(Path(path).read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise PlanError(f"frontier {path}: {error}") from error
        if found.version != VERSION:
            raise PlanError(f"frontier {path}: version {found.version}, but this ullage reads {VERSION}")
        if not found.points:
            raise PlanError(f"frontier {path}: it has no points")
        for p in found.points:
            check_actions(p.plan, f"frontier {path}")
        return found

    def plot(self, path: str | Path) -> None:
        """Draw the curve and the policies as a picture; the file's ending says which kind (svg, png or pdf).

        Raises:
            ArgumentError: another ending, a folder that is not there, or matplotlib is not installed.
        """
        write(self, "plot", path)

    def __str__(self) -> str:
        label = ", an ESTIMATE: this device is not here" if self.estimate else ""
        memory = "" if self.memory_bytes is None else f", {format_bytes(self.memory_bytes)} of memory"
        fastest = self.points[-1].step_seconds
        setup = self.points[0].plan.setup
        plain = next((q.peak_bytes for q in self.policies if q.policy == "none"), None)
        fits = [f"  fits       plain: {setup.fits(plain)}"] if setup is not None and plain is not None else []
        lines = [
            f"frontier for {self.device}{label}{memory} (costs: {self.costs})",
            *([str(setup)] if setup is not None else []),
            *fits,
            f"  {'peak':>12}  {'step time':>10}  {'slower':>8}  decisions",
        ]
        for p in self.points:
            row = _row(p.peak_bytes, p.step_seconds, fastest)
            lines.append(f"  {row}  {p.plan.kinds}")
        lines.append("  named policies")
        for q in self.policies:
            ran = q.peak_bytes is not None and q.step_seconds is not None
            row = _row(q.peak_bytes or 0, q.step_seconds or 0.0, fastest) if ran else " " * 34
            lines.append(f"  {row}  {q.policy}{': ' if q.reason else ''}{q.reason}")
        return "\n".join(lines)


def _row(peak: int, seconds: float, fastest: float) -> str:
    slower = seconds / fastest - 1 if fastest else 0.0
    return f"{format_bytes(peak):>12}  {format_seconds(seconds):>10}  {slower:>+8.1%}"


@shows_progress
@captures
def frontier(
    work: Workload,
    points: int = 12,
    device: str | None = None,
    *,
    costs: str = "auto",
    profile: Profile | None = None,
    units: Sequence[str] | None = None,
    disk_directory: str | Path | None = None,
    disk_budget: int | str | None = None,
    host_budget: int | str | None = None,
    checksums: bool = False,
    values: str = "auto",
    assume: Mapping[str, float] | None = None,
    progress: Progress = None,
) -> Frontier:
    """Plan for budgets from the smallest that is possible to the plain step's peak.

    The workload is captured once, and every point is a plan that was confirmed as those of `plan` are. The budgets are
    the two ends, then the peaks of the named policies, so that each is compared at equal memory, and the others evenly
    between those. Where two budgets lead to the same plan there are fewer points.

    Args:
        work: what is trained; left as found.
        points: budgets to plan for, 2 or more. With fewer than 6 (7 with a tier) some policies have no point of their own.
        device: see `plan`.
        costs: "auto" or "roofline".
        profile: take op costs from this profile.
        units: FQN globs of the modules to plan over.
        disk_directory: where saved tensors may be offloaded to, see `plan`; with a tier the policy `offload` is shown too.
        disk_budget: bytes or a string: size of the file that is made there.
        host_budget: bytes or a string: pinned host memory, instead of a disk.
        checksums: see `plan`, as for `values` and `assume`.
        values: "auto", "assumed" or "run".
        assume: what to take for values that depend on activations.
        progress: called with a line at each stage; None shows one on a terminal after 2 s, False nothing.

    Raises:
        ArgumentError: `points` is not a whole number of 2 or more, or a tier is only half named.
        CaptureError, WorkloadError, DeviceError, OffloadError: see their docstrings.
    """
    progress = callback(progress)
    check_points(points)
    work = reading(work, values, assume)
    tier = choose_tier(
        TierRequest(disk_directory, disk_budget, host_budget, checksums=checksums), work, device, progress
    )
    return frontier_of(prepare(work, device, costs, profile, units, progress, tier), points)


def check_points(points: int) -> None:
    """Raise ArgumentError unless `points` is a whole number of 2 or more."""
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ArgumentError(f"points={points!r}: expected a whole number of 2 or more")


def frontier_of(s: Study, points: int) -> Frontier:
    """Make the frontier of a study; see `frontier`."""
    high, low = s.plain_steps.peak_bytes, smallest_bytes(s)
    limits = sorted({min(low, high), high})
    found = [_within(s, limit) for limit in limits]
    policies = []
    for name in named_policies(s.tier is not None):
        s.progress(f"policy {name}")
        point, plan = _policy(s, name)
        policies.append(point)
        if plan is not None:
            found.append(plan)
            limit = plan.predicted.peak_bytes
            if limit < high and limit not in limits and len(limits) < points:
                limits.append(limit)
                found.append(_within(s, limit))  # now, while the policy's captured steps are still kept
    between = spread(limits, points)
    found += [_within(s, limit) for limit in between]
    return Frontier(
        version=VERSION,
        device=s.device.name,
        estimate=s.device.estimate,
        costs=s.costs_mode,
        memory_bytes=s.device.memory_bytes,
        points=curve(sorted([*limits, *between]), [p for p in found if p is not None]),
        policies=policies,
    )


def spread(limits: Sequence[int], points: int) -> list[int]:
    """Return further limits, for `points` in all, that make the widest gap between neighbours as narrow as possible."""
    ends = sorted(limits)
    gaps = [1] * (len(ends) - 1)
    for _ in range(points - len(ends) if gaps else 0):
        widest = max(range(len(gaps)), key=lambda i: (ends[i + 1] - ends[i]) / gaps[i])
        gaps[widest] += 1
    inner = {a + (b - a) * i // n for a, b, n in zip(ends, ends[1:], gaps, strict=False) for i in range(1, n)}
    return sorted(inner - set(ends))


def curve(limits: Sequence[int], plans: Sequence[Plan]) -> list[FrontierPoint]:
    """Return per limit, upwards, the fastest of all plans within it, those for smaller budgets included."""
    points: list[FrontierPoint] = []
    for limit in limits:
        fits = [p for p in plans if p.predicted.peak_bytes <= limit]
        if not fits:
            continue
        best = min(fits, key=lambda p: (p.predicted.step_seconds, p.predicted.peak_bytes, p.policy != "optimal"))
        peak, seconds = best.predicted.peak_bytes, best.predicted.step_seconds
        if not points or seconds < points[-1].step_seconds:
            plan = msgspec.structs.replace(best, budget_bytes=limit)
            points.append(FrontierPoint(budget_bytes=limit, peak_bytes=peak, step_seconds=seconds, plan=plan))
    return points


def _within(s: Study, limit: int) -> Plan | None:
    """Return the plan for a limit; None if there is none."""
    s.progress(f"planning for {format_bytes(limit)}")
    try:
        return decide(s, Budget(limit))
    except BudgetInfeasible:
        return None


def _policy(s: Study, name: str) -> tuple[PolicyPoint, Plan | None]:
    try:
        plan = decide(s, None, name)
    except (CaptureError, BudgetError) as error:
        return PolicyPoint(policy=name, peak_bytes=None, step_seconds=None, reason=str(error)), None
    peak, memory = plan.predicted.peak_bytes, s.device.memory_bytes
    reason = f"over the memory of {s.device.name}" if memory is not None and peak > memory else ""
    used = mechanism_of(name)
    if not (used is not None and used.is_plain) and all(d.settings().option.is_plain for d in plan.decisions):
        reason = "no unit can do this: the plain step"
    seconds = plan.predicted.step_seconds
    return PolicyPoint(policy=name, peak_bytes=peak, step_seconds=seconds, reason=reason), plan
