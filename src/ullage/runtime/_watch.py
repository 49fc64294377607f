"""A replay in which tensors that changed since the forward must not be read.

A tensor that a unit was given, or closes over, may change before backward as long as the replay does not depend on it: this
replay finds out. It is slow, and there only when something has changed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ullage.runtime._local import local


class Changed(BaseException):
    """The replay reads something that changed; carries its name. Not an `Exception`: the unit must not catch it."""


class Watch(TorchDispatchMode):
    """Raises `Changed` when an op, or autograd, takes a changed tensor.

    Args:
        changed: names by storage.
    """

    supports_higher_order_operators = True

    def __init__(self, changed: dict[int, str]) -> None:
        super().__init__()
        self.changed = changed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not local.quiet:
            for t in tree_flatten((args, kwargs or {}))[0]:
                if isinstance(t, Tensor):
                    self.look(t)
        return func(*args, **(kwargs or {}))

    def look(self, t: Tensor) -> None:
        """Is this one of them?"""
        name = self.changed.get(storage_of(t))
        if name is not None:
            raise Changed(name)


def storage_of(t: Tensor) -> int:
    """What tells storages apart; 0 for a tensor that has none."""
    try:
        return int(t.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0
