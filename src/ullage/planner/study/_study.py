"""Everything the planner knows about one workload: captured steps, costs, units and their options.

All options are measured the same way: one step runs on fake tensors with that option on every unit that has it. These few
homogeneous steps show, per unit and option, the bytes alive between the unit's forward and its backward, the peak inside either, and
the added time. `ullage.planner.model._model` composes them for any mixed assignment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar
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
from ullage.planner.study._device import DeviceChoice
from ullage.planner.study._executed import Executed, Key, StepCapture, Steps, key_of
from ullage.planner.study._explored import Explored
from ullage.planner.study._liveness import Ledger, categories, moment, peak_op
from ullage.planner.study._nodes import book_nodes, upper_bound
from ullage.planner.study._tiers import OffloadTier
from ullage.planner.study._transfers import events_of, largest_sent, offloaded_bytes, senders_of, transfers_of
from ullage.workload import Setup, Workload, setup_of

# Models kept per study. One question (a plan, its pins, a frontier) asks for a few sets of choices in turn; a composed model is
# small beside a trace.
DERIVED_KEPT = 8
# Sessions of executed first-and-later steps: each holds a trace, of some 100 MB for the largest models. Two, because a decision
# compares two candidates (with and without offloading) and then reads the trace of the one it takes.
FRESH_KEPT = 2
Progress = Callable[[str], None]

T = TypeVar("T")


@dataclass(frozen=True)
class Study:
    """The study of one workload, see above. `study` makes it, and nobody assigns to it.

    Attributes:
        work: the workload.
        device: the device that is planned for.
        costs_mode: "measured" or "roofline".
        plain: the plain step: the first and a later one.
        units: modules with options, in forward order.
        explored: their options, and the findings of steps that ran with them.
        tier: where tensors may be offloaded to.
        evaluation: modules in evaluation mode whose code reads the mode.
        known_costs: costs of ops by signature; it grows as steps with new ops are executed.
        times_given: the known costs came with times, so no others are measured.
        progress: called with a line at each stage.
    """

    work: Workload
    device: DeviceChoice
    costs_mode: str
    plain: tuple[StepCapture, StepCapture]
    units: Sequence[UnitFacts]
    explored: Explored
    tier: OffloadTier | None = None
    evaluation: Sequence[str] = ()
    known_costs: dict[str, OpCost] = field(default_factory=dict)
    times_given: bool = False
    progress: Progress = lambda _: None
    _costs: WeakKeyDictionary[Session, list[OpCost]] = field(default_factory=WeakKeyDictionary)
    _booked: WeakKeyDictionary[Session, int] = field(default_factory=WeakKeyDictionary)  # runs of nodes
    _timelines: WeakKeyDictionary[Session, tuple[int, Timeline]] = field(default_factory=WeakKeyDictionary)
    _in_passing: dict[Key, StepCapture] = field(default_factory=dict, init=False)
    _fresh: dict[Key, tuple[StepCapture, StepCapture]] = field(default_factory=dict, init=False)
    _executed: dict[Key, Executed] = field(default_factory=dict, init=False)
    _steps: dict[Key, Steps] = field(default_factory=dict, init=False)
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False)

    @cached_property
    def setup(self) -> Setup:
        """The facts that the step's numbers depend on."""
        return setup_of(self.plain_session.inst, self.device.name, self.device.memory_bytes, self.work.notes)

    @property
    def session(self) -> Session:
        """The session on which later steps are executed one after the other; `capture_fresh` takes a new one."""
        return self.explored.session

    @property
    def options(self) -> Mapping[str, Sequence[Option]]:
        """All options of each unit, also those that have failed; `Choices.of` leaves these out."""
        return self.explored.options

    @property
    def reasons(self) -> Mapping[tuple[str, str], str]:
        """Why a unit does not have an option, by (unit, option)."""
        return self.explored.reasons

    @property
    def captures(self) -> Mapping[str, StepCapture]:
        """One captured step per option or level, by label."""
        return self.explored.captures

    def costs(self, session: Session) -> list[OpCost]:
        """Return the costs of a session's signatures; each distinct signature is measured once per study."""
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
        """Return bytes and seconds over a session's whole trace."""
        n = len(session.trace.signature)
        known = self._timelines.get(session)
        if known is None or known[0] != n:
            known = (n, self._with_host(session.trace, timeline(session.trace, self.costs(session))))
            self._timelines[session] = known
        return known[1]

    def settings(self, assignment: Mapping[str, Option]) -> dict[str, UnitSettings]:
        """Return the runtime's settings for an assignment."""
        facts = {u.fqn: u for u in self.units}
        return {f: UnitSettings(o, facts[f].buffers, facts[f].routing) for f, o in assignment.items() if o != KEEP}

    @cached_property
    def update_peak_bytes(self) -> int:
        """The peak while an optimizer runs, over both steps (the first one makes its state), without activations that a plan can free.

        A step of the user's own may run one while a graph is alive (a GAN's critic): a plan can free that.
        """
        session = self.plain_session
        peak, trace = self.timeline(session).peak, session.trace
        ops = [i for c in self.plain for i in range(c.ops.start, c.ops.stop) if trace.phase[i] == "optimizer"]
        if ops and session.inst.step is not None:
            freed = np.array([c == "activation" for c in categories(trace)], np.bool_)
            peak = peak - self.ledger(session).alive_bytes(freed)
        return max((int(peak[i]) for i in ops), default=0) + self.device.facts.blas_workspace_bytes

    @property
    def plain_session(self) -> Session:
        """The session of the plain step."""
        return self.plain[0].session

    @property
    def plain_steps(self) -> Steps:
        """The findings of the plain step."""
        return self.execute_fresh({u.fqn: KEEP for u in self.units})

    def op_seconds(self, capture: StepCapture) -> npt.NDArray[np.float64]:
        """Return the seconds of each op of a captured step; the host time of a unit's replays is spread evenly over their ops."""
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

    @cached_property
    def host_cost(self) -> HostCost:
        """Host time beside the ops: measured if op times are, on a CPU; zero for an estimate and on CUDA."""
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
        """Per module, the number of ops of its forwards in the plain step."""
        trace, stacks, counts = self.plain_session.trace, self.plain_session.tracker.stacks, dict[str, int]()
        for i in range(self.plain[1].ops.start, self.plain[1].ops.stop):
            if trace.phase[i] == "forward":
                for fqn in stacks[trace.stack[i]]:
                    counts[fqn] = counts.get(fqn, 0) + 1
        return counts

    @cached_property
    def forward_seconds(self) -> dict[str, float]:
        """Per module, the time of the ops of its forwards in the plain step."""
        session, ops = self.plain_session, self.plain[1].ops
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
        ops = self.plain[1].ops
        return Counter(c.fqn for c in self.plain_session.calls if ops.start <= c.first_op < ops.stop)

    def replay_seconds(self, fqn: str, option: Option, ops: int | None = None) -> float:
        """Return the host time of a unit's replays in one step.

        Args:
            fqn: the unit.
            option: its option.
            ops: how many ops run again, if known; otherwise those of one forward per call are taken.
        """
        calls, forward = self.forward_calls.get(fqn, 1), max(self.forward_ops.get(fqn, 0), 1)
        return option.mechanism.seconds(option, self.host_cost, calls, forward, ops)

    def another_session(self, explores: bool = False) -> Session:
        """Return a new session from the workload's own state."""
        return Session(self.work, self.device.round_bytes, self.device.as_cuda, explores, like=self.session)

    def capture(self, assignment: Mapping[str, Option]) -> StepCapture:
        """Run forward and backward of one later step under an assignment, once; the plain step is there already."""
        wanted = key_of(assignment)
        found = self._in_passing.get(wanted)
        if not wanted or wanted in self._fresh:
            found = self.capture_fresh(assignment)[1]
        elif found is None:
            session = self.session
            session.run(self.settings(assignment), update=False, settled=True)
            ops = slice(session.trace.marks[-1], session.tracker.clock)
            found = self._in_passing[wanted] = StepCapture(session, ops, dict(assignment))
        return replace(found, assignment=dict(assignment))

    def capture_fresh(self, assignment: Mapping[str, Option]) -> tuple[StepCapture, StepCapture]:
        """Run a first and a later step under an assignment, from the workload's own state. The last traces are kept."""
        wanted = key_of(assignment)
        if not wanted:
            return self.plain
        if wanted not in self._fresh:
            session = self.another_session()
            session.run(self.settings(assignment), steps=2)
            self._fresh[wanted] = both_steps(session, assignment)
            while len(self._fresh) > FRESH_KEPT:
                del self._fresh[next(iter(self._fresh))]
        return self._fresh[wanted]

    def execute(self, assignment: Mapping[str, Option], window_bytes: int = 0) -> Executed:
        """Execute a later step under an assignment, without its optimizer: see `Executed.peak_with_update`."""
        wanted = key_of(assignment)
        if wanted in self._steps or wanted in self._fresh or not wanted:
            return self.execute_fresh(assignment, window_bytes).later
        if wanted not in self._executed:
            self._executed[wanted] = self.show(self.capture(assignment))
        return replace(self._executed[wanted], assignment=dict(assignment)).with_window(window_bytes)

    def execute_fresh(self, assignment: Mapping[str, Option], window_bytes: int = 0) -> Steps:
        """Execute a first and a later step under an assignment, from the workload's own state."""
        wanted = key_of(assignment)
        if wanted not in self._steps:
            first, later = self.capture_fresh(assignment)
            self._steps[wanted] = Steps(self.show(first), self.show(later))
        steps, given = self._steps[wanted], dict(assignment)
        steps = Steps(replace(steps.first, assignment=given), replace(steps.later, assignment=given))
        return steps.with_window(window_bytes)

    def ledger(self, session: Session) -> Ledger:
        """Return the storages and ops of a session as arrays."""
        return Ledger(session, self.timeline(session), self.costs(session), {u.fqn for u in self.units})

    def derived(self, key: Hashable, derive: Callable[[], T]) -> T:
        """Return what `derive` makes for a key, made once; the last few are kept."""
        if key not in self._derived:
            self._derived[key] = derive()
            while len(self._derived) > DERIVED_KEPT:
                del self._derived[next(iter(self._derived))]
        found: T = self._derived[key]
        return found

    def show(self, capture: StepCapture) -> Executed:
        """Return the findings of a captured step, without a window; they follow from the capture and this study's costs alone."""
        session, sends = capture.session, any(o.offloads for o in capture.assignment.values())
        seconds, at = self.op_seconds(capture), peak_op(self.timeline(session), capture.ops)
        moved = transfers_of(capture) if sends and self.tier is not None else []
        return Executed(
            assignment=capture.assignment,
            tensor_bytes=int(self.timeline(session).peak[capture.ops].max(initial=0)),
            moment=moment(session, at),
            compute_seconds=float(seconds.sum()),
            ops=capture.ops.stop - capture.ops.start,
            recomputed=recomputed_in(self, capture),
            offloaded_bytes=offloaded_bytes(capture),
            largest_sent=largest_sent(self.device.round_bytes, capture),
            library_bytes=self.device.facts.blas_workspace_bytes,
            update_bytes=self.update_peak_bytes,
            tier=structs.replace(self.tier, window_bytes=0) if sends and self.tier is not None else None,
            events=events_of(capture, seconds) if moved else (),
            senders=senders_of(capture, {u.fqn for u in self.units}) if moved else None,
            transfer_ops=tuple(min(t.op, capture.ops.stop - 1) for t in moved),
        )


