"""Digests of tensors: equal digests mean equal bits, shapes and dtypes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ullage._array import elements_of
from ullage._torch import DisableTorchFunctionSubclass
from ullage.runtime.tensors._memory import OWN, has_memory

# Bytes copied at once of elements that do not lie side by side. A plan knows of no copies that digests make, so they must stay small
# beside a saved tensor; 1 MiB is large enough that the hash, not the call, takes the time.
_PIECE = 1 << 20


def digest(t: Tensor) -> bytes | None:
    """Return a 16-byte BLAKE2b of a tensor's values and of the order of its dimensions in memory; None if it has no values to read.

    It reads on the host (a tensor on a device is copied there), because `torch.hash_tensor` folds by XOR and does not see
    two elements that changed places. On the CPU it reads the tensor's own memory: a plan knows of no copies here.
    """
    if t.layout != torch.strided:
        return _of_parts(t)
    if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return None  # fake tensors, too
    # a class with `__torch_function__` only: autograd may hand out the tensor with or without it
    if type(t) not in OWN:
        with DisableTorchFunctionSubclass():
            t = t.as_subclass(Tensor)
    if t.is_quantized or t.device.type == "meta" or not has_memory(t):
        return None
    t = t.detach().resolve_conj().resolve_neg().cpu()
    strides, values = t.stride(), elements_of(t)
    order = sorted(range(t.dim()), key=lambda d: -strides[d])
    if values.transpose(order).flags.c_contiguous:  # read it as it lies in memory, as a clone of it would lie
        values = values.transpose(order)
    else:
        order = list(range(t.dim()))
    known = hashlib.blake2b(f"{t.shape}{t.dtype}{order}".encode(), digest_size=16)
    if t.numel():
        _add(known, values)
    return known.digest()


def _of_parts(t: Any) -> bytes | None:
    """Of a jagged or a sparse tensor: of the tensors it is made of, in their order."""
    with torch.no_grad():
        parts = _PARTS[t.layout](t) if t.layout in _PARTS else ()
        found = [d for part in parts if part is not None and (d := digest(part)) is not None]
    if not parts or len(found) < sum(part is not None for part in parts):
        return None
    return hashlib.blake2b(f"{t.layout}{t.dtype}".encode() + b"".join(found), digest_size=16).digest()


_PARTS: dict[torch.layout, Callable[[Any], tuple[Tensor | None, ...]]] = {
    torch.jagged: lambda t: (t._values, t._offsets, t._lengths),
    torch.sparse_coo: lambda t: (t._indices(), t._values()),
    torch.sparse_csr: lambda t: (t.crow_indices(), t.col_indices(), t.values()),
    torch.sparse_bsr: lambda t: (t.crow_indices(), t.col_indices(), t.values()),
    torch.sparse_csc: lambda t: (t.ccol_indices(), t.row_indices(), t.values()),
    torch.sparse_bsc: lambda t: (t.ccol_indices(), t.row_indices(), t.values()),
}


def _add(known: Any, values: npt.NDArray[Any]) -> None:
    """Add elements in order, through copies of a piece at a time where they do not lie side by side."""
    if values.flags.c_contiguous:
        known.update(values.reshape(-1).view(np.uint8))
        return
    if values.nbytes <= _PIECE:
        known.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
        return
    rows = max(_PIECE // (values.nbytes // len(values)), 1)
    for k in range(0, len(values), rows):
        _add(known, values[k : k + rows] if rows > 1 else values[k])


def comparable(t: Tensor) -> bool:
    """Can two runs be compared? Not in a kernel's workspace (oneDNN, cuDNN: flat uint8), where some bytes are never set."""
    return not (t.dtype == torch.uint8 and t.dim() == 1)
