"""The dispatch mode of a selective replay: hand out kept tensors, run the ops that are needed, make placeholders for the rest."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ullage._source import source_line
from ullage._torch import OpOverload, TorchDispatchMode, make_wrapper_subclass, tree_flatten, tree_map, tree_unflatten
from ullage.runtime.ambient._local import local
from ullage.runtime.ops._log import SHAPE_ONLY, is_query
from ullage.runtime.ops._select import RUN, Selection, Step
from ullage.runtime.tensors._memory import OWN, lost
from ullage.runtime.tensors._notes import lazy_bits, with_lazy_bits
from ullage.runtime.unit._tier import brought_back

_TO_COPY = torch.ops.aten._to_copy.default


class Stale(BaseException):
    """The op log does not match what runs now. Not an `Exception`: the unit's own handlers must not catch it."""


class Placeholder(Tensor):
    """A result that nothing needs: a shape without memory. An op that reads it proves the log wrong."""

    @staticmethod
    def __new__(cls, meta: Any, offset: int, bits: int = 0) -> Placeholder:
        made: Placeholder = make_wrapper_subclass(
            cls, meta[0], strides=meta[1], storage_offset=offset, dtype=meta[2], device=meta[3]
        )
        if bits:
            with_lazy_bits(made, bits)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]
        raise Stale(f"{func} at {source_line() or 'unknown line'} needs what the log says nobody needs")

    def data_ptr(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse access to its memory, which does not exist, with an error that the unit does not catch."""
        raise Stale(f"its memory is read at {source_line() or 'unknown line'}, which the log says nobody needs")

    numpy = tolist = __array__ = __dlpack__ = data_ptr

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<ullage placeholder {tuple(self.shape)}>"


def _view_of(placeholder: Placeholder, func: Any, args: Any, kwargs: Any) -> Any:
    shape, stride, offset = placeholder.shape, placeholder.stride(), placeholder.storage_offset()
    needed = (
        offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if placeholder.numel() else offset
    )
    base = torch.empty(needed, dtype=placeholder.dtype, device="meta").as_strided(shape, stride, offset)
    base, device = with_lazy_bits(base, lazy_bits(placeholder)), placeholder.device
    return tree_map(
        lambda t: Placeholder((t.shape, t.stride(), t.dtype, device), t.storage_offset(), lazy_bits(t)),
        func(base, *args, **kwargs),
    )


def _like(placeholder: Placeholder, func: Any, args: Any, kwargs: Any) -> Any:
    """Run an op that reads only its argument's shape, dtype and device."""
    base = torch.empty_strided(placeholder.shape, placeholder.stride(), dtype=placeholder.dtype, device="meta")
    device = kwargs.get("device")
    return func(base, *args, **{**kwargs, "device": placeholder.device if device is None else device})


def _as_made(kept: Tensor, meta: Any, offset: int, bits: int) -> Tensor:
    """Return an op's output from the kept tensor: often another view of its memory, maybe conjugated or of its imaginary part."""
    shape, stride, dtype = meta[:3]
    if kept.dtype is not dtype:
        return torch.empty(0, dtype=dtype, device=kept.device).set_(kept.untyped_storage(), offset, shape, stride)
    same = kept.shape == shape and kept.stride() == stride and kept.storage_offset() == offset
    made = with_lazy_bits(kept.detach(), bits)
    return made if same else made.as_strided(shape, stride, offset)


class SkipMode(TorchDispatchMode):
    """The dispatch mode, see above.

    Args:
        selection: what to do at each op.
        kept: the forward's kept tensors by index; one that is brought back here is put back into it.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No wrapper around every op (2 us each): nothing that Dynamo compiles runs in a selective replay."""
        return False

    def __init__(self, selection: Selection, kept: dict[int, Any]) -> None:
        super().__init__()
        self.steps, self.kept, self.at = selection.steps, kept, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if local.quiet:
            return func(*args, **(kwargs or {}))
        at = self.at
        step = self.steps[at] if at < len(self.steps) else None
        if step is None or func is not step.func:
            # not in the log: in the forward autocast took this cast from its cache
            if func is _TO_COPY or is_query(func):
                return func(*args, **(kwargs or {}))
            if type(func) is OpOverload and func.is_view and args and type(args[0]) is Placeholder:
                # not in the log: after an in-place op on a view of a subclass, autograd makes the view once more
                return _view_of(args[0], func, args[1:], kwargs or {})
            raise Stale(f"{func} at {source_line()} where the log has {step.func if step else 'its end'}")
        self.at = at + 1
        if step.action == RUN:
            for a in args:
                if type(a) in OWN and a.data_ptr() == 0 and lost(a):
                    raise Stale(
                        f"{func} at {source_line() or 'unknown line'} reads memory that no op gave it (`.data =`)"
                    )
            if func in SHAPE_ONLY and type(args[0]) is Placeholder:
                return _like(args[0], func, args[1:], kwargs or {})
            return func(*args, **kwargs) if kwargs else func(*args)
        out = Placeholder(*step.made) if step.made is not None else self._made_up(step, args, kwargs)
        if local.on_skip is not None:
            local.on_skip(func, args, out)
        return out

    def _made_up(self, step: Step, args: Any, kwargs: Any) -> Any:
        leaves = []
        for (meta, offset, bits), index, same_as in zip(step.outputs, step.handed, step.returns, strict=True):
            if same_as >= 0:
                leaves.append([a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)][same_as])
            elif index >= 0:
                leaves.append(_as_made(brought_back(self.kept, index), meta, offset, bits))
            elif type(meta) is tuple:
                leaves.append(Placeholder(meta, offset, bits))
            else:
                leaves.append(meta)
        return leaves[0] if step.spec.is_leaf() else tree_unflatten(leaves, step.spec)
