"""What leaves memory and comes back in a captured step: how many bytes, and what the step waits for."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

from ullage.capture._store import Transfer
from ullage.offload import whole_blocks
from ullage.planner._channels import COMPUTE, IN, OUT, Event, Overlap, overlap

if TYPE_CHECKING:
    from ullage.planner._study import StepCapture, Study


def transfers_of(s: Study, capture: StepCapture) -> list[Transfer]:
    """What left memory and came back in a captured step."""
    return [t for t in capture.session.store.transfers if capture.ops.start <= t.op < capture.ops.stop]


def largest_sent(s: Study, *captures: StepCapture) -> int:
    """Bytes of the largest tensor that leaves in some of these, as the device's allocator rounds them."""
    most = max((t.nbytes for c in captures for t in transfers_of(s, c)), default=0)
    return -(-most // s.device.round_bytes) * s.device.round_bytes


def offloaded_bytes(s: Study, capture: StepCapture) -> int:
    """The most bytes of its tier that a captured step takes at any moment, in whole blocks."""
    dropped = capture.session.store.dropped
    held: list[tuple[int, int]] = []  # (op at which its place is free again, bytes)
    most = now = 0
    for t in transfers_of(s, capture):
        if not t.out:
            continue
        while held and held[0][0] < t.op:
            now -= heapq.heappop(held)[1]
        size = whole_blocks(t.nbytes)
        heapq.heappush(held, (dropped.get(t.ticket, capture.ops.stop), size))
        now += size
        most = max(most, now)
    return most


def fits_tier(s: Study, capture: StepCapture) -> bool:
    """Does the tier hold what a captured step sends?"""
    return s.tier is None or offloaded_bytes(s, capture) <= s.tier.capacity_bytes


def overlap_of(s: Study, capture: StepCapture) -> Overlap | None:
    """How the transfers of a captured step fit into its computing; None if there are none."""
    tier, moved = s.tier_for(capture.assignment), transfers_of(s, capture)
    if tier is None or not moved:
        return None
    done = np.concatenate([[0.0], np.cumsum(s.op_seconds(capture))])
    events: list[Event] = []
    at = 0
    for t in moved:
        k = t.op - capture.ops.start
        events.append((COMPUTE, float(done[k] - done[at]), 0))
        events.append((OUT if t.out else IN, t.ticket, t.nbytes))
        at = k
    events.append((COMPUTE, float(done[-1] - done[at]), 0))
    units = {u.fqn for u in s.units}
    senders: dict[float, str] = {t.ticket: next((m for m in t.modules if m in units), "") for t in moved if t.out}
    return overlap(events, tier.channels, senders)


def waits(s: Study, capture: StepCapture) -> list[tuple[int, float]]:
    """(op, seconds) of each op that a captured step runs only after it has waited for a transfer."""
    seen, moved = overlap_of(s, capture), transfers_of(s, capture)
    if seen is None:
        return []
    # of two events each transfer is the second; what waits at the step's end belongs to its last op
    return [(min(moved[k // 2].op, capture.ops.stop - 1), seconds) for k, seconds in seen.waits]
