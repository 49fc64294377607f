"""From a trace to bytes over time: live bytes before, during and at the peak of every op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ullage.capture._trace import Storage, Trace

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class OpCost:
    """What one op signature costs.

    Attributes:
        seconds: time of one call.
        internal_bytes: the most a call has allocated at any moment, outputs included.
        output_bytes: real sizes of the storages it allocates and returns, where known.
    """

    seconds: float
    internal_bytes: int
    output_bytes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Timeline:
    """Bytes per op: `before` it starts, at its `peak`, `after` it."""

    before: Array
    peak: Array
    after: Array
    seconds: npt.NDArray[np.float64]


def effective_bytes(storage: Storage, trace: Trace, costs: Sequence[OpCost]) -> int:
    """A storage's size, as the real kernel makes it where that was measured."""
    if storage.position >= 0:
        real = costs[trace.signature[storage.birth]].output_bytes
        if storage.position < len(real) and real[storage.position] > storage.nbytes:
            return real[storage.position]
    return storage.nbytes


def timeline(trace: Trace, costs: Sequence[OpCost]) -> Timeline:
    """Sum storages over op indices."""
    n = len(trace.signature)
    born, dead = np.zeros(n + 2, np.int64), np.zeros(n + 2, np.int64)
    for s in trace.storages:
        size = effective_bytes(s, trace, costs)
        born[max(s.birth, -1) + 1] += size
        dead[min(s.death, n) + 1] += size
    # born[i + 1]: during op i; dead[i + 1]: after op i, before op i + 1
    alive_during = np.cumsum(born)[1 : n + 1] - np.cumsum(dead)[:n]
    before = alive_during - born[1 : n + 1]
    internal = np.array([costs[s].internal_bytes for s in trace.signature], np.int64)
    peak = before + np.maximum(born[1 : n + 1], internal)
    after = alive_during - dead[1 : n + 1]
    seconds = np.array([costs[s].seconds for s in trace.signature])
    return Timeline(before, peak, after, seconds)


def steps(trace: Trace) -> list[slice]:
    """The op range of each step."""
    return [slice(a, b) for a, b in zip(trace.marks, [*trace.marks[1:], len(trace.signature)], strict=True)]


def segment_keys(
    trace: Trace, ops: slice, stacks: Sequence[tuple[str, ...]], units: frozenset[str], calls: Any
) -> list[tuple[Any, int, int]]:
    """Split a step into maximal runs of ops that belong to the same unit call and phase.

    Returns:
        (key, first op, one past the last op); key is (phase, unit FQN or "", call index), numbered where it repeats.
    """
    starts = np.array([c.first_sequence for c in calls], np.int64)
    unit_of_stack = [next((f for f in s if f in units), "") for s in stacks]
    call_of_op = {}
    for c in calls:
        for op in (c.first_op,):
            call_of_op[op] = c
    runs: list[list[Any]] = []
    current: tuple[str, str, int] = ("forward", "", 0)
    by_first = {c.first_op: c for c in reversed(calls)}
    open_call: Any = None
    for i in range(ops.start, ops.stop):
        if trace.phase[i] == "backward":
            sequence = trace.sequence[i]
            if 0 <= sequence < 2**62:
                k = int(np.searchsorted(starts, sequence, side="right")) - 1
                inside = k >= 0 and sequence < calls[k].last_sequence
                current = ("backward", calls[k].fqn, calls[k].index) if inside else ("backward", "", 0)
            elif current[0] != "backward":
                current = ("backward", "", 0)
        else:
            if i in by_first:
                open_call = by_first[i]
            fqn = unit_of_stack[trace.stack[i]]
            inside = bool(fqn) and open_call is not None and open_call.fqn == fqn
            current = (trace.phase[i], fqn, open_call.index) if inside else (trace.phase[i], "", 0)
        if runs and runs[-1][0] == current:
            runs[-1][2] = i + 1
        else:
            runs.append([current, i, i + 1])
    seen: dict[Any, int] = {}
    result = []
    for key, first, last in runs:
        seen[key] = seen.get(key, -1) + 1
        result.append(((*key, seen[key]), first, last))
    return result
