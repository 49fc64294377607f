"""Fewer events than there are, for a drawing: a part of a plot shows the highest of the events that fall on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ullage.report._records import Array
from ullage.report._timeline import Timeline

PARTS = 700  # of a step, by time and by op: as many as a wide plot has pixels, about


def highest(live: Array, starts: npt.NDArray[Any], edges: npt.NDArray[Any]) -> Array:
    """Per part between two edges, the event with the most bytes; where a long event covers several parts, it again.

    Args:
        live: bytes per event.
        starts: when each starts, ascending; it lasts until the next.
        edges: one more than there are parts, ascending.
    """
    first = np.maximum(np.searchsorted(starts, edges[:-1], side="right") - 1, 0)
    last = np.maximum(np.searchsorted(starts, edges[1:], side="left") - 1, first)
    return np.array([a + int(live[a : b + 1].argmax()) for a, b in zip(first, last, strict=True)], np.int64)


def kept_events(t: Timeline, step: str, parts: int = PARTS) -> Array:
    """Return the events of "first" or "later" that a drawing of it shows, in order, as indices into the timeline.

    All of them if they are few; otherwise the first, the last, the timeline's peak, and the highest of each of `parts` parts
    of equal time and of equally many ops. An event that is left out is no higher than a neighbour that is shown.
    """
    some = t.steps[step]
    n = some.stop - some.start
    if n <= 2 * parts:
        return np.arange(some.start, some.stop)
    live, starts = t.live_bytes[some], t.start_seconds[some] - t.start_seconds[some.start]
    seconds = float(starts[-1] + t.events.seconds.values[some][-1])
    ranks = np.arange(n, dtype=np.float64)
    found = [
        np.array([0, n - 1]),
        highest(live, starts, np.linspace(0.0, seconds, parts + 1)),
        highest(live, ranks, np.linspace(0.0, n, parts + 1)),
    ]
    at = np.unique(np.concatenate(found)) + some.start
    return np.asarray(np.union1d(at, [t.peak_event]) if some.start <= t.peak_event < some.stop else at)
