"""The facts that a comparison takes from a plan, profile, timeline, measurement, baseline or monitored run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ullage._errors import MonitorError, PlanError
from ullage.measure._measure import Measurement
from ullage.mechanisms import KEEP
from ullage.monitor import MonitorSummary
from ullage.monitor._jsonl import KEY as MONITOR_KEY
from ullage.planner import Holding, Plan, Profile
from ullage.report._baseline import Baseline, StepFacts
from ullage.report._records import INSIDE, WORKSPACE, where
from ullage.report._rows import by_module
from ullage.report._timeline import Timeline, unit_of

NO_MODULE = "(no module)"
NOT_LISTED = "(not listed)"  # a plan lists the largest holdings only
OWNED = ("parameter", "buffer", "optimizer state")  # plans and profiles don't know whose they are
Compared = Plan | Profile | Timeline | Measurement | Baseline | MonitorSummary


class Side(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One side of a comparison; a field is None if the side does not know it.

    Attributes:
        name: the file, or what it is.
        what: in words.
        device, costs: of a prediction.
        peak_bytes, step_seconds: the largest and the median, where they were measured.
        samples_per_second, tokens_per_second: as measured.
        no_peak: why its peak is not known, or "".
        moment: that of the peak, in words.
        by_category, by_module: bytes alive at the peak; they add up to it.
        actions: what is done with each unit.
    """

    name: str
    what: str
    device: str | None
    costs: str | None
    peak_bytes: int | None
    step_seconds: float | None
    moment: str | None
    by_category: dict[str, int] | None
    by_module: dict[str, int] | None
    actions: dict[str, str] | None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    no_peak: str = ""


def read(path: str | Path) -> Compared:
    """Read whichever of these a file is.

    Raises:
        PlanError: it can't be read, or is none of them.
    """
    try:
        data = Path(path).read_bytes()
        if data.startswith(f'{{"{MONITOR_KEY}"'.encode()):
            return MonitorSummary.load(path)
        keys = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).keys()
    except OSError as error:
        raise PlanError(f"{path}: can't be read: {error}") from error
    except MonitorError as error:
        raise PlanError(str(error)) from error
    except msgspec.DecodeError as error:
        raise PlanError(f"{path}: not whole JSON of ullage: {error}") from error
    kinds: list[tuple[str, type[Any]]] = [
        ("decisions", Plan), ("op_cost_table", Profile), ("allocations", Timeline), ("step_peaks", Measurement), ("plain", Baseline),
    ]  # fmt: skip
    kind = next((k for key, k in kinds if key in keys), None)
    if kind is None:
        raise PlanError(f"{path}: is no plan, profile, timeline, measurement, baseline or monitored run of ullage")
    if kind is not Measurement:
        found: Compared = kind.load(path)
        return found
    try:
        return msgspec.json.decode(data, type=Measurement)
    except msgspec.ValidationError as error:
        raise PlanError(f"measurement {path}: {error}") from error


def side(given: Compared, name: str | None, owners: bool) -> Side:
    """Make a side; `owners`: parameters and their state count to the module that holds them, else to no module."""
    if isinstance(given, Plan):
        return _of_plan(given, name)
    if isinstance(given, Profile):
        return _of_profile(given, name)
    if isinstance(given, Timeline):
        at = given.peak
        what = f"timeline, {f'plan ({given.policy})' if given.plan_digest else 'plain step'}"
        facts = StepFacts.of(given)
        return _of_facts(name or "timeline", what, given.device, given.costs, facts, given.actions, where(at), owners)
    if isinstance(given, Baseline):
        f = given.judged
        what = f"baseline, {'plan' if given.planned is not None else 'plain step'}"
        actions = {unit: state.action for unit, state in given.units.items()}
        moment = _moment(f.phase, f.module, f.op)
        return _of_facts(name or "baseline", what, given.device, given.costs, f, actions, moment, owners)
    if isinstance(given, MonitorSummary):
        return _of_run(given, name)
    return Side(
        name=name or "measurement",
        what=f"measured over {given.steps} steps",
        device=None,
        costs=None,
        peak_bytes=given.peak_bytes,
        step_seconds=given.step_seconds,
        moment=None,
        by_category=None,
        by_module=None,
        actions=None,
        samples_per_second=given.samples_per_second,
    )


