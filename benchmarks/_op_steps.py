"""A small step around each op of torch's own op database: what is trained, and the samples it is called on."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import ullage as ul

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what torch's tests import
    from torch.testing._internal.common_methods_invocations import op_db

DTYPES = (torch.float32, torch.float64, torch.complex64)
MOST_SAMPLES = 40  # looked at per op; some have several hundred


class Called(nn.Module):
    """Calls an op on a sample; what requires grad are parameters, other tensors are buffers."""

    def __init__(self, op: Any, sample: Any) -> None:
        super().__init__()
        leaves, self.spec = tree_flatten((sample.input, tuple(sample.args), dict(sample.kwargs)))
        self.calls = op, sample.output_process_fn_grad
        self.leaves = list(leaves)
        for k, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self.leaves[k] = None
                if leaf.requires_grad:
                    self.register_parameter(f"t{k}", nn.Parameter(leaf.detach().clone()))
                else:
                    self.register_buffer(f"t{k}", leaf.detach().clone())

    def forward(self, _: Tensor) -> Any:
        leaves = [getattr(self, f"t{k}", leaf) for k, leaf in enumerate(self.leaves)]
        first, args, kwargs = tree_unflatten(leaves, self.spec)
        op, chosen = self.calls
        return chosen(op(first, *args, **kwargs))


def total(output: Any, _: Any) -> Tensor:
    """The sum of all that can be differentiated: its own backward makes nothing, so that the op's holds the peak."""
    parts = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.requires_grad]
    real = [(torch.view_as_real(p.resolve_conj()) if p.is_complex() else p).sum() for p in parts]
    return torch.stack(real).sum() if len(real) > 1 else real[0]


@dataclass
class OpStep:
    """One op with a sample that it can be differentiated on."""

    name: str
    dtype: torch.dtype
    sample: Any = field(repr=False)
    op: Any = field(repr=False)

    def workload(self) -> ul.Workload:
        """The op's step: forward, the sum of its outputs, backward."""
        torch.manual_seed(0)
        return ul.Workload(Called(self.op, self.sample), torch.zeros(1), loss=total)

    @property
    def shapes(self) -> list[str]:
        """Of its tensors."""
        leaves = tree_flatten((self.sample.input, self.sample.args, self.sample.kwargs))[0]
        return ["x".join(map(str, t.shape)) for t in leaves if isinstance(t, Tensor)]


def names() -> list[str]:
    """Of every op of the database with a derivative that runs on this CPU."""
    return sorted({_name(o) for o in op_db if o.supports_autograd and _dtype(o) is not None})


def steps(wanted: set[str], samples: int = 1) -> Iterator[OpStep]:
    """Steps of each op: on the sample with the most elements, of those whose output has a gradient, then on smaller ones."""
    for info in sorted(op_db, key=_name):
        if _name(info) in wanted and (dtype := _dtype(info)) is not None:
            torch.manual_seed(zlib.crc32(_name(info).encode()))
            for sample in _samples(info, dtype)[:samples]:
                yield OpStep(_name(info), dtype, sample, info.op)


def _name(info: Any) -> str:
    return f"{info.name}.{info.variant_test_name}" if info.variant_test_name else str(info.name)


def _dtype(info: Any) -> torch.dtype | None:
    known = info.supported_dtypes("cpu") & info.supported_backward_dtypes("cpu")
    return next((d for d in DTYPES if d in known), None)


def _samples(info: Any, dtype: torch.dtype) -> list[Any]:
    """The largest first; of samples of one size, the first one."""
    found: dict[int, Any] = {}
    for k, sample in enumerate(info.sample_inputs("cpu", dtype, requires_grad=True)):
        if k == MOST_SAMPLES:
            break
        leaves = [t for t in tree_flatten((sample.input, sample.args, sample.kwargs))[0] if isinstance(t, Tensor)]
        size = sum(t.numel() for t in leaves)
        if size in found or not any(t.requires_grad for t in leaves):
            continue
        try:
            out = sample.output_process_fn_grad(info.op(sample.input, *sample.args, **sample.kwargs))
        except Exception:  # a sample that is there to be refused
            continue
        if any(isinstance(t, Tensor) and t.requires_grad for t in tree_flatten(out)[0]):
            found[size] = sample
    return [found[size] for size in sorted(found, reverse=True)]
