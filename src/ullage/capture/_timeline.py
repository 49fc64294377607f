"""Sum a trace's storages to bytes over time: live bytes before, at the peak of, and after every op."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ullage.capture._trace import Storage, Trace

Array = npt.NDArray[np.int64]
_ENGINE_SEQUENCE = 2**62  # below the sequence number of gradient accumulation (the largest uint64), above any op's


@dataclass(frozen=True)
class OpCost:
    """Seconds and bytes of one op signature.

    Attributes:
        seconds: time of one call.
        internal_bytes: the most bytes that a call has allocated at any moment, with its outputs, without tensors made of its numbers.
        output_bytes: real sizes of the storages that it allocates and returns, if known.
        bounds: `internal_bytes` depends on values, and is the most of several tried.
    """

    seconds: float
    internal_bytes: int
    output_bytes: tuple[int, ...] = ()
    bounds: bool = False


@dataclass(frozen=True)
class Timeline:
    """Bytes per op: `before` it starts, at its `peak`, `after` it."""

    before: Array
    peak: Array
    after: Array
    seconds: npt.NDArray[np.float64]


def effective_bytes(storage: Storage, trace: Trace, costs: Sequence[OpCost]) -> int:
    """Return a storage's size: the real kernel's, if that was measured."""
    if storage.booked is not None:
        return storage.booked
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
        if s.death < s.birth:  # freed before the next op (a generator's state that is only compared)
            continue
        born[max(s.birth, -1) + 1] += size
        dead[min(s.death, n) + 1] += size
    # born[i + 1]: during op i; dead[i + 1]: after op i, before op i + 1
    alive_during = np.cumsum(born)[1 : n + 1] - np.cumsum(dead)[:n]
    before = alive_during - born[1 : n + 1]
    inside = [costs[s].internal_bytes + numbers for s, numbers in zip(trace.signature, trace.numbers, strict=True)]
    for i, measured in trace.inside.items():  # measured with the numbers of the whole node
        inside[i] = measured
    held = np.zeros(n, np.int64)  # per op, bytes made between it and the op before, and alive while it runs
    for s in {id(s): s for moment in trace.between for s in moment.born}.values():
        if s.birth <= s.death and 0 <= s.birth < n:
            held[s.birth] += effective_bytes(s, trace, costs)
    peak = before + held + np.maximum(born[1 : n + 1] - held, np.array(inside, np.int64))
    for moment in trace.between:
        live = int(alive_during[moment.at - 1]) if moment.at > 0 else int(np.cumsum(born)[0])
        live += sum(effective_bytes(s, trace, costs) for s in moment.born)
        live -= sum(effective_bytes(s, trace, costs) for s in moment.dead)
        # a state that is only compared is made when a unit's forward is over, after the last of its ops
        compared = any(s.death < s.birth for s in moment.born)
        at = min(max(moment.at - compared, 0), n - 1)
        peak[at] = max(peak[at], live)
    after = alive_during - dead[1 : n + 1]
    seconds = np.array([costs[s].seconds for s in trace.signature])
    return Timeline(before, peak, after, seconds)


def segment_keys(
    trace: Trace, ops: slice, stacks: Sequence[tuple[str, ...]], units: frozenset[str], calls: Sequence[Any]
) -> list[tuple[Any, int, int]]:
    """Split a step into maximal ranges of ops that belong to the same unit call and phase.

    Args:
        trace: the recorded ops.
        ops: the step's.
        stacks: module stacks by their index in the trace.
        units: FQNs of the units.
        calls: the units' calls in the step, by first autograd sequence number.

    Returns:
        (key, first op, one past the last op); key is (phase, unit FQN or "", call index), numbered where it repeats.
    """
    starts = np.array([c.first_sequence for c in calls], np.int64)
    sequences = np.array([min(s, _ENGINE_SEQUENCE) for s in trace.sequence[ops]], np.int64)
    call_before = np.searchsorted(starts, sequences, side="right") - 1
    unit_of_stack = [next((f for f in s if f in units), "") for s in stacks]
    first_op = {c.first_op: c for c in reversed(calls)}
    runs: list[list[Any]] = []
    current: tuple[str, str, int] = ("forward", "", 0)
    open_call: Any = None
    for i in range(ops.start, ops.stop):
        phase = trace.phase[i]
        if phase == "backward":  # a node belongs to the call that made it
            sequence = trace.sequence[i]
            if 0 <= sequence < _ENGINE_SEQUENCE:
                call = calls[k] if (k := int(call_before[i - ops.start])) >= 0 else None
                inside = call is not None and sequence < call.last_sequence
                current = (phase, call.fqn, call.index) if call is not None and inside else (phase, "", 0)
            elif current[0] != phase:
                current = (phase, "", 0)
        else:
            open_call = first_op.get(i, open_call)
            fqn = unit_of_stack[trace.stack[i]]
            inside = bool(fqn) and open_call is not None and open_call.fqn == fqn
            current = (phase, fqn, open_call.index) if inside else (phase, "", 0)
        if runs and runs[-1][0] == current:
            runs[-1][2] = i + 1
        else:
            runs.append([current, i, i + 1])
    seen: Counter[Any] = Counter()
    result = []
    for key, first, last in runs:
        result.append(((*key, seen[key]), first, last))
        seen[key] += 1
    return result
