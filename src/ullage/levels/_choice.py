"""The choice inside one unit: which saved tensors to keep, so that a replay makes the others in the least time.

`levels` returns points of the curve of least replay seconds against kept bytes. A price per byte finds the points on the curve's
convex hull; a limit on bytes finds those between. Each is the optimum for its bytes, or has a bound on how far it may be off.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace

from ullage.levels._eliminate import Curve, TooWide, curve_of
from ullage.levels._graph import Graph
from ullage.levels._milp import Program

# nodes of HiGHS's search tree per level: a limit on work, so that every machine finds the same. Not tuned
NODE_LIMIT = 2_000
# Levels closer than this count as equally fast: below the clock's resolution, and above HiGHS's tolerances.
_TIE_SECONDS, _TIE_SHARE = 1e-9, 1e-7


@dataclass(frozen=True)
class Level:
    """A choice inside a unit.

    Attributes:
        kept: the kept groups.
        nbytes: bytes that they hold.
        seconds: time of the replay.
        lower_bound: no choice that holds at most as many bytes takes less; `seconds` where that is proved to be the optimum
            (to within 1e-9 s or 1e-7 of a replay that keeps nothing, whichever is more).
    """

    kept: frozenset[int]
    nbytes: int
    seconds: float
    lower_bound: float

    @property
    def proved(self) -> bool:
        """Is it the optimum for its bytes?"""
        return self.lower_bound == self.seconds


@dataclass
class _Gap:
    """The gap between two neighbouring levels: no level of at most `searched` bytes is faster than `left`."""

    left: Level
    right: Level
    searched: int
    convex: bool = False  # no point between lies below the line through both

    @property
    def area(self) -> float:
        """The area in which levels may still be found, in bytes times seconds."""
        return (self.right.nbytes - self.searched) * (self.left.seconds - self.right.seconds)


def levels(graph: Graph, count: int = 12, negligible: float = 1e-4, node_limit: int = NODE_LIMIT) -> tuple[Level, ...]:
    """Return optimal levels, bytes ascending and seconds descending, from nothing kept to the least bytes with the fastest replay.

    The gap with the largest area (bytes times seconds) is split first.

    Args:
        graph: the unit.
        count: the most levels.
        negligible: gaps with a smaller share of the whole area (between the first and the last level) are not split.
        node_limit: the most nodes of the solver's tree per level; if they are not enough, `Level.proved` is false.
    """
    return _Search(graph, node_limit).levels(count, negligible)


class _Search:
    def __init__(self, graph: Graph, node_limit: int) -> None:
        self.graph = graph
        self.empty = graph.seconds(())
        self.tie = max(_TIE_SECONDS, _TIE_SHARE * self.empty)
        self.total = graph.nbytes(range(len(graph.groups)))
        self.step = math.gcd(*(g.nbytes for g in graph.groups))
        self.solver: Curve | Program
        try:
            self.solver = curve_of(graph)
        except TooWide:
            self.solver = Program(graph, node_limit)

    def levels(self, count: int, negligible: float) -> tuple[Level, ...]:
        nothing, everything = self._level(frozenset()), self._level(frozenset(range(len(self.graph.groups))))
        if everything.seconds > self.empty - self.tie:
            return (nothing,)
        first, last = self._solve(0, 0.0, nothing), self._solve(None, 0.0, everything)
        found = {0: first, last.nbytes: last}
        whole = _Gap(first, last, 0).area
        open_gaps: list[tuple[float, int, _Gap]] = []

        def put(gap: _Gap) -> None:
            if gap.area > negligible * whole and gap.right.nbytes - gap.searched > self.step:
                heapq.heappush(open_gaps, (-gap.area, gap.left.nbytes, gap))

        put(_Gap(first, last, 0))
        while open_gaps and len(found) < count:
            gap = heapq.heappop(open_gaps)[2]
            for part in self._split(gap):
                found.setdefault(part.left.nbytes, part.left)
                put(part)
        return self._useful([found[n] for n in sorted(found)])

    def _split(self, gap: _Gap) -> list[_Gap]:
        left, right = gap.left, gap.right
        if not gap.convex:
            price = (left.seconds - right.seconds) / (right.nbytes - left.nbytes)
            level = self._solve(None, price, left)
            below = left.seconds + price * left.nbytes - (level.seconds + price * level.nbytes)
            if below <= self.tie or not left.nbytes < level.nbytes < right.nbytes:
                return [_Gap(left, right, gap.searched, True)]
            return [_Gap(left, level, gap.searched), _Gap(level, right, level.nbytes)]
        keep_bytes = (gap.searched + right.nbytes - 1) // 2 if right.nbytes - gap.searched > 2 else gap.searched + 1
        keep_bytes = max(keep_bytes, gap.searched + 1)
        level = self._solve(keep_bytes, 0.0, left)
        if level.seconds >= left.seconds - self.tie:
            return [_Gap(left, right, keep_bytes, True)]
        return [_Gap(left, level, gap.searched, True), _Gap(level, right, keep_bytes, True)]

    def _solve(self, keep_bytes: int | None, price: float, known: Level) -> Level:
        """Return the best level that keeps at most `keep_bytes`, or the best at a price; `known` if the solver finds none."""
        fewest = self.tie / max(self.total, 1)  # a tiny price, so that of two equally fast levels the smaller one wins
        kept, value = self.solver.solve(keep_bytes, price + fewest)
        level = self._level(known.kept if kept is None else kept)
        bound = max(value - (price + fewest) * (level.nbytes if keep_bytes is None else keep_bytes), 0.0)
        return level if bound >= level.seconds - 2 * self.tie else replace(level, lower_bound=bound)

    def _level(self, kept: frozenset[int]) -> Level:
        seconds = self.graph.seconds(kept)
        return Level(kept, self.graph.nbytes(kept), seconds, seconds)

    def _useful(self, found: list[Level]) -> tuple[Level, ...]:
        kept = found[:1]
        for level in found[1:]:
            if level.seconds < kept[-1].seconds - self.tie:
                kept.append(level)
        return tuple(kept)
