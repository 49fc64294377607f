"""Compute sparse products under autocast in the dtype of the plain step, also inside a dispatch mode of ullage's.

`torch.sparse.mm` calls `_sparse_addmm`, whose kernel calls `addmm`, and there autocast casts. A dispatch mode intercepts
`_sparse_addmm`, and autocast is off while a mode handles an op, so the product would stay in float32. Only a function mode can
still tell whether autocast was on.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ullage._torch import DispatchKey, exclude, is_excluded
from ullage.runtime.ambient._local import local

_SPARSE_ADDMM = torch.ops.aten._sparse_addmm.default


@functools.cache
def _keys() -> tuple[Any, ...]:
    found = (getattr(DispatchKey, n, None) for n in ("AutocastCPU", "AutocastCUDA", "AutocastXPU"))
    return tuple(key for key in found if key is not None)


def call(func: Any, args: Any, kwargs: Any) -> Any:
    """Call one of torch's functions, in a function mode's handler."""
    if func is not torch.sparse.mm:
        return func(*args, **(kwargs or {}))
    before, local.autocast = local.autocast, tuple([key for key in _keys() if not is_excluded(key)])
    try:
        return func(*args, **(kwargs or {}))
    finally:
        local.autocast = before


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an op, in a dispatch mode's handler."""
    if func is not _SPARSE_ADDMM or not local.autocast:
        return func(*args, **(kwargs or {}))
    for key in local.autocast:
        exclude(key, False)
    try:
        return func(*args, **(kwargs or {}))
    finally:
        for key in local.autocast:
            exclude(key, True)


class SparseProducts(TorchFunctionMode):
    """Notes whether autocast is on at a sparse product, for the dispatch modes that `run` ops."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function."""
        return call(func, args, kwargs)
