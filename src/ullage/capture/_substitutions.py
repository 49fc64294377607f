"""Replace ops of the CPU by those that a CUDA device would run, for an estimate.

A build for CPUs can't run fake CUDA tensors that require grad. So a named CUDA device is estimated from the ops that the model
runs on a CPU, with these substitutions, each of which changes saved or allocated bytes:

- dropout saves a mask of one byte per element (`native_dropout`), not a float mask;
- attention with dropout stays fused (flash or memory-efficient kernels), where the CPU falls back to plain matmuls;
- under autocast CUDA runs more ops in float32 than a CPU does (torch.amp's op reference);
- optimizers take their foreach implementation by default, which holds temporary lists as large as all parameters.

Not substituted: statistics of low-precision norms (float32 on CUDA: a few bytes per row), cuDNN's reserve spaces, and the ops inside
`F.multi_head_attention_forward`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torch.optim.optimizer as optim
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ullage._torch import foreach_devices, tree_map

# https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32"
_FLOAT32_NAMES = [
    "acos",
    "asin",
    "cosh",
    "cumprod",
    "cumsum",
    "dist",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log1p",
    "log2",
    "norm",
    "pow",
    "prod",
    "reciprocal",
    "rsqrt",
    "sinh",
    "softmax",
    "log_softmax",
    "sum",
    "renorm",
    "tan",
    "binary_cross_entropy_with_logits",
    "cosine_embedding_loss",
    "cdist",
    "cosine_similarity",
    "cross_entropy",
    "group_norm",
    "hinge_embedding_loss",
    "kl_div",
    "l1_loss",
    "layer_norm",
    "margin_ranking_loss",
    "mse_loss",
    "multilabel_margin_loss",
    "multi_margin_loss",
    "nll_loss",
    "normalize",
    "pdist",
    "poisson_nll_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
    "softmin",
    "softplus",
    "triplet_margin_loss",
]
_OWNERS: tuple[Any, ...] = (torch, F, Tensor)
_FLOAT32 = {getattr(owner, n) for owner in _OWNERS for n in _FLOAT32_NAMES if hasattr(owner, n)}
_FLOAT32 |= {getattr(Tensor, n) for n in ("__pow__", "__rpow__", "__rdiv__", "__rtruediv__") if hasattr(Tensor, n)}
_LOW = (torch.float16, torch.bfloat16)
_DROPOUTS = {F.dropout, torch.dropout}


class _AsOnCuda(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_to_float32, (args, kwargs))
        elif func in _DROPOUTS:
            return _dropout(func, *args, **kwargs)
        elif func is F.scaled_dot_product_attention:
            kwargs = {k: v for k, v in kwargs.items() if k != "dropout_p"}
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        return func(*args, **kwargs)


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _LOW else value


def _dropout(func: Any, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, **other: Any) -> Any:
    train = other.pop("train", training)
    if inplace or not train or not 0 < p < 1:
        return func(x, p, train, **({"inplace": inplace} if inplace else {}))
    return torch.native_dropout(x, p, train)[0]


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Run a step on CPU tensors as a CUDA device would, as far as bytes go. Inside itself it changes nothing."""
    name, supported = "_get_foreach_kernels_supported_devices", foreach_devices
    supported()  # is it there?
    found = getattr(optim, name)  # inside itself: the outer one's, which the optimizer's step will ask
    owner = threading.get_ident()  # the patch is seen by every thread
    setattr(optim, name, lambda: [*supported(), *(["cpu"] if threading.get_ident() == owner else [])])
    try:
        with _AsOnCuda():
            yield
    finally:
        setattr(optim, name, found)
