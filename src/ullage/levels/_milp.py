"""The choice inside a unit as a mixed-integer program, solved by HiGHS.

Binary variables: x_g says that group g is kept, y_n that node n of `Rules` holds. The rule "if a holds, b does" is y_b >= y_a; with "and g
is dropped" it is y_b >= y_a - x_g; with "and g is kept" y_b >= y_a + x_g - 1. Nodes that hold with everything kept always hold, and
nodes that don't hold with nothing kept never do: neither are variables. At a price per byte, and without the rules about a replay's
end, this is a minimum cut (as in torch's partitioner), and its relaxation is integral. With a limit on bytes HiGHS 1.12 (scipy 1.17)
may print a line of its own.

Source: which values are kept and which ops run again are Checkmate's variables (Jain et al., MLSys 2020, arXiv 1910.02653). One
replay of one unit runs each op at most once, so they need no index of time here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ullage._errors import ArgumentError
from ullage.levels._graph import Graph

_INTEGRAL = 1e-7  # HiGHS's values this close to an integer are that integer
_SCALE = 1e6  # of the objective: HiGHS stops at a gap of 1e-6, whatever the unit


def _scipy() -> tuple[Any, Any]:
    """Import scipy only here: of 18 models of eight families none has a unit that needs it.

    It stays a dependency rather than an extra: with and without it, plans of such a unit would differ.

    Raises:
        ArgumentError: scipy is not installed, as after `pip install --no-deps`.
    """
    try:
        from scipy import optimize, sparse  # type: ignore[import-untyped]
    except ImportError as error:
        raise ArgumentError(
            "a unit's saved tensors depend on each other in so many ways that the choice among them needs scipy, which is not installed: "
            "`pip install scipy`, or pin the unit (pin={'its.name': 'recompute'})"
        ) from error
    return optimize, sparse


class Program:
    """The program of one unit, see above.

    Args:
        graph: the unit; a replay of it that keeps nothing must take some time.
        node_limit: the most nodes of the search tree per solve: a limit on work, not on time, so that results repeat.
    """

    def __init__(self, graph: Graph, node_limit: int) -> None:
        self.graph, self.node_limit = graph, node_limit
        rules, groups = graph.rules, len(graph.groups)
        most, least = rules.holds(()), rules.holds(range(groups))
        self.fixed = {n: float(least[n]) for n in rules.antitone if least[n] or not most[n]}
        free = [n for n in range(rules.size) if n not in self.fixed]
        self.column = {n: groups + i for i, n in enumerate(free)}
        self.rows: list[tuple[dict[int, float], float]] = []  # coefficients, lower bound
        for a, b in rules.always:
            self._row({b: 1, a: -1}, {}, 0)
        everything = frozenset(range(groups))
        alone = [rules.holds(everything - {g}) for g in range(groups)]
        for a, b, g in rules.dropped:
            # if dropping g alone makes b hold, y_b >= 1 - x_g: with y_a in the place of 1 the relaxation would be much weaker
            self._row({b: 1} if alone[g][b] else {b: 1, a: -1}, {g: 1}, int(alone[g][b]))
        for a, b, g in rules.kept:
            self._row({b: 1, a: -1}, {g: -1}, -1)
        for a, b, c in rules.both:
            self._row({c: 1, a: -1, b: -1}, {}, -1)
        self.sunk = sum(s * self.fixed.get(n, 0.0) for n, s in rules.cost.items())
        self.seconds = np.zeros(groups + len(free))
        for n, s in rules.cost.items():
            if n in self.column:
                self.seconds[self.column[n]] = s
        self.nbytes = np.array([g.nbytes for g in graph.groups], np.int64)
        self.unit = math.gcd(*self.nbytes.tolist()) or 1
        self.scale = _SCALE / max(graph.seconds(()), 1e-12)

    def _row(self, nodes: dict[int, int], groups: dict[int, int], least: float) -> None:
        """Add: the sum of nodes and groups is at least `least`, unless it always is."""
        row = {g: float(c) for g, c in groups.items()}
        for n, c in nodes.items():
            if n in self.fixed:
                least -= c * self.fixed[n]
            else:
                row[self.column[n]] = float(c)
        if sum(c for c in row.values() if c < 0) < least:
            self.rows.append((row, least))

    def solve(self, keep_bytes: int | None, price: float) -> tuple[frozenset[int] | None, float]:
        """Return the groups with the least seconds + price * bytes that hold at most `keep_bytes` bytes, and a lower bound on that sum.

        None for the groups: it stopped before it found any.
        """
        groups = len(self.nbytes)
        objective = self.seconds * self.scale
        objective[:groups] = self.nbytes * (price * self.scale)
        upper = np.ones(len(objective))
        if keep_bytes is not None:
            upper[:groups] = self.nbytes <= keep_bytes
        # without a limit the relaxation is nearly always integral, and takes a tenth of the time
        for integral in (False, True) if keep_bytes is None else (True,):
            x, bound = self._run(objective, upper, self._constraints(keep_bytes), integral)
            if x is None or not np.abs(x[:groups] - x[:groups].round()).max() > _INTEGRAL:
                break
        bound = self.sunk + max(bound, 0.0) / self.scale
        kept = frozenset(np.flatnonzero(x[:groups] > 0.5).tolist()) if x is not None else None
        if kept is not None and keep_bytes is not None and self.graph.nbytes(kept) > keep_bytes:
            kept = None  # the solver's tolerance let too many bytes through
        return kept, bound

    def _run(self, objective: Any, upper: Any, constraints: list[Any], integral: bool) -> tuple[Any, float]:
        optimize, _ = _scipy()
        result = optimize.milp(
            objective,
            integrality=np.full(len(objective), int(integral)),
            bounds=optimize.Bounds(0, upper),
            constraints=constraints,
            options={"node_limit": self.node_limit, "mip_rel_gap": 0.0},
        )
        bound = result.mip_dual_bound if integral else result.fun
        return result.x, bound if bound is not None and math.isfinite(bound) else 0.0

    def _constraints(self, keep_bytes: int | None) -> list[Any]:
        optimize, sparse = _scipy()
        rows = self.rows
        if keep_bytes is not None:
            # sizes in their greatest common divisor, so that numbers are small; half of one leaves room for the solver's tolerance
            sizes = {g: -float(n // self.unit) for g, n in enumerate(self.nbytes.tolist())}
            rows = [*rows, (sizes, -(keep_bytes // self.unit) - 0.5)]
        if not rows:
            return []
        ends = np.cumsum([0, *(len(row) for row, _ in rows)])
        columns = np.array([c for row, _ in rows for c in row])
        data = np.array([v for row, _ in rows for v in row.values()])
        matrix = sparse.csr_array((data, columns, ends), shape=(len(rows), len(self.seconds)))
        return [optimize.LinearConstraint(matrix, np.array([least for _, least in rows]), np.inf)]
