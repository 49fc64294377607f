"""Notes of the tensors that autograd saves in a forward, and a quick check that another call saves the same.

Reading shape, strides, dtype and device from Python costs more than half a microsecond per tensor. torch's own guard object
compares all of it in one call. A note gets its guard when a tensor first equals it; a tensor that the guard rejects (it compares
dispatch keys, too) is compared from Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ullage._torch import TensorGuards, set_conj, set_neg
from ullage.runtime.tensors._jagged import jagged_meta

Meta = tuple[Any, ...]  # (shape, stride, dtype, device)
Check = Callable[..., bool]


def meta_of(t: Tensor) -> Meta:
    """Return a saved tensor's note, which the forward takes and the replay compares."""
    if t.layout is torch.jagged:
        return jagged_meta(t)
    try:
        return t.shape, t.stride(), t.dtype, t.device
    except RuntimeError:  # compressed sparse tensors have none
        return t.shape, (str(t.layout),), t.dtype, t.device


def lazy_bits(t: Tensor) -> int:
    """Return 1 for a lazily conjugated view, plus 2 for a lazily negated one. Such a view has its base's memory, shape and strides."""
    return t.is_conj() + 2 * t.is_neg()


def with_lazy_bits(t: Tensor, bits: int) -> Tensor:
    """Return `t` itself, with these bits set."""
    if bits != lazy_bits(t):
        set_conj(t, bool(bits & 1))
        set_neg(t, bool(bits & 2))
    return t


def _unknown(_: Tensor) -> bool:
    return False


def _compared(*_: Tensor) -> bool:
    """Stands for a guard where none could be made."""
    return False


class Notes(list[Meta]):
    """Notes of the tensors that one call saved, in order; `checks[k]` has a guard per note for place `k`, see `checks_in`."""

    __slots__ = ("checks",)

    def __init__(self, metas: Any = ()) -> None:
        super().__init__(metas)
        self.checks: dict[str, list[Check]] = {}

    def checks_in(self, place: str) -> list[Check]:
        """Return the guards for the forward, or a "full" or "selective" replay: tensors have other dispatch keys in each."""
        checks = self.checks.get(place)
        if checks is None or len(checks) != len(self):
            checks = self.checks[place] = [_unknown] * len(self)
        return checks

    def equal(self, i: int, x: Tensor, checks: list[Check]) -> bool:
        """Does `x` equal its note? If so, make the guard."""
        if i >= len(self) or meta_of(x) != self[i]:
            return False
        if checks[i] is _unknown:
            checks[i] = guard_of(x) if type(x) in (Tensor, torch.nn.Parameter) else _compared
        return True


def guard_of(*tensors: Tensor) -> Check:
    """Return a check: do as many tensors have the types, shapes, strides, dtypes and devices of these? It says no if torch has no guards."""
    if TensorGuards is None:
        return _compared
    try:
        shapes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        return TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check  # type: ignore[no-any-return]
    except Exception:  # a private class: its arguments may change
        return _compared
