"""The transfers of a captured step: bytes and moments of the tensors that it offloads and brings back."""

from __future__ import annotations

import heapq
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from ullage.capture._store import Transfer
from ullage.offload import whole_blocks
from ullage.planner.study._executed import StepCapture
from ullage.solver._channels import COMPUTE, IN, OUT, Event


def transfers_of(capture: StepCapture) -> list[Transfer]:
    """Return the transfers of offloaded tensors in a captured step."""
    return [t for t in capture.session.store.transfers if capture.ops.start <= t.op < capture.ops.stop]


def largest_sent(round_bytes: int, *captures: StepCapture) -> int:
    """Return the bytes of the largest tensor offloaded in any of these, as the device's allocator rounds them."""
    most = max((t.nbytes for c in captures for t in transfers_of(c)), default=0)
    return -(-most // round_bytes) * round_bytes


def offloaded_bytes(capture: StepCapture) -> int:
    """Return the most bytes of its tier that a captured step takes at any moment, in whole blocks."""
    dropped = capture.session.store.dropped
    held: list[tuple[int, int]] = []  # (op at which its place is free again, bytes)
    most = now = 0
    for t in transfers_of(capture):
        if not t.out:
            continue
        while held and held[0][0] < t.op:
            now -= heapq.heappop(held)[1]
        size = whole_blocks(t.nbytes)
        heapq.heappush(held, (dropped.get(t.ticket, capture.ops.stop), size))
        now += size
        most = max(most, now)
    return most


def events_of(capture: StepCapture, op_seconds: npt.NDArray[np.float64]) -> tuple[Event, ...]:
    """Return the computing and the transfers of a captured step, as events for the channels."""
    done = np.concatenate([[0.0], np.cumsum(op_seconds)])
    events: list[Event] = []
    at = 0
    for t in transfers_of(capture):
        k = t.op - capture.ops.start
        events.append((COMPUTE, float(done[k] - done[at]), 0))
        events.append((OUT if t.out else IN, t.ticket, t.nbytes))
        at = k
    events.append((COMPUTE, float(done[-1] - done[at]), 0))
    return tuple(events)


def senders_of(capture: StepCapture, units: Collection[str]) -> dict[float, str]:
    """Return by ticket the unit that sent it; "" if none of these did."""
    return {t.ticket: next((m for m in t.modules if m in units), "") for t in transfers_of(capture) if t.out}
