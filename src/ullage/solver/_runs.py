"""The least added cost of recomputing a run, as a function of slack; one function for all runs of a kind.

For units s..t recomputed together, `F(s, t)` maps slack to the least cost: a falling step function, kept as the list of its
steps (slack needed, cost). It follows Rotor's recurrence with options (Beaumont et al., arXiv 1911.13214; Rockmate,
ICML 2023): the first item of the run's own schedule is

- the single unit s; the rest is F(s + 1, t), with less slack by the bytes that s's option holds; or
- a run s..w, which costs its forwards and F(s, w); the rest is F(w + 1, t), with more slack by the bytes of the freed inputs.

All conditions have the form "bytes held before <= a number", so lists of steps are exact, and memory is not cut into slots. Only
steps that a solution may use are computed: up to the largest possible slack, and up to `excess` above the run's least cost. The
same limits hold for the parts of a step, because each part costs its least or more. If that is still too much, an
`Effort` keeps fewer steps: a selection of them for schedules, or lower bounds of all for a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ullage.solver._chain import FREE, NEVER, Chain, Ints
from ullage.solver._schedule import Item, Run, Single

Steps = tuple[Ints, Ints]  # slack needed, rising; cost, falling
_NONE: Steps = (np.zeros(0, np.int64), np.zeros(0, np.int64))
# the fixed work of one candidate, in points: numpy calls take about as long as so many points. Not tuned
CANDIDATE = 100


@dataclass(frozen=True)
class Effort:
    """Limits on what is computed; none by default.

    Attributes:
        keep: the most steps per kind of run.
        optimistic: the kept steps are lower bounds of all, not a selection.
        longest: the most units in a run.
    """

    keep: int = NEVER
    optimistic: bool = False
    longest: int = NEVER

    @property
    def bounds(self) -> bool:
        """Are the steps valid lower bounds, so that no run costs less than they say?"""
        return self.optimistic or (self.keep == NEVER and self.longest == NEVER)


ALL = Effort()


class TooManyPoints(Exception):
    """The frontiers are larger than the caller allows."""


class Frontiers:
    """`F` of every kind of run, as far as a budget and `excess` allow.

    Attributes:
        steps: per kind; with less slack than the first step needs, a run costs more than its least + excess.
        points: number of steps looked at; more than `allowed` raise `TooManyPoints`.
    """

    def __init__(self, chain: Chain, budget: int, excess: int, allowed: int, effort: Effort) -> None:
        self.chain, self.excess, self.effort, self.points = chain, excess, effort, 0
        slack = budget - chain.lowest[:-1] - chain.base
        most = np.full(chain.kinds, FREE, np.int64)
        first: dict[int, tuple[int, int]] = {}
        for s, t, kind in chain.by_length():
            most[kind] = max(most[kind], slack[s])
            first.setdefault(kind, (s, t))
        self.steps: list[Steps] = [_NONE] * chain.kinds
        for kind, (s, t) in first.items():
            if chain.need[kind] <= most[kind] and t - s < effort.longest:
                self.steps[kind] = self._steps(s, t, int(most[kind]), int(chain.least[kind]) + excess)
            if self.points > allowed:
                raise TooManyPoints

    def lower(self, kind: int) -> Steps:
        """Return the steps of a lower bound of `F`: below the known steps a run costs at least its least + excess + 1."""
        slack, cost = self.steps[kind]
        need, unknown = self.chain.need[kind], self.chain.least[kind] + self.excess + 1
        if len(slack) and slack[0] <= need:
            return slack, cost
        return np.concatenate(([need], slack)), np.concatenate(([unknown], cost))

    def _steps(self, s: int, t: int, most: int, dearest: int) -> Steps:
        slack, cost = [_NONE[0]], [_NONE[1]]
        for r, c in self._candidates(s, t, most, dearest):
            self.points += len(r) + CANDIDATE
            fits = (r <= most) & (c <= dearest)
            slack.append(r[fits])
            cost.append(c[fits])
        steps = falling(np.concatenate(slack), np.concatenate(cost))
        return thinned(steps, self.effort)

    def _candidates(self, s: int, t: int, most: int, dearest: int) -> Iterator[Steps]:
        chain, unit = self.chain, self.chain.units[s]
        if s == t:
            yield unit.last_need, unit.last
            return
        (needs, run_needs), (shifts, run_shifts) = chain.item_needs(s, t), chain.shifts(s, t)
        r, c = self.steps[chain.kind[s + 1, t]]
        yield np.maximum(r + shifts[:, None], needs[:, None]).ravel(), (c + unit.passed[:, None]).ravel()
        left, right = chain.kind[s, s + 1 : t], chain.kind[s + 2 : t + 1, t]
        passes = chain.passes[s + 2 : t + 1] - chain.passes[s]
        possible = (chain.least[left] + chain.least[right] + passes <= dearest) & (run_needs <= most)
        for i in np.flatnonzero(possible):
            r, c = self.steps[right[i]]
            yield both(self.steps[left[i]], (r + run_shifts[i], c + passes[i]), int(run_needs[i]))

    def rebuilt(self, s: int, t: int, slack: int) -> tuple[Item, ...]:
        """Return the items of a cheapest way to recompute s..t with this slack, which the frontiers must cover."""
        return rebuild(s, t, slack, self._first_item, self._last_option)

    def _last_option(self, unit: int, slack: int) -> int:
        arrays = self.chain.units[unit]
        return int(np.where(arrays.last_need <= slack, arrays.last, NEVER).argmin())

    def _first_item(self, s: int, t: int, slack: int) -> tuple[int, int, int]:
        """Return the cheapest first item of s..t: its last unit, its option if it is a single unit, the slack after it."""
        chain, unit = self.chain, self.chain.units[s]
        (needs, run_needs), (shifts, run_shifts) = chain.item_needs(s, t), chain.shifts(s, t)
        cost = np.where(needs <= slack, at(self.steps[chain.kind[s + 1, t]], slack - shifts) + unit.passed, NEVER)
        option = int(cost.argmin())
        best, found = int(cost[option]), (s, option, slack - int(shifts[option]))
        for i in np.flatnonzero(run_needs <= slack):
            w, rest = s + 1 + int(i), slack - int(run_shifts[i])
            passes = int(chain.passes[w + 1] - chain.passes[s])
            if passes + chain.least[chain.kind[s, w]] + chain.least[chain.kind[w + 1, t]] < best:
                total = passes + self.value(s, w, slack) + self.value(w + 1, t, rest)
                if total < best:
                    best, found = total, (w, 0, rest)
        return found

    def value(self, s: int, t: int, slack: int) -> int:
        """Return `F(s, t)` at one slack; NEVER or more if it is not known there."""
        r, c = self.steps[self.chain.kind[s, t]]
        i = int(np.searchsorted(r, slack, side="right")) - 1
        return int(c[i]) if i >= 0 else NEVER


def rebuild(
    s: int,
    t: int,
    slack: int,
    first_item: Callable[[int, int, int], tuple[int, int, int]],
    last_option: Callable[[int, int], int],
) -> tuple[Item, ...]:
    """Build the items of the run s..t from choices, without recursion: runs may be nested as deep as there are units.

    Args:
        s: first unit.
        t: last unit.
        slack: at s.
        first_item: of s, t and a slack: the first item's last unit, its option if that is s, and the slack after it.
        last_option: of t and a slack.
    """
    # outer runs that are not finished: their items, last unit, slack after the inner run, first unit of the inner run
    around: list[tuple[list[Item], int, int, int]] = []
    items: list[Item] = []
    while True:
        if s < t:
            w, option, rest = first_item(s, t, slack)
            if w > s:  # the run's own items first, then what follows it
                around.append((items, t, rest, s))
                items, t = [], w
            else:
                items.append(Single(s, option))
                s, slack = s + 1, rest
            continue
        items.append(Single(t, last_option(t, slack)))
        if not around:
            return tuple(items)
        inner, s = tuple(items), t + 1
        items, t, slack, first = around.pop()
        items.append(Run(first, s - 1, inner))


def thinned(steps: Steps, effort: Effort) -> Steps:
    """Return about as many steps as the effort keeps: a selection of them, or steps that nowhere cost more than these."""
    slack, cost = steps
    if len(slack) <= effort.keep:
        return steps
    cuts = np.unique(np.linspace(0, len(slack), effort.keep + 1).astype(np.int64))
    if effort.optimistic:
        return slack[cuts[:-1]], cost[cuts[1:] - 1]
    chosen = np.unique(np.append(cuts[:-1], len(slack) - 1))
    return slack[chosen], cost[chosen]


def falling(slack: Ints, cost: Ints) -> Steps:
    """Return, in order, the points that cost less than every point that needs no more slack."""
    order = np.argsort(slack)
    slack, cost = slack[order], cost[order]
    keep = np.ones(len(cost), bool)
    keep[1:] = cost[1:] < np.minimum.accumulate(cost)[:-1]
    slack, cost = slack[keep], cost[keep]
    last = np.ones(len(cost), bool)  # the cheapest among points that need the same slack
    last[:-1] = slack[1:] != slack[:-1]
    return slack[last], cost[last]


def at(steps: Steps, slack: Ints) -> Ints:
    """Return the step function's values; NEVER left of its first step."""
    if not len(steps[0]):
        return np.full(slack.shape, NEVER, np.int64)
    index = np.searchsorted(steps[0], slack, side="right") - 1
    return np.where(index < 0, NEVER, steps[1][index])


def both(a: Steps, b: Steps, need: int) -> Steps:
    """Return points of the sum of two step functions, from `need` on."""
    if not len(a[0]) or not len(b[0]):
        return _NONE
    low = max(int(a[0][0]), int(b[0][0]), need)
    i = int(np.searchsorted(a[0], low, side="right"))
    j = int(np.searchsorted(b[0], low, side="right"))
    (ra, ca), (rb, cb) = (a[0][i:], a[1][i:]), (b[0][j:], b[1][j:])
    # b at the points of a, and a at those of b; left of all that, both at `low`
    at_a = b[1][np.searchsorted(b[0], ra, side="right") - 1]
    at_b = a[1][np.searchsorted(a[0], rb, side="right") - 1]
    return np.concatenate(([low], ra, rb)), np.concatenate(([a[1][i - 1] + b[1][j - 1]], ca + at_a, cb + at_b))
