"""Find the whole curve of the choice inside a unit, exactly, by eliminating one variable after another.

A variable says that a node of `Rules` holds, or that a group is kept. A factor lists, per setting of a few variables, the possible
(bytes, time) labels; a forbidden setting has none. To eliminate a variable, the factors that contain it are added up, and for each
setting of the others only the labels that no other one beats are kept. This is bucket elimination (Dechter 1999) with sets of
Pareto-optimal labels as values. The work grows with the number of variables in one factor: 3 to 7 in the blocks of
transformers, MoE, state space and conv nets, where the needs of a replay run along a chain. If there are more (a dense block),
`ullage.levels._milp` solves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ullage.levels._graph import Graph

MOST_VARIABLES = 12  # in one factor: it has up to 2**12 settings, each with a list of labels
MOST_WORK = 500_000  # labels and settings, in all; about a second
# times are integers of picoseconds, so that sums are exact and the result does not depend on their order
_PICO = 10**12

Label = tuple[int, int, int]  # bytes, picoseconds, kept groups as bits
_Table = dict[tuple[bool, ...], list[Label]]
_NOTHING: list[Label] = [(0, 0, 0)]


class TooWide(Exception):
    """Elimination would take more work than is allowed."""


@dataclass(frozen=True)
class _Factor:
    scope: tuple[int, ...]
    table: _Table


@dataclass(frozen=True)
class Curve:
    """The Pareto-optimal choices (none is beaten in both bytes and time), bytes ascending; of equal ones the first `Label`."""

    labels: tuple[Label, ...]

    def solve(self, keep_bytes: int | None, price: float) -> tuple[frozenset[int], float]:
        """Return the groups with the least seconds + price * bytes that hold at most `keep_bytes` bytes, and that sum."""
        able = self.labels if keep_bytes is None else [label for label in self.labels if label[0] <= keep_bytes]
        values = [time / _PICO + price * nbytes for nbytes, time, _ in able]
        best = values.index(min(values))
        bits = able[best][2]
        return frozenset(g for g in range(bits.bit_length()) if bits >> g & 1), values[best]


def curve_of(graph: Graph) -> Curve:
    """Return the curve of a unit.

    Raises:
        TooWide: elimination exceeds `MOST_VARIABLES` or `MOST_WORK`.
    """
    return Curve(tuple(_Elimination(graph).labels()))


def _factors(graph: Graph) -> Iterator[_Factor]:
    rules, groups = graph.rules, len(graph.groups)
    most, least = rules.holds(()), rules.holds(range(groups))
    # a node that holds with everything kept always holds; one that does not hold with nothing kept never does
    fixed = {n: least[n] for n in rules.antitone if least[n] or not most[n]}
    first = rules.size  # the variable of group 0

    def allowed(scope: tuple[int, ...], forbidden: tuple[bool, ...]) -> Iterator[_Factor]:
        if all(fixed.get(v, bad) == bad for v, bad in zip(scope, forbidden, strict=True)):
            free = [(v, bad) for v, bad in zip(scope, forbidden, strict=True) if v not in fixed]
            bad = tuple(b for _, b in free)
            settings = itertools.product((False, True), repeat=len(free))
            yield _Factor(tuple(v for v, _ in free), {s: _NOTHING for s in settings if s != bad})

    for a, b in rules.always:
        yield from allowed((a, b), (True, False))
    for a, b, g in rules.dropped:
        yield from allowed((a, b, first + g), (True, False, False))
    for a, b, g in rules.kept:
        yield from allowed((a, b, first + g), (True, False, True))
    for a, b, c in rules.both:
        yield from allowed((a, b, c), (True, True, False))
    for n, seconds in rules.cost.items():
        label = (0, round(seconds * _PICO), 0)
        if n not in fixed:
            yield _Factor((n,), {(False,): _NOTHING, (True,): [label]})
        elif fixed[n]:
            yield _Factor((), {(): [label]})
    for g, group in enumerate(graph.groups):
        yield _Factor((first + g,), {(False,): _NOTHING, (True,): [(group.nbytes, 0, 1 << g)]})


class _Elimination:
    def __init__(self, graph: Graph) -> None:
        self.work = 0
        self.constants: list[list[Label]] = []
        self.having: dict[int, list[_Factor]] = {}
        self.near: dict[int, set[int]] = {}
        for factor in _factors(graph):
            self._add(factor)

    def _add(self, factor: _Factor) -> None:
        if not factor.scope:
            self.constants.append(factor.table[()])
        for v in factor.scope:
            self.having.setdefault(v, []).append(factor)
            self.near.setdefault(v, set()).update(factor.scope)

    def labels(self) -> list[Label]:
        near = self.near
        while near:
            # min-degree order: the variable that meets the fewest others
            v = min(near, key=lambda v: (len(near[v]), v))
            factors = self.having.pop(v)
            for u in near.pop(v) - {v}:
                near[u].discard(v)
                self.having[u] = [f for f in self.having[u] if v not in f.scope]
            self._add(self._without(v, factors))
        return self._sum(self.constants)

    def _without(self, v: int, factors: list[_Factor]) -> _Factor:
        scope = tuple(sorted({u for f in factors for u in f.scope} - {v}))
        if len(scope) >= MOST_VARIABLES:
            raise TooWide
        place = {u: i for i, u in enumerate((*scope, v))}
        places = [[place[u] for u in f.scope] for f in factors]
        table: _Table = {}
        for setting in itertools.product((False, True), repeat=len(scope)):
            labels: list[Label] = []
            for value in (False, True):
                full = (*setting, value)
                parts = [f.table.get(tuple(full[i] for i in at)) for f, at in zip(factors, places, strict=True)]
                if None not in parts:
                    labels += self._sum(p for p in parts if p is not None)
            self._worked(1)
            if labels:
                table[setting] = _best(labels)
        return _Factor(scope, table)

    def _sum(self, parts: Iterable[list[Label]]) -> list[Label]:
        total = _NOTHING
        for part in parts:
            if part is not _NOTHING:
                self._worked(len(total) * len(part))
                total = _best([(b + c, t + u, k | j) for b, t, k in total for c, u, j in part])
        return total

    def _worked(self, n: int) -> None:
        self.work += n
        if self.work > MOST_WORK:
            raise TooWide


def _best(labels: list[Label]) -> list[Label]:
    if len(labels) == 1:
        return labels
    kept: list[Label] = []
    for label in sorted(labels):
        if not kept or label[1] < kept[-1][1]:
            kept.append(label)
    return kept
