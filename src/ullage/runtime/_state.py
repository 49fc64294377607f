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
from torch._subclasses.fake_tensor import FakeTensor

_MOST_NODES = 20_000
_MISSING = object()
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OF_MODULES = frozenset(nn.Module().__dict__)
_OPAQUE = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
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


def _fields(obj: Any) -> dict[str, Any] | None:
    """The attributes of a module or plain object, or None."""
    if isinstance(obj, (*_PLAIN, *_OPAQUE, Tensor, np.ndarray, torch.Generator)):
        return None
    return getattr(obj, "__dict__", None)


def _content(obj: Any) -> Any:
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


def _same_content(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, set):
        return bool(a == b)
    pairs = [(v, b.get(k, _MISSING)) for k, v in a.items()] if isinstance(a, dict) else list(zip(a, b, strict=True))
    return all(x is y or (isinstance(x, _PLAIN) and type(x) is type(y) and x == y) for x, y in pairs)


class Survey:
    """Everything reachable from some roots, before a forward; `changes` compares with what is there after it.

    Args:
        roots: modules, closures' contents and arguments.
    """

    def __init__(self, roots: Sequence[Any]) -> None:
        self._containers: dict[int, tuple[Path, Any, Any]] = {}
        self._values: dict[int, tuple[Path, Any, Any, int]] = {}
        self._generators: dict[int, tuple[Path, torch.Generator, Any]] = {}
        self._parameters: dict[int, tuple[str, Tensor, int]] = {}
        self._seen: set[int] = set()
        self._held: list[Any] = list(roots)  # ids of the dead are used again
        for i, root in enumerate(roots):
            self._look(root, (i,), "")

    def _look(self, obj: Any, path: Path, name: str) -> None:
        if isinstance(obj, (*_PLAIN, *_OPAQUE)) or id(obj) in self._seen or len(self._seen) > _MOST_NODES:
            return
        self._seen.add(id(obj))
        self._held.append(obj)
        if isinstance(obj, nn.Parameter):
            self._parameters[id(obj)] = (name, obj, obj._version)
        elif isinstance(obj, torch.Generator):
            self._generators[id(obj)] = (path, obj, obj.get_state())
        elif isinstance(obj, Tensor | np.ndarray):
            self._values[id(obj)] = (path, obj, *_noted(obj))
        elif isinstance(obj, dict | list | set | deque):
            self._containers[id(obj)] = (path, obj, _content(obj))
            items = obj.items() if isinstance(obj, dict) else enumerate(obj) if not isinstance(obj, set) else ()
            for key, value in list(items):
                self._look(value, (*path, ("i", key)), f"{name}.{key}".strip("."))
        elif isinstance(obj, tuple):
            for key, value in enumerate(obj):
                self._look(value, (*path, ("i", key)), f"{name}.{key}".strip("."))
        if not isinstance(obj, dict | list | set | deque | tuple):
            self._look_at_fields(obj, path, name)

    def _look_at_fields(self, obj: Any, path: Path, name: str) -> None:
        fields = _fields(obj)
        if fields is None:
            return
        self._containers[id(fields)] = ((*path, ("a", None)), fields, dict(fields))
        self._held.append(fields)
        for key, value in list(fields.items()):
            if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                continue
            inner = f"{name}.{key}".strip(".")
            if key in ("_parameters", "_buffers", "_modules") and isinstance(value, dict):
                self._seen.add(id(value))
                if key != "_modules":
                    self._containers[id(value)] = ((*path, ("a", key)), value, dict(value))
                for k, v in list(value.items()):
                    self._look(v, (*path, ("a", key), ("i", k)), f"{name}.{k}".strip("."))
            else:
                self._look(value, (*path, ("a", key)), inner)

    def changes(self, known: set[int]) -> tuple[Changes, State]:
        """What changed since, and a state that holds what was there before. `known`: ids of tensors that do change."""
        containers = [(p, o, c) for p, o, c in self._containers.values() if not _same_content(c, _content(o))]
        values = [(p, o, h) for p, o, h, version in self._values.values() if id(o) in known or _moved(o, h, version)]
        parameters = tuple(f"parameter {n}" for n, p, version in self._parameters.values() if p._version != version)
        # without a copy there is nothing to put back
        parameters += tuple(describe(p) for p, o, h in values if h is None and not isinstance(o, FakeTensor))
        found = Changes(
            tuple(p for p, _, _ in containers),
            tuple(p for p, _, _ in values),
            tuple(p for p, _, _ in self._generators.values()),
            parameters,
        )
        entry = State(
            [(o, c) for _, o, c in containers],
            [(o, _restored(o, host)) for _, o, host in values],
            [(g, state) for _, g, state in self._generators.values()],
        )
        return found, entry


def _noted(obj: Any) -> tuple[Any, int]:
    """Its values, in host memory that no allocator of torch counts, and its version."""
    if isinstance(obj, np.ndarray):
        return obj.copy(), 0
    if type(obj) is not Tensor or obj.layout != torch.strided or obj.requires_grad or obj.grad_fn is not None:
        return None, obj._version
    return _host_copy(obj), obj._version


def _host_copy(t: Tensor) -> np.ndarray[Any, Any] | None:
    try:
        bits = t.detach().cpu()
        return (bits.view(torch.int16) if bits.dtype == torch.bfloat16 else bits).numpy().copy()
    except (TypeError, RuntimeError):  # a dtype numpy lacks: digests tell whether it changed, but it can't be put back
        return None


def _moved(obj: Any, host: Any, version: int) -> bool:
    if isinstance(obj, np.ndarray):
        return bool(obj.tobytes() != host.tobytes() or obj.shape != host.shape)
    if host is None:
        return bool(obj._version != version)
    now = _host_copy(obj)
    return now is None or now.shape != host.shape or bool(now.tobytes() != host.tobytes())


def _restored(obj: Any, host: Any) -> Any:
    if isinstance(obj, np.ndarray) or host is None:
        return host
    values = torch.from_numpy(host)
    return (values.view(torch.bfloat16) if obj.dtype == torch.bfloat16 else values).to(obj.device)


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
    while todo and len(seen) < _MOST_NODES:
        content = todo.pop()
        for key, value in list(content.items() if isinstance(content, dict) else enumerate(content)):
            if key in _OF_MODULES or isinstance(
                value, (*_PLAIN, *_OPAQUE, Tensor, nn.Module, np.ndarray, torch.Generator)
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
            [(o, _content(o)) for o in containers],
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
                    obj.data.copy_(value)
            else:
                obj[...] = value
        for generator, state in self.generators:
            generator.set_state(state)

    @contextlib.contextmanager
    def seen(self) -> Iterator[None]:
        """Inside it, everything is as it was then; afterwards as it was just before."""
        tensors = tuple(o for o, _ in self.values if isinstance(o, Tensor))
        versions = tuple(t._version for t in tensors)
        now = State._of([o for o, _ in self.containers], [o for o, _ in self.values], [g for g, _ in self.generators])
        try:
            self.put()
            yield
        finally:
            try:
                now.put()
            except BaseException:
                now.put()  # whatever broke in: the user's state comes first
                raise
            # the values are those that others may have saved: nothing was modified
            if versions != tuple(t._version for t in tensors):
                torch._C._autograd._unsafe_set_version_counter(tensors, versions)
