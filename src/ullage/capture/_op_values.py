"""Arguments and outputs of ops: tensors, numbers, and lists or tuples of these, which is less than torch's pytrees take.

torch's own `tree_flatten` asks of every leaf whether it is a named tuple, a dict or one of a dozen registered types. Done
for each op of a step it was a fifth of the time of a capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

MANY = (list, tuple)  # a pair, since `list | tuple` would be made anew for each of a million questions


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
    """The tensors of an argument or of an op's output, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [v for v in leaves(value) if isinstance(v, Tensor)] if isinstance(value, MANY) else []


def with_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The same, with `change` of each tensor in its place."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)([with_tensors(change, v) for v in value])
    return value
