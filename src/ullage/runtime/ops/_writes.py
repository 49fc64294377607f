"""Which tensors ops write to, and writes of a forward that no version counter sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ullage._torch import tree_flatten
from ullage.runtime.tensors._memory import LEAF, kind_of, storage_of

_GET_DATA: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_BATCH_NORMS = frozenset(
    {
        "aten::native_batch_norm",
        "aten::cudnn_batch_norm",
        "aten::_native_batch_norm_legit",
        "aten::_batch_norm_with_update",
        "aten::miopen_batch_norm",
    }
)
# These write to arguments that autograd saved just before it called them: their backward reads what they wrote.
FILLS = _BATCH_NORMS | {"aten::rrelu_with_noise", "aten::rrelu_with_noise_"}


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in a tree of arguments."""
    return [t for t in tree_flatten(values)[0] if isinstance(t, Tensor)]


def may_write(func: Any) -> bool:
    """Does an op write to an argument? The schemas of batch norms that train do not say it of their running statistics."""
    return bool(func._schema.is_mutable or func._schema.name in _BATCH_NORMS)


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the arguments that an op writes to, `out=` included; all of them for an op without a schema."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return tensors_in((args, kwargs))
    found = [
        args[i] if i < len(args) else kwargs.get(a.name)
        for i, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    if schema.name in _BATCH_NORMS and len(args) > 5 and args[5]:
        found += [args[3], args[4]]
    return tensors_in(found)


def parameters_in(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters among some tensors, and other leaves of autograd's graph."""
    return [t for t in tensors if isinstance(t, nn.Parameter) or kind_of(t) == LEAF]


def overlap(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Do two values (`_log.Value`) of one storage have memory in common? True where that is too hard to tell."""
    try:
        return bool(np.shares_memory(_Layout(a), _Layout(b), max_work=_MOST_WORK))  # type: ignore[arg-type]  # any number
    except np.exceptions.TooHardError:
        return True


class _Layout:
    """A value as numpy sees an array: where its elements lie, of memory that is not there and not read."""

    def __init__(self, value: tuple[Any, ...]) -> None:
        _, offset, shape, stride, dtype, _ = value
        size = dtype.itemsize
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "data": (_ANYWHERE + offset * size, True),
            "shape": tuple(shape),
            "strides": tuple(s * size for s in stride),
        }


_ANYWHERE = 1 << 20  # not zero, which numpy takes for no memory
_MOST_WORK = 10_000  # a whole decision takes some hundred; the problem is as hard as any in its worst case


class Writes(TorchFunctionMode):
    """Sees writes through `.data`, an alias with a version of its own: `p.data.clamp_()`, or `z.data.mul_()` after autograd saved `z`.

    A replay would write a parameter again, and one that ends before would not write what autograd has saved; no version would tell.
    Values are not compared: parameters may be large. A dispatch mode would see more, but under one torch makes each Python number a
    tensor twice: 8 bytes that no plan knows of.

    Args:
        tensors: all that a unit reaches; `parameters_in` them are watched.
        saved: gives how many tensors autograd has saved so far.
    """

    def __init__(self, tensors: Iterable[Tensor], saved: Callable[[], int]) -> None:
        super().__init__()
        self._watched = {storage_of(t): t for t in parameters_in(tensors)}
        self._saved = saved
        # weak, because a forward may make many; by address, because tensors have no equality that a dict could use
        self._aliases: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        # of each storage that was written to: how many tensors were saved at the last write
        self._last: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # most forwards never ask for `.data`, and then each op costs this one look
        given = [t for t in tensors_in((args, kwargs)) if self._aliases.get(id(t)) is t] if self._aliases else []
        versions = [t._version for t in given]
        out = func(*args, **kwargs)
        if func == _GET_DATA:
            self._aliases[id(out)] = out
        if given:
            self._follow(given, versions, out)
        return out

    def _follow(self, given: list[Tensor], versions: list[int], out: Any) -> None:
        """Note the storages that an op wrote through aliases, and its outputs that are aliases in turn."""
        for t, version in zip(given, versions, strict=True):
            if t._version != version:
                self._last[storage_of(t)] = self._saved()
        memory = {storage_of(t) for t in given} - {0}
        self._aliases.update({id(t): t for t in tensors_in(out) if storage_of(t) in memory})

    @property
    def seen(self) -> list[Tensor]:
        """The parameters that were written to."""
        return [t for key, t in self._watched.items() if key in self._last]

    def behind(self, saved: Mapping[int, tuple[Any, int]]) -> list[int]:
        """Return which saved tensors, of those given with their indices, were written to after autograd had saved them."""
        return [i for i, (t, _) in saved.items() if isinstance(t, Tensor) and i < self._last.get(storage_of(t), 0)]
