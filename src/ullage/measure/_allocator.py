"""The CPU allocator's own record: torch's profiler with `profile_memory=True`, its `[memory]` events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._C._autograd import DeviceType
from torch.autograd.profiler import profile, record_function


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


def record_blocks(call: Callable[[], None], steps: int) -> list[BlockEvent]:
    """As `record_steps`, of all runs together, with each block's address and the ops around it."""
    with profile(use_cpu=True, profile_memory=True) as prof:
        for _ in range(steps):
            call()
    assert prof.kineto_results is not None
    found = []
    todo: list[tuple[Any, tuple[str, ...]]] = [(n, ()) for n in prof.kineto_results.experimental_event_tree()]
    while todo:
        node, ops = todo.pop()
        fields = node.extra_fields
        if node.name == "[memory]":
            if fields.device.type == "cpu":
                found.append(BlockEvent(node.start_time_ns, fields.alloc_size, fields.ptr, ops))
            continue
        todo.extend((child, (node.name, *ops)) for child in node.children)
    return sorted(found, key=lambda e: e.time_ns)


def record_allocations(call: Callable[[], None]) -> list[MemoryEvent]:
    """Run `call` and return what the CPU allocator recorded, in order."""
    return record_steps(call, 1)[0]


def record_steps(call: Callable[[], None], steps: int) -> list[list[MemoryEvent]]:
    """Run `call` several times under one recording; events of each run apart.

    One recording, because frees of blocks that were allocated before it started are not in the record.
    """
    with profile(use_cpu=True, profile_memory=True) as prof:
        for k in range(steps):
            with record_function(f"ullage::step{k}"):
                call()
    assert prof.kineto_results is not None
    events, starts = [], []
    for e in prof.kineto_results.events():
        if e.name() == "[memory]":
            if e.device_type() == DeviceType.CPU:
                events.append(MemoryEvent(e.start_ns(), e.nbytes()))
        elif e.name().startswith("ullage::step"):
            starts.append(e.start_ns())
    events.sort(key=lambda e: e.time_ns)
    starts.sort()
    ends = [*starts[1:], 2**63]
    return [[e for e in events if a <= e.time_ns < b] for a, b in zip(starts, ends, strict=True)]
