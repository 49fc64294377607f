"""Choose a plan when tensors may be offloaded.

The solver (`_solve`) knows costs that add up; time on a shared channel does not. So it is asked several times, for several sizes
of the window (memory for tensors on their way), and in two ways:

- with a price per offloaded byte, from zero (every transfer is hidden behind compute) to the time of both transfers (none is
  hidden). Equal blocks then all get the same option, because a price that pays for one of them pays for all;
- with only every unit, or every second, third, ... unit allowed to offload. Its transfers then cost nothing as far as they fit
  into the compute time of that unit and the ones up to the next such unit.

Each schedule found is simulated (`_channels`), and so are the neighbours of the best one, with one unit changed at a time. The
fastest of them all is taken, the best one without offloading included: by prediction, a plan that may offload is never slower than
one that may not. If a model has few assignments, all are simulated.

This is a search, not a proof: the returned lower bound is that of a tier that takes no time and no memory.
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

# Shares of the time that a byte takes out and back. At 0 every transfer is hidden and at 1 none is; between lies a coarse grid,
# because each price costs one solve per window. Not tuned.
PRICES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
EVERY = (1, 2, 3, 4, 8)  # one unit of so many may offload. Not tuned
# Prices above the true one, for a tier that is too small: they make the solver offload only what saves the most time per byte.
SCARCE = (2.0, 5.0, 20.0)
# Times the largest offloaded tensor. Below 1 the step waits whenever that tensor is sent, but the window takes less of the budget.
WINDOWS = (0, 0.5, 1, 1.5, 2, 4)
# Bounds on work, not on time, so that plans are the same on any machine: the most assignments that are all simulated, and the
# simulated schedules after which no more neighbours are. Not tuned.
MOST_WHOLE = 1000
MOST_LOOKS = 8000


@dataclass(frozen=True)
class Pace:
    """Compute times of the plain step, per unit and phase.

    Attributes:
        forward_seconds, backward_seconds: seconds of each unit, in all passes.
        middle_seconds: seconds between the last forward and the first backward.
        rest_seconds: seconds of the step before and after these.
        passes: number of micro-batches.
        largest_bytes: bytes of the largest tensor that some option offloads.
    """

    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    middle_seconds: float
    rest_seconds: float
    passes: int = 1
    largest_bytes: int = 0


def events_of(model: StepModel, pace: Pace, schedule: Schedule) -> list[Event]:
    """Return a step's events for the channels.

    A unit is taken to offload evenly through its forward, and to ask for its tensors evenly through its backward, or all at
    once if a replay begins that. Its bytes are taken to be tensors of the largest one's size, and a rest.
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
    if runs:  # only the sum over all runs is known; it is divided by the number of their units
        together = evaluate(model, schedule)[1] - sum(extra)
        units = sum(r.last - r.first + 1 for r in runs)
        for r in runs:
            extra[r.last] = together * (r.last - r.first + 1) / units
    return extra


def solve_with_tier(
    model: StepModel, pace: Pace, budget: int, tier: OffloadTier
) -> tuple[Solution, OffloadTier] | None:
    """Return the fastest schedule found within `budget` bytes, and the tier with its window; None if there is none.

    The solution's seconds are simulated. Its lower bound is that of a tier that takes no time and no memory.
    """
    return _Choice(model, pace, budget, tier).best()


@dataclass(frozen=True)
class _Found:
    """A schedule that fits: the nanoseconds it adds, stalls included, its window, and its peak with the store's buffers."""

    cost: int
    window: int
    schedule: Schedule
    peak: int

    @property
    def rank(self) -> tuple[int, int, int, str]:
        """The least is the best; the schedule's text breaks ties, so that the same model gives the same plan."""
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
        # from the best schedule that offloads, even if one without is faster: a neighbour of it may be faster still
        if found:
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
        """Yield the solver's schedules within `room` bytes if an offloaded byte costs so many seconds."""
        solved = (solve(_priced(self.model, price), room) for price in prices)
        yield from (s.schedule for s in solved if s is not None)

    def _spread(self, room: int) -> Iterator[Schedule]:
        """Yield the solver's schedules within `room` bytes if one unit of so many may offload, in the compute time of all of them."""
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
        """Return the bytes offloaded in a pass."""
        return sum(o.sent_bytes for _, o in _facts(self.model, schedule)) // self.pace.passes

    def _look(self, schedule: Schedule, window: int) -> _Found | None:
        """Simulate a schedule that offloads something, once; None if it does not fit."""
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
        """Change one unit at a time as long as that helps. Other windows are tried once the schedule is executed, in `_window`."""
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
    """Return how much longer an option's transfers take than this compute time of its unit and its neighbours."""
    out, back = option.sent_bytes / tier.write_bytes_per_second, option.sent_bytes / tier.read_bytes_per_second
    return max(out - forward, 0.0) + max(back - backward, 0.0)


def _never(option: OptionFacts) -> OptionFacts:
    return replace(option, own_peak_bytes=NEVER_FITS)


def without_tier(model: StepModel) -> StepModel:
    """Return the model with options that offload made never to fit."""
    return replace(
        model,
        options=tuple(tuple(_never(o) if o.sent_bytes else o for o in options) for options in model.options),
    )


def _priced(model: StepModel, a_byte: float) -> StepModel:
    """Return the model with a cost of so many seconds per offloaded byte."""
    return replace(
        model,
        options=tuple(
            tuple(replace(o, seconds=o.seconds + o.sent_bytes * a_byte) for o in options) for options in model.options
        ),
    )
