"""Follow changed tensors through a replay, so that nothing computed from them is handed to backward.

A tensor that a unit was given, or closes over, may change before backward as long as nothing that backward asks for depends on it.
This mode finds out. It is slow, and runs only when a tensor has changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ullage._source import source_line
from ullage._torch import TorchDispatchMode
from ullage.runtime.ambient._local import local
from ullage.runtime.ops._log import is_query
from ullage.runtime.ops._writes import tensors_in, written
from ullage.runtime.tensors import _sparse as sparse
from ullage.runtime.tensors._memory import storage_of

_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_KNOWN = ("aten", "prims")


class Changed(BaseException):
    """The unit's next op may depend on a tensor that changed. Not an `Exception`: the unit must not catch it.

    Attributes:
        name: the tensor that changed.
        read: the op that reads a value computed from it on the host, and its line; "" if backward asks for such a value.
    """

    def __init__(self, name: str, read: str = "") -> None:
        super().__init__(name)
        self.name, self.read = name, read


class Watch(TorchDispatchMode):
    """Follows changed tensors through ops, storage by storage.

    Raises `Changed` where the host reads such values, where they decide a shape, and at ops that are not torch's own.

    Args:
        changed: names by storage.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What Dynamo runs to compile is not the unit's. Without this it compiles nothing, and `torch.cond` needs it to."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch's wrapper imports Dynamo at the first call, 1.2 s. `keep_eager` marks the method instead."""
        return False

    def __init__(self, changed: dict[int, str]) -> None:
        super().__init__()
        self.changed = dict(changed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if local.quiet or is_query(func):
            return func(*args, **(kwargs or {}))
        read = dict.fromkeys(storage_of(t) for t in tensors_in((args, kwargs or {})))  # in the order of the arguments
        name = next((self.changed[s] for s in read if s in self.changed), None)
        if name is not None and (
            getattr(func, "namespace", "") not in _KNOWN or not _BY_VALUE.isdisjoint(getattr(func, "tags", ()))
        ):
            raise Changed(name, f"{func} at {source_line() or 'unknown line'}")
        out = sparse.run(func, args, kwargs)
        touched = {storage_of(t) for t in tensors_in(out)} | {storage_of(t) for t in written(func, args, kwargs or {})}
        if name is not None:
            self.changed.update(dict.fromkeys(touched, name))
        else:
            for s in touched - read.keys():  # a new storage at the address of a freed one
                self.changed.pop(s, None)
        return out

    def name(self, t: Tensor) -> str | None:
        """Return the name of a changed tensor that this one was computed from, or None."""
        return self.changed.get(storage_of(t))
