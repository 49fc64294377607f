"""Label setting over the units in forward order: it keeps the prefixes that can still become the best schedule.

A label is (bytes held beyond the base, cost) of a prefix. Of two labels at the same unit, one that holds no less and costs no
less can't win; nor can one whose cost, with the bound of the rest, reaches the best known schedule. If there are more than `width`
labels, the most promising ones go on, and the best bound among the dropped ones bounds the result.

Source: a shortest path with one resource, memory, by label setting (Irnich & Desaulniers, "Shortest Path Problems with
Resource Constraints", 2005).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ullage.solver._bounds import Bounds, Floats, TopLevel
from ullage.solver._chain import NEVER, Ints
from ullage.solver._runs import Frontiers

BLOCK = 2_000_000  # pairs of a label and a run in one array operation: some 16 MB per array of them


@dataclass(frozen=True)
class Found:
    """The best path found, and a lower bound on the cost of any path of known steps.

    Attributes:
        cost: its cost; NEVER if there is none below `max_cost`.
        bound: the lower bound.
        whole: no label was dropped because of the width.
        path: items as (unit, option) or (first unit, -last unit).
    """

    cost: int
    bound: int
    whole: bool
    path: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Labels:
    """Prefixes that end before one unit, each with its last item, and the label that this item extends (and that one's unit)."""

    held: Ints
    cost: Ints
    unit: Ints
    label: Ints
    item: Ints

    def pick(self, index: Ints) -> _Labels:
        return _Labels(self.held[index], self.cost[index], self.unit[index], self.label[index], self.item[index])


class Search:
    """One budget and one set of frontiers.

    Attributes:
        work: pairs of a label and an item looked at so far.
        items: number of items over all units, for one label at each.
    """

    def __init__(self, top: TopLevel, frontiers: Frontiers, bounds: Bounds) -> None:
        self.top, self.chain, self.bounds, self.work = top, top.chain, bounds, 0
        sizes = np.array([len(s[0]) for s in frontiers.steps])
        slack = np.concatenate([s[0] for s in frontiers.steps])
        self.cost = np.concatenate([*(s[1] for s in frontiers.steps), [NEVER]])
        self.begin = np.cumsum(sizes) - sizes  # index of each kind's first step
        self.low, high = int(slack.min(initial=0)), int(slack.max(initial=0))
        self.span = high - self.low + 2
        self.keys = np.repeat(np.arange(len(sizes)), sizes) * self.span + (slack - self.low)  # sorted over all kinds
        first = np.array([int(s[0][0]) if len(s[0]) else NEVER for s in frontiers.steps])
        self.room = [self._run_room(v, first) for v in range(self.chain.size)]
        runs = sum(int((room >= self.chain.lowest[v]).sum()) for v, room in enumerate(self.room))
        self.items = runs + sum(len(u.held) for u in self.chain.units)

    def _run_room(self, v: int, first: Ints) -> Ints:
        """Return per run the most bytes held before v with which it fits, its cost is known, and the rest fits."""
        top, runs = self.top, len(self.top.kinds[v])
        onward = top.budget - top.need[v + 2 : v + 2 + runs] + top.freed[v]
        known = top.budget - self.chain.base[v] - first[top.kinds[v]]
        room: Ints = np.minimum(np.minimum(top.run_room[v], onward), known)
        return room

    def run(self, max_cost: int, width: int) -> Found:
        """Return the cheapest schedule that costs less than `max_cost`, with at most `width` labels per unit."""
        n, zero = self.chain.size, np.zeros(1, np.int64)
        arriving: list[list[_Labels]] = [[] for _ in range(n + 1)]
        arriving[0].append(_Labels(zero, zero, zero, zero, zero))
        labels: list[_Labels] = []
        missed = np.inf
        for v in range(n + 1):
            here = _best(arriving[v])
            arriving[v] = []
            if v < n and len(here.held):
                keep, dropped = self._promising(v, here, max_cost, width)
                here, missed = here.pick(keep), min(missed, dropped)
            labels.append(here)
            if v < n and len(here.held):
                self._singles(v, here, arriving)
                self._runs(v, here, max_cost, arriving)
        best = int(labels[n].cost[-1]) if len(labels[n].cost) else NEVER
        if best >= max_cost:
            return Found(NEVER, min(max_cost, self.bounds.at_least(missed)), missed == np.inf, ())
        return Found(best, min(best, self.bounds.at_least(missed)), missed == np.inf, _path(labels))

    def _promising(self, v: int, labels: _Labels, max_cost: int, width: int) -> tuple[Ints, float]:
        total = labels.cost + self.bounds.rest(v, labels.held)
        keep = np.flatnonzero(self._below(total, max_cost))
        if len(keep) <= width:
            return keep, np.inf
        order = np.argsort(total[keep], kind="stable")
        return np.sort(keep[order[:width]]), float(total[keep[order[width]]])

    def _below(self, total: Floats, max_cost: int) -> npt.NDArray[np.bool_]:
        return total - self.bounds.error <= max_cost - 1

    def _singles(self, v: int, labels: _Labels, arriving: list[list[_Labels]]) -> None:
        top, unit = self.top, self.chain.units[v]
        room = np.minimum(top.room[v], top.budget - top.need[v + 1] - unit.held)
        for c, (most, more, seconds) in enumerate(zip(room, unit.held, unit.seconds, strict=True)):
            k = int(np.searchsorted(labels.held, most, side="right"))
            self.work += k
            if k:
                index = np.arange(k)
                held, cost = labels.held[:k] + more, labels.cost[:k] + seconds
                arriving[v + 1].append(_Labels(held, cost, np.full(k, v), index, np.full(k, c)))

    def _runs(self, v: int, labels: _Labels, max_cost: int, arriving: list[list[_Labels]]) -> None:
        """Extend every label by every run that starts at v, unless the bounds rule the pair out."""
        top, bounds = self.top, self.bounds
        runs = np.flatnonzero(self.room[v] >= labels.held[0])
        if not len(runs):
            return
        prices = bounds.prices[bounds.near]
        rest = bounds.offsets[v + 2 + runs][:, bounds.near] - top.freed[v][runs][:, None] * prices
        least = self.chain.least[top.kinds[v][runs]]
        priced = labels.cost[:, None] + labels.held[:, None] * prices
        useful = self._below((priced.min(axis=0) + rest).max(axis=1) + least, max_cost)
        runs, rest, least = runs[useful], rest[useful], least[useful]
        for a in range(0, len(runs), max(1, BLOCK // len(labels.held))):
            part = slice(a, a + max(1, BLOCK // len(labels.held)))
            total = np.full((len(runs[part]), len(labels.held)), -np.inf)
            for i in range(len(prices)):
                np.maximum(total, rest[part, i, None] + priced[:, i], out=total)
            self.work += total.size
            total += least[part, None]
            fits = labels.held <= self.room[v][runs[part], None]
            at, label = np.nonzero(fits & self._below(total, max_cost))
            if len(at):
                after: Floats = total[at, label] - least[part][at]
                self._run_pairs(v, labels, runs[part][at], label, after, max_cost, arriving)

    def _run_pairs(
        self,
        v: int,
        labels: _Labels,
        run: Ints,
        label: Ints,
        total: Floats,
        max_cost: int,
        arriving: list[list[_Labels]],
    ) -> None:
        """Add each pair's label after its run; `total` bounds its cost without the run's own; pairs are sorted by run."""
        added = self._rebuild_cost(v, self.top.kinds[v][run], labels.held[label])
        index = np.flatnonzero(self._below(total + added, max_cost))
        run, label, added = run[index], label[index], added[index]
        held, cost = labels.held[label] - self.top.freed[v][run], labels.cost[label] + added
        cuts = [0, *(np.flatnonzero(np.diff(run)) + 1), len(run)] if len(run) else []
        for a, b in zip(cuts[:-1], cuts[1:], strict=True):
            w, k = v + 1 + int(run[a]), int(b - a)
            arriving[w + 1].append(_Labels(held[a:b], cost[a:b], np.full(k, v), label[a:b], np.full(k, -w)))

    def _rebuild_cost(self, v: int, kinds: Ints, held: Ints) -> Ints:
        """Return `F` of runs that start at v, per pair of a kind and bytes held; the slack must reach the kind's first step."""
        slack = self.top.budget - self.chain.base[v] - held
        keys = kinds * self.span + np.minimum(slack - self.low, self.span - 1)
        cost: Ints = self.cost[np.searchsorted(self.keys, keys, side="right") - 1]
        return cost


def _best(parts: list[_Labels]) -> _Labels:
    """Return, by bytes held, the labels that no other one beats in both bytes and cost; of equal ones the first."""
    if not parts:
        none = np.zeros(0, np.int64)
        return _Labels(none, none, none, none, none)
    held, cost = np.concatenate([p.held for p in parts]), np.concatenate([p.cost for p in parts])
    order = np.lexsort((cost, held))
    sorted_cost = cost[order]
    keep = np.ones(len(order), bool)
    keep[1:] = sorted_cost[1:] < np.minimum.accumulate(sorted_cost)[:-1]
    index = order[keep]
    unit, label = np.concatenate([p.unit for p in parts]), np.concatenate([p.label for p in parts])
    item = np.concatenate([p.item for p in parts])
    return _Labels(held[index], cost[index], unit[index], label[index], item[index])


def _path(labels: list[_Labels]) -> tuple[tuple[int, int], ...]:
    path = []
    v, i = len(labels) - 1, len(labels[-1].held) - 1
    while v > 0:
        here = labels[v]
        path.append((int(here.unit[i]), int(here.item[i])))
        v, i = int(here.unit[i]), int(here.label[i])
    return tuple(reversed(path))
