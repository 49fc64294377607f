"""Copy a workload's objects with all they reach: models, optimizers, hooks, and functions with what these close over.

`copy.deepcopy` treats functions as atoms, so a hook or a step would write to the original. It also leaves out a parameter's hooks,
and attributes of an optimizer that `Optimizer.__getstate__` does not name. A real object that this copy misses is noticed while
capturing: an optimizer that steps real parameters, or an op on a real parameter, is an error there.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ullage._errors import UllageError, WorkloadError
from ullage._torch import FakeTensor
from ullage.runtime.state._classes import ClassFields, classes_in
from ullage.runtime.state._traverse import hooks_of, traverse
from ullage.runtime.state._walk import CONTAINERS, children, functions_of, global_names, is_library, is_opaque, is_part

_ATOMS = (int, float, complex, str, bytes, type(None), type, types.ModuleType, types.BuiltinFunctionType)
_STATEFUL = (nn.Module, Tensor, torch.optim.Optimizer, torch.amp.GradScaler, torch.optim.lr_scheduler.LRScheduler)
_GLOBALS = (*_STATEFUL, *CONTAINERS, types.FunctionType, functools.partial)  # globals of other types are not copied


def copied_parts(obj: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Parts that are copied with an object, in the form of the walker's `children`: with globals, classes and modules that its code loads."""
    yield from hooks_of(obj)
    for step, label, child in children(obj):
        if isinstance(child, weakref.ref):  # a scheduler's way to its optimizer
            child = child()
            if not isinstance(child, _STATEFUL):
                continue
        if step[0] != "g" or isinstance(obj, types.FunctionType):
            yield step, label, child
    for _, name, value in shared_by(obj):
        yield None, name, value


def shared_by(obj: Any) -> Iterator[tuple[Any, str, Any]]:
    """Yield (owner, name, value) of places that an object's code reads and that no copy of the object has.

    These are globals that its methods load, and attributes of the user's classes and modules that its code loads.
    """
    if is_part(obj) or is_opaque(obj):
        return
    if isinstance(obj, types.FunctionType):
        functions, classes = [obj], dict.fromkeys(classes_in(obj))
    else:
        functions = _alive(functions_of(type(obj)))
        classes = dict.fromkeys(base for base in type(obj).__mro__ if _is_users_class(base))
    for fn in functions:
        if not is_library(fn.__code__.co_filename):
            classes.update(dict.fromkeys(classes_in(fn)))
    more = [fn for cls in classes for fn in _alive(functions_of(cls))]
    for fn in dict.fromkeys([*functions, *more]):
        yield from _loaded_past(fn, fn is not obj)
    for cls in classes:
        yield from ((cls, name, value) for name, value in ClassFields(cls).read().items() if not is_opaque(value))


def _is_users_class(cls: type) -> bool:
    """Classes of C have no attributes that can be set."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    return bool(cls.__flags__ & 512) and (cls.__module__ == "__main__" or (file is not None and not is_library(file)))


def _alive(methods: Iterable[Any]) -> list[types.FunctionType]:
    return [fn for method in methods if (fn := method()) is not None]


def _loaded_past(fn: types.FunctionType, is_method: bool) -> Iterator[tuple[Any, str, Any]]:
    """Attributes of the user's modules that a function loads; of a method, its globals, too (a function's own are copied with it)."""
    if is_library(fn.__code__.co_filename):
        return
    for name in global_names(fn.__code__)[0]:
        value = fn.__globals__.get(name)
        if isinstance(value, types.ModuleType):
            if not is_library(getattr(value, "__file__", None) or "<frozen"):
                loaded = ((n, vars(value)[n]) for n in _attributes(fn.__code__) if n in vars(value))
                yield from ((vars(value), n, v) for n, v in loaded if _is_followed(v))
        elif is_method and _is_followed(value):
            yield fn.__globals__, name, value


def _is_followed(value: Any) -> bool:
    library = isinstance(value, types.FunctionType) and is_library(value.__code__.co_filename)
    return not is_opaque(value) and (not library or "__wrapped__" in value.__dict__)


@functools.cache
def _attributes(code: types.CodeType) -> frozenset[str]:
    inner = [_attributes(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


def _globals_of(fn: types.FunctionType) -> dict[str, Any]:
    """Globals that a person's function loads and that may hold state; none for a library's function."""
    found = {label: child for step, label, child in children(fn) if step and step[0] == "g"}
    return {n: v for n, v in found.items() if isinstance(v, _GLOBALS) or _leads(v)}


def _leads(value: Any) -> bool:
    """Does it lead to a tensor, a model, an optimizer or the like?"""
    return any(isinstance(obj, _STATEFUL) for obj, _ in traverse([value], {}, copied_parts))


class Place:
    """An attribute of a class or a module, or a global that a method loads: it has the copy while steps of the copy run."""

    def __init__(self, owner: Any, name: str, was: Any, copied: Any) -> None:
        self.owner, self.name, self.was, self.copied = owner, name, was, copied
        self._depth = 0

    def put(self) -> None:
        """Set it to the copy."""
        self._depth += 1
        if self._depth == 1:
            self._set(self.copied)

    def take(self) -> None:
        """Set it to the user's object; what a step has set it to meanwhile is there again next time."""
        self._depth -= 1
        if self._depth == 0:
            self.copied = self.owner[self.name] if isinstance(self.owner, dict) else vars(self.owner)[self.name]
            self._set(self.was)

    def _set(self, value: Any) -> None:
        if isinstance(self.owner, dict):
            self.owner[self.name] = value
        else:
            type.__setattr__(self.owner, self.name, value)


