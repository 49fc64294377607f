"""Which plans to consider when tensors may leave memory.

The solver (`_solve`) knows costs that add up; time on a shared channel does not. So it is asked several times, with a price
per byte that leaves and comes back, from nothing (all of it is hidden behind compute) to what both ways take (none is), and
for several sizes of the window: tensors on their way that are in memory still or already. Each schedule it finds is simulated
(`_channels`), and so are its neighbours, one unit changed at a time. Of all of them and the best one without offload the
fastest is taken: a plan that uses the disk is never slower, as predicted, than the one that does not.
Models of few assignments are gone through whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from msgspec import structs

from ullage.planner._channels import COMPUTE, IN, OUT, Event, overlap
from ullage.planner._disk import Disk
from ullage.planner._instance import NEVER_FITS, OptionFacts, StepModel, nanoseconds
from ullage.planner._schedule import Item, Run, Schedule, Single, evaluate, flat
from ullage.planner._solve import Solution, solve

PRICES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # of what a byte takes to leave and come back
WINDOWS = (0, 0.5, 1, 2, 4)  # times the largest tensor that leaves
MOST_WHOLE = 1000  # assignments that are gone through one by one
MOST_LOOKS = 8000  # schedules after which no more neighbours are looked at


@dataclass(frozen=True)
class Pace:
    """When a step computes what, beside what its options add.

    Attributes:
        forward_seconds, backward_seconds: of each unit, in all passes.
        middle_seconds: between the last forward and the first backward.
        rest_seconds: of the step before and after.
        passes: micro-batches.
        largest_bytes: the largest tensor that some option sends.
    """

    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    middle_seconds: float
    rest_seconds: float
    passes: int = 1
    largest_bytes: int = 0


def events_of(model: StepModel, pace: Pace, schedule: Schedule) -> list[Event]:
    """A step as the channels see it: a unit sends evenly through its forward, and asks evenly through its backward.

    What it sends is taken to be tensors of the largest one's size, and a rest.
    """
    facts = dict(_facts(model, schedule))
    units, n = range(len(model.units)), pace.passes
    extra = _extra(model, schedule)
    events: list[Event] = [(COMPUTE, pace.rest_seconds / 2, 0)]
    ticket = 0
    for _ in range(n):
        sent: dict[int, list[int]] = {}
        for u in units:
            sizes = _sizes(facts[u].sent_bytes // n if u in facts else 0, pace.largest_bytes)
            sent[u] = []
            for size in sizes or (0,):
                events.append((COMPUTE, pace.forward_seconds[u] / n / max(len(sizes), 1), 0))
                if size:
                    ticket += 1
                    sent[u].append(ticket)
                    events.append((OUT, ticket, size))
        events.append((COMPUTE, pace.middle_seconds / n, 0))
        for u in reversed(units):
            seconds = (pace.backward_seconds[u] + extra[u]) / n
            for back in reversed(sent[u]):
                events += [(IN, back, 0), (COMPUTE, seconds / len(sent[u]), 0)]
            if not sent[u]:
                events.append((COMPUTE, seconds, 0))
    events.append((COMPUTE, pace.rest_seconds / 2, 0))
    return events


def _sizes(nbytes: int, largest: int) -> list[int]:
    whole, rest = divmod(nbytes, max(largest, 1))
    return [largest] * whole + ([rest] if rest else [])


def _facts(model: StepModel, items: tuple[Item, ...]) -> Iterator[tuple[int, OptionFacts]]:
    for item in items:
        if isinstance(item, Single):
            yield item.unit, model.options[item.unit][item.option]
        else:
            yield from _facts(model, item.items)


def _extra(model: StepModel, schedule: Schedule) -> list[float]:
    """Seconds that each unit's backward takes more; those of runs at their last units, whose backward has them rebuilt."""
    extra = [0.0] * len(model.units)
    runs = [item for item in schedule if isinstance(item, Run)]
    for item in schedule:
        if isinstance(item, Single):
            extra[item.unit] = model.options[item.unit][item.option].seconds
    if runs:  # which of them takes how much is not told apart, but by their length
        together = evaluate(model, schedule)[1] - sum(extra)
        units = sum(r.last - r.first + 1 for r in runs)
        for r in runs:
            extra[r.last] = together * (r.last - r.first + 1) / units
    return extra


