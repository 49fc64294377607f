"""Step from an object to the objects it holds. No other module of the runtime knows what there is to follow.

Steps lead to attributes, slots, items, cells of closures, defaults, the parts of partials and bound methods, and the globals that
a user's code loads. A step can be taken again from another object of the same structure (`follow`), so a path that one call
found serves the next. Not followed are modules of Python, classes, the code of libraries (torch, the standard library,
site-packages), and ullage's own objects.
"""

from __future__ import annotations

import dis
import enum
import functools
import io
import itertools
import logging
import queue
import random
import subprocess
import sysconfig
import threading
import types
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from multiprocessing.process import BaseProcess
from pathlib import Path as FilePath
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import numpy as np
import torch
import torch.utils.data
from torch import Tensor, nn

from ullage._source import OURS
from ullage._torch import FunctionSchema, LoaderIterator, OperatorBase, OpOverloadPacket
from ullage.runtime.ambient._local import Apart
from ullage.runtime.state._content import PLAIN, Cells, Globals, Slots, base_of

Step = tuple[str, Any]
# Objects that one walk visits. It bounds a first call where a model holds data: a visit takes about 15 us, so a walk takes 0.3 s
# at most. Changes to state beyond it go unseen, and only the digests of the first replay can tell.
MOST_NODES = 20_000
MODULE_FIELDS = frozenset(nn.Module().__dict__)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # those that run inside a unit's forward
RANDOM = (torch.Generator, np.random.Generator, np.random.BitGenerator, np.random.RandomState, random.Random)
_PARTS = (Tensor, np.ndarray, *RANDOM)  # objects with values and no children
CONTAINERS = (list, tuple, dict, set, frozenset, deque)
MUTABLE = (dict, list, set, deque, bytearray, array)
OPAQUE = (
    type,
    types.ModuleType,
    types.CodeType,
    torch.dtype,
    torch.device,
    torch.Size,
    enum.Enum,
    logging.Logger,
    io.IOBase,
    ReferenceType,
    Apart,
    OperatorBase,  # tables of ops lead to all of torch's decompositions
    OpOverloadPacket,
    FunctionSchema,
    # shared with other threads and processes
    *(type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Event, threading.Semaphore),
    *(threading.Thread, queue.Queue, queue.SimpleQueue, subprocess.Popen, BaseProcess, Executor, Future),
    LoaderIterator,
)
_BOUND = (types.MethodType, types.BuiltinFunctionType, types.MethodWrapperType)
_GLOBAL_RNG = {id(getattr(random, "_inst", None)), id(getattr(np.random.mtrand, "_rand", None))}  # `_ambient` has these
_LIBRARIES = (
    "<frozen",
    *{sysconfig.get_paths()[k] for k in ("stdlib", "platstdlib", "purelib", "platlib")},
    str(FilePath(torch.__file__).parent),
)
_ITSELF = -1
# Caches of facts that never change, by code and by class. Functions are held weakly, because a class's functions hold the class.
_names: WeakKeyDictionary[types.CodeType, tuple[tuple[str, ...], tuple[str, ...]]] = WeakKeyDictionary()
_functions: WeakKeyDictionary[type, tuple[ReferenceType[types.FunctionType], ...]] = WeakKeyDictionary()
_slots: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()


# The opaque types that a walk meets most, for a quick check; `is_opaque` knows the others.
OPAQUE_TYPES = frozenset((*PLAIN, type, types.ModuleType, types.CodeType, torch.dtype, torch.device, torch.Size))


def is_opaque(obj: Any) -> bool:
    """Is the object one that no walk follows?"""
    kind = type(obj)
    if kind in OPAQUE_TYPES:
        return True
    return kind not in CONTAINERS and (
        isinstance(obj, (*PLAIN, *OPAQUE)) or id(obj) in _GLOBAL_RNG or _is_machinery(kind)
    )


def _is_machinery(kind: type) -> bool:
    """Is it one of torch.distributed's objects (FSDP's states, meshes)? They follow forwards and backwards themselves."""
    return str(kind.__module__).startswith("torch.distributed.") and not issubclass(kind, nn.Module | Tensor)


@functools.cache
def is_library(file: str) -> bool:
    """Is a file's code torch's, Python's or an installed package's, and not the user's?"""
    return file.startswith((*_LIBRARIES, OURS)) or "site-packages" in file or "dist-packages" in file


