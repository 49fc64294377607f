"""A tensor as it was found: its bytes and where they were, its flag, its gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ullage._torch import TensorWeakRef, fix_weakref, overlaps_itself


class Homes:
    """The memory of tensors, held weakly: a step that gives a tensor other memory (`.data =`) frees the old one, as it would unmeasured."""

    def __init__(self) -> None:
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._again: dict[int, torch.UntypedStorage] = {}

    def note(self, tensor: Tensor) -> int:
        """Return a key of a tensor's memory."""
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        self._alive.setdefault(key, weakref.ref(storage))
        return key

    def storage(self, key: int, nbytes: int, device: torch.device) -> torch.UntypedStorage:
        """Return that memory, or new memory of the same size if it was freed; tensors that shared the old one share the new one."""
        storage: torch.UntypedStorage | None = self._alive[key]() or self._again.get(key)
        if storage is None:
            storage = self._again[key] = torch.UntypedStorage(nbytes, device=device)
        else:
            fix_weakref(storage)
        return storage


def is_fixed(t: Tensor) -> bool:
    """Does a tensor have no elements of its own that a step could write to (an expanded one can't be written to)?"""
    return t.layout is not torch.strided or t.is_meta or overlaps_itself(t)


class TensorState:
    """A tensor's memory, geometry and flags at one moment.

    A plain tensor is held weakly: a step that replaces it frees it, as it would unmeasured. Then `tensor` makes a new one with
    the same values.

    Args:
        t: the tensor.
        homes: the memory that all of them were in.
        copy: copy its values; else a write is only noticed (`written`).
    """

    __slots__ = (
        "_again",
        "_fields",
        "_hooks",
        "_ref",
        "device",
        "grad",
        "home",
        "homes",
        "is_leaf",
        "requires_grad",
        "values",
        "version",
    )

    def __init__(self, t: Tensor, homes: Homes, copy: bool = True) -> None:
        self.homes, self.device, self.version = homes, t.device, t._version
        self._again: Tensor | None = None
        self.is_leaf, self.requires_grad = t.is_leaf, t.requires_grad
        self.grad: Tensor | None = t.grad if t.is_leaf else None
        self._hooks = [list(h.items()) if h else [] for h in _hooks_of(t)]
        self._fields = vars(t)
        self.values: Tensor | None = None
        self.home: tuple[Any, ...] = ()
        if copy and not is_fixed(t):
            self.values = t.detach().to("cpu", copy=True)
            self.home = homes.note(t), t.untyped_storage().nbytes(), int(t.storage_offset()), t.stride()
        # a weak reference to a parameter would keep a step from swapping it (`torch.utils.swap_tensors`)
        can_be_made = type(t) is Tensor and t.is_leaf and not any(self._hooks)
        self._ref: Callable[[], Tensor | None] = (
            TensorWeakRef(t) if can_be_made and self.values is not None else lambda: t
        )

    def is_(self, value: Any) -> bool:
        """Whether that is the tensor, or the one made in its place."""
        return value is not None and (value is self._ref() or value is self._again)

    def tensor(self) -> Tensor:
        """The tensor itself; a new one if nothing holds it any more."""
        t = self._ref()
        if t is None:
            if self._again is None:
                self._again = self._data()
                vars(self._again).update(self._fields)
            t = self._again
        return t

    def _data(self) -> Tensor:
        """A tensor in the memory that it was in, with whatever is there now."""
        assert self.values is not None
        key, nbytes, offset, stride = self.home
        data = torch.empty(0, dtype=self.values.dtype, device=self.device)
        return data.set_(self.homes.storage(key, nbytes, self.device), offset, self.values.shape, stride)

    def written(self) -> bool:
        """Was it written to, although it was not copied?"""
        t = self._ref()
        return self.values is None and t is not None and t._version != self.version

    def restore(self) -> None:
        """Put it back, in place, so that whoever holds the tensor sees it; nothing if nobody does."""
        t = self._ref() if self._again is None else self._again
        if t is None:
            return
        if self.values is not None:
            data = self._data()
            if t.data_ptr() != data.data_ptr() or t.shape != data.shape or t.stride() != data.stride():
                t.data = data
            data.copy_(self.values)
        if t.is_leaf:
            if t.requires_grad != self.requires_grad:
                t.requires_grad_(self.requires_grad)
            t.grad = self.grad
        for hooks, was in zip(_hooks_of(t), self._hooks, strict=True):
            if hooks is not None and list(hooks.items()) != was:
                hooks.clear()
                hooks.update(was)


def _hooks_of(t: Tensor) -> tuple[dict[int, Any] | None, ...]:
    return t._backward_hooks, getattr(t, "_post_accumulate_grad_hooks", None)
