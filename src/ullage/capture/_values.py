"""Carry the real values of small tensors that steer the step beside their fake twins.

Fake tensors have no values, yet model code asks for some: masks, positions, step counters, sizes. Values that don't depend on
activations are computed for real on the side. For those that do, an assumption is noted (balanced routing, all finite), or they stay
unknown. If the step reads an unknown number, `_assumed` makes one up; a shape that depends on one is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ullage._torch import DisableTorchDispatch, FakeTensor, disable_modes, tree_flatten
from ullage.capture._assumed import Assumed, Taking
from ullage.capture._op_values import MANY, tensors, with_tensors
from ullage.runtime.ops._writes import written

aten = torch.ops.aten
_NAME = "_ullage_twin"
_STORAGES = (torch.UntypedStorage, torch.TypedStorage)  # of a file that is loaded: memory without values
# elements of a tensor whose values are carried: enough for a mask of 512 x 512 positions. Not tuned
MAX_NUMEL = 1 << 18

_INDEX_OUTPUTS = {aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim, aten.min.dim}
_INDEX_OUTPUTS |= {aten.argmax.default}
_NOT_FINITE = {aten.isnan.default, aten.isinf.default, aten.isposinf.default, aten.isneginf.default}
_COMPARISONS = {aten.eq.Scalar, aten.ne.Scalar, aten.ne.Tensor, aten.eq.Tensor} | _NOT_FINITE
_ABOVE, _BELOW = {aten.gt.Scalar, aten.ge.Scalar}, {aten.lt.Scalar, aten.le.Scalar}
_COMPARISONS |= _ABOVE | _BELOW
_ASSUMED = _INDEX_OUTPUTS | _COMPARISONS
_LARGE = 1e4  # a bound this large is a guard against overflow (float16 ends at 65,504), which trained activations don't reach
_KEEPS_VALUES = {aten._amp_foreach_non_finite_check_and_unscale_.default, aten._amp_update_scale_.default}


def _against(bound: Any, above: bool) -> bool | None:
    """Return whether `x > bound` (or `x < bound`) holds for every activation; None unless the bound is so large that it is a guard."""
    if not isinstance(bound, int | float) or abs(bound) < _LARGE:
        return None
    return (bound < 0) == above


def _has(storages: dict[int, weakref.ref[Any]], reals: tuple[Any, Any]) -> bool:
    given = [t.untyped_storage() for t in tensors((reals[0], tuple(reals[1].values())))]
    return any((known := storages.get(s._cdata)) is not None and known() is s for s in given)


def _twin_of(fake: Tensor) -> Tensor | None:
    twin: _Twin | None = vars(fake).get(_NAME)
    return None if twin is None else twin.real


def _limit(tensor: Tensor) -> bool:
    return tensor.numel() <= MAX_NUMEL


def may_follow(func: Any, outs: list[Any]) -> bool:
    """May `Values.follow` have anything to do for an op with these outputs? Not if they are too large to carry values."""
    return func._schema.is_mutable or func in _ASSUMED or all(map(_limit, outs))


def without_modes(func: Any) -> AbstractContextManager[Any]:
    """Return a context for an op on real tensors. torch's own ops run no Python, so it only skips the modes, in a tenth of the time."""
    context: AbstractContextManager[Any] = DisableTorchDispatch() if func.namespace == "aten" else disable_modes()
    return context


class _Twin:
    """A real tensor, as an attribute of its fake twin. A copy of the fake tensor gets a copy of it."""

    __slots__ = ("real",)

    def __init__(self, real: Tensor) -> None:
        self.real = real

    def __deepcopy__(self, _: Any) -> _Twin:
        with disable_modes():
            return _Twin(self.real.clone())


