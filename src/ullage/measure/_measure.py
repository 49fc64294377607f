"""`measure`: real steps of a workload, plain or under a plan: peak bytes and step times."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor, nn

from ullage._bytes import format_bytes, format_seconds
from ullage._errors import ApplyError, ArgumentError, WorkloadError
from ullage._stats import at_share, median
from ullage._told import out_of_memory, tells_of
from ullage._torch import tree_flatten
from ullage.apply import Handle, apply_plan
from ullage.apply._protocols import PlanToApply, is_plan
from ullage.measure._allocator import Resident, record_steps
from ullage.measure._reach import copied_tensors, optimizers_of, shared_tensors
from ullage.measure._snapshot import Snapshot
from ullage.measure._state import leaves_rng, preserved
from ullage.workload import Instance, Setup, Workload, run_step, setup_of, tensors_of


class PlanToMeasure(PlanToApply, Protocol):
    """A plan that applies itself."""

    def apply(self, model: nn.Module) -> Handle:
        """Put it in force."""


PEAK_STEPS = 3  # a first step, in which the optimizer makes its state, and two later ones
# Warm-up ends with the first step that has fewer than 16 page faults, as then all pages are there; a step that never gets there is
# timed after this many.
MAX_WARMUP = 8


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Peaks and times of real steps.

    Attributes:
        peak_bytes: bytes; the largest of `step_peaks`. On CUDA, bytes that torch allocated.
        start_bytes: bytes alive before the first step.
        step_peaks: bytes of the peaks of steps 1, 2 and 3.
        step_seconds: median seconds of the timed steps.
        p90: seconds that nine of ten steps do not exceed; a time that occurred.
        p99: seconds that 99 of 100 do not exceed.
        samples_per_second: at the median.
        steps: how many were timed.
        reserved_bytes: bytes that torch's CUDA allocator held; 0 on a CPU.
        other_bytes: bytes that the CUDA driver counts beyond these; 0 on a CPU.
        step_times: seconds of the timed steps, in order; empty in files of older versions.
        plan_digest: of the plan, "" of the plain step; None in files of older versions.
        setup: the facts that these numbers depend on; None in files of older versions.
    """

    peak_bytes: int
    start_bytes: int
    step_peaks: list[int]
    step_seconds: float
    p90: float
    p99: float
    samples_per_second: float
    steps: int
    reserved_bytes: int
    other_bytes: int
    step_times: list[float] = []
    plan_digest: str | None = None
    setup: Setup | None = None

    def __str__(self) -> str:
        extra = (
            f", reserved {format_bytes(self.reserved_bytes)}, not PyTorch's {format_bytes(self.other_bytes)}"
            if self.reserved_bytes
            else ""
        )
        facts = f"\n{self.setup}" if self.setup is not None else ""
        return (
            f"peak {format_bytes(self.peak_bytes)}{extra}; step {format_seconds(self.step_seconds)} (p90 {format_seconds(self.p90)}, "
            f"p99 {format_seconds(self.p99)}), {self.samples_per_second:.1f} samples/s over {self.steps} steps{facts}"
        )


def resident(inst: Instance, held: Sequence[Tensor] = ()) -> Resident:
    """Everything a step can reach (model, gradients, batch, optimizer state, a teacher in the loss) and `held`."""
    # A tensor that a step leaves behind (a feature that a hook noted) is freed in the next one, whose record does not show it
    tensors = [
        *(t for t in copied_tensors(inst) if t.is_leaf),
        *shared_tensors(inst),
        *tensors_of(inst.batch),
        *held,
    ]
    tensors += [t.grad for t in tensors if isinstance(t, Tensor) and t.is_leaf and t.grad is not None]
    for optimizer in optimizers_of(inst):
        tensors += tree_flatten([list(s.values()) for s in optimizer.state.values()])[0]
    return Resident(
        {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors if isinstance(t, Tensor)}.values()
    )


def resident_bytes(inst: Instance, held: Sequence[Tensor] = ()) -> int:
    """Bytes of that."""
    return resident(inst, held).nbytes


@tells_of(WorkloadError, but=out_of_memory)
@leaves_rng
def measure(
    work: Workload,
    plan: PlanToMeasure | None = None,
    steps: int = 7,
    *,
    progress: Callable[[str], None] | None = None,
) -> Measurement:
    """Run real steps and record their peaks and times; model, optimizer, gradients, buffers and generators are left as found.

    Args:
        work: what is trained.
        plan: applied for the time of the measurement; None measures the plain step.
        steps: timed steps, after warm-up (until a step makes no page faults, 8 at most).
        progress: called with a line at each stage.

    Raises:
        ArgumentError: `steps` is not a whole number of 1 or more.
        ApplyError: a plan is in force on the model already.
        PlanMismatch: the plan can't be applied, or a module is in another mode (training, evaluation) than planned.
        WorkloadError: the step raises; where memory ran out, torch's own error comes out.
    """
    check_arguments(work, plan, steps)
    say = progress or (lambda _: None)
    say("building the model")
    inst = work.instance()
    _refuse_a_plan_in_force(inst, plan)
    with planned_bytes(plan, inst.model), preserved(inst) as found:
        say(f"recording the allocator over {PEAK_STEPS} steps")
        start, peaks, reserved, other = _peaks(inst, found)
        try:
            times = _times(inst, steps, say)
        finally:
            hand_back_pages()
        setup = _setup(inst, work.notes)
    ordered = sorted(times)
    middle = median(ordered)
    samples = inst.samples * inst.accumulate
    return Measurement(
        peak_bytes=max(peaks),
        start_bytes=start,
        step_peaks=peaks,
        step_seconds=middle,
        p90=at_share(ordered, 0.9),
        p99=at_share(ordered, 0.99),
        samples_per_second=samples / middle,
        steps=steps,
        reserved_bytes=reserved,
        other_bytes=other,
        step_times=times,
        plan_digest=plan.digest if plan is not None else "",
        setup=setup,
    )


