"""The timeline in the terminal: live bytes over time, stacked by category, a letter for each."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ullage._bytes import format_bytes
from ullage._plot import letter, plotted, size_unit, time_unit
from ullage.report._records import PHASES
from ullage.report._thin import highest
from ullage.report._timeline import Timeline

LETTERS = {
    "parameter": "p", "buffer": "b", "library workspace": "w", "input": "i", "other": "o", "optimizer state": "s", "gradient": "g",
    "activation": "A", "recomputed": "R", "temporary": "t", "optimizer temporary": "u", "inside the op": "k",
}  # fmt: skip
COLORS = {  # of 256; they can be read on light and on dark
    "parameter": 67, "buffer": 73, "library workspace": 244, "input": 139, "other": 244, "optimizer state": 98, "gradient": 71,
    "activation": 208, "recomputed": 161, "temporary": 178, "optimizer temporary": 169, "inside the op": 137,
}  # fmt: skip
_OVER = 160
_RECOMPUTED = "r"


def terminal(t: Timeline, width: int = 80, height: int = 18, color: bool = False) -> str | None:
    """The step with the peak; None if plotext is not installed.

    Each column shows the bytes alive at its highest moment, so the highest column is the peak.
    """
    step = "first" if t.peak_event < t.first_events else "later"
    some = t.steps[step]
    starts = t.start_seconds[some] - t.start_seconds[some.start]
    seconds = float(starts[-1] + t.events.seconds.values[some][-1])
    bounded = t.budget_bytes is not None and t.budget_bytes <= 2 * t.peak_bytes
    unit, scale = size_unit(t.budget_bytes or 0 if bounded else t.peak_bytes)
    clock, tick = time_unit(seconds)

    def draw(figure: Any, columns: npt.NDArray[np.int64], color: bool = False) -> None:
        xs = ((np.arange(len(columns)) + 0.5) * seconds / len(columns) / tick).tolist()
        layers = {c: n[some][columns] / scale for c, n in t.live_by_category.items()}
        top = sum(layers.values(), np.zeros(len(columns)))
        for category, layer in reversed(layers.items()):  # from the highest down: each hides all but its top
            mark = letter(LETTERS.get(category, "?"), COLORS.get(category) if color else None)
            signal = figure.signal(xs, top.tolist(), marker=mark)
            signal.fillx()
            figure.draw(signal)
            top = top - layer
        if bounded and t.budget_bytes is not None:
            figure.draw(
                figure.signal(xs, [t.budget_bytes / scale] * len(xs), marker=letter("-", _OVER if color else None))
            )
        figure.label(f"{clock}", "x")
        figure.title(f"live bytes in {unit}, {step} step; peak {format_bytes(t.peak_bytes)}")

    lines = plotted(lambda f: draw(f, _highest(t, starts, seconds, width)), width, height, False)
    if lines is None:
        return None
    frame = next(line for line in lines if "┌" in line)
    left, room = frame.index("┌") + 1, frame.index("┐") - frame.index("┌") - 1
    columns = _highest(t, starts, seconds, room)  # one per column of the frame that the labels leave
    lines = plotted(lambda f: draw(f, columns, color), width, height, color) or []
    kinds = t.events.recomputed.values[some][columns] == 1
    phases = np.where(kinds, _RECOMPUTED, np.array([p[0] for p in PHASES])[t.events.phase.values[some][columns]])
    lines.insert(len(lines) - 2, " " * left + "".join(phases))
    return "\n".join([*lines, *_legend(t, bounded, width)])


def _highest(t: Timeline, starts: npt.NDArray[np.float64], seconds: float, columns: int) -> npt.NDArray[np.int64]:
    """Per column of equal time, the event with the most bytes; where a long event covers several, it again."""
    some = t.steps["first" if t.peak_event < t.first_events else "later"]
    return highest(t.live_bytes[some], starts, np.arange(columns + 1) * (seconds / columns))


def _legend(t: Timeline, bounded: bool, width: int) -> list[str]:
    names = [f"{LETTERS.get(c, '?')} {c}" for c in t.live_by_category] + (["- budget"] if bounded else [])
    rows = [""]
    for name in names:
        if len(rows[-1]) + len(name) + 2 > width:
            rows.append("")
        rows[-1] += f"  {name}"
    phases = [*(f"{p[0]} {p}" for p in PHASES), f"{_RECOMPUTED} recomputed"]
    return [*rows, f"  below the axis: {'  '.join(phases)}"]
