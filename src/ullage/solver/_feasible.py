"""Find some schedule that fits, by the least needs alone: it is the solver's first best one, and bounds the search."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from ullage.solver._bounds import TopLevel
from ullage.solver._chain import NEVER, Chain, Ints
from ullage.solver._runs import rebuild
from ullage.solver._schedule import Item, Run, Schedule, Single


def any_schedule(chain: Chain, top: TopLevel) -> Schedule:
    """Return a schedule within the budget, if one exists: it keeps units while they fit, and halves runs that must be recomputed."""

    def last_option(unit: int, slack: int) -> int:
        return _cheapest(chain.units[unit].last, chain.units[unit].last_need <= slack)

    items: list[Item] = []
    v, held = 0, 0
    while v < chain.size:
        unit = chain.units[v]
        fits = (top.room[v] >= held) & (held + unit.held + top.need[v + 1] <= top.budget)
        if fits.any():
            option = _cheapest(unit.seconds, fits)
            items.append(Single(v, option))
            v, held = v + 1, held + int(unit.held[option])
            continue
        runs = len(top.freed[v])
        fits = (top.run_room[v] >= held) & (held - top.freed[v] + top.need[v + 2 : v + 2 + runs] <= top.budget)
        w = v + 1 + int(np.flatnonzero(fits)[0])
        slack = top.budget - held - int(chain.base[v])
        items.append(Run(v, w, rebuild(v, w, slack, partial(_first_item, chain), last_option)))
        held -= int(chain.links[w] - chain.links[v])
        v = w + 1
    return tuple(items)


def _first_item(chain: Chain, s: int, t: int, slack: int) -> tuple[int, int, int]:
    """Return the middle one of the runs that s..t can start with, or else the cheapest option of s."""
    (needs, run_needs), (shifts, run_shifts) = chain.item_needs(s, t), chain.shifts(s, t)
    left, right = chain.need[chain.kind[s, s + 1 : t]], chain.need[chain.kind[s + 2 : t + 1, t]]
    runs = np.flatnonzero((run_needs <= slack) & (left <= slack) & (right + run_shifts <= slack))
    if len(runs):
        i = int(runs[len(runs) // 2])
        return s + 1 + i, 0, slack - int(run_shifts[i])
    fits = (needs <= slack) & (chain.need[chain.kind[s + 1, t]] + shifts <= slack)
    option = _cheapest(chain.units[s].passed, fits)
    return s, option, slack - int(shifts[option])


def _cheapest(cost: Ints, fits: npt.NDArray[np.bool_]) -> int:
    return int(np.where(fits, cost, NEVER).argmin())