def _setup(inst: Instance, defaults: Sequence[str]) -> Setup:
    if inst.device.type != "cuda":
        return setup_of(inst, inst.device.type, None, defaults)
    properties = torch.cuda.get_device_properties(inst.device)
    return setup_of(inst, properties.name, properties.total_memory, defaults)


@tells_of(WorkloadError, but=out_of_memory)
@leaves_rng
def record_peak(work: Workload, plan: PlanToMeasure | None = None) -> int:
    """The peak alone, in bytes: three real steps under the allocator's record, no timing."""
    check_arguments(work, plan, 1)
    inst = work.instance()
    _refuse_a_plan_in_force(inst, plan)
    with planned_bytes(plan, inst.model), preserved(inst) as found:
        return max(_peaks(inst, found)[1])


def check_arguments(work: Any, plan: Any, steps: Any) -> None:
    """Raise ArgumentError unless these are a workload, a plan (or None) and a number of steps."""
    if not isinstance(work, Workload):
        raise ArgumentError(f"work: expected a ullage.Workload, got {type(work).__name__}")
    if plan is not None and not is_plan(plan):
        raise ArgumentError(
            f"plan: expected a ullage.Plan, got {type(plan).__name__}; a file is read by Plan.load(path)"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"steps={steps!r}: expected a whole number of 1 or more")


def planned_bytes(plan: PlanToMeasure | None, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Apply a plan for steps whose bytes are recorded: a module in another mode than planned is refused, not warned of."""
    if plan is None:
        return contextlib.nullcontext()
    handle = apply_plan(plan, model)
    handle.modes.refuses = True
    return handle


def _refuse_a_plan_in_force(inst: Instance, plan: PlanToMeasure | None) -> None:
    """The plain step is asked for, and the model runs a planned one. With a plan given, `apply` refuses."""
    from ullage.apply import handle_on

    handle = handle_on(inst.model) if plan is None else None
    if handle is not None:
        raise ApplyError(
            f"measure without a plan measures the plain step, but plan {handle.plan.digest} is in force on the model; "
            "call remove() of its handle first, then measure(work) or measure(work, plan)"
        )


def _peaks(inst: Instance, found: Snapshot) -> tuple[int, list[int], int, int]:
    if inst.device.type == "cuda":
        return _cuda_peaks(inst)
    before, peaks = resident(inst, found.grads), []
    live = start = before.nbytes

    def step() -> None:
        run_step(inst)
        found.let_go()

    for events in record_steps(step, PEAK_STEPS):
        peak = live
        for event in events:
            live += event.nbytes
            peak = max(peak, live)
        peaks.append(peak)
    return start, peaks, 0, 0


def _cuda_peaks(inst: Instance) -> tuple[int, list[int], int, int]:
    device, peaks = inst.device, []
    torch.cuda.synchronize(device)
    start = torch.cuda.memory_allocated(device)
    for _ in range(PEAK_STEPS):
        torch.cuda.reset_peak_memory_stats(device)
        run_step(inst)
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device))
    reserved = torch.cuda.max_memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    return start, peaks, reserved, max(total - free - torch.cuda.memory_reserved(device), 0)


def _times(inst: Instance, steps: int, say: Callable[[str], None]) -> list[float]:
    sync = (lambda: torch.cuda.synchronize(inst.device)) if inst.device.type == "cuda" else (lambda: None)
    keep_pages()
    say("warming up")
    for _ in range(MAX_WARMUP):
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run_step(inst)
        if resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 16:
            break
    times = []
    say(f"timing {steps} steps")
    for _ in range(steps):
        sync()
        begin = time.perf_counter()
        run_step(inst)
        sync()
        times.append(time.perf_counter() - begin)
    return times


def keep_pages() -> None:
    """Tell glibc not to hand large blocks back to the kernel: page faults make the plain step look slow otherwise."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def hand_back_pages() -> None:
    """Undo `keep_pages`: set glibc's defaults, and return free pages. (The threshold that glibc had adapted can't be read.)"""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 65536)  # M_MMAP_MAX
        libc.mallopt(-1, 128 * 1024)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)
