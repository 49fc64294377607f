"""Choose a plan when tensors may be offloaded.

The solver (`_solve`) knows costs that add up; time on a shared channel does not. So it is asked several times, for several
sizes of the window (tensors on their way that are in memory still or already), and in two ways:

- with a price per byte that leaves and comes back, from nothing (all of it is hidden behind compute) to what both ways take
  (none is). Blocks that are alike are then all treated alike, since what pays for one of them pays for all;
- with every unit, every second, third, ... one alone able to send: what these send costs nothing as far as it moves while
  they and those up to the next of them compute.

Each schedule it finds is simulated (`_channels`), and so are the neighbours of the best one, one unit changed at a time. Of all of them and
the best one without offload the fastest is taken: a plan that offloads tensors is never slower, as predicted, than the one
that does not. Models of few assignments are gone through whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from msgspec import structs

from ullage.mechanisms import Replays
from ullage.planner.study._tiers import OffloadTier
from ullage.solver._channels import COMPUTE, IN, OUT, Event, overlap
from ullage.solver._instance import NEVER_FITS, OptionFacts, StepModel, nanoseconds
from ullage.solver._schedule import Item, Run, Schedule, Single, evaluate, flat
from ullage.solver._solve import Solution, solve

PRICES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # of what a byte takes to leave and come back
EVERY = (1, 2, 3, 4, 8)  # units of which one may send
SCARCE = (2.0, 5.0, 20.0)  # the same, where more would leave than the tier holds
WINDOWS = (0, 0.5, 1, 1.5, 2, 4)  # times the largest tensor that leaves
MOST_WHOLE = 1000  # assignments that are gone through one by one
MOST_LOOKS = 8000  # schedules after which no more neighbours are looked at


@dataclass(frozen=True)
class Pace:
    """Compute times of the plain step, per unit and phase.

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
    """A step as the channels see it: a unit sends evenly through its forward, and asks evenly through its backward, or as its replay begins.

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
            asks: list[Event] = [(IN, back, 0) for back in reversed(sent[u])]
            if not asks or facts[u].option.replays is Replays.PART:
                events += [*asks, (COMPUTE, seconds, 0)]
            else:
                events += [e for ask in asks for e in (ask, (COMPUTE, seconds / len(asks), 0))]
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
    """Extra backward seconds per unit; a run's whole replay is charged to its last unit."""
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


