"""A real run as PyTorch's memory snapshot, to lay beside the predicted one.

On a CUDA device it is torch's own record. A CPU's allocator keeps none, but torch's profiler does: each block with its address and
the ops around it. All memory from before the first step is one block.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ullage._files import write_whole
from ullage._torch import cuda_record, cuda_snapshot
from ullage.measure._allocator import BlockEvent, record_blocks
from ullage.measure._measure import check_arguments, planned_bytes, resident_bytes
from ullage.measure._state import leaves_rng, preserved
from ullage.report._blocks import BEFORE, NO_LINE, Blocks, Frames, frame
from ullage.report._snapshot import PROTOCOL
from ullage.workload import Instance, Workload, run_step

if TYPE_CHECKING:
    from ullage.planner import Plan

STEPS = 2  # a first and a later one, as in a timeline
_MOST_ENTRIES = 1_000_000  # of torch's own record


@leaves_rng
def record_snapshot(work: Workload, plan: Plan | None = None, path: str | Path | None = None) -> dict[str, Any]:
    """Run two real steps and return their memory snapshot, which pytorch.org/memory_viz reads; model and RNG are left as found.

    Args:
        work: what is trained.
        plan: applied for the time of the run; None for the plain step.
        path: write it there too, as a pickle.

    Raises:
        ArgumentError: not a workload, or not a plan.
        ApplyError, PlanMismatch: the plan can't be applied.
    """
    check_arguments(work, plan, STEPS)
    inst = work.instance()
    with planned_bytes(plan, inst.model), preserved(inst) as found:
        if inst.device.type == "cuda":
            snapshot = _on_cuda(inst)
        else:
            start = resident_bytes(inst, found.grads)
            snapshot = _from_blocks(start, record_blocks(lambda: _step(inst), STEPS))
    if path is not None:
        write_whole(path, pickle.dumps(snapshot, PROTOCOL))
    return snapshot


def _step(inst: Instance) -> None:
    run_step(inst)


def _on_cuda(inst: Instance) -> dict[str, Any]:
    cuda_record(max_entries=_MOST_ENTRIES)
    try:
        for _ in range(STEPS):
            run_step(inst)
        torch.cuda.synchronize(inst.device)
        found: dict[str, Any] = cuda_snapshot(inst.device)
        return found
    finally:
        cuda_record(enabled=None)


def _from_blocks(start_bytes: int, events: list[BlockEvent]) -> dict[str, Any]:
    """Blocks that were there before and are freed in the run have no record of their own: they stay in the first one."""
    blocks, frames = Blocks(), dict[tuple[str, ...], Frames]()
    begin = events[0].time_ns if events else 0
    blocks.alloc(start_bytes, BEFORE, [frame(BEFORE, NO_LINE)], 0)
    places: dict[int, int] = {}
    for e in events:
        time = (e.time_ns - begin) // 1000
        if e.nbytes < 0:
            blocks.free(places.pop(e.address, -1), time)
            continue
        if e.ops not in frames:
            frames[e.ops] = [frame(op, NO_LINE) for op in e.ops] or [frame("(no op)", NO_LINE)]
        where = "backward" if any(op.startswith("autograd::engine") for op in e.ops) else "forward or optimizer"
        places[e.address] = blocks.alloc(e.nbytes, where, frames[e.ops], time)
    return blocks.snapshot()
