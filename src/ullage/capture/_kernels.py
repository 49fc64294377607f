"""Run one op on fake tensors: from a remembered call, by its fake kernel, or from real values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ullage._source import source_line
from ullage._torch import DataDependentOutputException, DynamicOutputShapeException, disable_modes
from ullage.capture._fake_mode import StepMode
from ullage.capture._outputs import KnownCall, KnownOutputs
from ullage.capture._values import Values, without_modes

aten = torch.ops.aten


class NeedsValues(Exception):
    """An op's shapes depend on values that a step on fake tensors does not have."""

    def __init__(self, func: Any) -> None:
        super().__init__(f"{func} makes a tensor whose shape depends on values of activations")
        self.func = func


class FakeKernels:
    """Runs ops, and carries the values of small tensors along. `place` returns the line that the step is at."""

    def __init__(
        self,
        fake_mode: StepMode,
        values: Values,
        like: FakeKernels | None = None,
        place: Callable[[], str] = source_line,
    ) -> None:
        self.fake_mode, self.values, self.place = fake_mode, values, place
        self.known: KnownOutputs = KnownOutputs(fake_mode, None if like is None else like.known)

    def call(self, known: KnownCall, args: Any, kwargs: Any) -> tuple[Any, bool]:
        """Return the op's outputs, and whether they may have storages that were not seen before."""
        func, offset = known.func, self.known.offset(known, args)
        if offset is None:
            return self._run(func, args, kwargs), True
        entry = known.entries.get(offset)
        if entry is not None:
            out = self.known.make(entry, args)
            if entry.valued:
                self.values.follow(func, args, kwargs, out)
            return out, entry.fresh
        out = self._run(func, args, kwargs)
        self.known.learn(known, offset, args, kwargs, out)
        return out, True

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten.index.Tensor and not any(i is not None and i.dtype in _MASKS for i in args[1]):
            out = func(*args, **kwargs)  # indexed by integers: the shape needs no values, though the op's tag says so
            self.values.follow(func, args, kwargs, out)
            return out
        if func in _READS or torch.Tag.dynamic_output_shape in func.tags:
            return self._with_values(func, args, kwargs)
        if func is _GROUPED_MM and args[0].dtype != torch.bfloat16:
            return _grouped_mm(*args)
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return self._with_values(func, args, kwargs)
        self.values.follow(func, args, kwargs, out)
        return out

    def _with_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op whose result depends on values on the real twins of its arguments."""
        given = self.values.reals(args, kwargs)
        if given is None:
            return self._without_values(func, args)
        if self.values.are_drawn(given):
            where = source_line()
            self.values.assumptions[f"{where}: a random draw steers the step; it was captured for one draw"] = None
        with without_modes(func), torch.no_grad():
            real = func(*given[0], **given[1])
        if not isinstance(real, Tensor):
            return real if not isinstance(real, tuple) else tuple(self._to_fake(r) for r in real)
        return self._to_fake(real)

    def _without_values(self, func: Any, args: Any) -> Any:
        """Run an op with some unknown values: its shape may follow from the known ones; a number is made up.

        Raises:
            NeedsValues: the shape depends on unknown values.
        """
        if func in _READS:
            dtype = args[0].dtype if func is aten._local_scalar_dense.default else torch.bool
            return self.values.assumed.scalar(dtype, self.place())
        if func is aten.index.Tensor:
            index = [None if i is None else self.values.get(i) for i in args[1]]
            if all(i is None or known is not None for i, known in zip(args[1], index, strict=True)):
                return args[0].new_empty(_indexed_shape(args[0], index))
        if func is aten.masked_select.default and (mask := self.values.get(args[1])) is not None:
            with disable_modes():
                chosen = int(mask.expand(torch.broadcast_shapes(args[0].shape, mask.shape)).sum())
            return args[0].new_empty(chosen)
        raise NeedsValues(func)

    def _to_fake(self, real: Tensor) -> Tensor:
        with disable_modes():
            fake = self.fake_mode.from_tensor(real)
        self.values.attach(fake, real)
        return fake


def _indexed_shape(tensor: Tensor, index: Sequence[Tensor | None]) -> torch.Size:
    """Return the shape of `tensor[index]`, with None for a whole dimension."""

    def on_meta(i: Tensor | None) -> list[Any]:
        if i is None:
            return [slice(None)]
        return [x.to("meta") for x in (i.nonzero(as_tuple=True) if i.dtype in _MASKS else (i,))]

    with disable_modes():
        return torch.empty(tensor.shape, device="meta")[tuple(x for i in index for x in on_meta(i))].shape


_READS = {aten._local_scalar_dense.default, aten.equal.default}
_MASKS = (torch.bool, torch.uint8)
_GROUPED_MM = getattr(getattr(aten, "_grouped_mm", None), "default", None)


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor | None = None, *_: Any) -> Tensor:
    """Return outputs of the real kernel's shapes: the fake one refuses float32, which the real one accepts."""
    if a.dim() == 2 and b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    if a.dim() == 3 and b.dim() == 2:
        return a.new_empty(a.shape[1], b.shape[1])
    if a.dim() == 2 and offsets is not None:
        return a.new_empty(offsets.shape[0], a.shape[0], b.shape[1])
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])
