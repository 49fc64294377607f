"""Find the schedule of least added time with live bytes <= budget at every moment, and a bound that proves it.

Idea: the search of the top level (`_search`) is exact, given the cost of recomputing runs as a function of memory (`_runs`). That
cost is computed only up to an *excess* over a run's least cost, and bounds tell how much is needed: if the step costs at
least `floor` when every run costs its least (`_bounds`), no run of a schedule cheaper than `best` has an excess of `best - floor` or
more. So a first round has no excess, the next ones have growing excesses until a good schedule is known, and the last one has
the excess that is needed.

Invariant: `bound` never exceeds the cost of any schedule within the budget, whichever limits were hit, and `schedule` always fits:
its peak is checked by `evaluate`, which shares no code with the search. Limits count work, not time, so that a model and a
budget give the same schedule on any machine.

Known non-optimalities: beyond WORK_LIMIT or WIDEST labels the schedule is the best one found, with a gap. Units of a run are
recomputed or kept, nothing between. Runs do not cross units without links. An offloaded byte has no cost here (`_with_tier`).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from ullage.solver._bounds import Bounds, TopLevel
from ullage.solver._chain import NEVER, Chain, chain_of
from ullage.solver._feasible import any_schedule
from ullage.solver._instance import StepModel
from ullage.solver._runs import ALL, CANDIDATE, Effort, Frontiers, TooManyPoints
from ullage.solver._schedule import Item, Run, Schedule, Single, evaluate
from ullage.solver._search import Found, Search

WORK_LIMIT = 600_000_000  # steps of frontiers, and pairs of labels and items: a minute or so
# Steps that are tried for the needed excess before it is known to be near: a 200th of the limit, so that a failure costs little.
QUICK = 3_000_000
NARROW, WIDEST = 64, 2**15  # labels per unit: of a first, quick search, and the most
GROWTH = 16  # factor on the excess, and on the labels per unit, from round to round: all earlier rounds cost little beside the last
# with fewer steps per kind of run the frontier is too coarse to be worth a round; runs are shortened instead
FEWEST = 8


@dataclass(frozen=True)
class Solution:
    """A schedule, the seconds that it adds, a lower bound on the seconds of any schedule, and its peak under the model."""

    schedule: Schedule
    seconds: float
    lower_bound: float
    peak_bytes: int

    @property
    def proved(self) -> bool:
        """Is it proved that no schedule within the budget adds less?"""
        return self.lower_bound >= self.seconds

    @property
    def gap(self) -> float:
        """The most seconds that a better schedule could save, as a fraction of this one's."""
        return (self.seconds - self.lower_bound) / self.seconds if self.seconds else 0.0

    @property
    def choice(self) -> tuple[int, ...]:
        """The option index per unit; ValueError if units are recomputed together."""
        if any(isinstance(item, Run) for item in self.schedule):
            raise ValueError("a schedule with runs is no choice of an option per unit")
        return tuple(item.option for item in self.schedule if isinstance(item, Single))


def solve(model: StepModel, budget: int, *, work_limit: int = WORK_LIMIT) -> Solution | None:
    """Return the cheapest schedule within `budget` bytes, or None if there is none.

    If `work_limit` is too low, it is the best schedule found, with a valid lower bound. The same model, budget and limit give
    the same schedule.
    """
    chain = chain_of(model)
    top = TopLevel(chain, budget)
    if max(int(top.need[0]), int(chain.outside[0])) > budget:
        return None
    if not model.units:
        return Solution((), 0.0, 0.0, int(chain.outside[0]))
    solver = _Solver(chain, top, work_limit)
    solver.solve()
    peak, seconds = evaluate(model, solver.schedule)
    assert peak <= budget, "the solver's conditions and the timeline disagree"
    return Solution(solver.schedule, seconds, min(solver.bound / 10**9, seconds), peak)


def smallest(model: StepModel, *, work_limit: int = WORK_LIMIT) -> Solution:
    """Return the cheapest schedule with the smallest peak of any."""
    chain = chain_of(model)
    found = solve(model, max(int(TopLevel(chain, 0).need[0]), int(chain.outside[0])), work_limit=work_limit)
    assert found is not None
    return found


