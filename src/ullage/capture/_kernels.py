"""Run one op on fake tensors: from a remembered call, by its fake kernel, or from real values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ullage._source import source_line
from ullage._torch import DataDependentOutputException, DynamicOutputShapeException, disable_modes, tree_map
from ullage.capture._fake_mode import StepMode
from ullage.capture._op_values import MASKS, asks_for_values, name_of, tensors
from ullage.capture._outputs import KnownCall, KnownOutputs
from ullage.capture._values import Values, without_modes

if TYPE_CHECKING:
    from ullage.capture._recorded import Taken

aten = torch.ops.aten


class NeedsValues(Exception):
    """An op's shapes depend on values that a step on fake tensors does not have."""

    def __init__(self, func: Any, place: str) -> None:
        super().__init__(f"{func} makes a tensor whose shape depends on values of activations")
        self.func, self.place = func, place


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
        if asks_for_values(func, args):
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
        """Run an op whose result depends on values on the real twins of its arguments, or take what a real step has read."""
        given = self.values.reals(args, kwargs)
        if given is not None and not self.values.assumed.taking.sizes and self.values.are_made_up(given):
            if func not in _READS:
                raise NeedsValues(func, self.place())
            given = None  # is it only for a log?
        if given is not None and self._is_assumed_instead(func, given):
            given = None
        taken = self.values.assumed.recorded(name_of(func), self.place, known=given is not None)
        if taken is not None:
            return self._as_taken(taken, tensors(args)[0].device)
        if given is None:
            return self._without_values(func, args, kwargs)
        if self.values.are_drawn(given):
            where = source_line()
            self.values.assumptions[f"{where}: a random draw steers the step; it was captured for one draw"] = None
        with without_modes(func), torch.no_grad():
            real = func(*given[0], **given[1])
        if not isinstance(real, Tensor):
            return real if not isinstance(real, tuple) else tuple(self._to_fake(r) for r in real)
        return self._to_fake(real)

    def _without_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op with some unknown values: its shape may follow from the known ones; a number is made up.

        Raises:
            NeedsValues: the shape depends on unknown values.
        """
        if func in _READS:
            dtype = args[0].dtype if func is aten._local_scalar_dense.default else torch.bool
            return self.values.assumed.scalar(dtype, self.place())
        if func is aten.index.Tensor:
            index = [
                self._selecting(func, i) if i is not None and i.dtype in MASKS else self._known(i) for i in args[1]
            ]
            if all(i is None or known is not None for i, known in zip(args[1], index, strict=True)):
                return args[0].new_empty(_indexed_shape(args[0], index))
        if func is aten.masked_select.default and (mask := self._selecting(func, args[1])) is not None:
            with disable_modes():
                chosen = int(mask.expand(torch.broadcast_shapes(args[0].shape, mask.shape)).sum())
            return args[0].new_empty(chosen)
        size = kwargs.get("output_size") if func is aten.repeat_interleave.Tensor else None
        if func is aten.bincount.default:  # the indices are taken to be in range
            size = args[2] if len(args) > 2 else kwargs.get("minlength")
        if not size and func in _SUMS:
            size = self.values.assumed.size(name_of(func), self.place())
        if size:
            return args[0].new_empty(
                size, dtype=args[1].dtype if len(args) > 1 and args[1] is not None else torch.int64
            )
        if func in _CTC and (lengths := self._lengths(args[3])) is not None:
            steps, batch = args[0].shape[:2] if args[0].dim() == 3 else (args[0].shape[0], 1)
            return args[0].new_empty(batch), args[0].new_empty(batch, steps, 2 * max(lengths, default=0) + 1)
        if func in _OF_ELEMENTS:
            real = self._selecting(func, args[0])
            if real is not None:
                with without_modes(func), torch.no_grad():
                    return tree_map(self._shaped, func(real, *args[1:], **kwargs))
        raise NeedsValues(func, self.place())

    def _is_assumed_instead(self, func: Any, given: tuple[Any, Any]) -> bool:
        """Does `assume=` say what to take in place of values that were drawn, or made up?"""
        values = self.values
        if not values.assumed.taking.reads.assume or not (values.are_drawn(given) or values.are_made_up(given)):
            return False
        return (
            values.assumed.given(None if func in _READS else _OF_ELEMENTS.get(func, "mask"), self.place()) is not None
        )

    def _known(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self.values.get(tensor)

    def _lengths(self, given: Any) -> list[int] | None:
        known = self._known(given) if isinstance(given, Tensor) else given
        with disable_modes():
            return known.tolist() if isinstance(known, Tensor) else known

    def _selecting(self, func: Any, tensor: Tensor) -> Tensor | None:
        """Return a tensor's values; of unknown ones an assumption, which holds wherever else the step uses the tensor. None if there is none."""
        known = self.values.get(tensor)
        if known is not None and not self._is_assumed_instead(func, ((known,), {})):
            return known
        numel, kind = tensor.numel(), _OF_ELEMENTS.get(func, "mask")
        count = self.values.assumed.chosen(name_of(func), kind, numel, self.place()) if numel <= _MOST_MADE_UP else None
        if count is None:
            return None
        with disable_modes():
            at = torch.arange(numel)
            if kind == "unique":
                return (at % max(count, 1)).to(tensor.dtype).reshape(tensor.shape)
            made = (
                (at * count // max(numel, 1) != (at + 1) * count // max(numel, 1))
                .to(tensor.dtype)
                .reshape(tensor.shape)
            )
        self.values.attach(tensor, made)
        return made

    def _as_taken(self, taken: Taken, device: torch.device) -> Any:
        """Make on fake tensors what a real step's read gave."""
        if not taken.outputs:
            return taken.value
        made = []
        for o in taken.outputs:
            fake = torch.empty_strided(o.shape, o.stride, dtype=o.dtype, device=device)
            if o.values is not None:
                with disable_modes():
                    self.values.attach(fake, o.values.clone())
            made.append(fake)
        return made[0] if taken.container is None else taken.container(made)

    def _shaped(self, real: Any) -> Any:
        """Return a fake tensor of this one's shape, whose values are not known."""
        with disable_modes():
            return self.fake_mode.from_tensor(real) if isinstance(real, Tensor) else real

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
        return [x.to("meta") for x in (i.nonzero(as_tuple=True) if i.dtype in MASKS else (i,))]

    with disable_modes():
        return torch.empty(tensor.shape, device="meta")[tuple(x for i in index for x in on_meta(i))].shape


_READS = {aten._local_scalar_dense.default, aten.equal.default}
# ops whose number of outputs' elements depends on their first argument, and what an assumption about it is called
_OF_ELEMENTS = {aten.nonzero.default: "mask", aten.argwhere.default: "mask"}
_OF_ELEMENTS |= {f.default: "unique" for f in (aten._unique2, aten._unique, aten.unique_dim, aten.unique_consecutive)}
_SUMS = {aten.bincount.default, aten.repeat_interleave.Tensor}  # sizes that no share of elements tells
_CTC = {aten._ctc_loss.Tensor, aten._ctc_loss.default}
_MOST_MADE_UP = 1 << 26  # elements of a mask that is made up. Not tuned
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
