"""Which units can be rebuilt together, and what that frees; from schedules to what the runtime is told, and back.

A unit is linked if its input is the output of the unit before. Two steps are captured in which pairs of neighbours are
rebuilt together, every unit being the second of a pair in one of them: what is alive less than in the recomputed step
between the second one's forward and its backward is its input, if nothing else holds that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ullage.mechanisms import KEEP, RECOMPUTE, Option
from ullage.planner.study._choices import ALL
from ullage.planner.study._study import Study
from ullage.runtime import Place
from ullage.solver._instance import StepModel
from ullage.solver._schedule import Run, Schedule, Single

FIRST = replace(RECOMPUTE, place=Place(0, 1, False, True))
SECOND = replace(RECOMPUTE, place=Place(1, 1))


def linkable(s: Study) -> list[int]:
    """Units (by their place in the order) whose input may be made by the unit before.

    Not among them: units called several times, units that keep routing outputs, and those after one that can't be run again.
    """
    first_micro = [c for c in s.session.calls if c.first_op < s.session.trace.marks[1]]
    calls = {c.fqn: c for c in reversed(first_micro)}
    options = ALL.of(s)
    alone = {u.fqn for u in s.units if u.calls == 1 and not u.routing and RECOMPUTE in options[u.fqn]}
    found = []
    for k, (a, b) in enumerate(zip(s.units, s.units[1:], strict=False)):
        if (
            a.fqn in alone
            and b.fqn in alone
            and b.fqn not in s.explored.unlinked
            and calls[a.fqn].outputs & calls[b.fqn].inputs
        ):
            found.append(k + 1)
    return found


def pairs(s: Study, parity: int) -> dict[str, Option]:
    """An assignment in which units of one parity are rebuilt together with the one before."""
    seconds, options = {k for k in linkable(s) if k % 2 == parity}, ALL.of(s)
    assignment = {}
    for k, u in enumerate(s.units):
        option = RECOMPUTE if RECOMPUTE in options[u.fqn] else KEEP
        assignment[u.fqn] = SECOND if k in seconds else FIRST if k + 1 in seconds else option
    return assignment


def assignment_of(model: StepModel, schedule: Schedule) -> dict[str, Option]:
    """What the runtime is told of each unit.

    Args:
        model: its options are what the schedule's numbers stand for.
        schedule: from the solver.
    """
    options = [[o.option for o in facts] for facts in model.options]
    found: dict[int, Option] = {}
    for item in schedule:
        if isinstance(item, Single):
            found[item.unit] = options[item.unit][item.option]
        else:
            found |= {u: replace(RECOMPUTE, place=p) for u, p in _places(item, 0, options).items()}
    return {f: _with_feeds(found, u) for u, f in enumerate(model.units)}


def _places(run: Run, depth: int, options: Sequence[Sequence[Option]]) -> dict[int, Place]:
    """A run starts where its first unit does; what is in it lies one deeper."""
    found: dict[int, Place] = {}
    for item in run.items:
        if isinstance(item, Single):
            records = options[item.unit][item.option] == KEEP
            found[item.unit] = Place(depth + 1, depth + 1, records)
        else:
            found |= _places(item, depth + 1, options)
    found[run.first] = replace(found[run.first], depth=depth)
    return found


def _with_feeds(found: Mapping[int, Option], u: int) -> Option:
    option, following = found[u], found.get(u + 1, KEEP)
    feeds = following.place is not None and following.place.depth > 0
    return replace(option, place=replace(option.place, feeds=feeds)) if option.place is not None else option
