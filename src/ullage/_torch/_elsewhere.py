"""Names of torch's libraries: recurrent layers, optimizers, FLOPs, memory's records, settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.optim.optimizer as optim

from ullage._torch._find import OLDEST, find

_PLANS = "a plan or a profile"
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu", "_pack_padded_sequence", "_pad_packed_sequence")

recurrent: dict[str, Callable[..., Any]] = {
    name: find(
        f"torch._VF.{name}", "what recurrent layers call; replaced during a capture", "a plan of recurrent layers"
    )
    for name in _RECURRENT
}
recurrent_module = find("torch._VF", "where recurrent layers look those up", _PLANS)

_OPTIMIZER = "a plan of a step with an optimizer"
foreach_types = find(
    "torch.optim.optimizer._foreach_supported_types",
    "an optimizer takes fake parameters as it takes real ones",
    _OPTIMIZER,
    through=lambda: optim._foreach_supported_types,
)
foreach_devices = find(
    "torch.optim.optimizer._get_foreach_kernels_supported_devices",
    "an optimizer does on a CPU what it would on CUDA",
    "a plan for a CUDA device made on a CPU",
)
_UNKNOWN = "attention is among the ops of which a Monitor says that their FLOPs are unknown"
flop_registry = find("torch.utils.flop_counter.flop_registry", "FLOPs per op", 'costs="roofline" or a Monitor\'s FLOPs')
sdpa_flops = find(
    "torch.utils.flop_counter.sdpa_flop_count", "FLOPs of attention", "a Monitor's FLOPs", instead=_UNKNOWN
)
sdpa_backward_flops = find(
    "torch.utils.flop_counter.sdpa_backward_flop_count", "FLOPs of its backward", "a Monitor's FLOPs", instead=_UNKNOWN
)
event_tree = find(
    "torch._C._autograd._ProfilerResult.experimental_event_tree",
    "what a CPU's allocator did, as the profiler saw it",
    "measure or record_snapshot on a CPU",
)
cuda_snapshot = find(
    "torch.cuda.memory._snapshot", "torch's record of a GPU's memory", "record_snapshot on a CUDA device"
)
cuda_record = find(
    "torch.cuda.memory._record_memory_history", "starts and ends that record", "record_snapshot on a CUDA device"
)

# --- settings --------------------------------------------------------------------------------------------------------

Setting = tuple[Callable[[], Any], Callable[..., Any]]  # get, set
_SETTINGS = "a replay under the settings of its forward"
_NOT_PUT_BACK = "a replay does not see that setting: leave it alone between a unit's forward and its backward"


def _setting(get: str, put: str, since: str = OLDEST) -> Setting | None:
    """Find a setting by the names of its getter and setter. If a torch from `since` on lacks it, a plan's notes say so."""
    getter, setter = (
        find(
            f"torch._C.{name}",
            "puts a setting that decides what kernels compute back for a replay",
            _SETTINGS,
            stand_in=None,
            instead=_NOT_PUT_BACK,
            said=True,
            since=since,
        )
        for name in (get, put)
    )
    return (getter, setter) if getter is not None and setter is not None else None


_NAMES = (
    "mkldnn_enabled", "mkldnn_deterministic", "nnpack_enabled", "cudnn_enabled", "cudnn_benchmark", "cudnn_deterministic",
    "float32_matmul_precision",  # before what it decides, too
    "cudnn_allow_tf32", "cublas_allow_tf32", "cublas_allow_fp16_reduced_precision_reduction",
    "cublas_allow_bf16_reduced_precision_reduction", "cublas_allow_fp16_accumulation", "cpu_allow_fp16_reduced_precision_reduction",
    "math_sdp_allow_fp16_bf16_reduction", "deterministic_fill_uninitialized_memory",
)  # fmt: skip
# they take a microsecond each, and no kernel of the CPU asks them
_ACCELERATORS = ("blas_preferred_backend", "linalg_preferred_backend", "cudnn_depthwise_kernel", "miopen_immediate")
_KERNELS = ("flash", "mem_efficient", "math", "cudnn", "overrideable", "fa3")


_SINCE = {"_get_cudnn_depthwise_kernel": "2.13"}


def _settings(pairs: list[tuple[str, str]]) -> tuple[Setting, ...]:
    found = [_setting(get, put, _SINCE.get(get, OLDEST)) for get, put in pairs]
    return tuple([setting for setting in found if setting is not None])


settings = _settings([(f"_get_{n}", f"_set_{n}") for n in _NAMES])
settings_of_accelerators = _settings([(f"_get_{n}", f"_set_{n}") for n in _ACCELERATORS])
attention_kernels = _settings([(f"_get_{n}_sdp_enabled", f"_set_sdp_use_{n}") for n in _KERNELS])
attention_order: Any = _setting("_get_sdp_priority_order", "_set_sdp_priority_order")
precisions: Any = _setting("_get_fp32_precision_getter", "_set_fp32_precision_setter")
is_deterministic = find(
    "torch._C._get_deterministic_algorithms",
    "must kernels be deterministic?",
    _SETTINGS,
    stand_in=torch.are_deterministic_algorithms_enabled,
    instead="`torch.are_deterministic_algorithms_enabled`",
)
warns_only = find(
    "torch._C._get_deterministic_algorithms_warn_only",
    "or is it only warned?",
    _SETTINGS,
    stand_in=torch.is_deterministic_algorithms_warn_only_enabled,
    instead="`torch.is_deterministic_algorithms_warn_only_enabled`",
)


def onednn_is_on() -> bool:
    """Do kernels of the CPU use oneDNN?"""
    return bool(torch.backends.mkldnn.enabled)
