"""Read, put back and compare the content of containers and other places that hold objects by name; and states of generators."""

from __future__ import annotations

import random
from array import array
from collections import OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import torch

from ullage.runtime.ambient._ambient import own_state

PLAIN = (bool, int, float, complex, str, bytes, type(None))


class View:
    """A place that holds objects by name and is no container.

    Args:
        owner: the object, function or class that has it.
        names: slots, or names of globals.
    """

    __slots__ = ("names", "owner")

    def __init__(self, owner: Any, names: tuple[str, ...] = ()) -> None:
        self.owner, self.names = owner, names

    def read(self) -> dict[Any, Any]:
        """Return the content now."""
        raise NotImplementedError

    def put(self, content: dict[Any, Any]) -> None:
        """Make this the content."""
        raise NotImplementedError


class Slots(View):
    """The `__slots__` of an object; written past a `__setattr__` of its class."""

    __slots__ = ()

    def read(self) -> dict[Any, Any]:
        found = {}
        for name in self.names:
            try:
                found[name] = getattr(type(self.owner), name).__get__(self.owner)
            except AttributeError:
                continue
        return found

    def put(self, content: dict[Any, Any]) -> None:
        now = self.read()
        for name in self.names:
            slot = getattr(type(self.owner), name)
            if name in content:
                slot.__set__(self.owner, content[name])
            elif name in now:
                slot.__delete__(self.owner)


class Cells(View):
    """The variables of enclosing functions that a function uses."""

    __slots__ = ()

    def read(self) -> dict[Any, Any]:
        found = {}
        for name, cell in zip(self.owner.__code__.co_freevars, self.owner.__closure__, strict=True):
            try:
                found[name] = cell.cell_contents
            except ValueError:  # not filled yet
                continue
        return found

    def put(self, content: dict[Any, Any]) -> None:
        for name, cell in zip(self.owner.__code__.co_freevars, self.owner.__closure__, strict=True):
            if name in content:
                cell.cell_contents = content[name]
            else:
                del cell.cell_contents


class Globals(View):
    """Globals that a function assigns to."""

    __slots__ = ()

    def read(self) -> dict[Any, Any]:
        values = self.owner.__globals__
        return {n: values[n] for n in self.names if n in values}

    def put(self, content: dict[Any, Any]) -> None:
        values = self.owner.__globals__
        for name in self.names:
            if name in content:
                values[name] = content[name]
            else:
                values.pop(name, None)


def base_of(cls: type) -> Any:
    """Return the built-in type whose methods read and write a container past any method that its class overrides."""
    for base in (OrderedDict, defaultdict, dict, list, tuple, deque, set, frozenset):
        if issubclass(cls, base):
            return base
    return cls


def content_of(obj: Any) -> Any:
    """Return a shallow copy of a container's or a view's content."""
    if isinstance(obj, View):
        return obj.read()
    if isinstance(obj, dict):
        return {k: dict.__getitem__(obj, k) for k in base_of(type(obj)).__iter__(obj)}
    if isinstance(obj, set | frozenset):
        return set(obj)
    return list(base_of(type(obj)).__iter__(obj))


_MISSING = object()


def put_content(obj: Any, content: Any) -> None:
    """Give a container or view its old content in place: holders of it see the same object."""
    if isinstance(obj, View):
        obj.put(content)
    elif isinstance(obj, dict):
        base = base_of(type(obj))
        for key in [k for k in base.__iter__(obj) if k not in content]:
            base.__delitem__(obj, key)
        for key, value in content.items():
            if dict.get(obj, key, _MISSING) is not value:
                base.__setitem__(obj, key, value)
        if list(base.__iter__(obj)) != list(content):  # the order is content, too
            base.clear(obj)
            for key, value in content.items():
                base.__setitem__(obj, key, value)
    elif isinstance(obj, list):
        list.__setitem__(obj, slice(None), content)
    elif isinstance(obj, set):
        set.clear(obj)
        set.update(obj, content)
    elif isinstance(obj, deque):
        deque.clear(obj)
        deque.extend(obj, content)
    else:
        obj[:] = type(obj)(content) if isinstance(obj, bytearray) else array(obj.typecode, content)


def same_content(a: Any, b: Any) -> bool:
    """Do two copies of a content hold the same objects, or equal plain values?"""
    if len(a) != len(b):
        return False
    if isinstance(a, set):
        return bool(a == b)
    if isinstance(a, dict):
        if list(a) != list(b):
            return False
        a, b = a.values(), b.values()
    return all(x is y or (isinstance(x, PLAIN) and type(x) is type(y) and x == y) for x, y in zip(a, b, strict=True))


def random_state(generator: Any) -> Any:
    """Return the state of a generator of torch, numpy or Python."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.BitGenerator):
        return generator.state
    if isinstance(generator, torch.Generator):
        return own_state(generator)
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def put_random_state(generator: Any, state: Any) -> None:
    """Put a generator's state back."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
