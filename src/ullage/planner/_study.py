"""Everything the planner knows about one workload: captured steps, costs, units and their options.

All options are measured the same way: one step is run on fake tensors with that option on every unit that has it. From
those few homogeneous steps follow, per unit, what an option leaves alive between its forward and its backward, the peak
inside either, and the time it adds; `ullage.planner._model` composes them for any mixed assignment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch

from ullage._errors import ArgumentError
from ullage.apply._existing import refuse_existing
from ullage.capture._session import OptionFailed, Session
from ullage.capture._timeline import OpCost, Timeline, effective_bytes, timeline
from ullage.capture._tracker import Signature
from ullage.capture._units import UnitFacts, unit_facts
from ullage.cost import Device, find_device, measure_ops, roofline_ops
from ullage.mechanisms import KEEP, RECOMPUTE, SELECT_LEVELS, Option, UnitSettings
from ullage.mechanisms._options import ATTENTION, MATMUL, ROUTING
from ullage.workload import Workload

Progress = Callable[[str], None]


@dataclass
class StepCapture:
    """One captured step: which trace, which ops, what was assigned."""

    session: Session
    ops: slice
    assignment: Mapping[str, Option]


@dataclass(frozen=True)
class DeviceChoice:
    """Where the step runs: a device that is here, or an estimate for one that is not."""

    name: str
    facts: Device
    estimate: bool
    memory_bytes: int | None

    @property
    def round_bytes(self) -> int:
        """Allocation granularity."""
        return 512 if self.facts.kind == "cuda" else 1


def choose_device(work: Workload, name: str | None) -> DeviceChoice:
    """Resolve `device=`; raises DeviceError for an unknown name."""
    here = "cpu" if work.factory is not None else work.instance_device().type
    if name is None:
        if here == "cuda" or (work.factory is not None and torch.cuda.is_available() and name is not None):
            properties = torch.cuda.get_device_properties(0)
            return DeviceChoice(properties.name, find_device("h200"), False, properties.total_memory)
        import os

        return DeviceChoice("cpu", find_device("cpu"), False, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    facts = find_device(name)
    return DeviceChoice(name, facts, name != here, facts.memory_bytes)


@dataclass
class Study:
    """See the module's docstring. Built by `study`."""

    work: Workload
    device: DeviceChoice
    costs_mode: str
    session: Session
    units: list[UnitFacts] = field(default_factory=list)
    options: dict[str, list[Option]] = field(default_factory=dict)
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)
    captures: dict[str, StepCapture] = field(default_factory=dict)
    plain_steps: list[slice] = field(default_factory=list)
    known_costs: dict[str, OpCost] = field(default_factory=dict)
    progress: Progress = lambda _: None
    _costs: WeakKeyDictionary[Session, list[OpCost]] = field(default_factory=WeakKeyDictionary)
    _timelines: WeakKeyDictionary[Session, tuple[int, Timeline]] = field(default_factory=WeakKeyDictionary)

    def costs(self, session: Session) -> list[OpCost]:
        """Costs of all of a session's signatures; each distinct signature is measured once per study."""
        have = self._costs.setdefault(session, [])
        todo = session.signatures[len(have) :]
        unknown = [s for s in todo if signature_key(s) not in self.known_costs]
        if unknown:
            if self.costs_mode == "measured":
                self.progress(f"timing {len(unknown)} ops")
                found = measure_ops(unknown, self.device.facts, [])
            else:
                found = roofline_ops(unknown, self.device.facts)
            self.known_costs.update({signature_key(s): c for s, c in zip(unknown, found, strict=True)})
        have += [self.known_costs[signature_key(s)] for s in todo]
        return have

    def timeline(self, session: Session) -> Timeline:
        """Bytes over a session's whole trace."""
        n = len(session.trace.signature)
        known = self._timelines.get(session)
        if known is None or known[0] != n:
            known = (n, timeline(session.trace, self.costs(session)))
            self._timelines[session] = known
        return known[1]

    def settings(self, assignment: Mapping[str, Option]) -> dict[str, UnitSettings]:
        """What the runtime needs for an assignment."""
        facts = {u.fqn: u for u in self.units}
        return {f: UnitSettings(o, facts[f].buffers, facts[f].routing) for f, o in assignment.items() if o != KEEP}

    def peak(self, capture: StepCapture) -> int:
        """The peak of a captured step, in bytes."""
        return (
            int(self.timeline(capture.session).peak[capture.ops].max(initial=0))
            + self.device.facts.blas_workspace_bytes
        )

    def seconds(self, capture: StepCapture) -> float:
        """The predicted time of a captured step."""
        return float(self.timeline(capture.session).seconds[capture.ops].sum())

    def execute(self, assignment: Mapping[str, Option]) -> StepCapture:
        """Run one later step under an assignment."""
        session = self.session
        session.run(self.settings(assignment))
        return StepCapture(session, slice(session.trace.marks[-1], session.tracker.clock), dict(assignment))

    def execute_fresh(self, assignment: Mapping[str, Option]) -> tuple[StepCapture, StepCapture]:
        """Run a first and a later step under an assignment, from the workload's own state."""
        session = Session(self.work, self.device.round_bytes)
        session.run(self.settings(assignment), steps=2)
        a, b = session.trace.marks
        return (
            StepCapture(session, slice(a, b), dict(assignment)),
            StepCapture(session, slice(b, session.tracker.clock), dict(assignment)),
        )


