"""Digests of tensors: equal digests mean equal bits, shapes and dtypes."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ullage._array import bytes_of
from ullage.runtime._memory import OWN, has_memory


def digest(t: Tensor) -> bytes | None:
    """A 16-byte BLAKE2b of a tensor's values, in logical order; None where there are no values to read.

    Reads on the host (a tensor on a device is copied there), because `torch.hash_tensor` folds by XOR and does not see
    two elements that changed places.
    """
    if t.layout != torch.strided or type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return None  # fake tensors, too
    if type(t) not in OWN:  # a class that only Python's functions know: what autograd hands out may be of it or not
        with torch._C.DisableTorchFunctionSubclass():
            t = t.as_subclass(Tensor)
    if t.is_quantized or t.device.type == "meta" or not has_memory(t):
        return None
    t = t.detach().resolve_conj().resolve_neg().cpu()
    if t.is_complex():
        t = torch.view_as_real(t)
    known = hashlib.blake2b(f"{t.shape}{t.dtype}".encode(), digest_size=16)
    known.update(bytes_of(t.contiguous()).data if t.numel() else b"")
    return known.digest()


def comparable(t: Tensor) -> bool:
    """Not a kernel's workspace (oneDNN, cuDNN), where some bytes are never set."""
    return not (t.dtype == torch.uint8 and t.dim() == 1)
