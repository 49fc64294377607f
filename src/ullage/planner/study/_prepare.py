"""Make the study that all decisions about one workload share: the plain step, its units, and their options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from ullage._errors import ArgumentError
from ullage.apply._existing import refuse_existing
from ullage.capture._timeline import OpCost, effective_bytes
from ullage.capture._units import UnitFacts, unit_facts
from ullage.mechanisms import KEEP
from ullage.planner.study._device import choose_device
from ullage.planner.study._explored import Explored
from ullage.planner.study._options import find_options
from ullage.planner.study._study import Progress, Study, both_steps
from ullage.planner.study._tiers import OffloadTier
from ullage.workload import Workload, in_evaluation


class KnownCosts(Protocol):
    """The costs that a study takes from a `ullage.Profile`."""

    @property
    def costs(self) -> str:
        """How the costs were found: "measured" or "roofline"."""

    @property
    def op_costs(self) -> Mapping[str, OpCost]:
        """The cost of every op signature."""


def prepare(
    work: Workload,
    device: str | None = None,
    costs: str = "auto",
    profile: KnownCosts | None = None,
    units: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
    tier: OffloadTier | None = None,
) -> Study:
    """Make a study, from which plans for any number of budgets can be made."""
    known = profile.op_costs if profile is not None else None
    mode = profile.costs if profile is not None and profile.costs == "roofline" else costs
    return study(work, device, mode, units, known, progress, tier)


def study(
    work: Workload,
    device: str | None,
    costs: str,
    units: Sequence[str] | None = None,
    known_costs: Mapping[str, OpCost] | None = None,
    progress: Progress | None = None,
    tier: OffloadTier | None = None,
) -> Study:
    """Capture the plain step (a first and a later one), and find the units and their options."""
    if not isinstance(work, Workload):
        raise ArgumentError(f"work: expected a ullage.Workload, got {type(work).__name__}")
    choice = choose_device(work, device)
    if costs not in ("auto", "roofline"):
        raise ArgumentError(f"costs={costs!r}: expected 'auto' or 'roofline'")
    if work.factory is None:
        refuse_existing(work.model)
    mode = "roofline" if costs == "roofline" or choice.estimate else "measured"
    say = progress or (lambda _: None)
    say("capturing the plain step")
    from ullage.planner.study._plain import plain_session

    session = plain_session(work, choice, say)
    plain = both_steps(session, {})
    result = Study(
        work,
        choice,
        mode,
        plain,
        (),
        Explored(session, (KEEP.name, plain[1]), {}),
        tier,
        tuple(in_evaluation(session.inst.model, session.training)),
        dict(known_costs or {}),
        known_costs is not None,
        say,
    )
    return _with_units(result, unit_facts(session, saved_bytes(result), units))


def with_units(s: Study, fqns: Sequence[str]) -> Study:
    """Return a study of the same plain step with exactly these modules as units; their options are not captured yet."""
    return _with_units(s, unit_facts(s.plain_session, saved_bytes(s), fqns))


def _with_units(s: Study, units: Sequence[UnitFacts]) -> Study:
    found = find_options(s.session, units, s.tier)
    explored = Explored(s.session, (KEEP.name, s.plain[1]), found.options)
    for (fqn, option), why in found.reasons.items():
        explored.explain(fqn, option, why)
    return replace(s, units=found.units, explored=explored)


def saved_bytes(s: Study) -> dict[str, int]:
    """Return the bytes that each module's calls save for backward, in the first micro-batch of the first step."""
    trace, costs = s.session.trace, s.costs(s.session)
    first = next((i for i, p in enumerate(trace.phase) if p == "backward"), len(trace.phase))
    kept = [
        (t.birth, effective_bytes(t, trace, costs))
        for t in trace.storages
        if 0 <= t.birth < first <= t.death + 1 and not t.category
    ]
    totals: dict[str, int] = {}
    for birth, size in kept:
        for fqn in {*s.session.tracker.stacks[trace.stack[birth]], ""}:
            totals[fqn] = totals.get(fqn, 0) + size
    return totals
