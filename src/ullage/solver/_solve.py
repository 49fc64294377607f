"""The schedule of least added time with live bytes <= budget at every moment, and a bound that proves it.

The search of the top level (`_search`) is exact, given the cost of rebuilding runs as a function of memory (`_runs`). That
in turn is computed up to an *excess* over a run's least cost, and how much is needed is known from bounds: if the step
costs at least `floor` when every run costs its least (`_bounds`), a schedule cheaper than `best` has no run with an excess of
`best - floor` or more. So: a first round without excess, then growing ones until a schedule is known, then the last one.
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

WORK_LIMIT = 600_000_000  # steps of frontiers and pairs of labels and items: a minute or so
QUICK = 3_000_000  # steps that are computed just to see whether that is all it takes
NARROW, WIDEST = 64, 2**15  # labels per unit
GROWTH = 16  # of the excess, and of the labels per unit, from round to round
FEWEST = 8  # steps per kind of run with which it is worth trying


@dataclass(frozen=True)
class Solution:
    """A schedule, the seconds it adds, a lower bound on those of any, and its peak under the model."""

    schedule: Schedule
    seconds: float
    lower_bound: float
    peak_bytes: int

    @property
    def proved(self) -> bool:
        """Whether no schedule within the budget adds less."""
        return self.lower_bound >= self.seconds

    @property
    def gap(self) -> float:
        """Seconds that a better schedule could save at most, as a fraction of this one's."""
        return (self.seconds - self.lower_bound) / self.seconds if self.seconds else 0.0

    @property
    def choice(self) -> tuple[int, ...]:
        """The option index per unit; ValueError if units are rebuilt together."""
        if any(isinstance(item, Run) for item in self.schedule):
            raise ValueError("a schedule with runs is no choice of an option per unit")
        return tuple(item.option for item in self.schedule if isinstance(item, Single))


def solve(model: StepModel, budget: int, *, work_limit: int = WORK_LIMIT) -> Solution | None:
    """The cheapest schedule within `budget` bytes, or None if there is none.

    With less work than it takes, the best one found, and a valid lower bound. The same model, budget and limit give the
    same schedule.
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
    """The smallest peak of any schedule, and the cheapest schedule that has it."""
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
        """Rounds of growing excess until the best schedule is known to be the best."""
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
        """Fewer steps per run: a selection of them for a better schedule, then lower bounds of all for a bound."""
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
        """Look for a better schedule with this excess, which is all it takes if `final`; whether it was allowed."""
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
        for step in (self.unit, GROWTH * self.unit, NEVER):  # first with guesses of what is enough
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
        """Search below a cost; what is found is the best schedule if it can be one."""
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
