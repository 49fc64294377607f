"""Which tensors ops write to, and which parameters a forward writes where no version counter sees it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ullage._torch import OpOverload, TorchDispatchMode, tree_flatten
from ullage.runtime.ambient._local import local
from ullage.runtime.tensors import _sparse as sparse
from ullage.runtime.tensors._memory import LEAF, kind_of, storage_of

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


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the arguments that an op writes to, `out=` included; all of them for an op without a schema.

    The schemas of batch norms that train do not say that they write their running statistics.
    """
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


class Writes(TorchDispatchMode):
    """Sees writes into the memory of parameters, also through an alias with a version of its own (`p.data.clamp_()`).

    A replay would write again, and no version would tell. Values are not compared: parameters may be large.

    Args:
        tensors: all that a unit reaches; `parameters_in` them are watched.

    Attributes:
        seen: those that were written to.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What Dynamo runs to compile is not the unit's."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch's wrapper imports Dynamo at the first call, 1.2 s. `keep_eager` marks the method instead."""
        return False

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._watched = {storage_of(t): t for t in parameters_in(tensors)}
        self.seen: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not local.quiet and isinstance(func, OpOverload) and func._schema.is_mutable:
            found = (self._watched.get(storage_of(t)) for t in written(func, args, kwargs))
            self.seen += [t for t in found if t is not None]
        return sparse.run(func, args, kwargs)
