"""`check`: a gate for CI. Does a step stay within a peak, a slowdown and an earlier step's bytes?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ullage._bytes import format_bytes, format_seconds, parse_budget
from ullage._errors import ArgumentError, BudgetInfeasible, PlanError
from ullage._progress import Progress, callback, shows_progress
from ullage.capture import UnitFacts
from ullage.measure._state import captures
from ullage.mechanisms import KEEP, Option
from ullage.planner import Plan, Profile
from ullage.planner.decide._planner import decide
from ullage.planner.plan._budget import Budget
from ullage.planner.plan._plan import environment
from ullage.planner.plan._planned import study_plan
from ullage.planner.study._prepare import prepare
from ullage.planner.study._study import Study
from ullage.report._baseline import VERSION, Baseline, StepFacts, UnitState
from ullage.report._make import plain_timeline_of, planned_timeline_of
from ullage.report._rows import Row, by_module, grouped, rows, signed
from ullage.workload import Setup, Workload

_ROWS = 8


class CheckResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Result of `check`; `str(gate)` says it in words.

    Attributes:
        ok: nothing failed.
        failures: a sentence for each thing that did.
        max_peak_bytes: the limit of the peak in bytes, or None.
        max_slowdown: the limit of the step's time over the plain step's, or None.
        now: the facts; `now.save(path)` writes them as a baseline.
        baseline: the facts they were compared with, or None.
        by_category: bytes alive at the peak, in the baseline and now. The changes add up to that of the peak.
        by_module: the same by module.
        by_holding: the same by unit and category.
        units: how each unit changed, in words.
        notes: what was not judged, and why.
        setup: the facts that these numbers depend on.
    """

    ok: bool
    failures: list[str]
    max_peak_bytes: int | None
    max_slowdown: float | None
    now: Baseline
    baseline: Baseline | None
    by_category: list[Row]
    by_module: list[Row]
    by_holding: list[Row]
    units: dict[str, str]
    notes: list[str]
    setup: Setup | None = None

    @property
    def slowdown(self) -> float:
        """Step time over that of the plain step, as predicted."""
        plain = self.now.plain.step_seconds
        return self.now.judged.step_seconds / plain if plain else 1.0

    def __str__(self) -> str:
        step = self.now.judged
        what = "the plan" if self.now.planned is not None else "the plain step"
        limit = f", at most {format_bytes(self.max_peak_bytes)}" if self.max_peak_bytes is not None else ""
        slower = f", {self.slowdown:.3f} times the plain step" if self.now.planned is not None else ""
        lines = [
            f"check {'ok' if self.ok else 'FAILED'}: {what} on {self.now.device} peaks at {format_bytes(step.peak_bytes)}{limit}",
            *(f"  FAILED: {failure}" for failure in self.failures),
            *([str(self.setup), f"  fits       {self.setup.fits(step.peak_bytes)}"] if self.setup is not None else []),
            f"  peak in the {step.step} step: {_moment(step)}",
            f"  step about {format_seconds(step.step_seconds)}{slower} (costs: {self.now.costs})",
        ]
        if self.baseline is not None:
            lines += self._changes(self.baseline)
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])

    def _changes(self, before: Baseline) -> Iterator[str]:
        old, new = (before.judged, self.now.judged) if self._same_kind(before) else (before.plain, self.now.plain)
        kind = "" if self._same_kind(before) else "plain step's "
        yield f"  {kind}peak {signed(new.peak_bytes - old.peak_bytes)} since the baseline's {format_bytes(old.peak_bytes)}"
        if _moment(old) != _moment(new):
            yield f"    the baseline's was in the {old.step} step: {_moment(old)}"
        by_category = [(r.name, _changed(r)) for r in self.by_category if r.change]
        parts = [(r.name.rpartition(", "), r) for r in self.by_holding if r.change]
        by_module = [(module, f"{category} {_changed(r)}") for (module, _, category), r in parts]
        for title, found in (
            ("by category", by_category),
            ("by module", by_module),
            ("units", list(self.units.items())),
        ):
            lines = grouped(found)
            yield from [f"  {title}"] if lines else []
            yield from (f"    {line}" for line in lines[:_ROWS])
            yield from [f"    and {len(lines) - _ROWS} more"] if len(lines) > _ROWS else []

    def _same_kind(self, before: Baseline) -> bool:
        return (before.planned is None) == (self.now.planned is None)