def solve_with_tier(
    model: StepModel, pace: Pace, budget: int, tier: OffloadTier
) -> tuple[Solution, OffloadTier] | None:
    """The fastest schedule within `budget` bytes that was found, and the tier with its window; None if there is none.

    The solution's seconds are simulated ones, and its lower bound is that of a tier that takes no time and no memory.
    """
    return _Choice(model, pace, budget, tier).best()


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
    def __init__(self, model: StepModel, pace: Pace, budget: int, tier: OffloadTier) -> None:
        self.model, self.pace, self.budget, self.tier = model, pace, budget, tier
        self.idle = overlap(events_of(model, pace, ()), tier.channels).seconds  # the plain step, as events
        self.windows = sorted({int(w * pace.largest_bytes) for w in WINDOWS})
        self.seen: dict[tuple[Schedule, int], _Found | None] = {}

    def best(self) -> tuple[Solution, OffloadTier] | None:
        bound, without = solve(self.model, self.budget), solve(without_tier(self.model), self.budget)
        if bound is None:
            return None
        found = [f for window in self.windows for f in self._candidates(window)]
        if found:  # what sends, for itself: the best of it may be next to one that is slower than without
            found.append(self._neighbours(min(found, key=lambda f: f.rank)))
        if without is not None:
            found.append(_Found(nanoseconds(without.seconds), 0, without.schedule, without.peak_bytes))
        if not found:
            return None
        best = min(found, key=lambda f: f.rank)
        seconds = best.cost / 10**9
        solution = Solution(best.schedule, seconds, min(bound.lower_bound, seconds), best.peak)
        return solution, structs.replace(self.tier, window_bytes=best.window)

    def _candidates(self, window: int) -> Iterator[_Found]:
        room = self.budget - structs.replace(self.tier, window_bytes=window).reserved_bytes
        a_byte = 1 / self.tier.write_bytes_per_second + 1 / self.tier.read_bytes_per_second
        schedules = list(self._priced(room, [price * a_byte for price in PRICES]))
        schedules += self._spread(room)
        if any(self._sent(s) > self.tier.capacity_bytes for s in schedules):
            schedules += self._priced(room, [price * a_byte for price in SCARCE])
        if math.prod(map(len, self.model.options)) <= MOST_WHOLE:
            schedules += [flat(c) for c in product(*(range(len(o)) for o in self.model.options))]
        yield from filter(None, (self._look(s, window) for s in schedules))

    def _priced(self, room: int, prices: list[float]) -> Iterator[Schedule]:
        """What the solver finds within `room` bytes if a byte that leaves costs so many seconds."""
        solved = (solve(_priced(self.model, price), room) for price in prices)
        yield from (s.schedule for s in solved if s is not None)

    def _spread(self, room: int) -> Iterator[Schedule]:
        """What the solver finds within `room` bytes if one of so many units may send, in the time that all of them take."""
        for every in EVERY:
            if every <= len(self.model.units):
                found = solve(self._alone(every), room)
                if found is not None:
                    yield found.schedule

    def _alone(self, every: int) -> StepModel:
        pace, tier = self.pace, self.tier
        changed = []
        for u, options in enumerate(self.model.options):
            near = slice(u - u % every, u - u % every + every)
            forward, backward = sum(pace.forward_seconds[near]), sum(pace.backward_seconds[near])
            sends = u % every == every - 1
            changed.append(
                tuple(
                    o
                    if not o.sent_bytes
                    else replace(o, seconds=o.seconds + _excess(o, tier, forward, backward))
                    if sends
                    else _never(o)
                    for o in options
                )
            )
        return replace(self.model, options=tuple(changed))

    def _sent(self, schedule: Schedule) -> int:
        """Bytes that leave in a pass."""
        return sum(o.sent_bytes for _, o in _facts(self.model, schedule)) // self.pace.passes

    def _look(self, schedule: Schedule, window: int) -> _Found | None:
        """Simulate a schedule that sends something; None if it does not fit."""
        key = schedule, window
        if key not in self.seen:
            self.seen[key] = self._simulate(schedule, window)
        return self.seen[key]

    def _simulate(self, schedule: Schedule, window: int) -> _Found | None:
        tier = structs.replace(self.tier, window_bytes=window)
        if not 0 < self._sent(schedule) <= tier.capacity_bytes:
            return None
        peak = evaluate(self.model, schedule)[0] + tier.reserved_bytes
        if peak > self.budget:
            return None
        seconds = overlap(events_of(self.model, self.pace, schedule), tier.channels).seconds - self.idle
        return _Found(nanoseconds(seconds), window, schedule, peak)

    def _neighbours(self, best: _Found) -> _Found:
        """Change one unit at a time as long as that helps; `_window` looks at other windows once it is executed."""
        while len(self.seen) < MOST_LOOKS and all(isinstance(item, Single) for item in best.schedule):
            changed = [
                (*best.schedule[:u], Single(u, c), *best.schedule[u + 1 :])
                for u, options in enumerate(self.model.options)
                for c in range(len(options))
            ]
            looks = filter(None, (self._look(s, best.window) for s in changed))
            better = min(looks, key=lambda f: f.rank, default=best)
            if better.rank >= best.rank:
                break
            best = better
        return best


def _excess(option: OptionFacts, tier: OffloadTier, forward: float, backward: float) -> float:
    """Seconds that what an option sends moves for beyond these of its unit and its neighbours."""
    out, back = option.sent_bytes / tier.write_bytes_per_second, option.sent_bytes / tier.read_bytes_per_second
    return max(out - forward, 0.0) + max(back - backward, 0.0)


def _never(option: OptionFacts) -> OptionFacts:
    return replace(option, own_peak_bytes=NEVER_FITS)


def without_tier(model: StepModel) -> StepModel:
    """The same options, of which those that send something never fit."""
    return replace(
        model,
        options=tuple(tuple(_never(o) if o.sent_bytes else o for o in options) for options in model.options),
    )


def _priced(model: StepModel, a_byte: float) -> StepModel:
    """What is sent costs so many seconds a byte."""
    return replace(
        model,
        options=tuple(
            tuple(replace(o, seconds=o.seconds + o.sent_bytes * a_byte) for o in options) for options in model.options
        ),
    )
