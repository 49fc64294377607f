"""Flatten arguments and outputs of ops: tensors, numbers, and lists or tuples of these; and find ops that ask for values.

torch's own `tree_flatten` asks every leaf whether it is a named tuple, a dict or one of a dozen registered types. For each op
of a step this took a fifth of a capture's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

NUMPY = "numpy"  # how a read of a whole tensor is named
MASKS = (torch.bool, torch.uint8)
_TAGS = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
MANY = (list, tuple)  # not `list | tuple`: `isinstance` would build that union again at each of a million calls


def leaves(values: Iterable[Any]) -> list[Any]:
    """Flatten nested lists and tuples, in order."""
    found: list[Any] = []
    for v in values:
        if isinstance(v, MANY):
            found += leaves(v)
        else:
            found.append(v)
    return found


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors of an argument or of an op's output, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [v for v in leaves(value) if isinstance(v, Tensor)] if isinstance(value, MANY) else []


def with_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Return the value with each tensor replaced by `change` of it."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)([with_tensors(change, v) for v in value])
    return value


def asks_for_values(func: Any, args: Any) -> bool:
    """Does an op's result, or its shape, depend on values? An index of integers has a shape that does not."""
    if not any(tag in func.tags for tag in _TAGS):
        return False
    return func is not torch.ops.aten.index.Tensor or any(i is not None and i.dtype in MASKS for i in args[1])


def name_of(func: Any) -> str:
    """The op as a profile names it."""
    name = str(func._overloadpacket).removeprefix("aten.")
    return "item" if name == "_local_scalar_dense" else name.lstrip("_")
