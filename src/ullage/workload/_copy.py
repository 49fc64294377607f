"""Copy a workload's objects with all they reach: models, optimizers, hooks, and functions with what these close over.

`copy.deepcopy` treats functions as atoms, so a hook or a step would write to the original. It also leaves out a parameter's hooks,
and attributes of an optimizer that `Optimizer.__getstate__` does not name. A real object that this copy misses is noticed while
capturing: an optimizer that steps real parameters, or an op on a real parameter, is an error there.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ullage._errors import UllageError, WorkloadError
from ullage._torch import FakeTensor
from ullage.runtime.state._traverse import hooks_of, traverse
from ullage.runtime.state._walk import CONTAINERS, children, is_opaque

_ATOMS = (int, float, complex, str, bytes, type(None), type, types.ModuleType, types.BuiltinFunctionType)
_STATEFUL = (nn.Module, Tensor, torch.optim.Optimizer, torch.amp.GradScaler, torch.optim.lr_scheduler.LRScheduler)
_GLOBALS = (*_STATEFUL, *CONTAINERS, types.FunctionType, functools.partial)  # globals of other types are not copied


def copied_parts(obj: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Parts that are copied with an object, in the form of the walker's `children`: of globals, those that a function itself loads."""
    yield from hooks_of(obj)
    for step, label, child in children(obj):
        if isinstance(child, weakref.ref):  # a scheduler's way to its optimizer
            child = child()
            if not isinstance(child, _STATEFUL):
                continue
        if step[0] != "g" or (isinstance(obj, types.FunctionType) and isinstance(child, _GLOBALS)):
            yield step, label, child


def _globals_of(fn: types.FunctionType) -> dict[str, Any]:
    """Globals that a person's function loads and that may hold state; none for a library's function."""
    return {label: child for step, label, child in copied_parts(fn) if step and step[0] == "g"}


def _is_stateful(value: Any) -> bool:
    """Does a function reach anything that must be a copy?"""
    reached = traverse([value], {}, copied_parts)
    return any(not isinstance(obj, (types.FunctionType, functools.partial, *_ATOMS)) for obj, _ in reached)


def _stateful_below(value: Any) -> Any:
    """A model, tensor, optimizer or the like that an object leads to, or None."""
    reached = traverse([value], {}, copied_parts)
    return next((obj for obj, _ in reached if isinstance(obj, _STATEFUL)), None)


class Copier:
    """Copies things that may refer to each other; `memo` maps ids of originals to copies, as for `copy.deepcopy`."""

    def __init__(self, memo: dict[int, Any]) -> None:
        self.memo = memo
        self._scopes: dict[int, dict[str, Any]] = {}  # a module's globals, by their id: its functions share them
        self.weakly_held: list[Any] = []  # copies that may be reached through weak references alone
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
            return self._function(value) if _is_stateful(value) else value
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
        return self._object(value)

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
            own = _stateful_below(value)
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
