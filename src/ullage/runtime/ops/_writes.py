"""Which tensors ops write to, and which parameters a forward writes where no version counter sees it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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


class Writes(TorchFunctionMode):
    """Sees writes into the memory of parameters through `.data`, an alias with a version of its own (`p.data.clamp_()`).

    A replay would write again, and the parameter's version would not tell. Values are not compared: parameters may be large. A
    dispatch mode would see more, but under one torch makes each Python number a tensor twice: 8 bytes that no plan knows of.

    Args:
        tensors: all that a unit reaches; `parameters_in` them are watched.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._watched = {storage_of(t): t for t in parameters_in(tensors)}
        self._aliases: list[tuple[Tensor, Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func == _GET_DATA and (watched := self._watched.get(storage_of(out))) is not None:
            self._aliases.append((watched, out, out._version))
        return out

    @property
    def seen(self) -> list[Tensor]:
        """The parameters that were written to."""
        return [t for t, alias, version in self._aliases if alias._version != version]
