"""Hold a call's arguments, so that its replay gets the same ones.

Tensors are held detached: a unit may return its own input, and then the graph would hold itself. Where other saved-tensor hooks
are in force (an outer checkpoint, `save_on_cpu`), an argument is saved through those hooks, and they decide where it stays.
A tensor without a graph is given to the replay as the caller's own object. Containers of any class are copied, so a replay that
appends to one appends to the copy.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ullage._torch import make_saved_tensor, top_hooks
from ullage.runtime.ambient._local import local
from ullage.runtime.state._content import Slots, base_of, content_of, put_content
from ullage.runtime.state._walk import CONTAINERS, slots_of
from ullage.runtime.tensors._memory import IN_GRAPH, LEAF, OWN, fits_in, hides_graph, kind_of, same_memory, storage_of

_AS_IS = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device))


def _alias(t: Tensor) -> Tensor:
    try:
        view: Tensor = torch.ops.aten.alias.default(t)  # of equal strides, also where a dimension has one element
    except NotImplementedError:  # a jagged tensor has none
        return t.view_as(t)
    return view


class _SaveOne(torch.autograd.Function):
    """Saves one tensor and computes nothing, for versions of torch without `make_saved_tensor`."""

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

    __slots__ = ("_hooked", "_same", "_theirs", "first", "kind", "leaf", "tensor", "version")

    def __init__(self, t: Tensor, hooked: bool, leaf: int = -1) -> None:
        self.first: Held | None = None  # the first `Held` of the same tensor, if that was passed before
        self.version = t._version
        self.kind = kind_of(t)
        self.leaf = leaf  # its place in the output of the previous unit, which a sweep makes; -1: it is held here
        self._same: Tensor | None = None
        if leaf < 0 and not hooked:
            self.tensor: Tensor | None = t.detach()
            if self.kind != IN_GRAPH:
                # A plain float tensor only weakly: the caller may write to it later, and then it holds the graph that holds
                # this frame. Once it is gone nobody can tell it from the alias that the replay gets instead.
                if type(t) is not Tensor or not t.dtype.is_floating_point or t.__dict__:
                    self._same = t
                self._theirs: Any = ref(t)
            return
        self.tensor, self._theirs = None, ref(t)
        self._hooked: Any = None
        if leaf >= 0:
            return
        if hides_graph(t):
            t = t.detach()
        if make_saved_tensor is not None:
            self._hooked = _holding(make_saved_tensor, t, False)
        else:
            flag = torch.zeros((), requires_grad=True)
            # the output holds the node: dropping the output frees what the node saved
            self._hooked = _holding(_SaveOne.apply, t, flag)

    def give(self, moved: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the argument for a replay, in grad mode: the caller's own tensor, where that has no graph.

        Otherwise a detached alias. A leaf stays a leaf, because autocast caches casts of leaves for the next op.

        Args:
            moved: gets each tensor whose old memory is put back for the replay, with the memory it has now. `.data =` changes a
                tensor's memory and no version counter.
        """
        if self.tensor is not None:
            if self.kind != IN_GRAPH and self.leaf < 0:
                theirs = self._same if self._same is not None else self._theirs()
                if theirs is not None and self._is_leaf_as_was(theirs):
                    if type(theirs) not in OWN or same_memory(theirs, self.tensor):
                        return theirs
                    if fits_in(theirs, self.tensor):
                        moved.append((theirs, theirs.data))
                        theirs.data = self.tensor
                        return theirs
            t: Tensor = self.tensor.detach()
            if not self.kind:
                return t
            return t.requires_grad_() if self.kind == LEAF else _alias(t.requires_grad_())
        saved: Any = self._hooked
        saved = saved.unpack() if make_saved_tensor is not None else saved.grad_fn.saved_tensors[0]
        theirs = self._theirs() if self.kind != IN_GRAPH else None
        if theirs is not None and theirs._version == self.version and self._is_leaf_as_was(theirs):
            return theirs  # type: ignore[no-any-return]
        return saved  # type: ignore[no-any-return]

    def _is_leaf_as_was(self, theirs: Tensor) -> bool:
        return theirs.grad_fn is None and theirs.requires_grad == (self.kind == LEAF)

    def written(self) -> bool:
        """Has the argument been written to? Call it right after the forward, while the caller still holds the tensor."""
        theirs = self.tensor if self.tensor is not None else self._theirs()
        return theirs is not None and theirs._version != self.version


class _Box:
    """A container among the arguments, of any class: its items and attributes, held as arguments are.

    Args:
        of: the container.
    """

    __slots__ = ("cls", "extra", "fields", "items")

    def __init__(self, of: Any) -> None:
        self.cls = type(of)
        self.items: Any = ()
        self.fields: dict[str, Any] | None = None
        self.extra: Any = of.maxlen if isinstance(of, deque) else getattr(of, "default_factory", None)

    def empty(self) -> Any:
        """Return a new container of that class, without running its `__init__`."""
        base = base_of(self.cls)
        new: Any = base.__new__(self.cls)
        if base is deque:
            deque.__init__(new, (), self.extra)
        elif self.extra is not None and isinstance(new, defaultdict):
            new.default_factory = self.extra
        return new

    def fixed(self, items: list[Any]) -> Any:
        """Return a new tuple or frozenset of that class."""
        base = base_of(self.cls)
        try:
            return base.__new__(self.cls, items)
        except TypeError:  # torch's return types (`torch.return_types.max`) have a constructor of their own
            return self.cls(items)