def _of_run(run: MonitorSummary, name: str | None) -> Side:
    return Side(
        name=name or "run",
        what=f"monitored over {run.window_steps} steps on {run.device_name or run.device}",
        device=None,
        costs=None,
        peak_bytes=run.peak_allocated_bytes,
        step_seconds=run.step_seconds,
        moment=None,
        by_category=None,
        by_module=None,
        actions=None,
        samples_per_second=run.samples_per_second,
        tokens_per_second=run.tokens_per_second,
        no_peak=""
        if run.peak_allocated_bytes is not None
        else run.not_available.get("peak allocated", "no step has one"),
    )


def _of_plan(p: Plan, name: str | None) -> Side:
    b, f = p.bounds, p.predicted
    modules = None
    if b is not None:
        units = {d.unit for d in p.decisions}
        modules = by_module([*b.holdings, *_without_tensors(b.by_category, unit_of(b.module, units))])
        missing = b.peak_bytes - sum(modules.values())
        modules |= {NOT_LISTED: missing} if missing else {}
    return Side(
        name=name or "plan",
        what=f"plan ({p.policy})",
        device=p.device,
        costs=p.costs,
        peak_bytes=f.peak_bytes,
        step_seconds=f.step_seconds,
        moment=_moment(f.phase, f.module, f.op),
        by_category=b.by_category if b is not None else None,
        by_module=_named(modules) if modules is not None else None,
        actions={d.unit: d.label for d in p.decisions},
    )


def _of_profile(p: Profile, name: str | None) -> Side:
    units = {u.fqn for u in p.units}
    tensors = [Holding(category="", module=unit_of(m, units), nbytes=n, tensors=1) for m, n in p.by_module.items()]
    return Side(
        name=name or "profile",
        what="profile, plain step",
        device=p.device,
        costs=p.costs,
        peak_bytes=p.peak_bytes,
        step_seconds=p.step_seconds,
        moment=_moment(p.phase, p.module, p.op),
        by_category=p.by_category,
        by_module=_named(by_module([*tensors, *_without_tensors(p.by_category, unit_of(p.module, units))])),
        actions={u.fqn: KEEP.name for u in p.units},
    )


def _of_facts(
    name: str, what: str, device: str, costs: str, f: StepFacts, actions: dict[str, str], moment: str, owners: bool
) -> Side:
    rows: Iterable[Holding] = f.holdings
    if not owners:
        rows = [msgspec.structs.replace(h, module="") if h.category in OWNED else h for h in rows]
    return Side(
        name=name,
        what=what,
        device=device,
        costs=costs,
        peak_bytes=f.peak_bytes,
        step_seconds=f.step_seconds,
        moment=moment,
        by_category=f.by_category,
        by_module=_named(by_module(list(rows))),
        actions=dict(actions),
    )


def _without_tensors(by_category: Mapping[str, int], module: str) -> list[Holding]:
    """Bytes that no tensor accounts for: the library's workspace, and those inside the op at the peak."""
    places = ((WORKSPACE, ""), (INSIDE, module))
    return [Holding(category=c, module=m, nbytes=by_category[c], tensors=0) for c, m in places if c in by_category]


def _named(modules: Mapping[str, int]) -> dict[str, int]:
    return {m or NO_MODULE: n for m, n in modules.items()}


def _moment(phase: str, module: str, op: str) -> str:
    return f"{phase}, {module or '(root)'}, {op}"


def know_owners(given: Collection[Compared]) -> bool:
    """Do all of them that know modules know whose parameters are?"""
    return not any(isinstance(x, Plan | Profile) for x in given)
