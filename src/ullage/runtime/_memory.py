"""Whose memory a forward replaces: `p.data = ...` and `set_` are no ops, so neither a version nor a dispatch mode shows them.

A replay would replace it again; one that skips ops would leave the tensor without memory, and the next kernel would end the process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_OWN = (Tensor, torch.nn.Parameter)

Memory = list[tuple[Tensor, Any]]


def memory_of(tensors: Iterable[Tensor]) -> Memory:
    """These tensors and their storages, which are held, so that no other one gets the address of one of them."""
    return [(t, s) for t in tensors if (s := _storage(t)) is not None]


def replaced(memory: Memory) -> list[Tensor]:
    """Those that have another storage now."""
    return [t for t, was in memory if (now := _storage(t)) is None or now._cdata != was._cdata]


def _storage(t: Tensor) -> Any:
    try:
        return t.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse, or a subclass that has none
        return None


def make_good(tensors: Iterable[Tensor]) -> Tensor | None:
    """The first of these that a replay has left without memory; each gets some, full of NaN, so that no kernel reads nothing."""
    lost = [t for t in tensors if type(t) in _OWN and t.layout == torch.strided and not t.is_meta and _is_lost(t)]
    for t in lost:
        missing = torch.empty(t.shape, dtype=t.dtype, device=t.device)
        t.data = missing.fill_(float("nan")) if t.dtype.is_floating_point or t.dtype.is_complex else missing.zero_()
    return lost[0] if lost else None


def _is_lost(t: Tensor) -> bool:
    """Of so many bytes, and nowhere: a placeholder's. FSDP frees storages too, but resizes them to nothing."""
    return t.data_ptr() == 0 and t.numel() > 0 and t.untyped_storage().nbytes() > 0
