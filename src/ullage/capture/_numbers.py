"""Tensors that autograd makes of Python numbers and saves: bytes that no dispatch mode and no saved-tensor hook sees.

`x * 0.5` makes a tensor of 0.5 in C++, and the node of the product saves it for the gradient of x. That tensor is real
where x is fake, so its storage is followed like any other, until the node has run (without `retain_graph`) or is gone. The
graph of a replay goes with the last of its tensors that backward still waits for, and so do its numbers.
Saved-tensor hooks leave such tensors out (`saved_variable.cpp`), so checkpointing keeps them too.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ullage._torch import keeps_graph

_TENSOR = ("Tensor", "Optional[Tensor]")
# Backward of a product with a number takes the tensor that its node has saved; others make one of each number anew.
_HAVE_THEIR_NUMBER = ("MulBackward", "DivBackward")
_WRITES = (torch.ops.aten.mul_, torch.ops.aten.div_)  # which make such nodes, inside another where a view is written to
_SIZES = {bool: 1, int: 8, float: 8, complex: 16}


class _Hidden:
    """Stands for a number's tensor that Python can't reach."""


class SavedNumbers:
    """Finds what the op before has saved of the numbers it was given."""

    def __init__(self) -> None:
        self._names: dict[Any, tuple[tuple[int, str], ...]] = {}  # per op, its arguments that are tensors
        self._last: tuple[weakref.ref[Tensor], list[tuple[str, int]], bool] | None = None
        self._with_number: set[int] = set()  # numbers of the nodes that such a node is inside

    def note(self, func: Any, args: Any, out: Any, node: Any) -> int:
        """An op has run; bytes of the numbers that were made tensors for it. The output gets its own node only afterwards.

        Args:
            func, args, out: the op.
            node: whose backward it is part of, or None.
        """
        names = self._names.get(func)
        if names is None:
            found = [(i, a.name) for i, a in enumerate(func._schema.arguments) if str(a.type) in _TENSOR]
            names = self._names[func] = tuple(found) if len(found) > 1 else ()
        given = [(name, args[i]) for i, name in names if i < len(args) and type(args[i]) in _SIZES]
        self._last = None
        if not given:
            return 0
        if torch.is_grad_enabled() and isinstance(out, Tensor):
            sizes = [(name, _SIZES[type(number)]) for name, number in given]
            self._last = weakref.ref(out), sizes, func._overloadpacket in _WRITES
        if node is not None and self._has_its_number(node):
            return 0
        return sum(_SIZES[type(number)] for _, number in given)

    def look(self) -> list[tuple[Any, int, int]]:
        """Return what the last noted op has saved: per number the object that holds it alive, a key and its bytes."""
        if self._last is None:
            return []
        out, given, writes = self._last[0](), *self._last[1:]
        self._last = None
        if out is None or not out.requires_grad:
            return []
        if out._base is not None:
            outer = out._base.grad_fn
            if outer is not None and writes:
                self._with_number.add(outer._sequence_nr())
            return [_hidden_in(outer, nbytes) for _, nbytes in given if outer is not None]
        tensors = [getattr(out.grad_fn, f"_saved_{name}", None) for name, _ in given]
        storages = [t.untyped_storage() for t in tensors if isinstance(t, Tensor)]
        return [(s, s._cdata, s.nbytes()) for s in storages]

    def _has_its_number(self, node: Any) -> bool:
        return node.name().startswith(_HAVE_THEIR_NUMBER) or node._sequence_nr() in self._with_number


def _hidden_in(node: Any, nbytes: int) -> tuple[Any, int, int]:
    """Stand in for the number of an op that wrote to a view: its node lies inside that of the view's base, and goes when that has run or is gone."""
    held = [_Hidden()]
    # after a backward with `retain_graph` nodes hold what they have saved
    node.register_hook(lambda *_: None if keeps_graph() else held.clear())
    return held[0], id(held[0]), nbytes
