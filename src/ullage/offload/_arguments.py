"""Sizes and sources as callers give them, checked."""

from __future__ import annotations

import torch
from torch import Tensor, UntypedStorage

from ullage._bytes import parse_budget
from ullage._errors import ArgumentError
from ullage.offload._extents import BLOCK


def size_of(name: str, value: int | str) -> int:
    """Bytes, 0 included."""
    if value == 0 and not isinstance(value, bool):
        return 0
    found = parse_budget(value, name).bytes
    if found is None:
        raise ArgumentError(f"{name}={value!r}: give bytes, or a size with its unit such as '6GiB'")
    return found


def whole_size(name: str, value: int | str) -> int:
    """Return bytes, rounded down to whole blocks; at least one block is required."""
    found = size_of(name, value) // BLOCK * BLOCK
    if not found:
        raise ArgumentError(f"{name}={value!r}: must be at least {BLOCK} bytes")
    return found


def flat_source(source: Tensor | UntypedStorage, device: torch.device) -> Tensor:
    """A source as a flat uint8 tensor with its version counter; it has to be on `device`."""
    if isinstance(source, UntypedStorage):
        if source.device != device:
            raise ArgumentError(f"source: a storage on {source.device}; copy it to {_name(device)} first")
        return torch.empty(0, dtype=torch.uint8, device=device).set_(source)
    if not isinstance(source, Tensor):
        raise ArgumentError(f"source: a {type(source).__name__}; give a tensor or its untyped_storage()")
    if source.dtype is not torch.uint8 or source.dim() != 1 or not source.is_contiguous():
        what = f"{source.dtype} of shape {tuple(source.shape)} and strides {source.stride()}"
        raise ArgumentError(f"source: {what}, not flat contiguous uint8; give its untyped_storage()")
    if source.device != device:
        raise ArgumentError(f"source: a tensor on {source.device}; copy it to {_name(device)} first")
    return source.detach()


def _name(device: torch.device) -> str:
    return "the CPU" if device.type == "cpu" else str(device)
