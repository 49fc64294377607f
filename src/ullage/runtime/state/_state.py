"""State that a forward changes: buffers, attributes of modules and plain objects, built-in containers, numpy arrays.

At its first call everything that a unit reaches is compared before and after, and the changed places are remembered as paths.
Later calls copy only these on entry. During a replay the unit sees the values of its own entry; afterwards the values from just
before the replay are back. Tensors are written through `.data`, which bumps no version: BatchNorm's backward has saved those
very buffers.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ullage._torch import set_versions
from ullage.runtime.state._content import content_of, put_content, put_random_state, random_state
from ullage.runtime.state._walk import MODULE_FIELDS, MOST_NODES, children, follow, is_opaque, is_part, places
from ullage.runtime.tensors._memory import copy_of, same_memory

_MISSING = object()
Path = tuple[Any, ...]  # (index of the root, then steps of `_walk`)


@dataclass(frozen=True)
class Changes:
    """The state that a forward changes.

    Attributes:
        containers: paths of containers, attributes, slots, cells and globals whose content it changes.
        values: paths of tensors and numpy arrays whose values it changes.
        generators: paths of generators (torch's, numpy's, Python's), which it may draw from.
        parameters: names of parameters that it writes to, and of other tensors that can't be put back.
    """

    containers: tuple[Path, ...] = ()
    values: tuple[Path, ...] = ()
    generators: tuple[Path, ...] = ()
    parameters: tuple[str, ...] = ()

    def __or__(self, other: Changes) -> Changes:
        """Return the changes of both."""
        names = ("containers", "values", "generators", "parameters")
        return Changes(*(tuple(dict.fromkeys((*getattr(self, n), *getattr(other, n)))) for n in names))


class Unreachable(Exception):
    """A recorded attribute path no longer resolves: the module was restructured."""


def _follow(roots: Sequence[Any], path: Path) -> Any:
    try:
        obj = roots[path[0]]
        for step in path[1:]:
            obj = follow(obj, step)
    except (KeyError, IndexError, AttributeError, TypeError, StopIteration) as error:
        raise Unreachable(str(path)) from error
    return obj


def _and_below(changed: list[Any]) -> list[Any]:
    """Return the containers that a forward changes and those inside them: it may change an object that it put there at an earlier call."""
    found, seen = list(changed), {id(c) for c in changed}
    todo: list[Any] = []
    for place in changed:
        content = content_of(place)
        values = content.items() if isinstance(content, dict) else enumerate(content)
        todo += [v for k, v in values if k not in MODULE_FIELDS]
    while todo and len(seen) < MOST_NODES:
        value = todo.pop()
        if is_opaque(value) or isinstance(value, nn.Module) or is_part(value) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            continue
        for _, place in places(value):
            if not isinstance(place, dict) or id(place) not in seen or place is value:
                seen.add(id(place))
                found.append(place)
        todo += [child for step, _, child in children(value) if step[0] != "g"]
    return found


def describe(path: Path) -> str:
    """Write a path as a person would."""
    skip = ("_buffers", "_modules", "_parameters", None)
    keys = [key for kind, key in path[1:] if kind not in ("self", "func", "G")]
    keys = [key[1] if isinstance(key, tuple) else key for key in keys]
    return ".".join(str(key) for key in keys if key not in skip) or (
        "attributes" if len(path) > 1 else "a tensor that it closes over"
    )


@dataclass
class State:
    """Objects with their contents, values and states at one moment."""

    containers: list[tuple[Any, Any]]
    values: list[tuple[Any, Any]]
    generators: list[tuple[Any, Any]]

    @staticmethod
    def read(roots: Sequence[Any], changes: Changes) -> State:
        """Copy the state that the forward will change; Unreachable if a path no longer resolves."""
        containers = _and_below([_follow(roots, p) for p in changes.containers])
        values = [_follow(roots, p) for p in changes.values]
        generators = [_follow(roots, p) for p in changes.generators]
        return State._of(containers, values, generators)

    @staticmethod
    def _of(containers: Sequence[Any], values: Sequence[Any], generators: Sequence[Any]) -> State:
        return State(
            [(o, content_of(o)) for o in containers],
            [(o, copy_of(o) if isinstance(o, Tensor) else o.copy()) for o in values],
            [(g, random_state(g)) for g in generators],
        )

    def replaced(self) -> set[tuple[int, str]]:
        """Return (id of a dict, key) pairs whose values are other objects now."""
        return {
            (id(d), k)
            for d, content in self.containers
            if isinstance(d, dict)
            for k in {*d, *content}
            if d.get(k, _MISSING) is not content.get(k, _MISSING)
        }

    def written(self) -> set[int]:
        """Return the ids of tensors that the forward wrote to or put in a container: a replay sees their entry values instead."""
        ids = {id(o) for o, _ in self.values}
        for obj, content in self.containers:
            if isinstance(content, dict):
                now = content_of(obj).items()
                ids.update([id(v) for k, v in now if isinstance(v, Tensor) and content.get(k) is not v])
        return ids

    def put(self) -> None:
        """Write everything back."""
        for obj, content in self.containers:
            put_content(obj, content)
        for obj, value in self.values:
            if value is None:
                continue
            if isinstance(obj, Tensor):
                with torch.no_grad():
                    if (obj.shape, obj.dtype) == (value.shape, value.dtype):
                        obj.data.copy_(value)
                    else:  # `.data =` has given it other memory since
                        obj.data = copy_of(value)
            else:
                obj[...] = value
        for generator, state in self.generators:
            put_random_state(generator, state)

    @contextlib.contextmanager
    def seen(self) -> Iterator[None]:
        """Put everything back inside the context; afterwards everything is as just before it."""
        tensors = tuple(o for o, _ in self.values if isinstance(o, Tensor))
        versions = tuple(t._version for t in tensors)
        memory = [t.data for t in tensors]
        now = State._of([o for o, _ in self.containers], [o for o, _ in self.values], [g for g, _ in self.generators])
        try:
            self.put()
            yield
        finally:
            for t, data in zip(tensors, memory, strict=True):
                if not same_memory(t, data):  # the replay gave it other memory, maybe a placeholder's
                    t.data = data
            try:
                now.put()
            except BaseException:
                now.put()  # once more after an interrupt (Ctrl-C): the user's state comes first
                raise
            finally:
                # the values are the old ones again, so for autograd nothing was modified
                if versions != tuple(t._version for t in tensors):
                    set_versions(tensors, versions)
