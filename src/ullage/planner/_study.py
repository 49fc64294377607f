"""Everything the planner knows about one workload: captured steps, costs, units and their options.

All options are measured the same way: one step is run on fake tensors with that option on every unit that has it. From
those few homogeneous steps follow, per unit, what an option leaves alive between its forward and its backward, the peak
inside either, and the time it adds; `ullage.planner._model` composes them for any mixed assignment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from msgspec import structs

from ullage.capture import Session
from ullage.capture._timeline import OpCost, Timeline, timeline
from ullage.capture._trace import Trace, signature_key
from ullage.capture._units import UnitFacts
from ullage.cost import HostCost, host_cost_in, measure_host, measure_ops, roofline_ops
from ullage.mechanisms import KEEP, Option, UnitSettings
from ullage.planner._device import DeviceChoice
from ullage.planner._moved import overlap_of
from ullage.planner._nodes import book_nodes, upper_bound
from ullage.workload import Workload

if TYPE_CHECKING:
    from ullage.planner._instance import StepModel
    from ullage.planner._tiers import OffloadTier
    from ullage.planner._with_tier import Pace

FRESH_KEPT = 2  # sessions hold traces of some 100 MB for the largest models
Progress = Callable[[str], None]


@dataclass
class StepCapture:
    """One captured step: which trace, which ops, what was assigned."""

    session: Session
    ops: slice
    assignment: Mapping[str, Option]


@dataclass
class Study:
    """See the module's docstring. Built by `study`."""

    work: Workload
    device: DeviceChoice
    costs_mode: str
    session: Session
    units: list[UnitFacts] = field(default_factory=list)
    options: dict[str, list[Option]] = field(default_factory=dict)
    levels: dict[str, list[Option]] = field(default_factory=dict)
    call_bytes: dict[str, dict[tuple[str, int], int]] = field(
        default_factory=dict
    )  # per unit, of calls that levels name
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)
    failed: set[tuple[str, str]] = field(default_factory=set)  # options that did not run, by unit
    unlinked: set[str] = field(default_factory=set)  # units that can't be rebuilt together with the one before
    captures: dict[str, StepCapture] = field(default_factory=dict)
    plain_steps: list[slice] = field(default_factory=list)
    known_costs: dict[str, OpCost] = field(default_factory=dict)
    options_captured: bool = False
    model: StepModel | None = None
    pace: Pace | None = None
    tier: OffloadTier | None = None  # where tensors may go
    windows: dict[frozenset[tuple[str, Option]], int] = field(default_factory=dict)  # bytes, per assignment
    times_given: bool = False
    evaluation: list[str] = field(default_factory=list)  # modules in evaluation mode whose code reads the mode
    explains: bool = False  # plans and errors say what holds the peak, which takes a step or two more
    headroom_bytes: int = 0
    restrictions: list[str] = field(default_factory=list)  # what a person's overrides take away, for messages
    progress: Progress = lambda _: None
    _costs: WeakKeyDictionary[Session, list[OpCost]] = field(default_factory=WeakKeyDictionary)
    _executed: dict[frozenset[tuple[str, Option]], StepCapture] = field(default_factory=dict)
    _fresh: dict[frozenset[tuple[str, Option]], tuple[StepCapture, StepCapture]] = field(default_factory=dict)
    _booked: WeakKeyDictionary[Session, int] = field(default_factory=WeakKeyDictionary)  # runs of nodes
    _timelines: WeakKeyDictionary[Session, tuple[int, Timeline]] = field(default_factory=WeakKeyDictionary)

    def costs(self, session: Session) -> list[OpCost]:
        """Costs of all of a session's signatures; each distinct signature is measured once per study."""
        have = self._costs.setdefault(session, [])
        todo = session.signatures[len(have) :]
        unknown = {k: s for k, s in enumerate(todo, len(have)) if signature_key(s) not in self.known_costs}
        if unknown:
            facts, timed = self.device.facts, self.costs_mode == "measured" and not self.times_given
            if self.device.estimate:
                found = roofline_ops(list(unknown.values()), facts)
            else:
                self.progress(f"{'timing' if timed else 'running'} {len(unknown)} ops")
                forward = _forward_signatures(session.trace)
                found = measure_ops(
                    list(unknown.values()), facts, [k not in forward for k in unknown] if timed else None
                )
            self.known_costs.update({signature_key(s): c for s, c in zip(unknown.values(), found, strict=True)})
        for s in todo:
            have.append(self.known_costs[signature_key(s)])
            if have[-1].bounds:
                session.values.assumptions[upper_bound(str(s.func))] = None
        done, nodes = self._booked.get(session, 0), session.trace.nodes
        if not self.device.estimate and done < len(nodes):
            book_nodes(session, nodes[done:], have, self.known_costs, signature_key)
        self._booked[session] = len(nodes)
        return have

    def timeline(self, session: Session) -> Timeline:
        """Bytes over a session's whole trace."""
        n = len(session.trace.signature)
        known = self._timelines.get(session)
        if known is None or known[0] != n:
            known = (n, self._with_host(session.trace, timeline(session.trace, self.costs(session))))
            self._timelines[session] = known
        return known[1]

    def settings(self, assignment: Mapping[str, Option]) -> dict[str, UnitSettings]:
        """What the runtime needs for an assignment."""
        facts = {u.fqn: u for u in self.units}
        return {f: UnitSettings(o, facts[f].buffers, facts[f].routing) for f, o in assignment.items() if o != KEEP}

    def peak(self, capture: StepCapture) -> int:
        """The peak of a captured step, in bytes."""
        peak = int(self.timeline(capture.session).peak[capture.ops].max(initial=0))
        return peak + self.workspace_bytes(capture.assignment)

    def workspace_bytes(self, assignment: Mapping[str, Option]) -> int:
        """What is held all the time beside tensors: cuBLAS's workspace, and what a store's transfers may hold."""
        tier = self.tier_for(assignment)
        return self.device.facts.blas_workspace_bytes + (tier.reserved_bytes if tier is not None else 0)

    def tier_for(self, assignment: Mapping[str, Option]) -> OffloadTier | None:
        """The tier that an assignment uses, with its window; None if nothing is sent there."""
        if self.tier is None or not any(o.offloads for o in assignment.values()):
            return None
        return structs.replace(self.tier, window_bytes=self.windows.get(key_of(assignment), 0))

    def peak_with_update(self, capture: StepCapture) -> int:
        """The peak in bytes of a step that was captured without its optimizer, which no assignment changes."""
        return max(self.peak(capture), self.update_peak_bytes)

    @cached_property
    def update_peak_bytes(self) -> int:
        """The peak while the optimizer runs; the first step's, in which its state is made, included."""
        t, trace = self.timeline(self.plain_session), self.plain_session.trace
        ops = [i for s in self.plain_steps for i in range(s.start, s.stop) if trace.phase[i] == "optimizer"]
        return max((int(t.peak[i]) for i in ops), default=0) + self.device.facts.blas_workspace_bytes

    @property
    def plain_session(self) -> Session:
        """The session of the plain step."""
        return self.captures["keep"].session

    @property
    def plain_capture(self) -> tuple[StepCapture, StepCapture]:
        """The plain step: the first and a later one."""
        return StepCapture(self.plain_session, self.plain_steps[0], {}), self.captures["keep"]

    def op_seconds(self, capture: StepCapture) -> npt.NDArray[np.float64]:
        """Seconds of each op of a captured step; host time of a unit's replays is spread evenly over what they run again."""
        trace, stacks = capture.session.trace, capture.session.tracker.stacks
        found = self.timeline(capture.session).seconds[capture.ops].copy()
        again = recomputed_in(self, capture) if key_of(capture.assignment) else {}
        shares = {
            fqn: self.replay_seconds(fqn, option, again[fqn][0]) / again[fqn][0]
            for fqn, option in capture.assignment.items()
            if option != KEEP and fqn in again
        }
        of_stack = [sum(shares.get(fqn, 0.0) for fqn in stack) for stack in stacks]
        for i in range(capture.ops.start, capture.ops.stop):
            if trace.recomputed[i]:
                found[i - capture.ops.start] += of_stack[trace.stack[i]]
        return found

    def seconds(self, capture: StepCapture) -> float:
        """The predicted time of a captured step, waits for transfers included."""
        moved = overlap_of(self, capture)
        return float(self.op_seconds(capture).sum()) + (moved.stalled_seconds if moved is not None else 0.0)

    @cached_property
    def host_cost(self) -> HostCost:
        """Host time beside the ops: measured where op times are, on a CPU; nothing for an estimate and on CUDA."""
        found = host_cost_in(self.known_costs)
        if found is None:
            timed = self.costs_mode == "measured" and not self.times_given and self.device.facts.kind == "cpu"
            found = measure_host() if timed else HostCost()
            self.known_costs.update(found.as_costs())
        return found

    def _with_host(self, trace: Trace, found: Timeline) -> Timeline:
        cost = self.host_cost
        backward = np.array(trace.phase) == "backward"
        forward = (np.array(trace.phase) == "forward") | (backward & np.array(trace.recomputed, np.bool_))
        host = np.where(forward, cost.forward_op, np.where(backward, cost.backward_op, 0.0))
        return replace(found, seconds=found.seconds + host)

    @cached_property
    def forward_ops(self) -> dict[str, int]:
        """Per module, the ops of its forwards in the plain step."""
        trace, stacks, counts = self.plain_session.trace, self.plain_session.tracker.stacks, dict[str, int]()
        for i in range(self.plain_steps[1].start, self.plain_steps[1].stop):
            if trace.phase[i] == "forward":
                for fqn in stacks[trace.stack[i]]:
                    counts[fqn] = counts.get(fqn, 0) + 1
        return counts

    @cached_property
    def forward_seconds(self) -> dict[str, float]:
        """Per module, the time of the ops of its forwards in the plain step."""
        session, ops = self.plain_session, self.plain_steps[1]
        trace, stacks, found = session.trace, session.tracker.stacks, dict[str, float]()
        seconds = self.timeline(session).seconds
        for i in range(ops.start, ops.stop):
            if trace.phase[i] == "forward":
                for fqn in stacks[trace.stack[i]]:
                    found[fqn] = found.get(fqn, 0.0) + float(seconds[i])
        return found

    @cached_property
    def forward_calls(self) -> Counter[str]:
        """Per module, its calls in the plain step."""
        ops = self.plain_steps[1]
        return Counter(c.fqn for c in self.plain_session.calls if ops.start <= c.first_op < ops.stop)

    def replay_seconds(self, fqn: str, option: Option, ops: int | None = None) -> float:
        """Host time of a unit's replays in one step.

        Args:
            fqn: the unit.
            option: what is done with it.
            ops: how many ops run again, if that is known; else those of one forward per call.
        """
        if option.action in ("keep", "offload"):
            return 0.0
        calls, forward = self.forward_calls.get(fqn, 1), max(self.forward_ops.get(fqn, 0), 1)
        if option.action == "select":
            return self.host_cost.replays(True, calls, forward)
        if ops is not None:  # several times, in runs of units
            calls, forward = max(round(ops / forward), 1) * calls, ops
        return self.host_cost.replays(False, calls, forward)

    def execute(self, assignment: Mapping[str, Option]) -> StepCapture:
        """Run forward and backward of one later step under an assignment, once; its peak is `peak_with_update`."""
        wanted = key_of(assignment)
        if wanted in self._fresh:
            return replace(self._fresh[wanted][1], assignment=dict(assignment))
        if wanted not in self._executed:
            session = self.session
            session.run(self.settings(assignment), update=False, settled=True)
            ops = slice(session.trace.marks[-1], session.tracker.clock)
            self._executed[wanted] = StepCapture(session, ops, dict(assignment))
        return replace(self._executed[wanted], assignment=dict(assignment))

    def another_session(self, explores: bool = False) -> Session:
        """A session from the workload's own state."""
        return Session(self.work, self.device.round_bytes, self.device.as_cuda, explores, like=self.session)

    def execute_fresh(self, assignment: Mapping[str, Option]) -> tuple[StepCapture, StepCapture]:
        """Run a first and a later step under an assignment, from the workload's own state. The last runs are kept."""
        wanted = key_of(assignment)
        if not wanted:
            return self.plain_capture
        if wanted not in self._fresh:
            session = self.another_session()
            session.run(self.settings(assignment), steps=2)
            a, b = session.trace.marks
            first, later = slice(a, b), slice(b, session.tracker.clock)
            runs = StepCapture(session, first, dict(assignment)), StepCapture(session, later, dict(assignment))
            self._fresh[wanted] = runs
            while len(self._fresh) > FRESH_KEPT:
                del self._fresh[next(iter(self._fresh))]
        return self._fresh[wanted]

    def fresh_peak(self, assignment: Mapping[str, Option]) -> int:
        """The larger peak of that first and that later step, in bytes."""
        return max(self.peak(c) for c in self.execute_fresh(assignment))


def key_of(assignment: Mapping[str, Option]) -> frozenset[tuple[str, Option]]:
    """What an assignment changes: unnamed units are kept."""
    return frozenset((f, o) for f, o in assignment.items() if o != KEEP)


def _forward_signatures(trace: Trace) -> set[int]:
    """What some forward or replay calls."""
    flags = zip(trace.signature, trace.phase, trace.recomputed, strict=True)
    return {k for k, phase, again in flags if phase == "forward" or again}


def recomputed_in(s: Study, capture: StepCapture) -> dict[str, tuple[int, float]]:
    """Recomputed ops per module FQN in a captured step, and their seconds."""
    trace, tracker, costs = capture.session.trace, capture.session.tracker, s.costs(capture.session)
    found: dict[str, tuple[int, float]] = {}
    for i in range(capture.ops.start, capture.ops.stop):
        if trace.recomputed[i]:
            seconds = costs[trace.signature[i]].seconds
            for fqn in tracker.stacks[trace.stack[i]]:
                ops, total = found.get(fqn, (0, 0.0))
                found[fqn] = ops + 1, total + seconds
    return found
