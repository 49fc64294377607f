"""State that a forward changes: buffers, attributes of modules and plain objects, built-in containers, numpy arrays.

At the first call of a unit everything reachable from it is looked at before and after; what changed is remembered as
paths. Later calls copy only that on entry. During a replay the unit sees the values of its own entry; afterwards there is
what was there just before the replay. Tensors are written through `.data`, so no version is bumped: BatchNorm's backward
has saved those very buffers.
"""

from __future__ import annotations

import contextlib
import types
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ullage.runtime._local import Apart

MOST_NODES = 20_000
_MISSING = object()
PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OF_MODULES = frozenset(nn.Module().__dict__)
OPAQUE = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
    Apart,
)

Path = tuple[
    Any, ...
]  # (index of the root, then ("a", attribute), ("i", item) or ("a", None), the attributes themselves)


@dataclass(frozen=True)
class Changes:
    """What a forward changes.

    Attributes:
        containers: paths of dicts, lists, sets, deques and `__dict__`s whose content it changes.
        values: paths of tensors and numpy arrays whose values it changes.
        generators: paths of `torch.Generator`s, which it may draw from.
        parameters: names of parameters it writes to, and of other tensors that can't be put back.
    """

    containers: tuple[Path, ...] = ()
    values: tuple[Path, ...] = ()
    generators: tuple[Path, ...] = ()
    parameters: tuple[str, ...] = ()

    def __or__(self, other: Changes) -> Changes:
        """What either changes."""
        names = ("containers", "values", "generators", "parameters")
        return Changes(*(tuple(dict.fromkeys((*getattr(self, n), *getattr(other, n)))) for n in names))


class Unreachable(Exception):
    """A path leads nowhere any more: what is known of this unit is of another structure."""


def fields_of(obj: Any) -> dict[str, Any] | None:
    """The attributes of a module or plain object, or None."""
    if isinstance(obj, (*PLAIN, *OPAQUE, Tensor, np.ndarray, torch.Generator)):
        return None
    return getattr(obj, "__dict__", None)


def content_of(obj: Any) -> Any:
    """A shallow copy of a container's content."""
    if isinstance(obj, dict):
        return dict(obj)
    if isinstance(obj, set):
        return set(obj)
    return list(obj)


def _put_content(obj: Any, content: Any) -> None:
    if isinstance(obj, dict):
        for key in [k for k in obj if k not in content]:
            dict.__delitem__(obj, key)
        for key, value in content.items():
            if obj.get(key, _MISSING) is not value:
                dict.__setitem__(obj, key, value)
    elif isinstance(obj, list):
        obj[:] = content
    else:
        obj.clear()
        obj.update(content) if isinstance(obj, set) else obj.extend(content)


def same_content(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, set):
        return bool(a == b)
    pairs = [(v, b.get(k, _MISSING)) for k, v in a.items()] if isinstance(a, dict) else list(zip(a, b, strict=True))
    return all(x is y or (isinstance(x, PLAIN) and type(x) is type(y) and x == y) for x, y in pairs)


def _follow(roots: Sequence[Any], path: Path) -> Any:
    try:
        obj = roots[path[0]]
        for step in path[1:]:
            kind, key = step
            obj = obj[key] if kind == "i" else obj.__dict__ if key is None else obj.__dict__[key]
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise Unreachable(str(path)) from error
    return obj


def _and_below(changed: list[Any]) -> list[Any]:
    """Containers that a forward changes, and those in them: what it put there once, it may change at its next call."""
    found, seen = list(changed), {id(c) for c in changed}
    todo = list(changed)
    while todo and len(seen) < MOST_NODES:
        content = todo.pop()
        for key, value in list(content.items() if isinstance(content, dict) else enumerate(content)):
            if key in _OF_MODULES or isinstance(
                value, (*PLAIN, *OPAQUE, Tensor, nn.Module, np.ndarray, torch.Generator)
            ):
                continue
            if not isinstance(value, dict | list | set | deque | tuple):
                value = getattr(value, "__dict__", None)
            if value is not None and id(value) not in seen:
                seen.add(id(value))
                todo.append(value)
                if not isinstance(value, tuple | types.MappingProxyType):
                    found.append(value)
    return found


