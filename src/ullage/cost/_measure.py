"""Run each distinct op alone on the device, for its time, the bytes it allocates inside, and its outputs' real sizes.

Kernels allocate below the dispatcher (a convolution's backward converts memory formats, attention takes scratch). No dispatch
mode sees that; the allocator's own record of one call does.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ullage.capture._nodes import tensors_in
from ullage.capture._timeline import OpCost
from ullage.capture._trace import Signature, signature_key
from ullage.cost._devices import Device
from ullage.cost._made import Filling, arguments, fillings, measurable
from ullage.cost._roofline import is_free, roofline_ops, specs_in
from ullage.measure._allocator import record_blocks
from ullage.measure._state import preserved_rng, preserved_torch_rng
from ullage.measure._turns import one_at_a_time
from ullage.runtime import draws
from ullage.runtime.ambient._settings import Settings, read_settings

aten = torch.ops.aten
# An op of backward reads tensors that were written long before and are no longer in a core's own caches: between its calls this
# much else is written.
EVICTED_BYTES = 4 * 2**20
MEASURED_KEPT = 10_000  # costs, of about a kilobyte each with their names
_MEASURED: dict[tuple[str, Settings], OpCost] = {}
_OF_TORCH = ("aten", "prims")


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


def measure_ops(signatures: Sequence[Signature], table: Device, cold: Sequence[bool] | None = None) -> list[OpCost]:
    """Return the costs of ops, each run alone. An op that can't be run alone gets the roofline's cost.

    Args:
        signatures: the op calls.
        table: the device whose roofline stands in.
        cold: per signature, whether its inputs were written long before (an op of backward or of the optimizer), and so are
            no longer in a cache. None: only bytes are measured, and times are the roofline's.
    """
    costs, settings = [], read_settings()
    with one_at_a_time():
        for k, (s, rough) in enumerate(zip(signatures, roofline_ops(list(signatures), table), strict=True)):
            if is_free(s):
                costs.append(OpCost(1e-6, 0) if cold else rough)
            elif not measurable(s):
                costs.append(rough)
            elif cold:
                costs.append(_one(s, cold[k], rough))
            else:
                costs.append(_bytes_of(s, rough, settings))
    return costs


def _bytes_of(s: Signature, rough: OpCost, settings: Settings) -> OpCost:
    """Bytes that torch's own kernels allocate, measured once in a process for each way that torch is set."""
    if s.func.namespace not in _OF_TORCH:
        return _one(s, None, rough)
    key = signature_key(s), settings
    if key not in _MEASURED:
        while len(_MEASURED) >= MEASURED_KEPT:
            _MEASURED.pop(next(iter(_MEASURED)))
        _MEASURED[key] = _one(s, None, rough)
    return replace(_MEASURED[key], seconds=rough.seconds)


def undrawn(s: Signature) -> contextlib.AbstractContextManager[None]:
    """Keep generators as they are while an op that draws, or may draw (a library's), runs: other threads draw from them, too."""
    if s.func.namespace not in _OF_TORCH:
        return preserved_rng()
    return preserved_torch_rng() if draws(s.func, s.args) else contextlib.nullcontext()


def _one(s: Signature, cold: bool | None, rough: OpCost) -> OpCost:
    devices = {i.device for i in specs_in([s.args, s.kwargs, s.outputs])}
    device = "cuda" if "cuda" in devices else "cpu"
    seconds = rough.seconds if cold is None else 0.0

    def run(filling: Filling) -> tuple[int, tuple[int, ...]]:
        nonlocal seconds
        # oneDNN's LSTM fills its workspace only where gradients are on
        with torch.set_grad_enabled(s.func is aten.mkldnn_rnn_layer.default):
            args, kwargs = arguments(s, filling)

            def call() -> Any:
                return s.func(*args, **kwargs)

            out = call()  # a first call, because bytes that a kernel allocates once per process are not part of a call
            shapes = [tuple(t.shape) for t in tensors_in(out)]
            if torch.Tag.dynamic_output_shape in s.func.tags and shapes != [o.shape for o in s.outputs]:
                raise ValueError(f"{s.func}: other shapes than in the step")
            del out
            found = peak_and_made(call, (args, kwargs), device)
            if cold is not None:
                seconds = seconds or max(_time(call, device, cold), 1e-6)
            return found

    try:
        with undrawn(s):
            peak, outputs, bounds = most_of(run, fillings(s, [s.func]))
    except Exception:  # an op that can't be run on made-up values: the roofline stands in
        return rough
    return OpCost(seconds, max(peak, s.output_bytes), outputs, bounds)


def most_of(
    run: Callable[[Filling], tuple[int, tuple[int, ...]]], fillings: Sequence[Filling]
) -> tuple[int, tuple[int, ...], bool]:
    """Return (the largest peak of these runs, the outputs of the first, do peaks differ). Only the first has to succeed."""
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
