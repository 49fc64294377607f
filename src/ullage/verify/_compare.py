"""Two sets of named tensors, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def compare(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[tuple[str, float]]:
    """Names of tensors that differ or are in one set only, with the largest absolute difference; sorted."""
    rows = [(n, float("nan")) for n in a.keys() ^ b.keys()]
    rows += [(n, _gap(a[n], b[n])) for n in a.keys() & b.keys() if not same_bits(a[n], b[n])]
    return sorted(rows, key=lambda row: row[0])


def _gap(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("nan")
    wide = torch.complex128 if a.is_complex() else torch.float64
    return float((a.to(wide) - b.to(wide)).abs().max().item())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality: shape, dtype and every byte (so NaN equals itself and -0.0 differs from 0.0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.numel() == 0:
        return True
    x, y = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(x, y)
