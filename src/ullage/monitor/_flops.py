"""FLOPs of a step, counted once op by op, and how fast the device could do them at best.

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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ullage._errors import ArgumentError
from ullage.cost import devices, find_device
from ullage.runtime._local import local

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
_graph_task = torch._C._current_graph_task_id


class OpCounter(TorchDispatchMode):
    """Counts the FLOPs of what runs under it, apart what is done again.

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
        if not isinstance(func, torch._ops.OpOverload):
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
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


# Kernels of the CPU that torch's registry leaves out; the formulas are torch's, as for those of CUDA.
_OWN: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _in_torchs_checkpoint() -> bool:
    """Is this op one that torch's own checkpoint does again? Its replays run in a backward, with grad mode on."""
    if _graph_task() == -1 or not torch.is_grad_enabled():
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


# What `torch.cuda.get_device_name` says of devices of the table. Variants with other rates (PCIe, laptops) are not there.
_NAMES = {
    "NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100-80gb", "NVIDIA A100-SXM4-80GB": "a100-80gb", "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-40gb", "NVIDIA A100-PCIE-40GB": "a100-40gb", "NVIDIA L40S": "l40s", "NVIDIA GeForce RTX 4090": "rtx-4090-24gb",
    "NVIDIA GeForce RTX 3090": "rtx-3090-24gb", "Tesla V100-SXM2-32GB": "v100-32gb", "Tesla T4": "t4-16gb",
}  # fmt: skip


class Peak:
    """The most FLOP/s a device can do: one number, or one per dtype.

    Args:
        given: FLOP/s, the name of a device of the table, or None: that of the device the model is on.
        device_name: what the system calls that one; "" on a CPU.

    Raises:
        ArgumentError: `given` is no positive number.
        DeviceError: no such device.
    """

    def __init__(self, given: float | str | None, device_name: str) -> None:
        self.number: float | None = None
        self.rates: dict[str, float] = {}
        self.why = ""
        if isinstance(given, str):
            self.rates = find_device(given).flops
        elif given is not None:
            if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < float("inf"):
                raise ArgumentError(
                    f"peak_flops={given!r}: expected FLOP/s above zero, or the name of a device of `ullage devices`"
                )
            self.number = float(given)
        elif device_name in _NAMES:
            self.rates = devices()[_NAMES[device_name]].flops
        else:
            what = repr(device_name) if device_name else "this processor"
            self.why = f"the peak FLOP/s of {what} are not known; pass peak_flops="

    def seconds(self, flops: dict[str, int]) -> float | str:
        """The least seconds for these FLOPs by name of rate, or why that is not known."""
        if self.why:
            return self.why
        if self.number is not None:
            return sum(flops.values()) / self.number
        missing = next((name for name in flops if name not in self.rates), None)
        if missing is not None:
            return f"the device table has no rate for {missing}; pass peak_flops="
        return sum(n / self.rates[name] for name, n in flops.items())


Counters = tuple[int, int, int]  # replays, skipped ops, stale logs of a step


class Utilization:
    """How well steps use the device, from one step whose ops were counted or from FLOPs as given.

    Args:
        peak: of the device.
        flops_per_step: the model's, as given, or None.
        why_not: why no step is counted, or "".
    """

    def __init__(self, peak: Peak, flops_per_step: float | None, why_not: str) -> None:
        self.peak, self.given, self.wanted = peak, flops_per_step, not why_not
        self.not_available: dict[str, str] = {}  # not told yet
        self.model_flops: int | None = None
        self.replay_flops: int | None = None
        self._step: int | None = None  # the counted one
        self._key: Any = None
        self._counters: Counters | None = None
        self._replays = (0, 0)  # ops, bytes
        self._seconds: float | None = None  # the least for the model's FLOPs
        self._with_replays: float | None = None
        why = why_not if flops_per_step is None or peak.number is None else ""
        if peak.why or why:
            self.not_available["MFU"] = peak.why or why

    def take(self, counter: OpCounter, step: int, key: Any, counters: Counters) -> None:
        """A step of this number went well and was counted; `key`: what its FLOPs depend on, `counters`: what was done again."""
        self.wanted = False
        self._step, self._key, self._counters = step, key, counters
        self._replays = counter.replay_ops, counter.replay_bytes
        why = ""
        if counter.unknown:
            why = f"no formula gives the FLOPs of {', '.join(counter.unknown)}; pass flops_per_step="
        elif not counter.flops:
            why = "no op with FLOPs was seen in the counted step; pass flops_per_step="
        else:
            self.model_flops, self.replay_flops = sum(counter.flops.values()), sum(counter.again.values())
        least = why or self.peak.seconds(counter.flops)
        if isinstance(least, str):
            if self.given is None or self.peak.number is None:
                self.not_available.setdefault("MFU", least)
            return
        self._seconds = least
        again = self.peak.seconds(counter.again)
        self._with_replays = None if isinstance(again, str) else least + again

    def of(
        self, seconds: float, flops: float | None, step: int, key: Any, counters: Counters
    ) -> tuple[float | None, float | None]:
        """(MFU, HFU) of a step of this many seconds; None: not known."""
        flops = flops if flops is not None else self.given
        if not seconds:
            return None, None
        if flops is not None:
            if self.peak.number is not None:
                return flops / self.peak.number / seconds, None
            if self._seconds is None or not self.model_flops:  # what dtype they are of is not known
                return None, None
            return flops / self.model_flops * self._seconds / seconds, None
        if self._seconds is None or not self._knows(step):
            return None, None
        if key != self._key:
            self.not_available["MFU of some steps"] = (
                "they differ from the counted step in samples or tokens; pass flops= to them"
            )
            return None, None
        hfu = self._with_replays / seconds if self._with_replays is not None and counters == self._counters else None
        return self._seconds / seconds, hfu

    def _knows(self, step: int) -> bool:
        """Is it the counted step or a later one? What came before is not judged by it: first steps learn."""
        return self._step is not None and step >= self._step

    def replays(self, step: int, counters: Counters) -> tuple[int | None, int | None]:
        """(ops that a step's replays ran, bytes they made); None: it replayed otherwise than the counted step."""
        if not counters[0]:
            return 0, 0
        return self._replays if counters == self._counters and self._knows(step) else (None, None)

    def news(self) -> dict[str, str]:
        """What became known not to be available since this was asked last."""
        found, self.not_available = self.not_available, {}
        return found
