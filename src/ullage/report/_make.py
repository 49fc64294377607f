"""`timeline`: run a first and a later step on fake tensors, and lay out their events."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ullage._progress import Progress, callback, shows_progress
from ullage._torch import tree_flatten
from ullage.capture import Session
from ullage.measure._reach import optimizers_of
from ullage.measure._state import captures
from ullage.planner import Plan, Profile
from ullage.planner.plan._planned import execute_plan, study_plan
from ullage.planner.study._executed import StepCapture, Steps
from ullage.planner.study._liveness import Ledger, categories, peak_op
from ullage.planner.study._study import Study
from ullage.report._columns import Column
from ullage.report._records import PHASES, Allocations, Events, Transfer
from ullage.report._timeline import VERSION, Timeline
from ullage.workload import Workload


@shows_progress
@captures
def timeline(
    work: Workload,
    plan: Plan | None = None,
    *,
    device: str | None = None,
    costs: str = "auto",
    profile: Profile | None = None,
    progress: Progress = None,
) -> Timeline:
    """Run a first and a later step on fake tensors, and list the storages alive at every op.

    Args:
        work: what is trained; left as found, the model itself never runs.
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
    return timeline_of(s, execute_plan(s, plan), plan)


def timeline_of(s: Study, steps: Steps, plan: Plan | None = None) -> Timeline:
    """The timeline of an executed first and later step; `plan`: what they were run under."""
    first, later = s.capture_fresh(steps.assignment)
    session, begin, end = first.session, first.ops.start, later.ops.stop
    stacks = _Names()
    ledger = s.ledger(session)
    storages = _Storages(session, ledger, begin, end)
    trace, window = session.trace, slice(begin, end)
    modules = storages.modules
    paths = [tuple(modules(fqn) for fqn in stack) for stack in session.tracker.stacks]
    ops, sources = _Names(), _Names()
    names = [str(x.func) for x in session.signatures]  # of all that the session has run: only some are in these steps
    seconds = _seconds(s, steps, first, later)
    return Timeline(
        version=VERSION,
        setup=s.setup,
        device=s.device.name,
        estimate=s.device.estimate,
        costs=s.costs_mode,
        plan_digest=plan.digest if plan is not None else "",
        policy=plan.policy if plan is not None else "",
        budget_bytes=plan.budget_bytes if plan is not None else None,
        actions={f: o.label for f, o in steps.assignment.items()},
        peak_bytes=steps.peak_bytes,
        first_step_peak_bytes=steps.first.peak_bytes,
        later_step_peak_bytes=steps.later.peak_bytes,
        peak_event=peak_op(ledger.timeline, (first if steps.first_is_worst else later).ops) - begin,
        step_seconds=steps.seconds,
        first_events=later.ops.start - begin,
        workspace_bytes=steps.later.workspace_bytes,
        events=Events(
            phase=Column.of([PHASES.index(p) for p in trace.phase[window]]),
            stack=Column.of([stacks(paths[k]) for k in trace.stack[window]]),
            op=Column.of([ops(names[k]) for k in trace.signature[window]]),
            source=Column.of([sources(x) for x in trace.source[window]]),
            seconds=Column.of(seconds),
            recomputed=Column.of(ledger.recomputed[window].astype(np.int64)),
            micro_batch=Column.of(_micro_batches(session, first) + _micro_batches(session, later)),
            inside_bytes=Column.of(ledger.timeline.peak[window] - storages.alive_bytes[window]),
        ),
        allocations=storages.columns(),
        modules=modules.all,
        stacks=[list(stack) for stack in stacks.all],
        ops=ops.all,
        sources=sources.all,
        categories=storages.categories.all,
        names=storages.names.all,
        notes=list(session.values.assumptions),
        transfers=_transfers(steps, later.ops.start - begin, seconds),
    )


def plain_timeline_of(s: Study) -> Timeline:
    """The timeline of a study's plain step."""
    return timeline_of(s, s.plain_steps)


def planned_timeline_of(s: Study, plan: Plan) -> Timeline:
    """The timeline of a step under a plan that was made on this study, or for its workload."""
    return timeline_of(s, execute_plan(s, plan), plan)