def _moment(f: StepFacts) -> str:
    return f"{f.phase}, {f.module or '(root)'}, {f.op}{f' ({f.source})' if f.source else ''}"


def _changed(r: Row) -> str:
    before, now = (format_bytes(v or 0) for v in (r.values[0], r.values[-1]))
    return f"{signed(r.change)} ({before} -> {now})"


@shows_progress
@captures
def check(
    work: Workload,
    *,
    max_peak: int | str | None = None,
    max_slowdown: float | None = None,
    against: Baseline | str | Path | None = None,
    allow_growth: int | str = 0,
    plan: Plan | None = None,
    budget: int | str | None = None,
    device: str | None = None,
    costs: str = "auto",
    profile: Profile | None = None,
    progress: Progress = None,
) -> CheckResult:
    """Judge a step by its predicted peak and time: the plain step, the step under a plan, or the best within a budget.

    It does not raise where a limit is exceeded or no plan fits the budget: see `CheckResult.ok`.

    Args:
        work: what is trained; left as found.
        max_peak: bytes or a string, as a budget: the peak may not be above it.
        max_slowdown: the step's time over that of the plain step may not be above it (1.1: a tenth slower); nor over the
            baseline's, where both times are estimates and so do not depend on the machine.
        against: a baseline, or its file: the peak may not have grown.
        allow_growth: bytes or a size: by more than this.
        plan: judge the step under this plan.
        budget: judge the step under the plan that `ullage.plan` makes for this.
        device: None (where the model is) or a name of the device table; a plan has its own.
        costs: "auto" or "roofline", as in `ullage.plan`; a plan has its own.
        profile: take op costs from this profile instead of measuring again.
        progress: called with a line at each stage; None shows one on a terminal after 2 s, False nothing.

    Raises:
        ArgumentError: both `plan` and `budget`, nothing to judge by, or a limit that means nothing.
        BudgetError: a size can't be read.
        PlanError: the baseline can't be read, or is of another device, of other costs, or
            of a plain step where this is of a plan. PlanMismatch: the plan is for another model.
    """
    progress = callback(progress)
    before = Baseline.load(against) if isinstance(against, str | Path) else against
    _check_arguments(max_slowdown, plan, budget, before)
    growth = 0 if allow_growth == 0 else parse_budget(allow_growth, "allow_growth").bytes
    wanted = parse_budget(max_peak, "max_peak") if max_peak is not None else None
    if growth is None:
        raise ArgumentError(f"allow_growth={allow_growth!r}: expected bytes, or a size with its unit")
    s, now, infeasible = _facts(work, plan, budget, device, costs, profile, progress)
    if before is not None:
        _check_baseline(before, now, plan is not None or budget is not None)
    limit = wanted.resolve(now.plain.peak_bytes, s.device.memory_bytes) if wanted is not None else None
    notes: list[str] = []
    failures = [infeasible] if infeasible else list(_exceeded(now, before, limit, max_slowdown, growth, notes))
    old, new = (None, None) if before is None else (before.judged, now.judged)
    if infeasible and before is not None:  # what grew in the step that the plan would have had to shrink
        old, new = before.plain, now.plain
    return CheckResult(
        ok=not failures,
        failures=failures,
        max_peak_bytes=limit,
        max_slowdown=max_slowdown,
        now=now,
        baseline=before,
        by_category=_rows(old, new, lambda f: f.by_category),
        by_module=_rows(old, new, lambda f: by_module(f.holdings)),
        by_holding=_rows(
            old, new, lambda f: {f"{h.module or '(no module)'}, {h.category}": h.nbytes for h in f.holdings}
        ),
        units=dict(_unit_changes(before.units, now.units)) if before is not None else {},
        notes=notes,
        setup=s.setup,
    )


def _check_arguments(slowdown: Any, plan: Any, budget: Any, before: Any) -> None:
    if plan is not None and budget is not None:
        raise ArgumentError("plan and budget: give one of them; a plan has its own budget")
    if before is not None and not isinstance(before, Baseline):
        raise ArgumentError(f"against: expected a ullage.Baseline or its file, got {type(before).__name__}")
    if slowdown is None:
        return
    if isinstance(slowdown, bool) or not isinstance(slowdown, int | float) or not slowdown >= 1:
        raise ArgumentError(f"max_slowdown={slowdown!r}: expected a number of 1 or more; 1.1 is a tenth slower")
    if plan is None and budget is None and before is None:
        raise ArgumentError("max_slowdown: slower than what? give a plan, a budget or a baseline too")