@contextlib.contextmanager
def in_place(places: list[Place]) -> Iterator[None]:
    """Have the copies in these places."""
    for place in places:
        place.put()
    try:
        yield
    finally:
        for place in places:
            place.take()


def _is_stateful(value: Any) -> bool:
    """Does a function reach anything that must be a copy?"""
    reached = traverse([value], {}, copied_parts)
    return any(not isinstance(obj, (types.FunctionType, functools.partial, *_ATOMS)) for obj, _ in reached)


def _model_below(value: Any) -> Any:
    """A model, an optimizer or the like that an object leads to, or None."""
    reached = traverse([value], {}, copied_parts)
    return next((obj for obj, _ in reached if isinstance(obj, _STATEFUL) and not isinstance(obj, Tensor)), None)


class Copier:
    """Copies things that may refer to each other; `memo` maps ids of originals to copies, as for `copy.deepcopy`."""

    def __init__(self, memo: dict[int, Any]) -> None:
        self.memo = memo
        self._scopes: dict[int, dict[str, Any]] = {}  # a module's globals, by their id: its functions share them
        self.weakly_held: list[Any] = []  # copies that may be reached through weak references alone
        self.places: list[Place] = []
        self._placed = set[tuple[int, str]]()
        self._kept: list[Any] = []  # what was copied, temporary states too: an id in `memo` stays one thing's

    def twins(self) -> list[tuple[Tensor, Tensor]]:
        """Each tensor's copy, and the tensor."""
        return [(self.memo[id(t)], t) for t in self._kept if isinstance(t, Tensor) and id(t) in self.memo]

    def __call__(self, value: Any) -> Any:
        """The copy of `value`, which may be itself."""
        if isinstance(value, _ATOMS):
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        self._kept.append(value)
        if isinstance(value, Tensor):
            return value if isinstance(value, FakeTensor) else self._tensor(value)
        if isinstance(value, types.FunctionType):
            new_function = self._function(value) if _is_stateful(value) else value
            self._share(value)
            return new_function
        if isinstance(value, functools.partial):
            keywords = {k: self(v) for k, v in value.keywords.items()}
            return functools.partial(self(value.func), *[self(a) for a in value.args], **keywords)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self(value.__self__))
        if isinstance(value, weakref.ref):
            target = value()
            if not isinstance(target, _STATEFUL):
                return value
            self.weakly_held.append(self(target))
            return weakref.ref(self.weakly_held[-1])
        if isinstance(value, torch.Generator):
            twin = self.memo[id(value)] = torch.Generator(value.device)
            twin.set_state(value.get_state())
            return twin
        if is_opaque(value):  # a lock, a thread, a file: what the walker does not follow
            return value
        new = self._object(value)
        self._share(value)
        return new

    def _share(self, value: Any) -> None:
        """Note the places that an object's code reads, with copies of what they hold."""
        for owner, name, held in shared_by(value):
            if (id(owner), name) not in self._placed:
                self._placed.add((id(owner), name))
                if _leads(held):
                    self.places.append(Place(owner, name, held, self(held)))

    def _tensor(self, value: Tensor) -> Tensor:
        """With its attributes and, of a leaf, the hooks on its gradient."""
        new: Tensor = copy.deepcopy(value, self.memo)
        self.memo[id(value)] = new
        for name, attribute in vars(value).items():
            if name not in vars(new):
                setattr(new, name, self(attribute))
        if value.is_leaf and new.is_leaf and new.requires_grad:
            for hook in list((value._backward_hooks or {}).values()):
                new.register_hook(self(hook))
            for hook in list((getattr(value, "_post_accumulate_grad_hooks", None) or {}).values()):
                new.register_post_accumulate_grad_hook(self(hook))
        return new

    def _object(self, value: Any) -> Any:
        memo, kind = self.memo, type(value)
        if kind is tuple:
            items = [self(v) for v in value]
            if all(a is b for a, b in zip(items, value, strict=True)):
                return value
            return memo.setdefault(id(value), tuple(items))
        if kind is list:
            new: Any = memo.setdefault(id(value), [])
            new.extend(self(v) for v in value)
        elif kind is dict:
            new = memo.setdefault(id(value), {})
            new.update((self(k), self(v)) for k, v in value.items())
        elif isinstance(value, torch.optim.Optimizer) or (
            isinstance(value, nn.Module) and not hasattr(value, "__deepcopy__") and "__reduce_ex__" not in vars(value)
        ):
            new = memo[id(value)] = object.__new__(kind)
            vars(new).update({k: self(v) for k, v in vars(value).items()})
        else:
            new = self._copied_or_shared(value)
        return new

    def _copied_or_shared(self, value: Any) -> Any:
        """An object that refuses to be copied (a tracker's connection, a running generator) is shared, if it leads to no state of the step.

        The walker puts back what a step writes to its attributes; what it writes beyond, to a file or a service, no copy could take back.
        """
        try:
            return self._reduced(value)
        except UllageError:
            raise
        except Exception as error:
            own = _model_below(value)
            if own is None:
                self.memo[id(value)] = value
                return value
            raise WorkloadError(
                f"a {type(value).__qualname__} can't be copied ({type(error).__name__}: {error}), and the step reaches a {type(own).__name__} through it; "
                "hand that to the step itself, or build the workload in a function: Workload.from_factory(fn)"
            ) from error

    def _reduced(self, value: Any) -> Any:
        """The copy that `copy.deepcopy` would make, its parts by this copier."""
        if hasattr(value, "__deepcopy__"):
            new = value.__deepcopy__(self.memo)
        else:
            form = value.__reduce_ex__(4)
            if isinstance(form, str):
                return value
            new = copy._reconstruct(value, self.memo, *form, deepcopy=lambda v, _: self(v))  # type: ignore[attr-defined]
        self.memo[id(value)] = new
        return new

    def _function(self, fn: types.FunctionType) -> types.FunctionType:
        used = {n: v for n, v in _globals_of(fn).items() if _is_stateful(v)}
        scope = fn.__globals__
        if used:
            scope = self._scopes.setdefault(id(scope), dict(scope))
        cells = tuple(self._cell(c) for c in fn.__closure__ or ())
        new = types.FunctionType(fn.__code__, scope, fn.__name__, None, cells or None)
        self.memo[id(fn)] = new
        for name, value in used.items():
            scope[name] = self(value)
        for old, cell in zip(fn.__closure__ or (), cells, strict=True):
            if _is_set(old) and not _is_set(cell):
                cell.cell_contents = self(old.cell_contents)
        new.__defaults__ = self(fn.__defaults__)
        new.__kwdefaults__ = self(fn.__kwdefaults__)
        new.__dict__.update(
            (k, self(v)) for k, v in fn.__dict__.items()
        )  # `functools.wraps` leaves the wrapped function here
        new.__module__, new.__qualname__ = fn.__module__, fn.__qualname__
        return new

    def _cell(self, cell: types.CellType) -> types.CellType:
        """One new cell for each: functions that share a variable go on sharing it."""
        return self.memo.setdefault(id(cell), types.CellType())  # type: ignore[no-any-return]


def _is_set(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
