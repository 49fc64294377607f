"""The window of an assignment: what tensors on their way may hold, as its executed step shows that it helps."""

from __future__ import annotations

from collections.abc import Mapping

from ullage.mechanisms import Option
from ullage.planner._instance import nanoseconds
from ullage.planner._moved import largest_sent, overlap_of
from ullage.planner._study import Study, key_of
from ullage.planner._with_tier import WINDOWS


def choose_window(s: Study, assignment: Mapping[str, Option], limit: int) -> None:
    """Note for an assignment the smallest of the windows with which its step waits for transfers the least.

    Args:
        s: the study that executes it.
        assignment: any; nothing is noted if it has nothing leave.
        limit: bytes of the step's peak, the window included.
    """
    if s.tier_for(assignment) is None:
        return
    first, later = s.execute_fresh(assignment)
    largest = largest_sent(s, later)
    key = key_of(assignment)
    s.windows[key] = 0
    room = max((limit - max(s.peak(first), s.peak(later))) // 2, 0)
    widths = {min(int(w * largest), room) for w in WINDOWS}

    def waits(window: int) -> tuple[int, int]:
        s.windows[key] = window
        moved = overlap_of(s, later)
        return nanoseconds(moved.stalled_seconds) if moved is not None else 0, window

    s.windows[key] = min(widths, key=waits)