def _facts(
    work: Workload,
    plan: Plan | None,
    budget: int | str | None,
    device: str | None,
    costs: str,
    profile: Profile | None,
    progress: Callable[[str], None] | None,
) -> tuple[Study, Baseline, str]:
    """The step's facts now; and why no plan fits, or ""."""
    planned, infeasible = None, ""
    if budget is None:
        s = study_plan(work, plan, device, costs, profile, progress)
    else:
        s = prepare(work, device, costs, profile, None, progress)
    plain = plain_timeline_of(s)
    if budget is not None:
        limit = Budget(parse_budget(budget).resolve(plain.peak_bytes, s.device.memory_bytes))
        try:
            plan = decide(s, limit)
        except BudgetInfeasible as error:
            infeasible = str(error)
    if plan is not None:
        planned = StepFacts.of(planned_timeline_of(s, plan))
    assignment = {d.unit: d.settings().option for d in plan.decisions} if plan is not None else {}
    now = Baseline(
        version=VERSION,
        device=s.device.name,
        costs=s.costs_mode,
        plain=StepFacts.of(plain),
        planned=planned,
        units={u.fqn: _unit_state(u, assignment.get(u.fqn, KEEP)) for u in s.units},
        environment=environment(),
    )
    return s, now, infeasible


def _unit_state(u: UnitFacts, option: Option) -> UnitState:
    action = option.label
    return UnitState(class_name=u.class_name, saved_bytes=u.saved_bytes, action=action)


def _check_baseline(before: Baseline, now: Baseline, plans: bool) -> None:
    for name in ("device", "costs"):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            raise PlanError(
                f"baseline: its {name} is {old}, but this check's is {new}; --update it, or check as it was"
            )
    if (before.planned is not None) != plans:
        kinds = ["the plain step", "a plan"]
        raise PlanError(f"baseline: it is of {kinds[not plans]}, but this check is of {kinds[plans]}; --update it")


def _exceeded(
    now: Baseline, before: Baseline | None, limit: int | None, slowdown: float | None, growth: int, notes: list[str]
) -> Iterator[str]:
    step, plain = now.judged, now.plain
    if limit is not None and step.peak_bytes > limit:
        over = step.peak_bytes - limit
        yield f"the peak is {format_bytes(over)} ({over} bytes) above {format_bytes(limit)}"
    if slowdown is not None and now.planned is not None and step.step_seconds > slowdown * plain.step_seconds:
        yield f"the step takes {step.step_seconds / plain.step_seconds:.3f} times the plain step's time, above {slowdown:g}"
    if before is None:
        return
    grown = step.peak_bytes - before.judged.peak_bytes
    if grown > growth:
        allowed = f"; {format_bytes(growth)} are allowed" if growth else ""
        yield f"the peak grew by {format_bytes(grown)} ({grown} bytes){allowed}"
    if slowdown is not None and now.costs != "roofline":
        notes.append("times were measured here, so they are not compared with the baseline's")
    elif slowdown is not None and step.step_seconds > slowdown * before.judged.step_seconds:
        yield f"the step takes {step.step_seconds / before.judged.step_seconds:.3f} times the baseline's time, above {slowdown:g}"


def _rows(old: StepFacts | None, new: StepFacts | None, of: Callable[[StepFacts], Mapping[str, int]]) -> list[Row]:
    return rows([of(old), of(new)]) if old is not None and new is not None else []


def _unit_changes(old: Mapping[str, UnitState], new: Mapping[str, UnitState]) -> Iterator[tuple[str, str]]:
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name), new.get(name)
        if a is None and b is not None:
            yield name, f"new, {b.class_name}, saves {format_bytes(b.saved_bytes)}"
        elif b is None and a is not None:
            yield name, f"gone, {a.class_name}, saved {format_bytes(a.saved_bytes)}"
        elif a is not None and b is not None and a != b:
            said = [f"{a.class_name} -> {b.class_name}"] if a.class_name != b.class_name else []
            change = b.saved_bytes - a.saved_bytes
            said += [f"saves {signed(change)} ({format_bytes(a.saved_bytes)} before)"] if change else []
            said += [f"{a.action} -> {b.action}"] if a.action != b.action else []
            yield name, ", ".join(said)
