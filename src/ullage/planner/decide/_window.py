"""Choose the window of an assignment (device bytes for tensors on their way) by simulating its executed step."""

from __future__ import annotations

from ullage.planner.model._with_tier import WINDOWS
from ullage.planner.plan._budget import Budget
from ullage.planner.study._executed import Steps
from ullage.solver._instance import nanoseconds


def choose_window(steps: Steps, budget: Budget) -> Steps:
    """Return the same steps with the smallest of the windows with which a later step waits least for transfers.

    Args:
        steps: executed steps; returned as they are if they offload nothing.
        budget: the step's peak with its window stays within it.
    """
    if steps.later.tier is None:
        return steps
    bare, largest = steps.with_window(0), steps.later.largest_sent
    spare = max((budget.room - bare.peak_bytes) // 2, 0)

    def waits(window: int) -> tuple[int, int]:
        moved = bare.later.with_window(window).overlap
        return nanoseconds(moved.stalled_seconds) if moved is not None else 0, window

    return bare.with_window(min({min(int(w * largest), spare) for w in WINDOWS}, key=waits))
