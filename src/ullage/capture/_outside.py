"""State that a step reaches and that is not copied with its workload: globals its code loads, attributes of classes, caches.

A captured step would leave fake tensors and made-up numbers there: in `lru_cache`d tables, a dict of features, `global last`.
So would a factory that is called while capturing. State that it sets up there (a table that its model's forward reads) is in
place while the session runs steps, and at no other time.
"""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ullage._torch import FakeTensor
from ullage.runtime.state._classes import classes_in
from ullage.runtime.state._content import Cells, content_of, put_content, same_content
from ullage.runtime.state._traverse import all_places, traverse, with_classes
from ullage.runtime.state._walk import children, is_part
from ullage.workload import Instance, Workload

_CACHE = functools._lru_cache_wrapper
_COPIED = (nn.Module, torch.optim.Optimizer, torch.amp.GradScaler, torch.optim.lr_scheduler.LRScheduler)
_CLOSURES = ("c", "d", "k", "self", "arg", "kw")  # steps of the walker: cells, defaults, bound objects and arguments
_FEW = 2_000  # objects searched for fake tensors below one place, so that a data set in memory costs little. Not tuned
_LARGE = 2**24  # bytes; a larger array is data, not copied: a step writes numbers of its losses to small arrays only


def _parts(obj: Any) -> Iterator[tuple[Any, Any, Any]]:
    if not isinstance(obj, _COPIED):
        yield from with_classes(obj)


def _without_closures(obj: Any) -> Iterator[tuple[Any, Any, Any]]:
    for part in _parts(obj):
        if part[0] is None or part[0][0] not in _CLOSURES:
            yield part


def _function(fn: Any) -> Any:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__func__", fn)


def _loaded_by(fn: Any) -> list[Any]:
    """Return the globals that a function loads; a workload copies the closure with the function."""
    loaded = children(fn) if isinstance(fn, types.FunctionType) else ()
    return [*classes_in(fn), *(child for step, _, child in loaded if step[0] == "g")]


class Outside:
    """Finds these places and notes their content.

    A place reached only through closures may belong to another thread that goes on meanwhile, so it is put back only if it has
    fake tensors.

    Args:
        roots: where to look.
        functions: functions whose own places (globals they assign to, attributes) are noted, too.
    """

    def __init__(self, roots: list[Any], functions: list[Any]) -> None:
        self._places: list[tuple[Any, Any, bool]] = []  # the bool: only the step can have changed it
        self._arrays: list[tuple[Any, Any]] = []
        self._caches: list[Any] = []
        seen: dict[int, Any] = {}
        for fn in functions:
            self._places += [(p, content_of(p), not isinstance(p, Cells)) for p in all_places(fn)]
        for obj, _ in traverse(roots, seen, _without_closures, classes=True):
            self._note(obj, seen, True)
        near = list(seen.values())
        held = [
            child for obj in near if not isinstance(obj, type) for step, _, child in _parts(obj) if step is not None
        ]
        for obj, _ in traverse(held, seen, _parts, classes=True):
            self._note(obj, seen, False)

    def _note(self, obj: Any, seen: dict[int, Any], sure: bool) -> None:
        if isinstance(obj, _CACHE):
            self._caches.append(obj)
        if isinstance(obj, np.ndarray) and sure and obj.nbytes <= _LARGE:
            self._arrays.append((obj, obj.copy()))
        elif not is_part(obj) and not isinstance(obj, _COPIED):
            for place in all_places(obj):
                if place is obj or id(place) not in seen:
                    seen[id(place)] = place
                    self._places.append((place, content_of(place), sure and not isinstance(place, Cells)))

    def now(self) -> Outside:
        """Return the same places, with their present content."""
        found = Outside([], [])
        found._places = [(place, content_of(place), sure) for place, _, sure in self._places]
        found._arrays = [(array, array.copy()) for array, _ in self._arrays]
        return found

    def put_back(self) -> None:
        """Put the noted content back."""
        for place, was, sure in self._places:
            now = content_of(place)
            if not same_content(was, now) and (sure or _any_fakes(now) or _any_fakes(was)):
                put_content(place, was)
        for array, was in self._arrays:
            array[...] = was
        for cache in self._caches:
            if _holds_fakes(cache):
                cache.cache_clear()

    def drop_fakes(self) -> None:
        """Take fake tensors out of these places."""
        for place, _, _ in self._places:
            now = content_of(place)
            if any(map(_is_fake, now.values() if isinstance(now, dict) else now)):
                put_content(place, _without_fakes(now))


def _any_fakes(content: Any) -> bool:
    reached = traverse([*(content.values() if isinstance(content, dict) else content)], {}, most=_FEW)
    return any(isinstance(obj, FakeTensor) for obj, _ in reached)


def _classes_of(model: nn.Module) -> list[Any]:
    return list(dict.fromkeys(cls for m in model.modules() for cls in classes_in(m)))


class KeptApart:
    """Keeps the effects of a session's steps on these places apart from the user's own content.

    Args:
        work: the session's workload, before anything of it is copied or built.
    """

    def __init__(self, work: Workload) -> None:
        functions = [_function(f) for f in (work.loss, work.step, work.factory) if f is not None]
        roots = _classes_of(work.model)
        for fn in functions:
            roots += _loaded_by(fn)
        if work.factory is not None:
            roots.append(work.factory)
        if work.optimizer is not None and not isinstance(work.optimizer, torch.optim.Optimizer):
            roots.append(work.optimizer)
        self._users, self._built = Outside(roots, functions), list[Outside]()
        self._is_factory = work.factory is not None

    def built(self, inst: Instance) -> None:
        """Note the content that a factory has set up for its model, with its fake tensors."""
        if self._is_factory:
            functions = [_function(f) for f in (inst.loss, inst.step) if f is not None]
            self._built = [Outside([*_classes_of(inst.model), *functions], []), self._users.now()]

    def enter(self) -> None:
        """Put the factory's content in place."""
        for outside in self._built:
            outside.put_back()

    def leave(self) -> None:
        """Put the user's content in place."""
        for outside in self._built:
            outside.put_back()
        self._users.put_back()
        for outside in self._built:
            outside.drop_fakes()


def _without_fakes(content: Any) -> Any:
    if isinstance(content, dict):
        return {k: v for k, v in content.items() if not _is_fake(v)}
    return type(content)(v for v in content if not _is_fake(v))


def _is_fake(value: Any) -> bool:
    parts = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(v, FakeTensor) for v in parts)


def _holds_fakes(cache: Any) -> bool:
    """Does an `lru_cache` hold a fake tensor? Only the garbage collector sees its entries."""
    todo, depth = gc.get_referents(cache), 0
    while todo and depth < 6:
        if any(isinstance(v, FakeTensor) for v in todo):
            return True
        inner = [v for v in todo if isinstance(v, dict | tuple | list) or type(v).__name__ == "_lru_list_elem"]
        todo, depth = [x for v in inner for x in gc.get_referents(v)], depth + 1
    return False