def both_steps(session: Session, assignment: Mapping[str, Option]) -> tuple[StepCapture, StepCapture]:
    """Return the first two steps that a session has run, under one assignment."""
    a, b = session.trace.marks[:2]
    end = session.trace.marks[2] if len(session.trace.marks) > 2 else session.tracker.clock
    return StepCapture(session, slice(a, b), dict(assignment)), StepCapture(session, slice(b, end), dict(assignment))


def _forward_signatures(trace: Trace) -> set[int]:
    """Return the indices of signatures that some forward or replay calls."""
    flags = zip(trace.signature, trace.phase, trace.recomputed, strict=True)
    return {k for k, phase, again in flags if phase == "forward" or again}


def recomputed_in(s: Study, capture: StepCapture) -> dict[str, tuple[int, float]]:
    """Return, per module FQN, the recomputed ops of a captured step and their seconds."""
    trace, tracker, costs = capture.session.trace, capture.session.tracker, s.costs(capture.session)
    found: dict[str, tuple[int, float]] = {}
    for i in range(capture.ops.start, capture.ops.stop):
        if trace.recomputed[i]:
            seconds = costs[trace.signature[i]].seconds
            for fqn in tracker.stacks[trace.stack[i]]:
                ops, total = found.get(fqn, (0, 0.0))
                found[fqn] = ops + 1, total + seconds
    return found
