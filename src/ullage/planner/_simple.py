"""Fewer distinct actions: of the plans that are hardly slower than the best, the one a person can keep in mind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from ullage._errors import BudgetInfeasible
from ullage.mechanisms import RECOMPUTE, Option
from ullage.planner._model import model_of
from ullage.planner._overrides import measured, only
from ullage.planner._solve import solve
from ullage.planner._study import Study

Assigned = dict[str, Option]
TOGETHER = "rebuilt together"
_MARGIN = 1.001  # between the time the solver sees and that of the executed step


def fewer_actions(
    s: Study, assignment: Assigned, tolerance: float, limit: int, decide: Callable[[], Assigned]
) -> tuple[Assigned, str]:
    """The plan with the fewest distinct actions that is at most `tolerance` slower, and what is to be said of it.

    First one action for all units, then keep and one more, then the best of these and one more, and so on. Of each size,
    the set that is cheapest as the solver sees it is decided in full, and its executed step is compared.

    Args:
        s: the study.
        assignment: the best plan.
        tolerance: share of its step time that may be added.
        limit: bytes that a plan may use.
        decide: the best plan under the options of the moment, confirmed.
    """
    most = count_actions(assignment)
    if most == 1:
        return assignment, ""
    best, _ = measured(s, assignment)
    allowed = best * (1 + tolerance)
    base: frozenset[str] = frozenset()
    for size in range(1, most):
        s.progress(f"looking for a plan with fewer actions ({size})")
        chosen, seconds = _cheapest(s, base, limit)
        if seconds <= allowed * _MARGIN:
            found = _decided(s, chosen, decide)
            if found is not None and count_actions(found) < most and (now := measured(s, found)[0]) <= allowed:
                fewer = count_actions(found)
                return (
                    found,
                    f"simple: {_actions(fewer)} instead of {most}, which changes the step time by {now / best - 1:+.2%}",
                )
        base = chosen if size > 1 else frozenset({"keep"})
    return assignment, f"simple: no plan with fewer than {_actions(most)} is within {tolerance:.1%} of this step time"


def count_actions(assignment: Mapping[str, Option]) -> int:
    """How many distinct actions there are; being rebuilt with others is one of its own."""
    return len({(o.name, o.place is not None) for o in assignment.values()})


def _cheapest(s: Study, base: frozenset[str], limit: int) -> tuple[frozenset[str], float]:
    """`base` and one more action: (the cheapest such set, seconds of its step), as the solver sees it."""
    kinds = {o.name for options in s.options.values() for o in options} | {TOGETHER}
    found = []
    for kind in sorted(kinds - base):
        with _only(s, base | {kind}):
            model = model_of(s)
            solution = solve(model, limit)
        if solution is not None:
            found.append((model.base_seconds + solution.seconds, kind))
    return (base | {min(found)[1]}, min(found)[0]) if found else (base, float("inf"))


def _decided(s: Study, actions: frozenset[str], decide: Callable[[], Assigned]) -> Assigned | None:
    with _only(s, actions):
        try:
            return decide()
        except BudgetInfeasible:  # the solver saw one that is none when it is executed
            return None


@contextlib.contextmanager
def _only(s: Study, actions: frozenset[str]) -> Iterator[None]:
    """Decide under the options of these names; a unit that has none of them keeps its own."""
    names = actions | ({RECOMPUTE.name} if TOGETHER in actions else frozenset())
    left = {f: [o for o in options if o.name in names] or options for f, options in s.options.items()}
    with only(s, left):
        model = model_of(s)
        s.model = model if TOGETHER in actions else replace(model, linked=())
        yield


def _actions(n: int) -> str:
    return "1 action" if n == 1 else f"{n} actions"
