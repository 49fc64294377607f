"""Schedules (which tensors a step holds, drops and recomputes, and when), and the timeline of one.

A schedule is a sequence of items that covers the units in forward order. An item is a unit with an option (`Single`) or a
run of two or more linked units (`Run`), which holds only its first unit's input. When backward reaches a run's last unit, the
run is *recomputed*: its units run again, in order, up to the last one, as the run's own items say:

- a `Single` holds its input. With an option that records (any but recompute) this forward is its recording: it holds
  `held_bytes` from here to its backward;
- a `Run` again holds only its first input, and is recomputed when backward reaches its last unit;
- the last is a `Single`, whose backward is next: with recompute, only its own replay runs its forward.

Five units: 1 to 4 are a run that holds only its first input, and 1 to 2 a run inside it (`x2` is the input of
unit 2, `F`/`R`/`B`: forward, forward that records, backward; `keep` and `rec` are options)::

    schedule   Single(0, keep)  Run(1, 4, (Run(1, 2, (Single(1, rec), Single(2, keep))), Single(3, rec), Single(4, keep)))

    does       R0  F1  F2  F3  F4  loss   F1  F2  F3  R4  B4   R3  B3   F1  R2  B2   R1  B1   B0
    alive x1        ==================================================================
          x2            ==                    ==                            ======
          x3                ==                    ==============
          x4                    ==                    ======
    saved of 0  ================================================================================

A runtime needs, per call of a unit, either its input or the note "input = output of the call before; run that again".

Seconds added: `forward_seconds` for each plain or recording forward beyond the first of each unit, and an option's
`seconds` at each unit's backward. Bytes alive: those of the base at the same moment, plus the bytes held beyond it, less the
inputs that are not held (`link_bytes`).

Source: runs inside runs are those of Griewank & Walther, "Revolve" (ACM TOMS 26, 2000), for equal units, and of Beaumont et
al., "Rotor" (arXiv 1911.13214), for unequal ones, where a forward may also record all that its backward needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ullage.solver._instance import StepModel, nanoseconds


@dataclass(frozen=True)
class Single:
    """One unit, with the index of its option."""

    unit: int
    option: int


@dataclass(frozen=True)
class Run:
    """Units `first` to `last`: only the first one's input is held, and `items` says how they are recomputed."""

    first: int
    last: int
    items: tuple[Item, ...]


Item = Single | Run
Schedule = tuple[Item, ...]


def flat(choice: list[int] | tuple[int, ...]) -> Schedule:
    """Return the schedule of an assignment (an option index per unit) without runs."""
    return tuple(Single(u, c) for u, c in enumerate(choice))


def check(model: StepModel, schedule: Schedule) -> None:
    """Raise ValueError unless `schedule` covers the model's units in order, with runs over linked units only."""
    waiting = [(schedule, 0, len(model.units) - 1)]  # not recursive: runs may be nested as deep as there are units
    while waiting:
        items, at, last = waiting.pop()
        for item in items:
            begin, end = (item.unit, item.unit) if isinstance(item, Single) else (item.first, item.last)
            if begin != at or end > last:
                raise ValueError(f"unit {at} comes next, the schedule has units {begin} to {end}")
            if isinstance(item, Run):
                if end == begin or not all(model.linked[begin + 1 : end + 1]):
                    raise ValueError(f"units {begin} to {end} can't be a run")
                if not item.items or not isinstance(item.items[-1], Single):
                    raise ValueError(
                        f"the last of units {begin} to {end} must be a single one when they are recomputed"
                    )
                waiting.append((item.items, begin, end))
            elif not 0 <= item.option < len(model.options[item.unit]):
                raise ValueError(f"unit {item.unit} has no option {item.option}")
            at = end + 1
        if at != last + 1:
            raise ValueError(f"unit {at} is missing")


def evaluate(model: StepModel, schedule: Schedule) -> tuple[int, float]:
    """Return peak bytes and added seconds of a schedule, by going through its timeline moment by moment."""
    check(model, schedule)
    timeline = _Timeline(model)
    timeline.forward(schedule)
    timeline.backward(schedule)
    return timeline.worst, timeline.cost / 10**9


class _Timeline:
    """Goes through the step; `beyond[u]`: bytes alive for unit u from forward to backward beyond the base (negative: fewer)."""

    def __init__(self, model: StepModel) -> None:
        self.model = model
        self.beyond = [0] * len(model.units)
        self.cost = 0
        self.worst = model.outside_bytes[0]

    def _see(self, base: int, units: int, extra: int = 0) -> None:
        """Note a moment at which the base has `base` bytes alive, and the first `units` units are between forward and backward."""
        self.worst = max(self.worst, base + sum(self.beyond[:units]) + extra)

    def _own(self, item: Single) -> None:
        self._see(self.model.options[item.unit][item.option].own_peak_bytes, item.unit)

    def forward(self, schedule: Schedule) -> None:
        m = self.model
        base = m.forward_base_bytes or m.backward_base_bytes
        for item in schedule:
            if isinstance(item, Single):
                self._own(item)
                self.beyond[item.unit] = m.options[item.unit][item.option].held_bytes
                self._see(m.outside_bytes[item.unit + 1], item.unit + 1)
                continue
            for u in range(item.first, item.last + 1):
                self._see(base[u], u, m.forward_peak_bytes[u])
                if u > item.first:
                    self.beyond[u] = -m.link_bytes[u]
                self._see(m.outside_bytes[u + 1], u + 1)

    def backward(self, schedule: Schedule) -> None:
        waiting = list(schedule)
        while waiting:
            item = waiting.pop()
            if isinstance(item, Run):
                self._rebuild(item)
                waiting.extend(item.items)
                continue
            self.beyond[item.unit] = 0
            self._own(item)
            self.cost += nanoseconds(self.model.options[item.unit][item.option].seconds)
            self._see(self.model.outside_bytes[item.unit], item.unit)

    def _rebuild(self, run: Run) -> None:
        """Run the units of `run` again, in forward order; then the backward of its last one begins."""
        m, base = self.model, self.model.backward_base_bytes[run.last]
        for u, single, stays in _steps(run):
            recorded = single is not None and not m.options[u][single.option].is_recompute
            if u == run.last and not recorded:
                break  # its own replay runs it, in its backward
            missing = m.link_bytes[u] if u > run.first else 0  # its input is alive while it runs
            needs = m.forward_peak_bytes[u] if single is None else m.record_bytes(u, single.option)
            self._see(base, run.last + 1, missing + needs)
            self.cost += nanoseconds(m.forward_seconds[u])
            if stays:
                self.beyond[u] += missing
            if single is not None:
                self.beyond[u] += m.options[u][single.option].held_bytes


def _steps(run: Run) -> Iterator[tuple[int, Single | None, bool]]:
    """Yield the units of a run in order, each with its item if that is a single one, and whether its input stays."""
    for item in run.items:
        if isinstance(item, Single):
            yield item.unit, item, True
        else:
            yield from ((u, None, u == item.first) for u in range(item.first, item.last + 1))
