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
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from ullage.capture._timeline import OpCost
from ullage.capture._trace import Signature, TensorSpec
from ullage.cost._devices import Device
from ullage.cost._roofline import is_free, roofline_ops, spec_bytes, specs_in
from ullage.measure._allocator import record_blocks
from ullage.measure._state import preserved_rng, preserved_torch_rng
from ullage.measure._turns import one_at_a_time
from ullage.runtime import draws

aten = torch.ops.aten
MAX_BYTES = 8 * 2**30
# What an op of backward reads has left the caches that are a core's own: between its calls this much else is written.
EVICTED_BYTES = 4 * 2**20
_INDEXED = {aten.embedding.default: 0, aten.nll_loss_forward.default: 0}
_COUNTED = {aten.masked_select.default: 1, aten.index.Tensor: 1}  # where the mask is that says how much comes out
_SKIP = {aten._local_scalar_dense.default, aten._pin_memory.default}


def _make(spec: TensorSpec, high: int) -> Tensor:
    span = 1 + sum((n - 1) * s for n, s in zip(spec.shape, spec.stride, strict=True)) if math.prod(spec.shape) else 0
    if spec.dtype.is_floating_point:
        base = torch.empty(span, dtype=spec.dtype, device=spec.device).fill_(0.5)
    elif spec.dtype.is_complex or high <= 1:
        base = torch.zeros(span, dtype=spec.dtype, device=spec.device)
    else:
        base = (torch.arange(span, device=spec.device) % high).to(spec.dtype)  # no draw: RNG stays as found
    made = base.as_strided(spec.shape, spec.stride)
    if spec.conj:
        made = made.conj()
    return torch._neg_view(made) if spec.neg else made


def _arguments(s: Signature) -> tuple[Any, Any]:
    high = 1
    if s.func in _INDEXED:
        high = s.args[0].shape[0] if s.func is aten.embedding.default else s.args[0].shape[-1]
    if s.func is aten.embedding_dense_backward.default:
        high = s.args[2]

    def make(value: Any) -> Any:
        return _make(value, high) if isinstance(value, TensorSpec) else value

    def listed(value: Any) -> Any:
        return [listed(v) for v in value] if isinstance(value, tuple) else value

    args = tree_map(make, [listed(a) for a in s.args])
    if s.func in _COUNTED:
        for mask in tree_flatten(args[_COUNTED[s.func]])[0]:
            if isinstance(mask, Tensor) and mask.dtype in (torch.bool, torch.uint8):
                _choose(mask, args[0], s.outputs[0].shape)
    if s.func is aten.mkldnn_rnn_layer_backward.default:  # reads a workspace that only its forward can fill
        reverse, mode, hidden, layers, biases, train, both, sizes, batch_first = args[13:22]
        with torch.enable_grad():
            args[22] = aten.mkldnn_rnn_layer(
                *args[:7], reverse, sizes, mode, hidden, layers, biases, both, batch_first, train
            )[3]
    return args, {k: make(v) for k, v in s.kwargs.items()}


def _choose(mask: Tensor, source: Tensor, wanted: Sequence[int]) -> None:
    """Set as much of a mask as makes an output of this shape."""
    rest = max(source.numel(), mask.numel()) // max(mask.numel(), 1)
    chosen = math.prod(wanted) // max(rest, 1)
    mask.copy_((torch.arange(mask.numel(), device=mask.device) < chosen).view(mask.shape))


def _measurable(s: Signature) -> bool:
    unknown = torch.Tag.dynamic_output_shape in s.func.tags and s.func not in _COUNTED
    if s.func in _SKIP or unknown or "c10d" in s.func.namespace:
        return False
    inputs = specs_in([s.args, s.kwargs])
    if any(len(i.stride) != len(i.shape) for i in inputs):
        return False
    return sum(spec_bytes(i) for i in inputs) + s.output_bytes <= MAX_BYTES


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
            with _undrawn(s):
                costs.append(_one(s, is_cold, rough) if _measurable(s) else rough)
    return costs


def _undrawn(s: Signature) -> contextlib.AbstractContextManager[None]:
    """Ops that draw are run for real; what a library's op draws isn't known. Other threads draw from the same generators."""
    if s.func.namespace not in ("aten", "prims"):
        return preserved_rng()
    return preserved_torch_rng() if draws(s.func, s.args) else contextlib.nullcontext()


def _one(s: Signature, cold: bool, rough: OpCost) -> OpCost:
    devices = {i.device for i in specs_in([s.args, s.kwargs, s.outputs])}
    device = "cuda" if "cuda" in devices else "cpu"
    try:
        # oneDNN's LSTM fills its workspace only where gradients are on
        with torch.set_grad_enabled(s.func is aten.mkldnn_rnn_layer.default):
            args, kwargs = _arguments(s)

            def call() -> Any:
                return s.func(*args, **kwargs)

            outputs: list[int] = []

            def once() -> None:
                known = {t.untyped_storage()._cdata for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
                out = call()
                for t in tree_flatten(out)[0]:
                    if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known:
                        known.add(t.untyped_storage()._cdata)
                        outputs.append(t.untyped_storage().nbytes())

            call()  # what a kernel allocates once and for all is not part of a call
            peak = _peak(once, device)
            return OpCost(max(_time(call, device, cold), 1e-6), max(peak, s.output_bytes), tuple(outputs))
    except Exception:  # an op that can't be run on made-up values: the roofline stands in
        return rough


def _peak(call: Callable[[], None], device: str) -> int:
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
