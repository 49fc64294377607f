"""Lower bounds on the cost of the rest of a step, given the bytes that the units before it hold.

`V(D)` is the least added cost of the units from v on, if those before hold D bytes beyond the base. For each price p (cost per
byte) of a grid there is an offset with `V(D) >= offset + p D` for all D that fit. An item with cost c that fits if D <= room, and
that leaves D + delta bytes held, gives, for every price q <= p of the grid,

    c + V'(D + delta) - p D  >=  c + offset'[q] + q (delta + room) - p room

An offset is the least of this over the items, each at its best q. This is linear (Lagrangian) duality, so the bounds are those of
the convex hull of V, as far as the grid is fine enough. Runs enter with a few steps of their frontier.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ullage.solver._chain import FREE, NEVER, Chain, Ints
from ullage.solver._runs import Frontiers

Floats = npt.NDArray[np.float64]
PIECES = 8  # steps of a run's frontier in the bound. More make it tighter and its recursion slower. Not tuned
REACH = 1e4  # the grid spans the expected price (all cost over all bytes) times and divided by this: eight orders of magnitude


class TopLevel:
    """The conditions of items at the top level, under a budget. Runs that start at v are numbered: 0 is v..v + 1, and so on.

    Attributes:
        room: [v][option]: the most bytes that may be held before v for the option to fit.
        run_room: [v][run]: the same for runs.
        freed: [v][run]: bytes of inputs that the run does not hold.
        kinds: [v][run]: the run's kind.
        need: [v]: the least peak of the units from v on, if those before hold nothing beyond the base.
    """

    def __init__(self, chain: Chain, budget: int) -> None:
        n = chain.size
        self.chain, self.budget = chain, budget
        own = [u.own + chain.base[i] for i, u in enumerate(chain.units)]
        self.room = [budget - np.maximum(own[i], chain.outside[i + 1] + u.held) for i, u in enumerate(chain.units)]
        ends = [r + 1 for r in chain.reach]
        self.kinds = [chain.kind[v, v + 1 : ends[v]] for v in range(n)]
        self.freed = [chain.links[v + 1 : ends[v]] - chain.links[v] for v in range(n)]
        self.run_room = [budget - self._run_needs(v, ends[v]) for v in range(n)]
        self.need = np.zeros(n + 1, np.int64)
        self.need[n] = chain.outside[n]
        for v in range(n - 1, -1, -1):
            single = np.maximum(budget - self.room[v], chain.units[v].held + self.need[v + 1])
            runs = np.maximum(budget - self.run_room[v], self.need[v + 2 : ends[v] + 1] - self.freed[v])
            self.need[v] = min(int(single.min()), int(runs.min(initial=NEVER)))

    def _run_needs(self, v: int, end: int) -> Ints:
        chain = self.chain
        gone = chain.links[v : end - 1] - chain.links[v]  # before the forwards of v + 1, ...
        forward = chain.forward_base[v + 1 : end] + chain.forward_peak[v + 1 : end] - gone
        outside = chain.outside[v + 1 : end] - gone
        first = int(chain.forward_base[v] + chain.forward_peak[v])
        passing = np.maximum.accumulate(np.maximum(np.maximum(forward, outside), first))
        after = chain.outside[v + 2 : end + 1] - self.freed[v]
        needs: Ints = np.maximum(np.maximum(passing, after), chain.need[self.kinds[v]] + chain.base[v])
        return needs


class Bounds:
    """Lower bounds of the cost of the units from v on, with the runs' frontiers as far as they are known.

    Attributes:
        root: the bound on the cost of all units.
        error: how much rounding may have raised a bound.
    """

    def __init__(self, top: TopLevel, frontiers: Frontiers) -> None:
        self.top = top
        self.items = _Items(top, frontiers)
        chain = top.chain
        cost = sum(int(u.seconds.max()) for u in chain.units) + int(chain.forward_cost.sum())
        held = sum(int(np.abs(u.held).max()) for u in chain.units) + int(chain.links[-1])
        scale = max(cost, 1) / max(held, 1)
        self.prices = scale * np.geomspace(1 / REACH, REACH, 24)
        for spread, near, far in ((4.0, 12, 12), (1.3, 32, 31)):
            offsets = self.items.offsets(self.prices)
            best = float(self.prices[int(offsets[0].argmax())])
            around = best * np.geomspace(1 / spread, spread, near)
            grid = scale * np.geomspace(1 / REACH, REACH, far)
            self.prices = np.unique(np.concatenate(([0.0], around, grid)))
        self.offsets = self.items.offsets(self.prices)
        best_at = int(self.offsets[0].argmax())
        self.near = np.unique(np.clip([best_at + i for i in (-6, -2, 0, 2, 6)], 0, len(self.prices) - 1))
        largest = float(np.abs(self.offsets[np.isfinite(self.offsets)]).max(initial=0.0))
        self.error = 1e-3 + 1e-15 * chain.size * max(largest, float(self.prices[-1]) * abs(top.budget))
        self.root = self.at_least(float(self.offsets[0][best_at]))

    def rest(self, v: int, held: Ints) -> Floats:
        """Return lower bounds of the cost of the units from v on, for each of these bytes held."""
        bounds: Floats = np.max(self.offsets[v] + held[:, None] * self.prices, axis=1)
        return bounds

    def at_least(self, bound: float) -> int:
        """Round a bound up to an integer cost, less the error that rounding may have put into it."""
        return int(np.ceil(bound - self.error)) if np.isfinite(bound) else NEVER


class _Items:
    """All items of the top level in the form of the bounds' recursion: per unit arrays with an element per item."""

    def __init__(self, top: TopLevel, frontiers: Frontiers) -> None:
        slack, cost = _pieces(frontiers)
        self.top, chain = top, top.chain
        self.rooms: list[Floats] = []
        self.costs: list[Floats] = []
        self.deltas: list[Floats] = []
        self.after: list[Ints] = []
        for v, unit in enumerate(chain.units):
            kinds, freed = top.kinds[v], top.freed[v]
            room = np.minimum(top.run_room[v][:, None], top.budget - chain.base[v] - slack[kinds])
            rooms = np.concatenate((top.room[v], room.ravel()))
            fits = rooms >= chain.lowest[v]
            after = np.repeat(np.arange(v + 2, v + 2 + len(kinds)), PIECES)
            self.rooms.append(rooms[fits].astype(np.float64))
            self.costs.append(np.concatenate((unit.seconds, cost[kinds].ravel()))[fits].astype(np.float64))
            self.deltas.append(np.concatenate((unit.held, -np.repeat(freed, PIECES)))[fits].astype(np.float64))
            self.after.append(np.concatenate((np.full(len(unit.held), v + 1), after))[fits])

    def offsets(self, prices: Floats) -> Floats:
        """Return offsets [v][price]; the last v stands for the end of the step."""
        n = len(self.rooms)
        found = np.full((n + 1, len(prices)), np.inf)
        found[n] = -prices * float(self.top.budget - self.top.chain.outside[n])
        for v in range(n - 1, -1, -1):
            room, cost = self.rooms[v][:, None], self.costs[v][:, None]
            if len(room):
                lines = found[self.after[v]] + (self.deltas[v][:, None] + room) * prices
                np.maximum.accumulate(lines, axis=1, out=lines)
                found[v] = (lines + cost - room * prices).min(axis=0)
        return found


def _pieces(frontiers: Frontiers) -> tuple[Ints, Ints]:
    """Return per kind of run at most PIECES (slack, cost): with less slack than the next one, a run costs at least this."""
    kinds = len(frontiers.steps)
    slacks, costs = np.full((kinds, PIECES), -FREE, np.int64), np.zeros((kinds, PIECES), np.int64)
    for kind in range(kinds):
        slack, cost = frontiers.lower(kind)
        if len(slack) == 1:
            slacks[kind, 0], costs[kind, 0] = slack[0], cost[0]
            continue
        cuts = np.unique(np.linspace(0, len(slack), PIECES + 1).astype(np.int64))
        slacks[kind, : len(cuts) - 1] = slack[cuts[:-1]]
        costs[kind, : len(cuts) - 1] = cost[cuts[1:] - 1]
    return slacks, costs
