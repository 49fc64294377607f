"""Find the units that can be recomputed together and the bytes that this frees; turn the solver's schedules into assignments.

A unit is linked if its input is the output of the unit before. Two steps are captured in which pairs of neighbours are recomputed
together, so that each unit is the second of a pair in one of them. Between the second unit's forward and its backward these steps
hold less than the recomputed step does: the second unit's input, unless something else holds it.
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
    """Return the indices of units whose input the unit before may recompute.

    Units called several times, units that keep routing outputs, and units after one that can't be run again are left out.
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
    """Return an assignment in which each linkable unit of one parity is recomputed together with the unit before."""
    seconds, options = {k for k in linkable(s) if k % 2 == parity}, ALL.of(s)
    assignment = {}
    for k, u in enumerate(s.units):
        option = RECOMPUTE if RECOMPUTE in options[u.fqn] else KEEP
        assignment[u.fqn] = SECOND if k in seconds else FIRST if k + 1 in seconds else option
    return assignment


def assignment_of(model: StepModel, schedule: Schedule) -> dict[str, Option]:
    """Return each unit's option, with its place in a run, from a schedule.

    Args:
        model: the model that the solver was given; the schedule's numbers are indices of its options.
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
    """Return the places of a run's units: its first unit is at the run's own depth, all others one deeper or more."""
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
