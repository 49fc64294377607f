"""Any schedule that fits, by the least needs alone: there is always one to return, and a first limit of the search."""

from __future__ import annotations

import numpy as np

from ullage.planner._bounds import TopLevel
from ullage.planner._chain import Chain
from ullage.planner._schedule import Item, Run, Schedule, Single


def any_schedule(chain: Chain, top: TopLevel) -> Schedule:
    """A schedule within the budget, of which there must be one: keeps what it can, and halves what it rebuilds."""
    items: list[Item] = []
    v, held = 0, 0
    while v < chain.size:
        unit = chain.units[v]
        fits = (top.room[v] >= held) & (held + unit.held + top.need[v + 1] <= top.budget)
        if fits.any():
            option = int(np.flatnonzero(fits)[int(unit.seconds[fits].argmin())])
            items.append(Single(v, option))
            v, held = v + 1, held + int(unit.held[option])
            continue
        runs = len(top.freed[v])
        fits = (top.run_room[v] >= held) & (held - top.freed[v] + top.need[v + 2 : v + 2 + runs] <= top.budget)
        w = v + 1 + int(np.flatnonzero(fits)[0])
        items.append(Run(v, w, _rebuilt(chain, v, w, top.budget - held - int(chain.base[v]))))
        held -= int(chain.links[w] - chain.links[v])
        v = w + 1
    return tuple(items)


def _rebuilt(chain: Chain, s: int, t: int, slack: int) -> tuple[Item, ...]:
    items: list[Item] = []
    while s < t:
        (needs, run_needs), (shifts, run_shifts) = chain.item_needs(s, t), chain.shifts(s, t)
        left = chain.need[[chain.kind[s][w] for w in range(s + 1, t)]]
        right = chain.need[[chain.kind[w + 1][t] for w in range(s + 1, t)]]
        runs = np.flatnonzero((run_needs <= slack) & (left <= slack) & (right + run_shifts <= slack))
        if len(runs):
            i = int(runs[len(runs) // 2])
            items.append(Run(s, s + 1 + i, _rebuilt(chain, s, s + 1 + i, slack)))
            s, slack = s + 2 + i, slack - int(run_shifts[i])
        else:
            fits = (needs <= slack) & (chain.need[chain.kind[s + 1][t]] + shifts <= slack)
            option = int(np.flatnonzero(fits)[int(chain.units[s].passed[fits].argmin())])
            items.append(Single(s, option))
            s, slack = s + 1, slack - int(shifts[option])
    unit = chain.units[t]
    fits = unit.last_need <= slack
    items.append(Single(t, int(np.flatnonzero(fits)[int(unit.last[fits].argmin())])))
    return tuple(items)