def signature_key(s: Signature) -> str:
    """A stable name of a signature."""
    return f"{s.func}|{s.args!r}|{sorted(s.kwargs.items(), key=lambda kv: kv[0])!r}|{s.outputs!r}"


def study(
    work: Workload,
    device: str | None,
    costs: str,
    units: Sequence[str] | None = None,
    known_costs: Mapping[str, OpCost] | None = None,
    progress: Progress | None = None,
) -> Study:
    """Capture the plain step (first and later) and find the units and the options they could have."""
    if not isinstance(work, Workload):
        raise ArgumentError(f"work: expected a ullage.Workload, got {type(work).__name__}")
    choice = choose_device(work, device)
    if costs not in ("auto", "roofline"):
        raise ArgumentError(f"costs={costs!r}: expected 'auto' or 'roofline'")
    if work.factory is None:
        refuse_existing(work.model)
    mode = "roofline" if costs == "roofline" or choice.estimate else "measured"
    say = progress or (lambda _: None)
    say("capturing the plain step")
    session = Session(work, choice.round_bytes)
    refuse_existing(session.inst.model)
    session.run(steps=2)
    result = Study(work, choice, mode, session, known_costs=dict(known_costs or {}), progress=say)
    a, b = session.trace.marks
    result.plain_steps = [slice(a, b), slice(b, session.tracker.clock)]
    result.captures["keep"] = StepCapture(session, result.plain_steps[1], {})
    result.units = [_with_routing(session, u) for u in unit_facts(session, saved_bytes(result), units)]
    result.options = {u.fqn: _possible(result, u) for u in result.units}
    return result


def saved_bytes(s: Study) -> dict[str, int]:
    """Bytes each module's calls save for backward, in the first micro-batch of the first step."""
    trace, costs = s.session.trace, s.costs(s.session)
    first = next((i for i, p in enumerate(trace.phase) if p == "backward"), len(trace.phase))
    kept = [
        (t.birth, effective_bytes(t, trace, costs))
        for t in trace.storages
        if 0 <= t.birth < first <= t.death + 1 and not t.category
    ]
    totals: dict[str, int] = {}
    for birth, size in kept:
        for fqn in {*s.session.tracker.stacks[trace.stack[birth]], ""}:
            totals[fqn] = totals.get(fqn, 0) + size
    return totals


