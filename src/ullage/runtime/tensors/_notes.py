"""What a forward notes of the tensors that autograd saves, and a quick way to see that another call saves the same.

Reading shape, strides, dtype and device from Python costs more than half a microsecond per tensor. torch's own guard object
compares all of it in one call; it is made for a note when that was first found equal, and a tensor that the guard does not
know (it is strict about dispatch keys) is compared from Python.
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
    """What forward notes of a saved tensor, and replay compares."""
    if t.layout is torch.jagged:
        return jagged_meta(t)
    try:
        return t.shape, t.stride(), t.dtype, t.device
    except RuntimeError:  # compressed sparse tensors have none
        return t.shape, (str(t.layout),), t.dtype, t.device


def lazy_bits(t: Tensor) -> int:
    """Is it a view that is conjugated (1) or negated (2) as it is read? Such a view has the memory, shape and strides of what it is taken of."""
    return t.is_conj() + 2 * t.is_neg()


def with_lazy_bits(t: Tensor, bits: int) -> Tensor:
    """`t` itself, now a view of that kind."""
    if bits != lazy_bits(t):
        set_conj(t, bool(bits & 1))
        set_neg(t, bool(bits & 2))
    return t


def _unknown(_: Tensor) -> bool:
    return False


def _compared(*_: Tensor) -> bool:
    """No guard could be made."""
    return False


class Notes(list[Meta]):
    """What one call saved, in order; `checks[k]` is a guard per note, in the place `k` where it is compared."""

    __slots__ = ("checks",)

    def __init__(self, metas: Any = ()) -> None:
        super().__init__(metas)
        self.checks: dict[str, list[Check]] = {}

    def checks_in(self, place: str) -> list[Check]:
        """The guards for "forward", "full" or "selective" replay: dispatch keys differ between them."""
        checks = self.checks.get(place)
        if checks is None or len(checks) != len(self):
            checks = self.checks[place] = [_unknown] * len(self)
        return checks

    def equal(self, i: int, x: Tensor, checks: list[Check]) -> bool:
        """Is `x` as noted? If so, its guard is made."""
        if i >= len(self) or meta_of(x) != self[i]:
            return False
        if checks[i] is _unknown:
            checks[i] = guard_of(x) if type(x) in (Tensor, torch.nn.Parameter) else _compared
        return True


def guard_of(*tensors: Tensor) -> Check:
    """One call that tells whether as many tensors have the types, shapes, strides, dtypes and devices of these; never, if there is none."""
    if TensorGuards is None:
        return _compared
    try:
        shapes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        return TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check  # type: ignore[no-any-return]
    except Exception:  # a private class: its arguments may change
        return _compared
