"""Roofline: max(FLOPs / rate, bytes / bandwidth) + launch, per op signature. Same on every machine."""

from __future__ import annotations

import math
from typing import Any

import torch

from ullage._torch import flop_registry, tree_flatten
from ullage.capture._timeline import OpCost
from ullage.capture._trace import Signature, TensorSpec
from ullage.cost._devices import Device

# Ops whose CPU kernels allocate about as much again as they return (layout conversions, partial sums), read off
# allocator records on torch 2.13; used only where nothing may be measured.
_INTERNAL_FACTOR = {"aten::convolution": 1.0, "aten::convolution_backward": 2.0, "aten::mkldnn_rnn_layer_backward": 1.0}

_ALLOCATE = {
    getattr(torch.ops.aten, n) for n in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}


def specs_in(value: Any) -> list[TensorSpec]:
    """All tensor specs of a nested argument."""
    return [s for s in tree_flatten(value)[0] if isinstance(s, TensorSpec)]


def spec_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor of this spec, each element counted once."""
    reached = [n for n, s in zip(spec.shape, spec.stride or spec.shape, strict=False) if s != 0]
    return math.prod(reached) * spec.dtype.itemsize


def is_free(signature: Signature) -> bool:
    """A view: no bytes moved, nothing allocated."""
    return signature.output_bytes == 0 and not signature.func._schema.is_mutable


def _only_allocates(signature: Signature) -> bool:
    """It takes memory and writes nothing to it: no kernel runs."""
    return signature.func._overloadpacket in _ALLOCATE


def _flops(signature: Signature) -> float:
    formula = flop_registry.get(signature.func._overloadpacket)
    if formula is None:
        return 0.0
    try:
        out = [torch.empty(s.shape, device="meta") for s in signature.outputs]
        to_meta = [torch.empty(a.shape, device="meta") if isinstance(a, TensorSpec) else a for a in signature.args]
        return float(formula(*to_meta, out_val=out[0] if len(out) == 1 else tuple(out)))
    except Exception:  # a formula that does not fit this overload: bytes decide
        return 0.0


def roofline_ops(signatures: list[Signature], device: Device) -> list[OpCost]:
    """Cost of each signature on a device of the table."""
    costs = []
    for s in signatures:
        inputs = specs_in([s.args, s.kwargs])
        moved = sum(spec_bytes(i) for i in inputs) + sum(spec_bytes(o) for o in s.outputs)
        dtype = next((str(i.dtype).removeprefix("torch.") for i in inputs if i.dtype.is_floating_point), "float32")
        rate = device.flops.get(dtype) or device.flops["float32"]
        seconds = (
            1e-9
            if is_free(s) or _only_allocates(s)
            else max(_flops(s) / rate, moved / device.memory_bandwidth_bytes_per_s) + device.launch_seconds
        )
        factor = _INTERNAL_FACTOR.get(s.func._schema.name, 0.0) if device.kind == "cpu" else 0.0
        costs.append(OpCost(seconds, int(s.output_bytes * (1 + factor))))
    return costs
