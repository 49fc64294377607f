"""Jagged tensors: torch gives out a new symbolic size for each tensor of offsets.

So a forward that makes its own offsets makes another size at each run, and autograd refuses to mix the two. A jagged tensor that a
replay rebuilds gets the offsets of its forward, if the values are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Rows = tuple[Tensor, Tensor | None]  # offsets, and lengths where there are gaps between rows


def is_jagged(t: Tensor) -> bool:
    """Is it one of torch's jagged nested tensors?"""
    return t.layout is torch.jagged


def jagged_meta(t: Any) -> tuple[Any, ...]:
    """Return shape, stride, dtype and device, without the ragged size, which differs from call to call."""
    values = t._values
    ragged = f"ragged, {values.shape[t._ragged_idx - 1]} in all"
    shape = tuple([n if isinstance(n, int) else ragged for n in t.shape])
    return shape, values.stride(), t.dtype, t.device


def rows_of(t: Any) -> Rows:
    """Return its offsets and lengths: where its rows begin and end."""
    return t._offsets, t._lengths


def with_rows(t: Any, rows: Rows) -> Tensor | None:
    """Return the same values with these tensors as rows; None if its own rows have other values."""
    own = rows_of(t)
    if own[0] is rows[0] and own[1] is rows[1]:
        return t  # type: ignore[no-any-return]
    if not all(_equal(a, b) for a, b in zip(own, rows, strict=True)):
        return None
    with torch.no_grad():
        return torch.nested.nested_tensor_from_jagged(
            t._values.detach(),
            *rows,
            jagged_dim=t._ragged_idx,
            min_seqlen=t._maybe_min_seqlen,
            max_seqlen=t._maybe_max_seqlen,
        )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or torch.equal(a, b)
