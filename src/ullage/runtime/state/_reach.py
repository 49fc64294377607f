"""Find the modules, closures and tensors that a call can read besides its arguments."""

from __future__ import annotations

import itertools
import types
from collections import deque
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import numpy as np
from torch import Tensor, nn

from ullage.runtime.state._content import PLAIN, content_of
from ullage.runtime.state._traverse import name_of, traverse
from ullage.runtime.state._walk import (
    CONTAINERS,
    HOOKS,
    MODULE_FIELDS,
    MOST_NODES,
    OPAQUE,
    OPAQUE_TYPES,
    RANDOM,
    Step,
    children,
    follow,
    functions_of,
    is_opaque,
)

_PLAIN = frozenset(PLAIN)
_STATELESS = (Tensor, *PLAIN, *OPAQUE)


def roots_of(fn: Callable[..., Any]) -> list[Any]:
    """Return where a walk from a callable starts: the module of a module's method, otherwise the callable itself."""
    if isinstance(fn, types.MethodType) and isinstance(fn.__self__, nn.Module):
        return [fn.__self__]
    return [fn]


def objects_in(args: Iterable[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Return arguments with state of their own: modules, caches, generators, functions; also those in containers."""
    found: list[Any] = []
    for a in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(a, _STATELESS):
            continue
        if isinstance(a, CONTAINERS):  # the container itself is copied for each replay, see `_inputs`
            found += objects_in(
                content_of(a).values() if isinstance(a, dict) else content_of(a), getattr(a, "__dict__", {})
            )
        else:
            found.append(a)
    return found


@dataclass(frozen=True)
class Below:
    """The dicts of tensors and the modules of one module and all below it. It holds modules weakly: it is cached by the module.

    Attributes:
        tensors: dicts of parameters and of buffers.
        buffers: dicts of buffers.
        modules: the modules.
        parents: the modules that have modules below them.
        names: per parent, the names of the modules right below it.
        children: the modules that stood right below the parents.
        structure: a number that changes if a module is replaced by another one, which has other state.
        loose: modules, with a step to an unregistered attribute that may hold tensors or modules.
    """

    tensors: list[dict[str, Any]]
    buffers: list[dict[str, Any]]
    modules: list[ReferenceType[nn.Module]]
    parents: list[ReferenceType[nn.Module]]
    names: list[list[str]]
    children: list[Callable[[], nn.Module | None]]
    structure: int
    loose: list[tuple[ReferenceType[nn.Module], Step]]

    def standing(self) -> list[Any]:
        """Return the modules right below the parents now; AttributeError if a parent is gone."""
        return [child for parent in self.parents for child in parent()._modules.values()]  # type: ignore[union-attr]


_below: WeakKeyDictionary[nn.Module, Below] = WeakKeyDictionary()


def _no_module() -> None:
    """Stands for the reference to a module that is registered as None."""


def _found_below(module: nn.Module) -> Below:
    modules = list(module.modules())
    tensors = [d for m in modules for d in (m._parameters, m._buffers) if d]
    known = {id(m) for m in modules} | {id(t) for d in tensors for t in d.values()}
    loose = [
        (ref(m), step)
        for m in modules
        if m.__dict__.keys() - MODULE_FIELDS or any(m.__dict__.get(h) for h in HOOKS) or functions_of(type(m))
        for step, _, value in children(m)
        if step[0] != "m" or step[1][0] in HOOKS
        if _may_hold(value, known)
    ]
    parents = [m for m in modules if m._modules]
    found = _below[module] = Below(
        tensors,
        [m._buffers for m in modules if m._buffers],
        [ref(m) for m in modules],
        [ref(m) for m in parents],
        [list(m._modules) for m in parents],
        [ref(child) if child is not None else _no_module for m in parents for child in m._modules.values()],
        hash(tuple(map(_number, modules))),
        loose,
    )
    return found


def _may_hold(value: Any, known: set[int]) -> bool:
    """Does an object lead to an unknown tensor, array or module, or may it later (an empty container)?

    `known`: ids of known tensors and modules, and of objects that lead to no others; objects found to be such are added.
    """
    if isinstance(value, list | dict | set | deque) and not value:
        return True
    todo: list[Any] = [value]
    seen: set[int] = set()
    while todo and len(seen) < MOST_NODES:
        obj = todo.pop()
        if is_opaque(obj) or id(obj) in known or id(obj) in seen:
            continue
        seen.add(id(obj))
        if isinstance(obj, Tensor | np.ndarray | nn.Module):
            return True
        if not isinstance(obj, RANDOM):
            todo += [child for _, _, child in children(obj) if type(child) not in OPAQUE_TYPES]
    if not todo:
        known |= seen
    return False


def forget(roots: Sequence[Any]) -> None:
    """Drop what is cached of these modules, so that the next call looks again."""
    for root in Reached(roots).modules:
        _below.pop(root, None)


_numbers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_counter = itertools.count()


def _number(module: nn.Module) -> int:
    """Return a number that no other module has or had; an id may be used again."""
    found = _numbers.get(module)
    if found is None:
        found = _numbers[module] = next(_counter)
    return found


class Reached:
    """The objects that a call can read besides its arguments, looked up once per call.

    Args:
        roots: the roots that `roots_of` and `objects_in` found.

    Attributes:
        roots: the same.
        modules: modules that are not below another one that was found before.
        around: tensors that no module has registered.
        arrays: numpy arrays.
        training: the `training` flag of every module: state and draws depend on it.
        structures: `Below.structure` of each of `modules`: the state that a forward changes depends on it.
        standing: per `below`, the modules right below others, held until backward.
        flags: bools in plain objects and closures: which state a forward changes often depends on them.
    """

    __slots__ = (
        "_code",
        "around",
        "arrays",
        "below",
        "flags",
        "modules",
        "roots",
        "standing",
        "structures",
        "training",
    )

    def __init__(self, roots: Sequence[Any]) -> None:
        self.roots = roots
        self.below: list[Below] = []
        self.modules: list[nn.Module] = []
        self.standing: list[list[Any]] = []
        self.structures: list[int] = []
        self.around: list[Tensor] = []
        self.arrays: list[np.ndarray[Any, Any]] = []
        self._code: list[Any] = []
        self.flags: list[bool] = []
        training: list[bool] = []
        todo = deque(roots)
        seen: set[int] = set()
        while todo:
            obj = todo.popleft()
            kind = type(obj)
            if kind in _PLAIN or id(obj) in seen or len(seen) > MOST_NODES:
                continue
            seen.add(id(obj))
            if isinstance(obj, Tensor):
                self.around.append(obj)
            elif isinstance(obj, nn.Module):
                self._add(obj, training, seen, todo)
            elif kind is np.ndarray:
                self.arrays.append(obj)
            elif not is_opaque(obj) and not isinstance(obj, RANDOM):
                if kind is types.FunctionType:
                    self._code.append(obj.__code__)
                elif kind not in CONTAINERS:
                    self._code.append(kind)
                for _, _, child in children(obj):
                    if type(child) is bool:
                        self.flags.append(child)
                    elif type(child) not in _PLAIN:
                        todo.append(child)
        self.training = tuple(training)
        if self.around and self.below:
            registered = {id(t) for below in self.below for d in below.tensors for t in d.values()}
            self.around = [t for t in self.around if id(t) not in registered]

    def _add(self, module: nn.Module, training: list[bool], seen: set[int], todo: deque[Any]) -> None:
        below = _below.get(module) or _found_below(module)
        try:
            standing = below.standing()
            same = [child() for child in below.children] == standing
        except AttributeError:  # a parent is gone
            same = False
        if not same:  # a module was replaced, added or removed
            below = _found_below(module)
            standing = below.standing()
        training.append(module.training)
        training += [m.training for m in standing if m is not None]
        self.structures.append(below.structure)
        self.standing.append(standing)
        self.below.append(below)
        self.modules.append(module)
        if below.loose:
            seen.update([id(m()) for m in below.modules])
            for owner, step in below.loose:
                try:
                    todo.append(follow(owner(), step))
                except (AttributeError, KeyError, TypeError):  # the attribute does not exist at the moment
                    continue

    def set_training(self) -> None:
        """Set each module's `training` flag as it was when these objects were looked up."""
        was = iter(self.training)
        for module, standing in zip(self.modules, self.standing, strict=True):
            for m in (module, *standing):
                if m is not None and m.training is not (training := next(was)):
                    m.training = training

    def identity(self, without: nn.Module | None = None) -> tuple[Hashable, ...]:
        """Return a key that tells units of one function apart: modules by number, functions by code, other objects by type."""
        return (*[_number(m) for m in self.modules if m is not without], *dict.fromkeys(self._code))

    def tensors(self, without: Container[tuple[int, str]] = ()) -> list[Tensor]:
        """Return parameters and buffers of modules; `without`: (id of a dict, key) pairs to leave out."""
        found: list[Any] = []
        for below in self.below:
            for d in below.tensors:
                found.extend([t for k, t in d.items() if (id(d), k) not in without] if without else d.values())
        return [t for t in found if t is not None]

    def replaced(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return the dicts of modules that have another content than at the call, each with its old content."""
        found: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for below, standing in zip(self.below, self.standing, strict=True):
            if below.standing() != standing:
                stood = iter(standing)
                for parent, names in zip(below.parents, below.names, strict=True):
                    dict_of = parent()._modules  # type: ignore[union-attr]  # the reached modules hold it
                    content = {name: next(stood) for name in names}
                    if list(dict_of.items()) != list(content.items()):
                        found.append((dict_of, content))
        return found

    def all_modules(self) -> list[nn.Module]:
        """Return the modules, and those below them."""
        return [m for root in self.modules for m in root.modules()]

    def is_compiled(self) -> bool:
        """Does Dynamo compile one of the modules?"""
        compiled = ("_compiled_call_impl", "_torchdynamo_orig_callable")
        return any(getattr(m, name, None) for m in self.all_modules() for name in compiled)

    def dicts(self) -> list[dict[str, Any]]:
        """Return the modules' dicts of parameters and of buffers."""
        return [d for below in self.below for d in below.tensors]

    def buffers(self) -> list[Tensor]:
        """Return the modules' buffers."""
        return [t for below in self.below for d in below.buffers for t in d.values() if t is not None]


def name_in(roots: Iterable[Any], tensor: Tensor) -> str:
    """Return the name that a person would use for a tensor."""
    for obj, way in traverse(list(roots), {}):
        if obj is tensor and (name := name_of(way)):
            return name
    return f"a tensor of shape {tuple(tensor.shape)} that it closes over"
