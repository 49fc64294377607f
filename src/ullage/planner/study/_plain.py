"""The session of the plain step, with values for what the step reads: assumed ones, or those of real steps (see `Reads`)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ullage._errors import ArgumentError, CaptureError, WorkloadError
from ullage._told import out_of_memory, tells_of
from ullage.apply._existing import refuse_existing
from ullage.capture import Session
from ullage.capture._assumed import Taking, steers
from ullage.capture._explain import chain
from ullage.capture._kernels import NeedsValues
from ullage.capture._recorded import Recording, recording_one
from ullage.measure._measure import resident_bytes
from ullage.measure._reach import optimizers_of
from ullage.measure._state import preserved
from ullage.planner.study._device import DeviceChoice
from ullage.workload import Workload, history, run_step, tensors_of

STEPS = 2  # a first one, in which the optimizer makes its state, and a later one


def plain_session(work: Workload, choice: DeviceChoice, say: Callable[[str], None]) -> Session:
    """Run the plain step twice on fake tensors.

    Raises:
        CaptureError: that is not possible.
        ArgumentError: `assume` names a line that reads nothing.
    """
    reads = work.reads
    if reads.values == "run":
        return _run_for_real(work, choice, say)
    # Who gives assumptions wants these; what a factory builds may be too large for this machine.
    may_run = reads.values == "auto" and not reads.assume and not choice.estimate and work.factory is None
    session = _new(work, choice, Taking(reads, sizes=not may_run, mask=_share_of_masks(work)))
    try:
        session.run(steps=STEPS)
        steered = steers(
            session, lambda k: Session(work, choice.round_bytes, choice.as_cuda, like=session, trial=k), STEPS
        )
    except CaptureError as error:
        if not may_run or not (session.values.assumed.read or any(isinstance(e, NeedsValues) for e in chain(error))):
            raise
        steered = True
    else:
        if steered and not may_run:
            session.values.assumed.steer()
        _check_lines(session)
    return session if not (steered and may_run) else _run_for_real(work, choice, say)


def _new(work: Workload, choice: DeviceChoice, taking: Taking) -> Session:
    session = Session(work, choice.round_bytes, choice.as_cuda, explores=True, taking=taking)
    refuse_existing(session.inst.model)
    return session


def _run_for_real(work: Workload, choice: DeviceChoice, say: Callable[[str], None]) -> Session:
    recording = _recorded(work, say)
    session = _new(work, choice, Taking(work.reads, recording=recording))
    session.run(steps=STEPS)
    if recording.grows > 0:
        session.values.assumptions[
            f"the second step leaves {recording.grows:,} more bytes behind than the first: what the step holds grows, and the "
            "promise is for the first two steps"
        ] = None
    return session


def _recorded(work: Workload, say: Callable[[str], None]) -> Recording:
    try:
        found: Recording = record(work, say)
        return found
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise CaptureError(
            "the step reads values that depend on activations and steer it; it was run for real to write them down, and memory ran out: "
            "say values='assumed' (assume={'mask': share} for the sizes), or give a smaller batch"
        ) from error


@tells_of(WorkloadError, but=out_of_memory)
def record(work: Workload, say: Callable[[str], None]) -> Recording:
    """Run a first and a later real step, write down what they read, and put everything back."""
    say("running two real steps, as this step reads values that depend on activations")
    inst, recording = work.instance(), Recording()
    with preserved(inst):
        left = []
        for _ in range(STEPS):
            with recording_one(recording):
                run_step(inst)
            of_history = [t for o in optimizers_of(inst) for t in history(o)]  # counted as full, see `Session`
            left.append(resident_bytes(inst) - sum(t.numel() * t.element_size() for t in of_history))
        recording.grows = left[-1] - left[0]
    return recording


def _share_of_masks(work: Workload) -> float:
    """Return the share of True in the batch's own masks; 1 without any, as all elements take the most memory."""
    masks = [
        t for t in (() if work.factory is not None else tensors_of(work.batch)) if t.dtype is torch.bool and t.numel()
    ]
    return sum(int(t.sum()) for t in masks) / sum(t.numel() for t in masks) if masks else 1.0


def _check_lines(session: Session) -> None:
    unused = session.values.assumed.unused()
    if unused:
        read = ", ".join(dict.fromkeys(r.line for r in session.values.assumed.reads)) or "none"
        raise ArgumentError(
            f"assume: nothing that depends on activations is read at {', '.join(unused)}; lines that do: {read}"
        )