def _name(place: str | int) -> str:
    return place if isinstance(place, str) else f"argument {place}"


class Inputs:
    """All arguments of a call.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        made: ids of tensors that the previous unit has just made, and which leaf of its output each is: these are not held.
    """

    __slots__ = ("_known", "_repeated", "args", "elsewhere", "held", "hooked", "kwargs", "made", "moved")

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any], made: dict[int, int] | None = None) -> None:
        self.hooked = top_hooks(True) is not None  # other saved-tensor hooks are in force around this call
        self.made = made if not self.hooked else None
        self.held: list[tuple[str | int, Held]] = []  # each with its keyword or position
        self._known: dict[int, Any] = {}  # by id; ids are unique while the caller holds all arguments
        self._repeated = False
        self.moved: list[tuple[Tensor, Tensor]] = []  # while a replay runs
        # storages of arguments that had been given other memory before the last replay
        self.elsewhere: Sequence[int] = ()
        hold = self._hold
        self.args = [a if type(a) in _AS_IS else hold(a, i) for i, a in enumerate(args)]
        self.kwargs = {k: a if type(a) in _AS_IS else hold(a, k) for k, a in kwargs.items()} if kwargs else kwargs
        self._known = {}

    def _hold(self, value: Any, name: str | int) -> Any:
        if isinstance(value, Tensor):
            first = held = self._known.get(id(value))
            # Under other hooks a repeated tensor is saved each time: in an outer replay two arguments that were one tensor may
            # be two, and the number of saved tensors must not depend on that.
            if held is None or self.hooked:
                held = Held(value, self.hooked, self.made.get(id(value), -1) if self.made else -1)
                held.first = first
            if first is None:
                self._known[id(value)] = held
            else:  # a forward may ask whether two arguments are one tensor, as `nn.MultiheadAttention` does
                self._repeated = True
            self.held.append((name, held))
            return held
        if isinstance(name, int):
            name = f"argument {name}"
        if not isinstance(value, CONTAINERS):
            return value
        box = self._known.get(id(value))
        if box is None:
            box = self._known[id(value)] = _Box(value)
            if isinstance(value, dict):
                box.items = {k: self._hold(v, f"{name}[{k!r}]") for k, v in content_of(value).items()}
            else:
                box.items = [self._hold(v, f"{name}[{i}]") for i, v in enumerate(content_of(value))]
            fields = getattr(value, "__dict__", None)
            slots = slots_of(box.cls)
            if fields or slots:
                fields = {**(fields or {}), **Slots(value, slots).read()}
                box.fields = {k: self._hold(v, f"{name}.{k}") for k, v in fields.items()}
        return box

    def _give(self, value: Any, given: dict[int, Any]) -> Any:
        if isinstance(value, Held):
            if id(value) not in given:
                # each `Held` once, also where several hold one tensor: the outer hooks count them
                given[id(value)] = value.give(self.moved)
            return given[id(value.first or value)]
        if not isinstance(value, _Box):
            return value
        if id(value) in given:
            return given[id(value)]
        if issubclass(value.cls, tuple | frozenset):
            new = value.fixed([self._give(v, given) for v in value.items])
            given[id(value)] = new
        else:
            new = given[id(value)] = value.empty()
            if isinstance(value.items, dict):
                put_content(new, {k: self._give(v, given) for k, v in value.items.items()})
            else:
                put_content(new, [self._give(v, given) for v in value.items])
        for name, field in (value.fields or {}).items():
            object.__setattr__(new, name, self._give(field, given))
        return new

    def give(self) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments for one replay; a tensor that was passed twice is still one object."""
        given: dict[int, Any] = {}
        if self._repeated:
            args = [self._give(a, given) for a in self.args]
        else:
            args = [a.give(self.moved) if type(a) is Held else self._give(a, given) for a in self.args]
        return args, {k: self._give(a, given) for k, a in self.kwargs.items()} if self.kwargs else {}

    def put_back(self) -> None:
        """After a replay, give each argument again the memory it had just before the replay."""
        for t, now in self.moved:
            t.data = now
        self.elsewhere = [storage_of(t) for t, _ in self.moved]
        self.moved = []

    def kinds(self) -> list[int]:
        """Return per input which in-place ops autograd allows: 0 no gradient, 1 non-leaf, 2 leaf."""
        return [held.kind for _, held in self.held]

    def linked(self) -> bool:
        """Does some argument come from the previous unit, so that it is not held here?"""
        return any(held.leaf >= 0 for _, held in self.held)

    def receive(self, leaves: Sequence[Any]) -> None:
        """Take the arguments that are not held here from the previous unit's output."""
        for _, held in self.held:
            if held.leaf >= 0:
                held.tensor = leaves[held.leaf].detach()
                held.version = held.tensor._version

    def let_go(self) -> None:
        """Free the arguments that `receive` took."""
        for _, held in self.held:
            if held.leaf >= 0:
                held.tensor = None

    def written(self) -> str:
        """Return the name of an argument that the forward has just written to, or ""."""
        for name, held in self.held:
            if held.written():
                return _name(name)
        return ""

    def changed(self) -> dict[int, str]:
        """Return the arguments written to since the call: names by storage."""
        found: dict[int, str] = {}
        for name, held in self.held:
            t = held.tensor
            if t is not None and t._version != held.version:  # autograd or the outer hooks check those they saved
                found[storage_of(t)] = _name(name)
        return found
