"""A call's arguments, held so that a replay can be given the same ones.

Tensors are held detached (a unit may return its own input, and the graph must not hold itself), or, where somebody else's
saved-tensor hooks are in force (an outer checkpoint, `save_on_cpu`), as saved tensors of theirs: they decide what
happens to them. Lists, tuples and dicts are copied, so a replay that appends to one appends to the copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ullage.runtime._local import local
from ullage.runtime._watch import storage_of

_AS_IS = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device))
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_alias = torch.ops.aten.alias.default  # a view of equal strides, also where a dimension has one element
_make_saved_tensor = getattr(torch._C._autograd, "_make_saved_tensor", None)


class _SaveOne(torch.autograd.Function):
    """Saves one tensor and does nothing, for versions of torch without `_make_saved_tensor`."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, flag: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return flag.detach()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        raise AssertionError("nobody goes backward through it")


def _holding(save: Any, *args: Any) -> Any:
    local.holding = True
    try:
        return save(*args)
    finally:
        local.holding = False


class Held:
    """One tensor argument."""

    __slots__ = ("_hooked", "_theirs", "first", "kind", "leaf", "tensor", "version")

    def __init__(self, t: Tensor, hooked: bool, leaf: int = -1) -> None:
        self.first: Held | None = None  # that holds the same tensor, if this is not the first
        self.version = t._version
        # without gradient, part of a graph, or a leaf: what is written in place in one call may not be in another
        self.kind = (2 if t.is_leaf else 1) if t.requires_grad else 0
        self.leaf = leaf  # of the output of the unit before, from which it is made again; -1: it is held
        if leaf < 0 and not hooked:
            self.tensor: Tensor | None = t.detach()
            return
        self.tensor, self._theirs = None, ref(t)
        self._hooked: Any = None
        if leaf >= 0:
            return
        if _make_saved_tensor is not None:
            self._hooked = _holding(_make_saved_tensor, t, False)
        else:
            flag = torch.zeros((), requires_grad=True)
            self._hooked = _holding(_SaveOne.apply, t, flag)  # not its node: that alone lets go of what it saved

    def give(self) -> Tensor:
        """The argument for a replay, in grad mode; a leaf if it was one: autocast keeps casts of leaves for the next op."""
        if self.tensor is not None:
            t: Tensor = self.tensor.detach()
            if not self.kind:
                return t
            return t.requires_grad_() if self.kind == 2 else _alias(t.requires_grad_())
        saved: Any = self._hooked
        return saved.unpack() if _make_saved_tensor is not None else saved.grad_fn.saved_tensors[0]  # type: ignore[no-any-return]

    def written(self) -> bool:
        """Has it been written to? Asked right after the forward, when the caller's tensor is there."""
        theirs = self.tensor if self.tensor is not None else self._theirs()
        return theirs is not None and theirs._version != self.version


class _Box:
    """A list, tuple, dict or named tuple of arguments."""

    __slots__ = ("items", "kind")

    def __init__(self, kind: Any, items: Any) -> None:
        self.kind, self.items = kind, items


def _name(place: str | int) -> str:
    return place if isinstance(place, str) else f"argument {place}"


def _maker(value: Any) -> Any:
    return type(value)._make


class Inputs:
    """All arguments of a call.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        made: ids of tensors that the unit before has just made, and which leaf of its output they are: these are not held.
    """

    __slots__ = ("_known", "_repeated", "args", "held", "hooked", "kwargs", "made")

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any], made: dict[int, int] | None = None) -> None:
        self.hooked = _top_hooks is None or _top_hooks(True) is not None  # somebody else's saved-tensor hooks
        self.made = made if not self.hooked else None
        self.held: list[tuple[str | int, Held]] = []  # with its keyword, or place
        self._known: dict[int, Held] = {}  # by the tensor's id, while the caller holds them all
        self._repeated = False
        hold = self._hold
        self.args = [a if type(a) in _AS_IS else hold(a, i) for i, a in enumerate(args)]
        self.kwargs = {k: a if type(a) in _AS_IS else hold(a, k) for k, a in kwargs.items()} if kwargs else kwargs
        self._known = {}

    def _hold(self, value: Any, name: str | int) -> Any:
        if isinstance(value, Tensor):
            first = held = self._known.get(id(value))
            # under hooks each is saved: how many are must not hang on which are one, as in an outer replay fewer may be
            if held is None or self.hooked:
                held = Held(value, self.hooked, self.made.get(id(value), -1) if self.made else -1)
                held.first = first
            if first is None:
                self._known[id(value)] = held
            else:  # a forward may ask whether its arguments are one tensor, as attention does
                self._repeated = True
            self.held.append((name, held))
            return held
        if isinstance(name, int):
            name = f"argument {name}"
        if type(value) in (list, tuple):
            return _Box(type(value), [self._hold(v, f"{name}[{i}]") for i, v in enumerate(value)])
        if type(value) is dict:
            return _Box(dict, {k: self._hold(v, f"{name}[{k!r}]") for k, v in value.items()})
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return _Box(_maker(value), [self._hold(v, f"{name}[{i}]") for i, v in enumerate(value)])
        return value

    def _give(self, value: Any, given: dict[int, Tensor]) -> Any:
        if isinstance(value, Held):
            if id(value) not in given:
                given[id(value)] = value.give()  # each once, also of those that are one: the outer hooks count
            return given[id(value.first or value)]
        if not isinstance(value, _Box):
            return value
        if value.kind is dict:
            return {k: self._give(v, given) for k, v in value.items.items()}
        return value.kind([self._give(v, given) for v in value.items])

    def give(self) -> tuple[list[Any], dict[str, Any]]:
        """Arguments for one replay; what was one tensor is one."""
        given: dict[int, Tensor] = {}
        if self._repeated:
            args = [self._give(a, given) for a in self.args]
        else:
            args = [a.give() if type(a) is Held else self._give(a, given) for a in self.args]
        return args, {k: self._give(a, given) for k, a in self.kwargs.items()} if self.kwargs else {}

    def kinds(self) -> list[int]:
        """Of each tensor, what autograd lets the unit do to it."""
        return [held.kind for _, held in self.held]

    def linked(self) -> bool:
        """Is there one that is not held?"""
        return any(held.leaf >= 0 for _, held in self.held)

    def receive(self, leaves: Sequence[Any]) -> None:
        """Take what is not held from the output of the unit before."""
        for _, held in self.held:
            if held.leaf >= 0:
                held.tensor = leaves[held.leaf].detach()
                held.version = held.tensor._version

    def let_go(self) -> None:
        """Of what was received."""
        for _, held in self.held:
            if held.leaf >= 0:
                held.tensor = None

    def written(self) -> str:
        """The name of an argument that the forward has just written to, or ""."""
        for name, held in self.held:
            if held.written():
                return _name(name)
        return ""

    def changed(self) -> dict[int, str]:
        """Arguments that were written to since the call: names by storage."""
        found: dict[int, str] = {}
        for name, held in self.held:
            t = held.tensor
            if t is not None and t._version != held.version:  # hooked ones are checked by autograd or by their hooks
                found[storage_of(t)] = _name(name)
        return found