class _Names:
    """Things by the order in which they were first seen."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self._known: dict[Any, int] = {}

    def __call__(self, name: Any) -> int:
        index = self._known.setdefault(name, len(self.all))
        if index == len(self.all):
            self.all.append(name)
        return index


class _Storages:
    """The storages of a session that are alive during some ops, and whose they are."""

    def __init__(self, session: Session, ledger: Ledger, begin: int, end: int) -> None:
        self.session, self.ledger, self.begin, self.end = session, ledger, begin, end
        lives = (ledger.birth <= ledger.death) & (ledger.death >= begin) & (ledger.birth < end) & (ledger.nbytes > 0)
        self.alive_bytes = ledger.alive_bytes(lives)
        self.chosen = np.flatnonzero(lives)
        self.modules, self.categories, self.names = _Names(), _Names(), _Names()

    def columns(self) -> Allocations:
        """Columns in the order of birth."""
        ledger, owners, kinds = self.ledger, _owners(self.session), categories(self.ledger.trace)
        order = self.chosen[np.argsort(ledger.birth[self.chosen], kind="stable")]
        category, module, name = [], [], []
        for k in order:
            storage = ledger.trace.storages[k]
            owner = owners.get(id(storage), "")
            category.append(self.categories(kinds[k]))
            module.append(self.modules(owner.rpartition(".")[0] if owner else self._maker(storage.birth)))
            name.append(self.names(owner))
        n = self.end - self.begin
        return Allocations(
            birth=Column.of(np.maximum(ledger.birth[order] - self.begin, -1)),
            death=Column.of(np.minimum(ledger.death[order] - self.begin, n)),
            nbytes=Column.of(ledger.nbytes[order]),
            category=Column.of(category),
            module=Column.of(module),
            name=Column.of(name),
        )

    def _maker(self, birth: int) -> str:
        """The innermost module that made a storage."""
        trace, stacks = self.ledger.trace, self.session.tracker.stacks
        return (stacks[trace.stack[birth]] or ("",))[-1] if 0 <= birth < len(trace.stack) else ""


def _owners(session: Session) -> dict[int, str]:
    """Names of parameters and buffers by the id of their storage's record; their optimizer state's too."""
    tracker, found = session.tracker, dict[int, str]()
    names = {id(p): name for name, p in session.inst.model.named_parameters()}
    for name, tensor in (*session.inst.model.named_parameters(), *session.inst.model.named_buffers()):
        _note(found, tracker.records([tensor.untyped_storage()._cdata]), name)
    for optimizer in optimizers_of(session.inst):
        for parameter, state in optimizer.state.items():
            tensors = [t for t in tree_flatten(list(state.values()))[0] if isinstance(t, Tensor)]
            keys = [t.untyped_storage()._cdata for t in tensors]
            _note(found, tracker.records(keys), names.get(id(parameter), ""))
    return found


def _note(found: dict[int, str], records: frozenset[int], name: str) -> None:
    for record in records:
        found.setdefault(record, name)


def _seconds(s: Study, steps: Steps, first: StepCapture, later: StepCapture) -> npt.NDArray[np.float64]:
    """Return the seconds per op of both steps, with the op's waits for transfers."""
    found = np.concatenate([s.op_seconds(first), s.op_seconds(later)])
    for step in steps.both:
        for op, seconds in step.waits:
            found[op - first.ops.start] += seconds
    return found


def _transfers(steps: Steps, first_ops: int, seconds: npt.NDArray[np.float64]) -> list[Transfer]:
    """Transfers of both steps, out and back; the later step begins where the first one ends."""
    found = []
    for name, step, start in (("first", steps.first, 0.0), ("later", steps.later, float(seconds[:first_ops].sum()))):
        seen = step.overlap
        found += [
            Transfer(
                out=x.out,
                step=name,
                start_seconds=start + x.begin,
                seconds=x.end - x.begin,
                nbytes=x.nbytes,
            )
            for x in (seen.spans if seen is not None else ())
        ]
    return found


def _micro_batches(session: Session, capture: StepCapture) -> list[int]:
    """Per op of a step, its micro-batch: the next one starts where a module is called after a backward."""
    trace, stacks = session.trace, session.tracker.stacks
    found, index, done = [], 0, False
    for i in range(capture.ops.start, capture.ops.stop):
        if trace.phase[i] == "backward":
            done = True
        elif done and trace.phase[i] == "forward" and stacks[trace.stack[i]]:
            index, done = index + 1, False
        found.append(index)
    return found