class _Solver:
    """The best schedule so far, its cost, and the bound; all costs are nanoseconds."""

    def __init__(self, chain: Chain, top: TopLevel, work: int) -> None:
        self.chain, self.top, self.left = chain, top, work
        self.schedule = any_schedule(chain, top)
        self.best = self._cost()
        self.bound = 0
        dearest = max(int(u.seconds.max()) for u in chain.units)
        self.unit = max(1, dearest, int(chain.forward_cost.max()))

    def solve(self) -> None:
        """Run rounds of growing excess until the best schedule is proved."""
        final = all(end == s for s, end in enumerate(self.chain.reach))
        if not self._round(0, self.left, final) or final:
            return
        floor, excess, refused = self.bound, 0, NEVER
        while self.bound < self.best:
            needed = self.best - floor
            near = needed <= GROWTH * max(excess, self.unit)
            if near or needed < refused:
                if self._round(needed, self.left // 2 if near else min(self.left // 8, QUICK), final=True):
                    return
                refused = needed
            excess = max(self.unit, GROWTH * excess)
            if near or not self._round(excess, self.left // 2, final=False):
                break
        if self.bound < self.best:
            self._thinned(self.best - floor)

    def _thinned(self, excess: int) -> None:
        """Run rounds with fewer steps per run: with a selection, for a better schedule, then with lower bounds of all, for a bound."""
        kinds = {
            k: (t - s + 1, t - s + len(self.chain.units[s].held) // 2 + 1) for s, t, k in self.chain.by_length()
        }.values()
        lengths, candidates = [k[0] for k in kinds], list(accumulate(k[1] for k in kinds))
        keep = (self.left // (2 * candidates[-1]) - CANDIDATE) // 2
        if keep >= FEWEST:
            self._round(excess, self.left, True, Effort(keep))
            self._round(excess, self.left, True, Effort(keep, optimistic=True))
        else:
            fit = bisect_right(candidates, self.left // (2 * (2 * FEWEST + CANDIDATE)))
            self._round(excess, self.left, True, Effort(FEWEST, longest=lengths[fit - 1]))

    def _round(self, excess: int, allowed: int, final: bool, effort: Effort = ALL) -> bool:
        """Look for a better schedule with this excess (`final`: with all that is needed); return False if it was too much work."""
        try:
            frontiers = Frontiers(self.chain, self.top.budget, excess, allowed, effort)
        except TooManyPoints:
            self.left -= allowed
            return False
        self.left -= frontiers.points
        bounds = Bounds(self.top, frontiers)
        if effort.bounds:
            self.bound = max(self.bound, min(bounds.root, self.best))
        search = Search(self.top, frontiers, bounds)
        for step in (self.unit, GROWTH * self.unit, NEVER):  # low guesses of the cost first: they prune the most labels
            max_cost = min(self.best, bounds.root + step)
            found = self._search(search, frontiers, max_cost, NARROW, final)
            if found.cost < max_cost or max_cost == self.best:
                break
        width = NARROW
        while final and not found.whole and self.bound < self.best:
            wider = min(GROWTH * width, WIDEST, self.left // search.items)
            if wider <= width:
                break
            width = wider
            found = self._search(search, frontiers, self.best, width, final)
        return True

    def _search(self, search: Search, frontiers: Frontiers, max_cost: int, width: int, final: bool) -> Found:
        """Search below a cost, and keep the schedule found if it is better; steps that are lower bounds give no schedule."""
        done = search.work
        found = search.run(max_cost, width)
        self.left -= search.work - done
        if found.cost < self.best and not frontiers.effort.optimistic:
            self.schedule = _schedule(self.chain, frontiers, self.top.budget, found.path)
            self.best = self._cost()
        if final and frontiers.effort.bounds:
            self.bound = max(self.bound, min(found.bound, self.best))
        return found

    def _cost(self) -> int:
        return round(evaluate(self.chain.model, self.schedule)[1] * 10**9)


def _schedule(chain: Chain, frontiers: Frontiers, budget: int, path: tuple[tuple[int, int], ...]) -> Schedule:
    items: list[Item] = []
    held = 0
    for unit, item in path:
        if item >= 0:
            items.append(Single(unit, item))
            held += int(chain.units[unit].held[item])
        else:
            items.append(Run(unit, -item, frontiers.rebuilt(unit, -item, budget - held - int(chain.base[unit]))))
            held -= int(chain.links[-item] - chain.links[unit])
    return tuple(items)
