"""FLOPs of a step, counted op by op.

The formulas are those of `torch.utils.flop_counter`. Its `FlopCounterMode` itself is not used: it hooks every module to say where FLOPs
are, a replay in the middle of backward confuses that, and it counts recomputation as the model's.
"""

from __future__ import annotations

import sys
from collections import Counter as Counts
from typing import Any

import torch
import torch.utils.checkpoint as torchs
from torch import Tensor

from ullage._torch import (
    OpOverload,
    TorchDispatchMode,
    flop_registry,
    graph_task,
    sdpa_backward_flops,
    sdpa_flops,
    tree_leaves,
)
from ullage.runtime.ambient._local import local

aten = torch.ops.aten
_NAMESPACES = {"aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "fsdp"}  # of others nothing is known
# They multiply matrices, and torch has no formula for them.
_UNCOUNTED = {
    getattr(aten, name)
    for name in (
        "mkldnn_rnn_layer", "mkldnn_rnn_layer_backward", "_cudnn_rnn", "_cudnn_rnn_backward", "miopen_rnn", "miopen_rnn_backward",
        "_grouped_mm", "_scaled_grouped_mm", "_scaled_dot_product_fused_attention_overrideable", "_trilinear", "addbmm",
        "mkldnn_linear", "mkldnn_convolution", "quantize_per_tensor",
    )
    if hasattr(aten, name)
}  # fmt: skip
# Asked for shapes by C++, where an answer of Python's is not wanted.
_QUERIES = {
    getattr(aten, name)
    for name in ("is_contiguous", "sym_is_contiguous", "is_strides_like_format", "is_non_overlapping_and_dense", "size", "sym_size",
                 "stride", "sym_stride", "storage_offset", "sym_storage_offset", "numel", "sym_numel", "dim")
    if hasattr(aten, name)
}  # fmt: skip
_PLAIN = Tensor.__torch_dispatch__


class OpCounter(TorchDispatchMode):
    """Counts the FLOPs of ops that run under it; those of replays separately.

    Attributes:
        flops: of the model, by the name of the rate of a device ("bfloat16", "tfloat32", ...) that they run at.
        again: of replays (ullage's and torch's checkpoint), by the same.
        replay_ops: ops that ullage's replays ran; `replay_bytes`: bytes of the storages they made.
        unknown: ops that may have FLOPs, and no formula.
        active: is one counting? Modes leave in the order opposite to the one they came in, and steps of two monitors need not,
            so there is one at a time.
    """

    active = False

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counts[str] = Counts()
        self.again: Counts[str] = Counts()
        self.replay_ops = self.replay_bytes = 0
        self.unknown: dict[str, None] = {}

    def __enter__(self) -> OpCounter:
        OpCounter.active = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        OpCounter.active = False
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and count it."""
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            out = func(*args, **kwargs)
            self._count(func, func, args, kwargs, out)
            return out
        packet = func._overloadpacket
        # a subclass of Tensor (DTensor) comes here again with the plain tensors that it is made of
        if packet in _QUERIES or any(t.__torch_dispatch__ is not _PLAIN for t in types):
            return NotImplemented
        out = func(*args, **kwargs)
        if local.quiet or func.namespace == "prim":
            return out
        if local.units:
            self.replay_ops += 1
            self.replay_bytes += _fresh_bytes(args, kwargs, out)
        self._count(packet, func, args, kwargs, out)
        return out

    def _count(self, packet: Any, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        formula = _OWN.get(packet) or flop_registry.get(packet)
        if formula is None:
            if packet in _UNCOUNTED or getattr(func, "namespace", "") not in _NAMESPACES:
                self.unknown[str(packet)] = None
            return
        try:
            number = int(formula(*args, **kwargs, out_val=out))
        except Exception:  # written for other arguments than these
            self.unknown[str(packet)] = None
            return
        into = self.again if local.units or _in_torchs_checkpoint() else self.flops
        into[_rate_name(packet, args)] += number


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flops(query.shape, key.shape, value.shape))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flops(grad.shape, query.shape, key.shape, value.shape))


# Kernels of the CPU that torch's registry leaves out; the formulas are torch's, as for those of CUDA.
_OWN: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _in_torchs_checkpoint() -> bool:
    """Is this op one that torch's own checkpoint does again? Its replays run in a backward, with grad mode on."""
    if graph_task() == -1 or not torch.is_grad_enabled():
        return False
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == torchs.__file__:
            return True
        frame = frame.f_back
    return False


def _fresh_bytes(args: Any, kwargs: Any, out: Any) -> int:
    """Bytes of storages that an op made."""
    given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _plain(t)}
    made = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tree_leaves(out) if _plain(t)}
    return sum(n for key, n in made.items() if key not in given)


def _plain(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout is torch.strided


def _rate_name(packet: Any, args: Any) -> str:
    first = next((t for t in tree_leaves(args) if isinstance(t, Tensor) and t.is_floating_point()), None)
    if first is None:
        return "unknown"
    name = str(first.dtype).removeprefix("torch.")
    if name == "float32" and first.device.type == "cuda" and _uses_tf32("convolution" in str(packet)):
        return "tfloat32"
    return name


def _uses_tf32(convolution: bool) -> bool:
    if convolution:
        return bool(torch.backends.cudnn.allow_tf32)
    return torch.get_float32_matmul_precision() != "highest"
