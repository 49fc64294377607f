"""Exact choice of one option per unit: least added time with live bytes <= budget at every moment.

Label setting over units in forward order. A label is (held bytes, cost); of two labels at the same unit the one with
more held bytes and no less cost can never win, because every later constraint is a prefix sum of held bytes. So the
Pareto set per unit is complete and the result optimal; identical units keep it small, since their sums coincide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ullage.planner._model import StepModel

MAX_LABELS = 20_000
_PICO = 10**12


@dataclass(frozen=True)
class Solution:
    """An option index per unit, its added seconds, a lower bound on them, and the peak the model sees."""

    choice: tuple[int, ...]
    seconds: float
    lower_bound: float
    peak_bytes: int


_Label = tuple[int, int, "tuple[object, int] | None"]  # held bytes, cost, (previous label's path, option)


def solve(model: StepModel, budget: int) -> Solution | None:
    """The cheapest assignment within `budget` bytes, or None if there is none."""
    if model.outside_bytes[0] > budget:
        return None
    labels: list[_Label] = [(0, 0, None)]
    thinned = False
    for u, options in enumerate(model.options):
        grown: list[_Label] = []
        for held, cost, path in labels:
            for c, o in enumerate(options):
                after = held + o.held_bytes
                if held + o.own_peak_bytes <= budget and after + model.outside_bytes[u + 1] <= budget:
                    grown.append((after, cost + round(o.seconds * _PICO), (path, c)))
        labels = _pareto(grown)
        if len(labels) > MAX_LABELS:
            thinned = True
            step = -(-len(labels) // MAX_LABELS)
            labels = labels[::step] if labels[-1] in labels[::step] else [*labels[::step], labels[-1]]
        if not labels:
            return None
    best = min(labels, key=lambda x: (x[1], x[0]))
    choice = _unwind(best[2])
    seconds = best[1] / _PICO
    return Solution(choice, seconds, _relaxed_bound(model) if thinned else seconds, model.peak(list(choice)))


def smallest(model: StepModel) -> Solution:
    """The assignment with the smallest peak the model sees; ties go to the cheaper one."""
    labels: list[_Label] = [(0, model.outside_bytes[0], None)]
    for u, options in enumerate(model.options):
        grown: list[_Label] = []
        for held, worst, path in labels:
            for c, o in enumerate(options):
                after = held + o.held_bytes
                peak = max(worst, held + o.own_peak_bytes, after + model.outside_bytes[u + 1])
                grown.append((after, peak, (path, c)))
        labels = _pareto(grown)[:MAX_LABELS]
    best = min(label[1] for label in labels)
    found = solve(model, best)
    assert found is not None
    return found


def _pareto(labels: list[_Label]) -> list[_Label]:
    labels.sort(key=lambda x: (x[0], x[1]))
    kept: list[_Label] = []
    for label in labels:
        if not kept or label[1] < kept[-1][1]:
            kept.append(label)
    return kept


def _unwind(path: Any) -> tuple[int, ...]:
    choice: list[int] = []
    while path is not None:
        path, option = path
        choice.append(option)
    return tuple(reversed(choice))


def _relaxed_bound(model: StepModel) -> float:
    return sum(min(o.seconds for o in options) for options in model.options)
