"""A model's facts as integers and arrays, and which runs of units are alike.

Slack: the budget, less the bytes that the units before hold beyond the base, less the base at the backward of the unit in question.
Needs are slacks. Relative to the base, equal units have the same needs wherever they stand. So everything about a run is
kept per *kind* of run: the kinds of its units, and the differences between neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ullage.solver._instance import StepModel, nanoseconds

Ints = npt.NDArray[np.int64]
NEVER = 2**62  # more than any cost or need
FREE = -(2**60)  # less than any need


@dataclass(frozen=True)
class UnitArrays:
    """One unit's options, an element per option: bytes, needs (above the base at the unit's backward), nanoseconds."""

    held: Ints
    own: Ints
    record: Ints
    seconds: Ints
    passed: Ints  # cost in a run that is recomputed, unless it is the last unit there
    last: Ints  # cost as the last unit of such a run
    last_need: Ints


class Chain:
    """All facts of a model.

    Attributes:
        links: [u]: bytes of the inputs up to u that need not be held.
        passes: [u]: cost of a forward of all units before u.
        above: [u]: need outside units before u, above u's base; FREE if u itself never needs less.
        reach: [s]: the last unit of the longest run that starts at s.
        kind: [s, t]: the number of the kind of s..t; a longer run has a higher one.
        need: per kind, the least slack with which a run can be recomputed (a single unit: be the last of a run).
        least: per kind, its least cost with any slack.
    """

    def __init__(self, model: StepModel) -> None:
        n = len(model.units)
        self.model, self.size, zeros = model, n, (0,) * len(model.units)
        linked = (False, *model.linked[1:]) if model.linked else (False,) * n
        self.links = _ints(np.cumsum([b if y else 0 for b, y in zip(model.link_bytes or zeros, linked, strict=True)]))
        self.base = _ints(model.backward_base_bytes or zeros)
        self.forward_base = _ints(model.forward_base_bytes or model.backward_base_bytes or zeros)
        self.forward_peak = _ints(model.forward_peak_bytes or zeros)
        self.forward_cost = _ints([nanoseconds(x) for x in model.forward_seconds or zeros])
        self.passes = _ints([0, *np.cumsum(self.forward_cost)])
        self.outside = _ints(model.outside_bytes)
        self.units = [self._arrays(u, any(linked)) for u in range(n)]
        self.lowest = _ints([0, *np.cumsum([min(int(u.held.min()), 0) for u in self.units])])
        self.lowest[1:] -= self.links  # the least that units before can hold
        self.above = _ints([FREE, *(self._outside_above(u) for u in range(1, n))])
        self.reach = list(range(n))
        for u in range(n - 2, -1, -1):
            if linked[u + 1]:
                self.reach[u] = self.reach[u + 1]
        self.kind, self.kinds = self._number_kinds()
        self.need, self.least = self._least_needs()

    def _arrays(self, u: int, linked: bool) -> UnitArrays:
        options, forward = self.model.options[u], self.forward_cost[u]
        own = _ints([o.own_peak_bytes for o in options]) - self.base[u]
        record = _ints([self.model.record_bytes(u, c) if linked else 0 for c in range(len(options))])
        seconds = _ints([nanoseconds(o.seconds) for o in options])
        records = np.array([not o.is_recompute for o in options])
        last_need = np.where(records, np.maximum(own, record), own)
        held = _ints([o.held_bytes for o in options])
        return UnitArrays(
            held, own, record, seconds, seconds + forward, seconds + np.where(records, forward, 0), last_need
        )

    def _outside_above(self, u: int) -> int:
        least = min(int(self.units[u].own.min()), int(self.forward_base[u] + self.forward_peak[u] - self.base[u]))
        above = int(self.outside[u] - self.base[u])
        return FREE if above <= least else above

    def _number_kinds(self) -> tuple[Ints, int]:
        seen: dict[object, int] = {}
        alike: dict[object, int] = {}
        own = []
        for u, arrays in enumerate(self.units):
            facts = *(a.tobytes() for a in astuple(arrays)), int(self.forward_peak[u]), int(self.forward_cost[u])
            own.append(alike.setdefault(facts, len(alike)))
        between = zip(np.diff(self.links).tolist(), np.diff(self.base).tolist(), self.above[1:].tolist(), strict=True)
        steps = [None, *zip(own[1:], between, strict=True)]
        kind = np.full((self.size, self.size), -1, np.int64)
        before: list[int] = []  # of the runs from each unit that are one unit shorter
        for length in range(self.size):
            for s in range(self.size - length):
                key = own[s] if length == 0 else (before[s], steps[s + length])
                if s + length <= self.reach[s]:
                    kind[s, s + length] = seen.setdefault(key, len(seen))
            before = kind.diagonal(length).tolist()
        return kind, len(seen)

    def by_length(self) -> Iterator[tuple[int, int, int]]:
        """Yield (s, t, kind) of every run, and of every single unit, the shortest first."""
        for length in range(self.size):
            kinds = self.kind.diagonal(length).tolist()
            for s in range(self.size - length):
                if s + length <= self.reach[s]:
                    yield s, s + length, kinds[s]

    def item_needs(self, s: int, t: int) -> tuple[Ints, Ints]:
        """Return the needs of the first item of the run s..t when it is recomputed: per option of s; per run s..w, w = s + 1..t - 1."""
        # growth of the base, the inputs after s left out
        rise = self.base[t] - self.base[s] - (self.links[t] - self.links[s])
        unit = self.units[s]
        outside = np.maximum(self.above[s + 1 : t + 1] + self.base[s + 1 : t + 1] - self.base[s], FREE)
        single = np.maximum(np.maximum(unit.own, rise + unit.record), outside[0] + unit.held)
        inputs = self.links[s + 1 : t] - self.links[s : t - 1]
        passing = np.maximum.accumulate(np.maximum(inputs + self.forward_peak[s + 1 : t], self.forward_peak[s]))
        return single, np.maximum(rise + passing, outside[1:] - (self.links[s + 1 : t] - self.links[s]))

    def shifts(self, s: int, t: int) -> tuple[Ints, Ints]:
        """Return how much lower than its own slack the slack after that first item is: per option; per run."""
        freed = self.links[s + 1 : t] - self.links[s]
        return self.units[s].held + (self.base[s + 1] - self.base[s]), self.base[s + 2 : t + 1] - self.base[s] - freed

    def _least_needs(self) -> tuple[Ints, Ints]:
        need, least = np.full(self.kinds, NEVER, np.int64), np.zeros(self.kinds, np.int64)
        table = np.full((self.size, self.size), NEVER, np.int64)  # need of s..t
        passed = _ints([0, *np.cumsum([int(u.passed.min()) for u in self.units])])
        last = [int(u.last.min()) for u in self.units]
        for s, t, kind in self.by_length():
            if need[kind] == NEVER:
                least[kind] = passed[t] - passed[s] + last[t]
                need[kind] = self._least_need(s, t, table)
            table[s, t] = need[kind]
        return need, least

    def _least_need(self, s: int, t: int, table: Ints) -> int:
        if s == t:
            return int(self.units[s].last_need.min())
        (single, runs), (shift, run_shifts) = self.item_needs(s, t), self.shifts(s, t)
        single = np.maximum(single, table[s + 1, t] + shift)
        runs = np.maximum(np.maximum(runs, table[s, s + 1 : t]), table[s + 2 : t + 1, t] + run_shifts)
        return min(int(single.min()), int(runs.min(initial=NEVER)))


@lru_cache(maxsize=4)
def chain_of(model: StepModel) -> Chain:
    """Return the chain of a model; the last few are kept, because a plan solves one model for several budgets."""
    return Chain(model)


def _ints(values: object) -> Ints:
    return np.array(values, np.int64)
