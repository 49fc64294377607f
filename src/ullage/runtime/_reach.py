"""What a call reaches besides its arguments: modules, closures, and the tensors it can read there."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Generator, Tensor, nn

_DEEPEST = 3  # functions in closures of functions
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, types.ModuleType)


def roots_of(fn: Callable[..., Any], depth: int = 0) -> list[Any]:
    """Modules and other objects a callable holds: its `self`, closure, defaults, bound arguments."""
    if isinstance(fn, nn.Module):
        return [fn]
    if isinstance(fn, functools.partial):
        held = [fn.func, *fn.args, *fn.keywords.values()]
    elif isinstance(fn, types.MethodType):
        return [fn.__self__] if not isinstance(fn.__self__, type) else []
    elif isinstance(fn, types.FunctionType):
        cells = []
        for cell in fn.__closure__ or ():
            try:
                cells.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
        held = [*cells, *(fn.__defaults__ or ())]
    else:
        return [fn]
    found: list[Any] = []
    for value in held:
        if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            found += roots_of(value, depth + 1) if depth < _DEEPEST else []
        elif not isinstance(value, _PLAIN):
            found.append(value)
    return found


_STATELESS = (Tensor, *_PLAIN)


def objects_in(args: Iterable[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments that may carry state of their own: modules, caches, generators; in lists, tuples and dicts too."""
    found: list[Any] = []
    for a in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(a, _STATELESS):
            continue
        if isinstance(a, list | tuple | dict):
            found += objects_in(a.values() if isinstance(a, dict) else a, {})
        elif isinstance(a, Generator) or hasattr(a, "__dict__"):
            found.append(a)
    return found


@dataclass(frozen=True)
class Below:
    """What there is of a module and of all modules below it. Weak references and dicts of tensors: it must not hold the module.

    Attributes:
        tensors: dicts of parameters and of buffers.
        buffers: dicts of buffers.
        modules: the modules.
    """

    tensors: list[dict[str, Any]]
    buffers: list[dict[str, Any]]
    modules: list[ReferenceType[nn.Module]]


_below: WeakKeyDictionary[nn.Module, Below] = WeakKeyDictionary()


def _found_below(module: nn.Module) -> Below:
    modules = list(module.modules())
    tensors = [d for m in modules for d in (m._parameters, m._buffers) if d]
    found = _below[module] = Below(tensors, [m._buffers for m in modules if m._buffers], [ref(m) for m in modules])
    return found


def forget(roots: Iterable[Any]) -> None:
    """Look again at the next call."""
    for root in roots:
        if isinstance(root, nn.Module):
            _below.pop(root, None)


class Reached:
    """What a call can read besides its arguments: looked up once per call.

    Args:
        roots: what `roots_of` and `objects_in` found.
    """

    __slots__ = ("below", "training")

    def __init__(self, roots: Iterable[Any]) -> None:
        self.below: list[Below] = []
        training: list[bool] = []
        for root in roots:
            if isinstance(root, nn.Module):
                below = _below.get(root) or _found_below(root)
                try:
                    training += [m().training for m in below.modules]  # type: ignore[union-attr]
                except AttributeError:  # one of them is gone: the structure has changed
                    below = _found_below(root)
                    training += [m.training for m in root.modules()]
                self.below.append(below)
        self.training = tuple(training)  # of every module: state and draws depend on it

    def tensors(self, without: Container[tuple[int, str]] = ()) -> list[Tensor]:
        """Parameters and buffers of modules; `without`: keys of dicts, given by their id."""
        found: list[Any] = []
        for below in self.below:
            for d in below.tensors:
                found.extend([t for k, t in d.items() if (id(d), k) not in without] if without else d.values())
        return [t for t in found if t is not None]

    def buffers(self) -> list[Tensor]:
        """Buffers of modules."""
        return [t for below in self.below for d in below.buffers for t in d.values() if t is not None]


def tensors_around(roots: Iterable[Any], depth: int = 2) -> list[Tensor]:
    """Tensors in containers and plain objects that a callable holds."""
    found: list[Tensor] = []
    for root in roots:
        if isinstance(root, Tensor):
            found.append(root)
        elif depth and not isinstance(root, nn.Module):
            fields = root if isinstance(root, dict) else getattr(root, "__dict__", None)
            inner = fields.values() if isinstance(fields, dict) else root if isinstance(root, list | tuple) else ()
            found += tensors_around(list(inner), depth - 1)
    return found


def name_in(roots: Iterable[Any], tensor: Tensor) -> str:
    """What a person would call that tensor."""
    for root in roots:
        if isinstance(root, nn.Module):
            for name, t in [*root.named_parameters(), *root.named_buffers()]:
                if t is tensor:
                    return name
    return f"a tensor of shape {tuple(tensor.shape)} that it closes over"
