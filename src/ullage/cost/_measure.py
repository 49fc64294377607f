"""Run each distinct op alone on the device: its time, what it allocates inside, and its outputs' real sizes.

Kernels allocate below the dispatcher (a convolution's backward converts memory formats, attention takes scratch), which
no dispatch mode sees; the allocator's own record of one call shows it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ullage.capture._nodes import tensors_in
from ullage.capture._timeline import OpCost
from ullage.capture._trace import Signature
from ullage.cost._devices import Device
from ullage.cost._made import Filling, arguments, fillings, measurable
from ullage.cost._roofline import is_free, roofline_ops, specs_in
from ullage.measure._allocator import record_blocks
from ullage.measure._state import preserved_rng, preserved_torch_rng
from ullage.measure._turns import one_at_a_time
from ullage.runtime import draws

aten = torch.ops.aten
# What an op of backward reads has left the caches that are a core's own: between its calls this much else is written.
EVICTED_BYTES = 4 * 2**20


def _time(call: Callable[[], Any], device: str, cold: bool) -> float:
    other = torch.zeros(EVICTED_BYTES, dtype=torch.uint8) if cold and device == "cpu" else None
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    best = math.inf
    spent, rounds = 0.0, 0
    while rounds < 3 or (spent < 2e-3 and rounds < 20):
        if other is not None:
            other.add_(1)
        sync()
        start = time.perf_counter()
        out = call()
        sync()
        took = time.perf_counter() - start
        del out
        best, spent, rounds = min(best, took), spent + took, rounds + 1
        if took > 1.0 and rounds >= 2:
            break
    return best


def measure_ops(signatures: Sequence[Signature], cold: Sequence[bool], fallback: Device) -> list[OpCost]:
    """Costs of ops, each run alone. What can't be run alone takes the roofline's cost.

    Args:
        signatures: what is called.
        cold: per signature, is what it reads from long before (an op of backward or of the optimizer), and so no longer in a cache?
        fallback: the device whose roofline stands in.
    """
    costs = []
    with one_at_a_time():
        for s, is_cold, rough in zip(signatures, cold, roofline_ops(list(signatures), fallback), strict=True):
            if is_free(s):
                costs.append(OpCost(1e-6, 0))
                continue
            with undrawn(s):
                costs.append(_one(s, is_cold, rough) if measurable(s) else rough)
    return costs


def undrawn(s: Signature) -> contextlib.AbstractContextManager[None]:
    """Ops that draw are run for real; what a library's op draws isn't known. Other threads draw from the same generators."""
    if s.func.namespace not in ("aten", "prims"):
        return preserved_rng()
    return preserved_torch_rng() if draws(s.func, s.args) else contextlib.nullcontext()


def _one(s: Signature, cold: bool, rough: OpCost) -> OpCost:
    devices = {i.device for i in specs_in([s.args, s.kwargs, s.outputs])}
    device = "cuda" if "cuda" in devices else "cpu"
    seconds = 0.0

    def run(filling: Filling) -> tuple[int, tuple[int, ...]]:
        nonlocal seconds
        # oneDNN's LSTM fills its workspace only where gradients are on
        with torch.set_grad_enabled(s.func is aten.mkldnn_rnn_layer.default):
            args, kwargs = arguments(s, filling)

            def call() -> Any:
                return s.func(*args, **kwargs)

            out = call()  # what a kernel allocates once and for all is not part of a call
            shapes = [tuple(t.shape) for t in tensors_in(out)]
            if torch.Tag.dynamic_output_shape in s.func.tags and shapes != [o.shape for o in s.outputs]:
                raise ValueError(f"{s.func}: other shapes than in the step")
            del out
            found = peak_and_made(call, (args, kwargs), device)
            seconds = seconds or max(_time(call, device, cold), 1e-6)
            return found

    try:
        peak, outputs, bounds = most_of(run, fillings(s, [s.func]))
    except Exception:  # an op that can't be run on made-up values: the roofline stands in
        return rough
    return OpCost(seconds, max(peak, s.output_bytes), outputs, bounds)


def most_of(
    run: Callable[[Filling], tuple[int, tuple[int, ...]]], fillings: Sequence[Filling]
) -> tuple[int, tuple[int, ...], bool]:
    """(the largest peak of these runs, what the first returned, do they differ). Only the first has to succeed."""
    peak, outputs = run(fillings[0])
    peaks = {peak}
    for filling in fillings[1:]:
        with contextlib.suppress(Exception):  # values that this op refuses
            peaks.add(run(filling)[0])
    return max(peaks), outputs, len(peaks) > 1


def peak_and_made(call: Callable[[], Any], given: Any, device: str) -> tuple[int, tuple[int, ...]]:
    """The most that a call allocates at any moment, and the sizes of the storages that it returns and was not given."""
    made: list[int] = []

    def once() -> None:
        known = {t.untyped_storage()._cdata for t in tensors_in(given)}
        for t in tensors_in(call()):
            if t.untyped_storage()._cdata not in known:
                known.add(t.untyped_storage()._cdata)
                made.append(t.untyped_storage().nbytes())

    return peak_of(once, device), tuple(made)


def peak_of(call: Callable[[], None], device: str) -> int:
    """The most that a call allocates at any moment."""
    if device == "cuda":
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - start
    live = peak = 0
    outside: set[int] = set()  # tensors that numbers become before the op starts
    for event in record_blocks(call, 1):
        if event.nbytes > 0 and not event.ops:
            outside.add(event.address)
        elif event.address in outside:
            outside.discard(event.address)
        else:
            live += event.nbytes
            peak = max(peak, live)
    return peak