def solve_with_disk(model: StepModel, pace: Pace, budget: int, disk: Disk) -> tuple[Solution, Disk] | None:
    """The fastest schedule within `budget` bytes that was found, and the disk with its window; None if there is none.

    The solution's seconds are simulated ones, and its lower bound is that of a disk that takes no time and no memory.
    """
    return _Choice(model, pace, budget, disk).best()


@dataclass(frozen=True)
class _Found:
    """A schedule that fits: nanoseconds it adds, stalls included, its window, and its peak with what the store needs."""

    cost: int
    window: int
    schedule: Schedule
    peak: int

    @property
    def rank(self) -> tuple[int, int, int, str]:
        """The least is the best one; ties are broken always alike."""
        return self.cost, self.window, self.peak, repr(self.schedule)


class _Choice:
    def __init__(self, model: StepModel, pace: Pace, budget: int, disk: Disk) -> None:
        self.model, self.pace, self.budget, self.disk = model, pace, budget, disk
        self.idle = overlap(events_of(model, pace, ()), disk.channels).seconds  # the plain step, as events
        self.windows = sorted({int(w * pace.largest_bytes) for w in WINDOWS})
        self.seen: dict[tuple[Schedule, int], _Found | None] = {}

    def best(self) -> tuple[Solution, Disk] | None:
        bound, without = solve(self.model, self.budget), solve(without_disk(self.model), self.budget)
        if bound is None:
            return None
        found = [f for window in self.windows for f in self._candidates(window)]
        if without is not None:
            found.append(_Found(nanoseconds(without.seconds), 0, without.schedule, without.peak_bytes))
        if not found:
            return None
        best = self._neighbours(min(found, key=lambda f: f.rank))
        seconds = best.cost / 10**9
        solution = Solution(best.schedule, seconds, min(bound.lower_bound, seconds), best.peak)
        return solution, structs.replace(self.disk, window_bytes=best.window)

    def _candidates(self, window: int) -> Iterator[_Found]:
        room = self.budget - structs.replace(self.disk, window_bytes=window).reserved_bytes
        a_byte = 1 / self.disk.write_bytes_per_second + 1 / self.disk.read_bytes_per_second
        solved = (solve(_priced(self.model, price * a_byte), room) for price in PRICES)
        schedules = [s.schedule for s in solved if s is not None]
        if math.prod(map(len, self.model.options)) <= MOST_WHOLE:
            schedules += [flat(c) for c in product(*(range(len(o)) for o in self.model.options))]
        yield from filter(None, (self._look(s, window) for s in schedules))

    def _look(self, schedule: Schedule, window: int) -> _Found | None:
        """Simulate a schedule that sends something; None if it does not fit."""
        key = schedule, window
        if key not in self.seen:
            self.seen[key] = self._simulate(schedule, window)
        return self.seen[key]

    def _simulate(self, schedule: Schedule, window: int) -> _Found | None:
        disk = structs.replace(self.disk, window_bytes=window)
        sent = sum(o.sent_bytes for _, o in _facts(self.model, schedule))
        if not sent or sent // self.pace.passes > disk.capacity_bytes:
            return None
        peak = evaluate(self.model, schedule)[0] + disk.reserved_bytes
        if peak > self.budget:
            return None
        seconds = overlap(events_of(self.model, self.pace, schedule), disk.channels).seconds - self.idle
        return _Found(nanoseconds(seconds), window, schedule, peak)

    def _neighbours(self, best: _Found) -> _Found:
        """Change one unit at a time as long as that helps."""
        while len(self.seen) < MOST_LOOKS and all(isinstance(item, Single) for item in best.schedule):
            changed = [
                (*best.schedule[:u], Single(u, c), *best.schedule[u + 1 :])
                for u, options in enumerate(self.model.options)
                for c in range(len(options))
            ]
            looks = filter(None, (self._look(s, w) for s in changed for w in self.windows))
            better = min(looks, key=lambda f: f.rank, default=best)
            if better.rank >= best.rank:
                break
            best = better
        return best


def without_disk(model: StepModel) -> StepModel:
    """The same options, of which those that send something never fit."""
    return replace(
        model,
        options=tuple(
            tuple(replace(o, own_peak_bytes=NEVER_FITS) if o.sent_bytes else o for o in options)
            for options in model.options
        ),
    )


def _priced(model: StepModel, a_byte: float) -> StepModel:
    """What is sent costs so many seconds a byte."""
    return replace(
        model,
        options=tuple(
            tuple(replace(o, seconds=o.seconds + o.sent_bytes * a_byte) for o in options) for options in model.options
        ),
    )