def describe(path: Path) -> str:
    """A path as a person would write it."""
    skip = ("_buffers", "_modules", "_parameters", None)
    return ".".join(str(key) for _, key in path[1:] if key not in skip) or (
        "attributes" if len(path) > 1 else "a tensor that it closes over"
    )


@dataclass
class State:
    """Objects and what they held at one moment."""

    containers: list[tuple[Any, Any]]
    values: list[tuple[Any, Any]]
    generators: list[tuple[torch.Generator, Tensor]]

    @staticmethod
    def read(roots: Sequence[Any], changes: Changes) -> State:
        """What the forward will change, as it is now; Unreachable if the structure is another one."""
        containers = _and_below([_follow(roots, p) for p in changes.containers])
        values = [_follow(roots, p) for p in changes.values]
        generators = [_follow(roots, p) for p in changes.generators]
        return State._of(containers, values, generators)

    @staticmethod
    def _of(containers: Sequence[Any], values: Sequence[Any], generators: Sequence[Any]) -> State:
        return State(
            [(o, content_of(o)) for o in containers],
            [(o, o.detach().clone() if isinstance(o, Tensor) else o.copy()) for o in values],
            [(g, g.get_state()) for g in generators],
        )

    def replaced(self) -> set[tuple[int, str]]:
        """Keys of dicts, given by their id, whose values are other objects now."""
        return {
            (id(d), k)
            for d, content in self.containers
            if isinstance(d, dict)
            for k in {*d, *content}
            if d.get(k, _MISSING) is not content.get(k, _MISSING)
        }

    def written(self) -> set[int]:
        """Ids of what holds other values now, or is another object now: a replay sees what was there then."""
        ids = {id(o) for o, _ in self.values}
        for obj, content in self.containers:
            if isinstance(obj, dict):
                ids.update([id(v) for k, v in obj.items() if isinstance(v, Tensor) and content.get(k) is not v])
        return ids

    def put(self) -> None:
        """Write it all back."""
        for obj, content in self.containers:
            _put_content(obj, content)
        for obj, value in self.values:
            if value is None:
                continue
            if isinstance(obj, Tensor):
                with torch.no_grad():
                    if (obj.shape, obj.dtype) == (value.shape, value.dtype):
                        obj.data.copy_(value)
                    else:  # it was given other memory since, by `.data =`
                        obj.data = value.clone()
            else:
                obj[...] = value
        for generator, state in self.generators:
            generator.set_state(state)

    @contextlib.contextmanager
    def seen(self) -> Iterator[None]:
        """Inside it, everything is as it was then; afterwards as it was just before."""
        tensors = tuple(o for o, _ in self.values if isinstance(o, Tensor))
        versions = tuple(t._version for t in tensors)
        memory = [t.data for t in tensors]
        now = State._of([o for o, _ in self.containers], [o for o, _ in self.values], [g for g, _ in self.generators])
        try:
            self.put()
            yield
        finally:
            for t, data in zip(tensors, memory, strict=True):
                if not _is_in(t, data):  # maybe what stands for the output of an op that is skipped, and is no memory
                    t.data = data
            try:
                now.put()
            except BaseException:
                now.put()  # whatever broke in: the user's state comes first
                raise
            # the values are those that others may have saved: nothing was modified
            if versions != tuple(t._version for t in tensors):
                torch._C._autograd._unsafe_set_version_counter(tensors, versions)


def _is_in(t: Tensor, data: Tensor) -> bool:
    """Does a tensor still have the memory of `data`, and all that says how to read it?"""
    if (t.dtype, t.shape) != (data.dtype, data.shape) or t.layout != data.layout:
        return False
    try:
        same = t.untyped_storage()._cdata == data.untyped_storage()._cdata
        return same and (t.layout != torch.strided or t.stride() == data.stride())
    except RuntimeError:  # no storage
        return False
