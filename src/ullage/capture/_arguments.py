"""Find out whether a module changes its arguments: a dict it writes, a list it appends to, a key-value cache that grows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_DEPTH = 6  # a cache holds a list of layers, each an object with tensors
_ATOMS = (int, float, complex, str, bytes, bool, type(None))


def contents(arguments: Any) -> list[tuple[Any, str]]:
    """Return what each mutable object in a call's (args, kwargs) holds now, by identity, and its class.

    Identities, because holding the tensors themselves would keep them alive in the step that is captured.
    """
    found: list[tuple[Any, str]] = []
    args, kwargs = arguments
    for value in (*args, *kwargs.values()):
        if not isinstance(value, Tensor | nn.Module | tuple | type) and not isinstance(value, _ATOMS):
            found.append((_held(value, _DEPTH), type(value).__name__))
    return found


def _held(value: Any, depth: int) -> Any:
    if isinstance(value, _ATOMS):
        return value
    if isinstance(value, Tensor | nn.Module | type) or depth == 0 or callable(value):
        return id(value)
    if isinstance(value, dict):
        return tuple((str(k), _held(v, depth - 1)) for k, v in value.items())
    if isinstance(value, list | tuple | set):
        return tuple(_held(v, depth - 1) for v in value)
    return _held(vars(value), depth - 1) if hasattr(value, "__dict__") else id(value)