def is_ours(fn: types.FunctionType) -> bool:
    """Is it a function of ullage? Its state is no unit's."""
    return fn.__code__.co_filename.startswith(OURS)


# --- code ---------------------------------------------------------------------------------------------------------------


def global_names(code: types.CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the globals that code loads and those that it assigns to, including functions inside it."""
    found = _names.get(code)
    if found is None:
        loads: dict[str, None] = {}
        stores: dict[str, None] = {}
        for op in dis.get_instructions(code):
            if op.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                loads[op.argval] = None
            elif op.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                stores[op.argval] = None
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                more = global_names(inner)
                loads.update(dict.fromkeys(more[0]))
                stores.update(dict.fromkeys(more[1]))
        found = _names[code] = (tuple(loads), tuple(stores))
    return found


def functions_of(cls: type) -> tuple[ReferenceType[types.FunctionType], ...]:
    """Return the methods of a class and its bases whose code is the user's."""
    found = _functions.get(cls)
    if found is None:
        methods: list[ReferenceType[types.FunctionType]] = []
        for base in cls.__mro__:
            for value in list(vars(base).values()):
                fn = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if isinstance(fn, types.FunctionType) and not is_library(fn.__code__.co_filename):
                    methods.append(ref(fn))
        found = _functions[cls] = tuple(methods)
    return found


def slots_of(cls: type) -> tuple[str, ...]:
    """Return the names of the slots of a class written in Python."""
    found = _slots.get(cls)
    if found is None:
        bases = [base for base in cls.__mro__ if "__slots__" in vars(base)]
        names = [n for base in bases for n, v in vars(base).items() if isinstance(v, types.MemberDescriptorType)]
        found = _slots[cls] = tuple(dict.fromkeys(names))
    return found


def _globals_of(fn: types.FunctionType, method: int = _ITSELF) -> Iterator[tuple[Step, str, Any]]:
    """Yield the globals that a function loads.

    `method`: index of the function among its class's methods, if it is one. The steps name the method by it: a function object
    may be another one at each call.
    """
    if is_library(fn.__code__.co_filename):
        return
    values = fn.__globals__
    for name in global_names(fn.__code__)[0]:
        value = values.get(name)
        if value is None or is_opaque(value):
            continue
        foreign = isinstance(value, types.FunctionType) and is_library(value.__code__.co_filename)
        # a function of a library's with `__wrapped__` is a decorator around one of the user's
        if foreign and "__wrapped__" not in value.__dict__:
            continue
        yield ("g", (method, name)), name, value


# --- steps --------------------------------------------------------------------------------------------------------------


def _items(obj: Any) -> Iterator[tuple[Step, str, Any]]:
    if isinstance(obj, dict):
        for key in list(dict.__iter__(obj)):
            yield ("i", key), key if type(key) in PLAIN else "an item", dict.__getitem__(obj, key)
    elif isinstance(obj, list | tuple | deque):
        for i, value in enumerate(base_of(type(obj)).__iter__(obj)):
            yield ("i", i), str(i), value
    elif isinstance(obj, set | frozenset):
        for i, value in enumerate(base_of(type(obj)).__iter__(obj)):
            yield ("n", i), str(i), value


def _of_function(fn: types.FunctionType) -> Iterator[tuple[Step, str, Any]]:
    if is_ours(fn):
        wrapped = fn.__dict__.get("__wrapped__")
        if wrapped is not None:
            yield ("a", "__wrapped__"), "", wrapped
        return
    if fn.__closure__:
        for name, value in Cells(fn).read().items():
            yield ("c", name), name, value
    for i, value in enumerate(fn.__defaults__ or ()):
        yield ("d", i), f"default {i}", value
    for name, value in (fn.__kwdefaults__ or {}).items():
        yield ("k", name), name, value
    yield from _globals_of(fn)


def children(obj: Any) -> Iterator[tuple[Step, str, Any]]:
    """Yield each step from an object with its name for a person and the object it leads to. Don't call it for opaque objects."""
    if isinstance(obj, types.FunctionType):
        yield from _of_function(obj)
        if is_ours(obj):
            return
    elif isinstance(obj, _BOUND):
        owner = obj.__self__
        ours = isinstance(obj, types.MethodType) and getattr(obj.__func__, "__module__", "").startswith("ullage.")
        if not ours and not is_opaque(owner):
            yield ("self", None), "", owner
            if isinstance(obj, types.MethodType):
                yield ("func", None), "", obj.__func__
        return
    elif isinstance(obj, functools.partial):
        yield ("func", None), "", obj.func
        for i, value in enumerate(obj.args):
            yield ("arg", i), str(i), value
        for name, value in obj.keywords.items():
            yield ("kw", name), name, value
    elif isinstance(obj, dict | list | tuple | deque | set | frozenset):
        yield from _items(obj)
    elif isinstance(obj, _PARTS):
        return
    yield from _fields(obj)


def _fields(obj: Any) -> Iterator[tuple[Step, str, Any]]:
    fields = getattr(obj, "__dict__", None)
    if isinstance(fields, dict):
        module = isinstance(obj, nn.Module)
        for key, value in list(fields.items()):
            if not module or key not in MODULE_FIELDS:
                yield ("a", key), key, value
            elif key in ("_parameters", "_buffers", "_modules"):
                yield from ((("m", (key, k)), k, v) for k, v in list(value.items()))
            elif key in HOOKS:
                yield from ((("m", (key, k)), "hook", v) for k, v in list(value.items()))
    cls = type(obj)
    # Py_TPFLAGS_HEAPTYPE: made by a class statement; static types of C have neither slots nor methods in Python
    if cls.__flags__ & 512:
        for name, value in Slots(obj, slots_of(cls)).read().items():
            yield ("s", name), name, value
        for i, method in enumerate(functions_of(cls)):
            fn = method()
            if fn is not None:
                yield from _globals_of(fn, i)


def places(obj: Any) -> Iterator[tuple[tuple[Step, ...], Any]]:
    """Yield the places of an object whose content can change (itself, its attributes, slots, cells, globals), with the steps there."""
    if isinstance(obj, MUTABLE):
        yield (), obj
    fields = getattr(obj, "__dict__", None)
    if isinstance(fields, dict) and not isinstance(obj, RANDOM):
        yield (("a", None),), fields
    if isinstance(obj, nn.Module):
        yield (("a", "_parameters"),), obj._parameters
        yield (("a", "_buffers"),), obj._buffers
    if isinstance(obj, types.FunctionType):
        if obj.__closure__ and not is_ours(obj):
            yield (("C", None),), Cells(obj)
        yield from _stored_globals(obj)
        return
    cls = type(obj)
    if cls.__flags__ & 512:
        names = slots_of(cls)
        if names:
            yield (("S", None),), Slots(obj, names)
        for i, method in enumerate(functions_of(cls)):
            fn = method()
            if fn is not None:
                yield from _stored_globals(fn, i)


def _stored_globals(fn: types.FunctionType, method: int = _ITSELF) -> Iterator[tuple[tuple[Step, ...], Any]]:
    if not is_library(fn.__code__.co_filename):
        stored = global_names(fn.__code__)[1]
        if stored:
            yield (("G", method),), Globals(fn, stored)


def _method(obj: Any, method: int) -> Any:
    return obj if method == _ITSELF else functions_of(type(obj))[method]()


def follow(obj: Any, step: Step) -> Any:
    """Return the object that a step leads to; an error of Python's if it leads nowhere."""
    kind, key = step
    if kind == "a":
        return obj.__dict__ if key is None else obj.__dict__[key]
    if kind == "m":
        return obj.__dict__[key[0]][key[1]]
    if kind == "i":
        return base_of(type(obj)).__getitem__(obj, key)
    if kind == "n":
        return next(itertools.islice(obj, key, None))
    return _FOLLOW[kind](obj, key)


_FOLLOW = {
    "s": lambda obj, name: getattr(type(obj), name).__get__(obj),
    "S": lambda obj, _: Slots(obj, slots_of(type(obj))),
    "c": lambda fn, name: Cells(fn).read()[name],
    "C": lambda fn, _: Cells(fn),
    "d": lambda fn, i: fn.__defaults__[i],
    "k": lambda fn, name: fn.__kwdefaults__[name],
    "g": lambda obj, key: _method(obj, key[0]).__globals__[key[1]],
    "G": lambda obj, i: Globals(fn := _method(obj, i), global_names(fn.__code__)[1]),
    "self": lambda obj, _: obj.__self__,
    "func": lambda obj, _: obj.__func__ if isinstance(obj, types.MethodType) else obj.func,
    "arg": lambda obj, i: obj.args[i],
    "kw": lambda obj, name: obj.keywords[name],
}


def is_part(obj: Any) -> bool:
    """Is it a tensor, an array or a generator? These have values and no children."""
    return isinstance(obj, _PARTS)