def _ops_of(session: Session, fqn: str) -> list[Signature]:
    stacks = {i for i, s in enumerate(session.tracker.stacks) if fqn in s}
    t = session.trace
    return [
        session.signatures[t.signature[i]]
        for i in range(t.marks[1])
        if t.stack[i] in stacks and t.phase[i] == "forward"
    ]


def _with_routing(session: Session, unit: UnitFacts) -> UnitFacts:
    ops = _ops_of(session, unit.fqn)
    if any("c10d" in o.func.namespace for o in ops):
        return replace(unit, keep_reason=unit.keep_reason or "it runs collectives, which a replay would run again")
    return replace(unit, routing=any(o.func in ROUTING for o in ops))


def _possible(s: Study, unit: UnitFacts) -> list[Option]:
    if unit.keep_reason:
        s.reasons[unit.fqn, "keep"] = unit.keep_reason
        return [KEEP]
    ops = _ops_of(s.session, unit.fqn)
    attention = [o for o in ops if o.func in ATTENTION]
    matmuls = [o for o in ops if o.func in MATMUL]
    levels = []
    if any(isinstance(a, float) and a > 0 for o in attention for a in o.args[3:5]):
        s.reasons[unit.fqn, "select"] = "attention with dropout: skipping it would move the generator"
    else:
        levels += ["matmul_attention"] if matmuls else []
        levels += ["half_matmul_attention"] if len(matmuls) > 2 else []
        levels += ["attention"] if attention and matmuls else []
    return [KEEP, RECOMPUTE, *(Option("select", level) for level in SELECT_LEVELS if level in levels)]


def capture_options(s: Study) -> None:
    """Run one step per option; an option that fails on a unit is taken from it, with the reason noted."""
    names = sorted(
        {o.name for options in s.options.values() for o in options if o != KEEP}, key=lambda n: n != "recompute"
    )
    for name in names:
        while name not in s.captures:
            assignment = {f: _like(options, name) for f, options in s.options.items()}
            s.progress(f"capturing option {name}")
            try:
                s.captures[name] = s.execute(assignment)
            except OptionFailed as failed:
                _take_away(s, failed, assignment[failed.fqn])
                s.session = Session(s.work, s.device.round_bytes)
                s.session.run()
                if not any(o.name == name for options in s.options.values() for o in options):
                    break


def _take_away(s: Study, failed: OptionFailed, used: Option) -> None:
    """An option failed on a unit: take it from all units of that class, unless keeping routing outputs was the cause."""
    kind = next(u.class_name for u in s.units if u.fqn == failed.fqn)
    same = [u for u in s.units if u.class_name == kind]
    if "mutated" in str(failed.cause) and any(u.routing for u in same):
        # topk's values are normalised in place (Mixtral), so they can't be kept by op; on one device, from the same
        # bits, they come out the same, which `verify` checks.
        s.units = [replace(u, routing=False) if u.class_name == kind else u for u in s.units]
        s.reasons[failed.fqn, "keep routing"] = "routing outputs are changed in place; they are recomputed"
        return
    s.reasons[failed.fqn, used.name] = str(failed.cause)
    for u in same:
        s.options[u.fqn] = [o for o in s.options[u.fqn] if o.name != used.name]


def _like(options: Sequence[Option], name: str) -> Option:
    for wanted in (name, "recompute"):
        for option in options:
            if option.name == wanted:
                return option
    return KEEP


def count_recomputed(capture: StepCapture) -> dict[str, int]:
    """Recomputed ops per module FQN in a captured step."""
    trace, tracker = capture.session.trace, capture.session.tracker
    counts: dict[str, int] = {}
    for i in range(capture.ops.start, capture.ops.stop):
        if trace.recomputed[i]:
            for fqn in tracker.stacks[trace.stack[i]]:
                counts[fqn] = counts.get(fqn, 0) + 1
    return counts