class Values:
    """Finds the real twins of fake tensors. Twins of views of one fake storage are views of one real storage.

    A fake tensor holds its twin as an attribute: with a weak reference to the fake one, `swap_tensors` (and `Module.to`) would fail.
    """

    def __init__(self, trial: int = 0, taking: Taking | None = None) -> None:
        self._poisoned: dict[int, weakref.ref[Any]] = {}
        self._drawn: dict[int, weakref.ref[Any]] = {}
        self._made_up: dict[int, weakref.ref[Any]] = {}
        self.assumptions: dict[str, None] = {}
        self.assumed = Assumed(
            trial, self.assumptions, taking or Taking()
        )  # gives values that are unknown and read all the same
        self._recorded = self.assumed.taking.recording is not None
        self.generator = torch.Generator()  # real draws use it, not the user's generator

    def get(self, fake: Any) -> Tensor | None:
        """Return the real twin of a fake tensor, or None if its values are unknown."""
        if not isinstance(fake, FakeTensor):  # a new constant, still real (`torch.tensor(0.0)`)
            return fake if isinstance(fake, Tensor) else None
        real = _twin_of(fake)
        if real is None or self._is_poisoned(real):
            return None
        return real

    def _is_poisoned(self, real: Tensor) -> bool:
        storage = real.untyped_storage()
        known = self._poisoned.get(storage._cdata)
        return known is not None and known() is storage  # not only the address, which another storage may have by now

    def attach(self, fake: Tensor, real: Tensor) -> None:
        """Note that `fake` has the values of `real`."""
        vars(fake)[_NAME] = _Twin(real)

    def seed(self, fake: Any, real: Any) -> None:
        """Attach small integer, boolean and scalar tensors of a real structure to its fake copy."""
        for f, r in zip(tree_flatten(fake)[0], tree_flatten(real)[0], strict=True):
            if isinstance(r, Tensor) and isinstance(f, Tensor) and r is not f and _limit(r) and r.device.type == "cpu":
                self.attach(f, r.detach().clone())

    def reals(self, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Return the arguments with real twins in place of fakes; None if one is unknown."""
        if not self._known(args) or not self._known(kwargs.values()):
            return None
        given: tuple[Any, ...] = with_tensors(self.get, args)
        return given, {k: with_tensors(self.get, v) for k, v in kwargs.items()}

    def _known(self, values: Iterable[Any]) -> bool:
        """Does every tensor in these have a real twin? Checked in order, as the first argument of most ops has none."""
        for v in values:
            if isinstance(v, Tensor):
                if self.get(v) is None:
                    return False
            elif isinstance(v, _STORAGES) or (isinstance(v, MANY) and not self._known(v)):
                return False
        return True

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Carry values through one op that already ran on fakes."""
        outs = tensors(out)
        mutates = func._schema.is_mutable
        if not outs and not mutates:
            return
        if self._recorded and torch.Tag.nondeterministic_seeded in func.tags:
            if mutates:  # the real step drew other numbers, and what it read of them was written down
                self._poison(func, args, kwargs)
            return
        if func in _KEEPS_VALUES:
            self.assumptions["all gradients are finite"] = None
            return
        # an op on a list in place (`_foreach_add_` on an optimizer's step counters) returns nothing
        written = outs or tensors(args[0])
        given = self.reals(args, kwargs) if all(_limit(o) for o in written) else None
        if given is None:
            if mutates:
                self._poison(func, args, kwargs)
            elif func in _ASSUMED and not self._recorded:
                self._assume(func, args, outs)
            return
        with without_modes(func), torch.no_grad():
            given_kwargs = {**given[1], "device": "cpu"} if given[1].get("device") is not None else given[1]
            real = self._run(func, given[0], given_kwargs)
        drawn = torch.Tag.nondeterministic_seeded in func.tags or self.are_drawn(given)
        made_up = self.are_made_up(given)
        for f, r in zip(outs, tensors(real), strict=True):
            self.attach(f, r)
            if drawn:
                self._drawn[r.untyped_storage()._cdata] = weakref.ref(r.untyped_storage())
            if made_up:
                self._made_up[r.untyped_storage()._cdata] = weakref.ref(r.untyped_storage())

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op for real; random draws come from `generator`."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if kwargs.get("generator") not in (None, torch.default_generator):  # the user's own: its state must not change
            state = kwargs["generator"].get_state()
            try:
                return func(*args, **kwargs)
            finally:
                kwargs["generator"].set_state(state)
        name = func._overloadname
        twin = getattr(func._overloadpacket, "generator" if name == "default" else f"{name}_generator", None)
        for op in (func, twin):
            if op is not None and any(a.name == "generator" for a in op._schema.arguments):
                return op(*args, **{**kwargs, "generator": self.generator})
        before = torch.default_generator.get_state()  # native_dropout takes no generator
        try:
            torch.default_generator.set_state(self.generator.get_state())
            out = func(*args, **kwargs)
            self.generator.set_state(torch.default_generator.get_state())
            return out
        finally:
            torch.default_generator.set_state(before)

    def are_drawn(self, reals: tuple[Any, Any]) -> bool:
        """Does the value of one of an op's arguments come from a random draw?"""
        return bool(self._drawn) and _has(self._drawn, reals)

    def are_made_up(self, reals: tuple[Any, Any]) -> bool:
        """Does it come from indices that were assumed, such as balanced routing?"""
        return bool(self._made_up) and _has(self._made_up, reals)

    def _poison(self, func: Any, args: Any, kwargs: Any) -> None:
        for tensor in written(func, args, kwargs):
            real = _twin_of(tensor)
            if real is not None:
                self._poisoned[real.untyped_storage()._cdata] = weakref.ref(real.untyped_storage())

    def _assume(self, func: Any, args: Any, outs: list[Tensor]) -> None:
        """Assume balanced routing for index outputs, and neither infinities nor NaN."""
        if func in _INDEX_OUTPUTS:
            index = outs[-1]
            if _limit(index) and index.dim() > 0 and not index.is_floating_point():
                position = 2 if func is aten.topk.default else 1
                dim = args[position] if len(args) > position and isinstance(args[position], int) else -1
                size = args[0].shape[dim] if args[0].dim() else 1
                with disable_modes():
                    real = (torch.arange(index.numel()) % max(size, 1)).reshape(index.shape)
                self.attach(index, real)
                self._made_up[real.untyped_storage()._cdata] = weakref.ref(real.untyped_storage())
                self.assumptions[f"balanced routing: indices of {func} spread evenly"] = None
            return
        constant: bool | None = None
        if func is aten.eq.Scalar and args[1] == float("inf"):
            constant = False
        elif func is aten.ne.Scalar and args[1] == float("inf"):
            constant = True
        elif func in (aten.ne.Tensor, aten.eq.Tensor) and args[0] is args[1]:
            constant = func is aten.eq.Tensor
        elif func in _NOT_FINITE:
            constant = False
        elif func in _ABOVE or func in _BELOW:
            constant = _against(args[1], func in _ABOVE)
        if constant is not None and outs[0].numel() <= (1 << 24):
            with disable_modes():
                self.attach(outs[0], torch.full(outs[0].shape, constant))
            self.assumptions["all activations are finite, and their absolute values less than 10,000"] = None
        elif constant is not None:
            self.attach(outs[0], torch.full((1,), constant).expand(outs[0].shape))
