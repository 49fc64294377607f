"""Make a plan from executed steps: its predictions, and a decision with a reason for each unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from msgspec import structs

from ullage._bytes import format_bytes
from ullage._errors import BudgetError
from ullage.mechanisms import KEEP, RECOMPUTE, Option
from ullage.offload import BLOCK
from ullage.planner.explain._peak import bounds_of
from ullage.planner.model._model import model_of
from ullage.planner.plan._budget import Budget
from ullage.planner.plan._plan import VERSION, Decision, Forecast, Plan, environment, fingerprint
from ullage.planner.study._choices import Choices
from ullage.planner.study._executed import Executed, StepCapture, Steps
from ullage.planner.study._reserved import reserved_bytes
from ullage.planner.study._study import Study
from ullage.planner.study._tiers import Disk, Host, OffloadTier, Traffic
from ullage.workload import note_of


def forecast(steps: Steps, reserved: int | None = None) -> Forecast:
    """Return the predictions of an executed first and later step; `reserved`: bytes that the caching allocator would hold."""
    moved, (phase, module, op) = steps.later.overlap, steps.worst.moment
    return Forecast(
        peak_bytes=steps.peak_bytes,
        step_seconds=steps.seconds,
        first_step_peak_bytes=steps.first.peak_bytes,
        later_step_peak_bytes=steps.later.peak_bytes,
        phase=phase,
        module=module,
        op=op,
        traffic=Traffic.of(moved) if moved is not None else None,
        reserved_bytes=reserved,
    )


def finish(
    s: Study,
    choices: Choices,
    steps: Steps,
    budget: Budget | None,
    policy: str,
    bound: float,
    pinned: Mapping[str, str],
    explain: bool = False,
) -> Plan:
    """Return the plan of executed steps.

    Args:
        s: the study.
        choices: the options that there were to choose from.
        steps: the executed steps of the chosen assignment.
        budget: the budget, which the steps fit; None for a policy without one.
        policy: "optimal", or the named one.
        bound: lower bound on the seconds of any step within the budget.
        pinned: reasons that are known already, by unit.
        explain: say what holds the peak and what would lower it, which takes a step or two more.
    """
    if not steps.fits_tier:
        larger = max(steps.both, key=lambda e: e.offloaded_bytes)
        raise too_much_offloaded(larger, f"under policy {policy!r}{' with these pins' if pinned else ''}")
    tier, (first, later) = _tier(steps), s.capture_fresh(steps.assignment)
    reserved = [reserved_bytes(s, last) if explain else None for last in (s.plain[1], later)]
    plain, predicted = forecast(s.plain_steps, reserved[0]), forecast(steps, reserved[1])
    notes = list(s.plain_session.values.assumptions)
    notes += sorted({f"{f}: no {o}: {why}" for (f, o), why in s.reasons.items() if o != KEEP.name})[:8]
    if s.device.estimate:
        notes.append(
            f"estimate for {s.device.facts.title}, margin {s.device.facts.margin:.0%}: its kernels were not run"
        )
    notes += note_of(s.evaluation)
    memory = s.device.memory_bytes
    if budget is not None and memory is not None and budget.total > memory:
        notes.append(
            f"the budget of {format_bytes(budget.total)} is above the memory of {s.device.name}, {format_bytes(memory)}"
        )
    model = first.session.inst.model if s.work.factory is not None else s.work.model
    return Plan(
        version=VERSION,
        budget_bytes=budget.total if budget is not None else None,
        policy=policy,
        device=s.device.name,
        costs=s.costs_mode,
        estimate=s.device.estimate,
        predicted=predicted,
        baseline=plain,
        lower_bound_seconds=min(bound, predicted.step_seconds),
        gap=max(predicted.step_seconds / bound - 1, 0.0) if bound else 0.0,
        decisions=_decisions(s, choices, steps, first, policy, pinned),
        shapes={u.fqn: list(u_shape) for u in s.units for u_shape in _first_shape(first, u.fqn)},
        model=fingerprint(model),
        notes=notes,
        environment=environment(),
        headroom_bytes=budget.reserve if budget is not None else 0,
        bounds=bounds_of(s, choices, steps) if explain else None,
        disk=tier if isinstance(tier, Disk) else None,
        host=tier if isinstance(tier, Host) else None,
        evaluation=list(s.evaluation),
        setup=s.setup,
        values=s.work.reads.values,
        assume=dict(s.work.reads.assume),
    )


def _tier(steps: Steps) -> OffloadTier | None:
    """Return the tier that a handle makes: a file of the size asked for, or as much pinned memory as the steps need."""
    tier = steps.later.tier
    if not isinstance(tier, Host):
        return tier
    return structs.replace(tier, capacity_bytes=max(BLOCK, *(e.offloaded_bytes for e in steps.both)))


def _decisions(
    s: Study, choices: Choices, steps: Steps, first: StepCapture, policy: str, pinned: Mapping[str, str]
) -> list[Decision]:
    """Return each unit's decision: its option, the bytes it frees, the seconds it costs, and the reason."""
    from ullage.planner.explain._words import words_of  # an import of ullage does not need it

    facts = model_of(s, choices) if len(s.captures) > 1 else None
    later = s.capture_fresh(steps.assignment)[1]
    rows = []
    for index, u in enumerate(s.units):
        option = steps.assignment[u.fqn]
        known = {o.option: o for o in facts.options[index]} if facts else {}
        keep, mine = known.get(KEEP), known.get(replace(option, place=None))
        freed = max((keep.held_bytes if keep else u.saved_bytes) - (mine.held_bytes if mine else 0), 0)
        if facts is not None and option.place is not None and option.place.depth:
            freed += facts.link_bytes[index]
        ops, seconds = steps.later.recomputed.get(u.fqn, (0, 0.0))
        shape = max((c for c in first.session.calls if c.fqn == u.fqn), key=lambda c: _elements(c.shapes), default=None)
        rows.append(
            Decision(
                unit=u.fqn,
                action=option.name,
                bytes_freed=0 if option == KEEP else freed,
                seconds_added=seconds,
                recomputed_ops=ops,
                reason=u.keep_reason or pinned.get(u.fqn) or _why(s, u.fqn, option, policy),
                buffers=list(u.buffers),
                keeps_routing=u.routing,
                input_elements=_elements(shape.shapes) if shape else 0,
                place=option.place,
                words=words_of(s, later, u.fqn, option, u.routing),
            )
        )
    return rows


def _why(s: Study, fqn: str, option: Option, policy: str) -> str:
    """Return why a unit that nobody pinned has its option."""
    if option != KEEP:
        return "needed for the budget" if policy == "optimal" else f"policy {policy}"
    return s.reasons.get((fqn, RECOMPUTE.name), "fits")


def _elements(shapes: tuple[tuple[int, ...], ...]) -> int:
    total = 0
    for shape in shapes:
        n = 1
        for d in shape:
            n *= d
        total += n
    return total


def _first_shape(capture: StepCapture, fqn: str) -> list[tuple[int, ...]]:
    return next(([c.shapes[0]] for c in capture.session.calls if c.fqn == fqn and c.shapes), [])


def too_much_offloaded(step: Executed, why: str) -> BudgetError:
    """Return the error for a tier that is too small for a step's offloaded tensors."""
    assert step.tier is not None
    there, needed = format_bytes(step.tier.capacity_bytes), format_bytes(step.offloaded_bytes)
    return BudgetError(
        f"{step.tier.argument}: {there}, but {needed} are offloaded at once {why}; raise it, or offload fewer units"
    )
