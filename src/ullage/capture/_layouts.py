"""Refuse, before a step runs, tensors of a workload that a plan can't follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ullage._errors import CaptureError, WorkloadError
from ullage._torch import FakeTensor, is_lazy
from ullage.workload import tensors_of

NO_NESTED = (
    "nested (jagged) tensors can't be planned, as torch's fake tensors have no sizes for them; pad to a fixed length "
    "with a mask for the planned step"
)
_KINDS = {torch.jagged: "a nested (jagged) tensor", torch.sparse_coo: "a sparse tensor"}


def check_tensors(inst: Any) -> None:
    """Refuse tensors that have no storage to follow.

    Args:
        inst: the workload on fake tensors.

    Raises:
        WorkloadError: a lazy module has not made its parameters yet.
        CaptureError: a tensor is not strided, or of a class with ops of its own.
    """
    for name, t in _named(inst):
        if is_lazy(t):
            raise WorkloadError(
                f"model: {name} has no shape yet, as a lazy module makes it at its first call; call the model once with a batch before planning"
            )
        if (
            type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__
            and not isinstance(t, FakeTensor)
            and not t.is_nested
        ):
            raise CaptureError(
                f"{name} is a {type(t).__name__}, a subclass of Tensor with ops of its own, which can't be made a fake tensor; plan with plain tensors, or "
                "use ullage.checkpoint, which knows such tensors, without a plan"
            )
        if t.layout != torch.strided:
            kind = _KINDS.get(t.layout, f"a {str(t.layout).removeprefix('torch.')} tensor")
            raise CaptureError(
                f"{name} is {kind}, which has no one storage whose bytes a plan could follow; use a dense tensor for the planned step, or "
                "ullage.checkpoint, which knows such tensors, without a plan"
            )


def _named(inst: Any) -> Iterator[tuple[str, Tensor]]:
    yield from inst.model.named_parameters()
    for name, b in inst.model.named_buffers():
        yield f"buffer {name}", b
    for i, t in enumerate(tensors_of(inst.batch)):
        yield f"tensor {i} of the batch", t
