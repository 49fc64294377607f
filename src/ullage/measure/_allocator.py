"""The CPU allocator's own record: torch's profiler with `profile_memory=True`, its `[memory]` events."""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler import profile, record_function

from ullage._torch import event_tree

_STEP = "ullage::step"
_FREED = "ullage::freed"


@dataclass(frozen=True)
class MemoryEvent:
    """One allocation (positive) or free (negative), at a time in ns."""

    time_ns: int
    nbytes: int


@dataclass(frozen=True)
class BlockEvent:
    """One allocation (positive) or free (negative) of a block; `ops` are the calls it happens in, the innermost first."""

    time_ns: int
    nbytes: int
    address: int
    ops: tuple[str, ...]


class Resident:
    """Memory from before a recording, held weakly. Torch's profiler leaves out that it is freed (`p.data = other`), so a mark says it."""

    def __init__(self, storages: Iterable[torch.UntypedStorage]) -> None:
        self.nbytes, self._alive = 0, []
        for storage in storages:
            self.nbytes += storage.nbytes()
            self._alive.append(weakref.ref(storage, functools.partial(_mark_freed, storage.nbytes())))


def _mark_freed(nbytes: int, _: Any) -> None:
    with record_function(f"{_FREED}{nbytes}"):
        pass


def record_blocks(call: Callable[[], None], steps: int) -> list[BlockEvent]:
    """As `record_steps`, of all runs together, with each block's address and the ops around it."""
    return _record(call, steps)[0]


def record_allocations(call: Callable[[], None]) -> list[MemoryEvent]:
    """Run `call` and return what the CPU allocator recorded, in order."""
    return record_steps(call, 1)[0]


def record_steps(call: Callable[[], None], steps: int) -> list[list[MemoryEvent]]:
    """Run `call` several times under one recording; events of each run apart.

    One recording, because frees of blocks that were allocated before it started are not in it (`_of_this_recording`).
    """
    events, starts = _record(call, steps)
    ends = [*starts[1:], 2**63]
    return [
        [MemoryEvent(e.time_ns, e.nbytes) for e in events if a <= e.time_ns < b]
        for a, b in zip(starts, ends, strict=True)
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler writes on stderr, unless this is set when it is first used."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "99"
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _record(call: Callable[[], None], steps: int) -> tuple[list[BlockEvent], list[int]]:
    """Return the events of blocks, in order, and the moment each run began."""
    with _quiet(), profile(use_cpu=True, profile_memory=True) as prof:
        for k in range(steps):
            with record_function(f"{_STEP}{k}"):
                call()
    assert prof.kineto_results is not None
    found, freed, starts, names = [], [], [], {f"{_STEP}{k}" for k in range(steps)}
    roots = reversed(event_tree(prof.kineto_results))
    todo: list[tuple[Any, tuple[str, ...]]] = [(n, ()) for n in roots]
    while todo:
        node, ops = todo.pop()
        if node.name == "[memory]":
            fields = node.extra_fields
            if fields.device.type == "cpu":
                found.append(BlockEvent(node.start_time_ns, fields.alloc_size, fields.ptr, ops))
            continue
        if node.name.startswith(_FREED):
            freed.append(BlockEvent(node.start_time_ns, -int(node.name.removeprefix(_FREED)), 0, ops))
        if node.name in names:
            starts.append(node.start_time_ns)
        else:
            ops = (node.name, *ops)
        todo.extend((child, ops) for child in reversed(node.children))
    found = [*_of_this_recording(sorted(found, key=lambda e: e.time_ns)), *freed]
    return sorted(found, key=lambda e: e.time_ns), sorted(starts)


def _of_this_recording(events: list[BlockEvent]) -> Iterator[BlockEvent]:
    """Drop frees of blocks that an earlier recording saw allocated: the profiler knows those, and the collector frees them at any time."""
    allocated = set()
    for event in events:
        if event.nbytes > 0:
            allocated.add(event.address)
        elif event.address not in allocated:
            continue
        else:
            allocated.discard(event.address)
        yield event
