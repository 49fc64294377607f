"""`Profile`: facts about a workload's plain step, made by `profile()`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from ullage._bytes import format_bytes, format_seconds
from ullage._errors import PlanError
from ullage._files import write_whole
from ullage._progress import Progress, callback, shows_progress
from ullage.capture._assumed import Read
from ullage.capture._timeline import OpCost
from ullage.measure._state import captures
from ullage.planner.model._model import model_of
from ullage.planner.plan._grouped import natural, template, together, wrapped
from ullage.planner.study._executed import StepCapture
from ullage.planner.study._liveness import LiveTensor, by_category, innermost, live_tensors, peak_op, totals
from ullage.planner.study._prepare import study
from ullage.planner.study._reserved import reserved_bytes
from ullage.planner.study._study import Study
from ullage.solver._instance import StepModel
from ullage.workload import Setup, Workload, note_of, reading

_ROWS = 12


class OptionProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An option of a unit: bytes it frees between forward and backward of a micro-batch, and seconds it adds to a step."""

    name: str
    bytes_freed: int
    seconds_added: float


class UnitProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A unit: bytes one micro-batch saves in it, its forward and backward seconds per step.

    `options` starts with the cheapest; those that another one beats in time, bytes and own peak are left out.
    """

    fqn: str
    class_name: str
    block: bool
    calls: int
    saved_bytes: int
    seconds: float
    options: list[OptionProfile]
    reason: str


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The plain step: its peak, the tensors that hold it, live bytes over time, and units. `str(profile)` is a table.

    Attributes:
        device: name of the device.
        estimate: whether that device is not here.
        costs: "measured" or "roofline".
        peak_bytes: bytes; the larger of the two below.
        first_step_peak_bytes: bytes; in the first step optimizer state is still to be made.
        later_step_peak_bytes: bytes.
        start_bytes: bytes alive before the later step.
        step_seconds: seconds of a later step.
        phase: "forward", "backward" or "optimizer": where the peak is.
        module: fully qualified name of the innermost module there; "" for the root.
        op: the op that runs there.
        source: `file.py:line` of the code that calls it, or "".
        by_category: bytes alive at the peak, by category.
        by_module: bytes alive at the peak, by the module that made them; "(root)" or "(no module)" outside of every module.
        largest: the largest tensors alive at the peak.
        units: modules that a plan can decide about, with their options.
        timeline: (phase, module, op, live bytes at the op's own peak) of every op of the later step.
        notes: sentences for the reader of the profile.
        op_cost_table: per op signature: seconds, bytes allocated inside the kernel, bytes of the outputs; see `op_costs`.
        setup: the facts that these numbers depend on; None in a file of an older version.
        reads: where the step reads values that depend on activations, and what was taken for them.
        bounded: ops of that table whose bytes depend on values, so that theirs is an upper bound.
        reserved_bytes: bytes that torch's CUDA caching allocator would hold after both steps, by a simulation of its rules; None on
            a CPU.
    """

    device: str
    estimate: bool
    costs: str
    peak_bytes: int
    first_step_peak_bytes: int
    later_step_peak_bytes: int
    start_bytes: int
    step_seconds: float
    phase: str
    module: str
    op: str
    source: str
    by_category: dict[str, int]
    by_module: dict[str, int]
    largest: list[LiveTensor]
    units: list[UnitProfile]
    timeline: list[tuple[str, str, str, int]]
    notes: list[str]
    op_cost_table: dict[str, tuple[float, int, list[int]]]
    bounded: list[str] = []
    reserved_bytes: int | None = None
    setup: Setup | None = None
    reads: list[Read] = []

    @property
    def op_costs(self) -> dict[str, OpCost]:
        """The cost of every distinct op signature."""
        bounded = set(self.bounded)
        return {k: OpCost(s, i, tuple(o), k in bounded) for k, (s, i, o) in self.op_cost_table.items()}

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON."""
        write_whole(path, msgspec.json.encode(self))

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile; PlanError if it is not one."""
        try:
            return msgspec.json.decode(Path(path).read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise PlanError(f"profile {path}: {error}") from error

    def describe(self, verbose: bool = False) -> str:
        """The profile in words; `verbose` lists the options of each kind of unit."""
        label, by = ", an ESTIMATE: it is not here" if self.estimate else "", self.setup
        place = f" ({self.source})" if self.source else ""
        lines = [
            f"profile on {self.device}{label}",
            *([str(by)] if by is not None else []),
            f"  peak       {format_bytes(self.peak_bytes)} in {self.phase}, {self.module or '(root)'}, {self.op}{place}",
            *([f"  fits       {by.fits(self.peak_bytes)}"] if by is not None else []),
            f"  steps      first {format_bytes(self.first_step_peak_bytes)}, later {format_bytes(self.later_step_peak_bytes)}; "
            f"about {format_seconds(self.step_seconds)} (costs: {self.costs})",
        ]
        if self.reserved_bytes is not None:
            lines.append(f"  reserved   {format_bytes(self.reserved_bytes)} (torch's caching allocator, simulated)")
        lines.append("  alive at the peak")
        lines += [
            f"    {c:<20} {format_bytes(n):>12}  {n / max(self.peak_bytes, 1):6.1%}"
            for c, n in self.by_category.items()
        ]
        lines.append("  by module")
        lines += [f"    {m:<40} {format_bytes(n):>12}" for m, n in self._modules()[:_ROWS]]
        lines.append("  units")
        lines += [f"    {row}" for row in self._units(verbose)]
        if self.reads:
            lines.append("  values read that depend on activations")
        for r in self.reads:
            lines += wrapped(f"    {r.line} in {r.module or 'the step'}: {r.what} {r.taken} ({r.how})")
        for note in [*(by.defaults if by is not None else []), *self.notes]:
            lines += wrapped(f"  note: {note}")
        return "\n".join(lines)

    def _modules(self) -> list[tuple[str, int]]:
        """Bytes per module, the sum of equal layers in one row, the most first."""
        groups: dict[str, list[tuple[str, int]]] = {}
        for name, nbytes in self.by_module.items():
            groups.setdefault(template(name), []).append((name or "(root)", nbytes))
        rows = [(together(sorted((n for n, _ in g), key=natural)), sum(b for _, b in g)) for g in groups.values()]
        return sorted(rows, key=lambda row: -row[1])

    def _units(self, verbose: bool) -> list[str]:
        """A row per kind of unit: equal layers share one."""
        groups: dict[tuple[str, str, int, str], list[UnitProfile]] = {}
        for u in self.units:
            groups.setdefault((template(u.fqn), u.class_name, u.saved_bytes, u.reason), []).append(u)
        lines = []
        for (_, kind, saved, reason), alike in groups.items():
            each = " each" if len(alike) > 1 else ""
            lines.append(f"{together([u.fqn for u in alike])}: {kind}")
            seconds = sum(u.seconds for u in alike) / len(alike)
            lines.append(
                f"  saves {format_bytes(saved)}, takes {format_seconds(seconds)}{each}{'; ' if reason else ''}{reason}"
            )
            if verbose:
                lines += [
                    f"    {o.name}: frees {format_bytes(o.bytes_freed)}, adds {format_seconds(o.seconds_added)}"
                    for o in alike[0].options
                ]
        return lines

    def __str__(self) -> str:
        return self.describe()


@shows_progress
@captures
def profile(
    work: Workload,
    device: str | None = None,
    costs: str = "auto",
    *,
    units: Sequence[str] | None = None,
    values: str = "auto",
    assume: Mapping[str, float] | None = None,
    options: bool = True,
    progress: Progress = None,
) -> Profile:
    """Run a first and a later step on fake tensors and report which tensors are alive when.

    Args:
        work: the workload; left as found. The model itself only runs if values of real steps are taken, see `values`.
        device: None (where the model is) or a name of the device table.
        costs: "auto" (single ops are timed) or "roofline" (times of the device table; bytes are the same).
        units: FQN globs, instead of the blocks the architecture shows.
        values: see `plan`, as for `assume`.
        assume: what to take for values that depend on activations.
        options: also capture a step per option of the units, for `UnitProfile.options`, and so that planning from this profile measures
            nothing; it takes most of the time.
        progress: called with a line at each stage; None shows one on a terminal after 2 s, False nothing.
    """
    progress = callback(progress)
    return study_and_profile(reading(work, values, assume), device, costs, units, progress, options)[1]


@captures
def study_and_profile(
    work: Workload,
    device: str | None = None,
    costs: str = "auto",
    units: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
    options: bool = True,
) -> tuple[Study, Profile]:
    """Do `profile`'s work, and also return the study, for reports."""
    s = study(work, device, costs, units, None, progress)
    return s, _profile_of(s, options)


def _profile_of(s: Study, options: bool) -> Profile:
    steps, later = s.plain_steps, s.plain[1]
    worst = s.plain[not steps.first_is_worst]
    at = peak_op(s.timeline(s.plain_session), worst.ops)
    live = live_tensors(s.plain_session, s.costs(s.plain_session), at)
    phase, module, op = steps.worst.moment
    return Profile(
        device=s.device.name,
        estimate=s.device.estimate,
        costs=s.costs_mode,
        peak_bytes=steps.peak_bytes,
        first_step_peak_bytes=steps.first.peak_bytes,
        later_step_peak_bytes=steps.later.peak_bytes,
        start_bytes=int(s.timeline(s.plain_session).before[later.ops.start]),
        step_seconds=steps.seconds,
        phase=phase,
        module=module,
        op=op,
        source=s.plain_session.trace.source[at],
        by_category=by_category(live, steps.peak_bytes, s.device.facts.blas_workspace_bytes),
        by_module=totals([(t.module, t.nbytes) for t in live]),
        largest=sorted(live, key=lambda t: -t.nbytes)[:50],
        units=_unit_profiles(s, options),
        timeline=_bytes_over_time(s, later),
        notes=[*s.plain_session.values.assumptions, *note_of(s.evaluation)],
        op_cost_table=_cost_table(s),
        setup=s.setup,
        reads=s.plain_session.values.assumed.reads,
        bounded=sorted(k for k, c in s.known_costs.items() if c.bounds),
        reserved_bytes=reserved_bytes(s, later),
    )


def _bytes_over_time(s: Study, step: StepCapture) -> list[tuple[str, str, str, int]]:
    trace, peak = step.session.trace, s.timeline(step.session).peak
    names = [str(x.func) for x in step.session.signatures]
    return [
        (trace.phase[i], innermost(step.session, i), names[trace.signature[i]], int(peak[i]))
        for i in range(step.ops.start, step.ops.stop)
    ]


def _unit_profiles(s: Study, options: bool) -> list[UnitProfile]:
    seconds, model = _unit_seconds(s), model_of(s) if options else None
    return [
        UnitProfile(
            fqn=u.fqn,
            class_name=u.class_name,
            block=u.block,
            calls=u.calls,
            saved_bytes=u.saved_bytes,
            seconds=seconds.get(u.fqn, 0.0),
            options=_options(model, u.fqn) if model is not None else [],
            reason=u.keep_reason,
        )
        for u in s.units
    ]


def _options(model: StepModel, fqn: str) -> list[OptionProfile]:
    facts = model.options[model.units.index(fqn)]
    most = max(o.held_bytes for o in facts)
    return [OptionProfile(name=o.option.name, bytes_freed=most - o.held_bytes, seconds_added=o.seconds) for o in facts]


def _cost_table(s: Study) -> dict[str, tuple[float, int, list[int]]]:
    """Return the costs of the ops of the plain step and of every option, so that planning from the profile measures nothing."""
    s.timeline(s.plain_session)
    s.costs(s.plain_session)
    return {k: (c.seconds, c.internal_bytes, list(c.output_bytes)) for k, c in s.known_costs.items()}


def _unit_seconds(s: Study) -> dict[str, float]:
    trace, tracker, seconds = s.plain_session.trace, s.plain_session.tracker, s.timeline(s.plain_session).seconds
    totals: dict[str, float] = {}
    ops = s.plain[1].ops
    for i in range(ops.start, ops.stop):
        for fqn in tracker.stacks[trace.stack[i]]:
            totals[fqn] = totals.get(fqn, 0.0) + float(seconds[i])
    return totals
