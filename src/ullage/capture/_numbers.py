"""Follow the tensors that autograd makes of Python numbers and saves: no dispatch mode and no saved-tensor hook sees these bytes.

`x * 0.5` makes a tensor of 0.5 in C++, and the node of the product saves it for the gradient of x. That tensor is real even if
x is fake, so its storage is followed like any other until the node has run (without `retain_graph`) or is freed. The graph of
a replay is freed with the last of its tensors that backward waits for, and its numbers with it.
Saved-tensor hooks skip such tensors (`saved_variable.cpp`), so checkpointing keeps them, too.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ullage._torch import keeps_graph

_TENSOR = ("Tensor", "Optional[Tensor]")
# The backward of these nodes uses the tensor that the node has saved; other formulas make a new one of each number.
_HAVE_THEIR_NUMBER = ("MulBackward", "DivBackward")
_WRITES = (
    torch.ops.aten.mul_,
    torch.ops.aten.div_,
)  # ops that make such nodes; on a view, inside the node of the view's base
_SIZES = {bool: 1, int: 8, float: 8, complex: 16}


class _Hidden:
    """Stands for a number's tensor that Python can't reach."""


class SavedNumbers:
    """Finds the tensors that the op before has saved of its number arguments."""

    def __init__(self) -> None:
        self._names: dict[Any, tuple[tuple[int, str], ...]] = {}  # per op, its arguments that are tensors
        self._last: tuple[weakref.ref[Tensor], list[tuple[str, int]], bool] | None = None
        self._with_number: set[int] = set()  # sequence numbers of nodes that contain one of `_HAVE_THEIR_NUMBER`

    def note(self, func: Any, args: Any, out: Any, node: Any) -> int:
        """Note that an op has run, and return the bytes of tensors made of its numbers.

        Its output gets a node only afterwards, so `look` finds the saved ones later.

        Args:
            func, args, out: the op.
            node: the node whose backward it is part of, or None.
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
        """Return the numbers that the last noted op has saved: for each the object that keeps it alive, a key and its bytes."""
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
    """Stand in for the number of an op that wrote to a view: its node is inside that of the view's base, and freed with it."""
    held = [_Hidden()]
    # after a backward with `retain_graph` nodes hold what they have saved
    node.register_hook(lambda *_: None if keeps_graph() else held.clear())
    return held[0], id(held[0]), nbytes
