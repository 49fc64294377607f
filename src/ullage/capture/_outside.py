"""What a step reaches that is not copied with its workload: globals that its code loads, attributes of classes, caches.

A captured step would leave fake tensors there, and numbers that were made up: `lru_cache`d tables, a dict of features, `global last`.
"""

from __future__ import annotations

import functools
import gc
import types
from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ullage.runtime._content import Globals, View, content_of, put_content
from ullage.runtime._walk import functions_of, global_names, is_library, is_ours

_CACHE = functools._lru_cache_wrapper
_LIBRARY = ("torch", "numpy", "builtins", "ullage")
_MOST = 2_000  # places: a registry of a person's own is not walked to its end


class _OfClass(View):
    """The attributes of a class that are neither its methods nor Python's own."""

    __slots__ = ()

    def read(self) -> dict[Any, Any]:
        return {
            n: v
            for n, v in vars(self.owner).items()
            if not n.startswith("__") and not isinstance(v, types.FunctionType)
        }

    def put(self, content: dict[Any, Any]) -> None:
        now = self.read()
        for name in now.keys() - content.keys():
            delattr(self.owner, name)
        for name, value in content.items():
            if now.get(name, self) is not value:
                setattr(self.owner, name, value)


class Outside:
    """Finds these places and notes what is there. `put_back` makes that be there again.

    Args:
        model: the model, for the classes of its modules.
        functions: the loss and the step.
        built: the model was built while capturing, so that fake tensors that are there already are none of the user's.
    """

    def __init__(self, model: nn.Module, functions: Iterable[Any], built: bool = False) -> None:
        self._places: list[tuple[Any, Any]] = []
        self._caches: list[Any] = []
        self._seen: dict[int, Any] = {}
        todo = [
            *{type(m): None for m in model.modules()},
            *(getattr(f, "__func__", f) for f in functions if f is not None),
        ]
        while todo and len(self._seen) < _MOST:
            value = todo.pop()
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                todo += self._look(value)
        if built:
            self._places = [(p, _without_fakes(c)) for p, c in self._places]

    def put_back(self) -> None:
        """Undo what a step has changed."""
        for place, was in self._places:
            now = content_of(place)
            if len(now) != len(was) or not _same(now, was):
                put_content(place, was)
        for cache in self._caches:
            if _holds_fakes(cache):
                cache.cache_clear()

    def _look(self, value: Any) -> list[Any]:
        """Note a thing's places; what to look at next."""
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, _CACHE):
            self._caches.append(value)
            return [value.__wrapped__]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, dict | list | set | deque):
            self._note(value)
            return [
                v for v in (value.values() if isinstance(value, dict) else value) if isinstance(v, dict | list | set)
            ]
        return []

    def _note(self, place: Any) -> None:
        self._places.append((place, content_of(place)))

    def _class(self, cls: type) -> list[Any]:
        if cls.__module__.partition(".")[0] in _LIBRARY or not cls.__flags__ & 512:
            return []
        methods = [f for m in functions_of(cls) if (f := m()) is not None]
        if not any(f.__qualname__.startswith(cls.__qualname__) for f in methods):
            return []  # a library's class
        place = _OfClass(cls)
        self._note(place)
        return [*methods, *(b for b in cls.__bases__), *place.read().values()]

    def _function(self, fn: types.FunctionType) -> list[Any]:
        if is_library(fn.__code__.co_filename) or is_ours(fn):
            return []
        loads, stores = global_names(fn.__code__)
        if stores:
            self._note(Globals(fn, stores))
        found = [fn.__globals__[n] for n in loads if n in fn.__globals__]
        for value in found:
            if hasattr(value, "__dict__") and not isinstance(value, _KNOWN) and not is_library_object(value):
                self._note(vars(value))
        return found


_KNOWN = (type, Tensor, nn.Module, types.ModuleType, types.FunctionType, _CACHE)


def is_library_object(value: Any) -> bool:
    """Is its class one of a library's? A plain namespace is the user's."""
    return not isinstance(value, types.SimpleNamespace) and not functions_of(type(value))


def _same(now: Any, was: Any) -> bool:
    if isinstance(now, dict):
        return all(k in was and was[k] is v for k, v in now.items())
    if isinstance(now, set):
        return bool(now == was)
    return all(a is b for a, b in zip(now, was, strict=True))


def _without_fakes(content: Any) -> Any:
    if isinstance(content, dict):
        return {k: v for k, v in content.items() if not _is_fake(v)}
    return type(content)(v for v in content if not _is_fake(v))


def _is_fake(value: Any) -> bool:
    parts = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(v, FakeTensor) for v in parts)


def _holds_fakes(cache: Any) -> bool:
    """Does an `lru_cache` hold a fake tensor? Its entries are seen by the garbage collector only."""
    todo, depth = gc.get_referents(cache), 0
    while todo and depth < 6:
        if any(isinstance(v, FakeTensor) for v in todo):
            return True
        inner = [v for v in todo if isinstance(v, dict | tuple | list) or type(v).__name__ == "_lru_list_elem"]
        todo, depth = [x for v in inner for x in gc.get_referents(v)], depth + 1
    return False
