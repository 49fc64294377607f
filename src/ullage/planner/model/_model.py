"""Compose homogeneous captures into the timeline of any mixed assignment.

Idea: one step is captured per option, with that option on every unit (levels of many equal units share a step, and a unit that ran with
one stands for the others). For every segment k (a maximal range of ops of one unit
call, or of none), with base[k] the live bytes at its start when every unit is recomputed:

    peak(k, a) = base[k] + sum over units w active at k, w != own:  held[w][a_w]  +  own[k][a_own]

`held` is the bytes that an option keeps alive, beyond recompute, between a unit's forward and backward. A unit is active from the
end of its forward to the start of its backward. Backward visits units in reverse, so the active units are a prefix of the
forward order, and the solver needs prefix sums only.

Invariant: where the model says less than the executed step, `ullage.planner.decide._confirm` lowers the solver's target and asks
again; so a plan's bytes are always those of an executed step, never the model's.

Known non-optimalities: segments that a capture doesn't have are merged into the one before, units called several times count as one, and
own peaks assume that each later unit holds the most it could. All of these err upward; `ullage.planner.decide._relax`
then tries cheaper options by execution. A unit recomputed together with others has no selective option.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ullage.mechanisms import KEEP, RECOMPUTE, Option
from ullage.offload import whole_blocks
from ullage.planner.model._tables import Segment, Tables
from ullage.planner.model._with_tier import Pace
from ullage.planner.study._choices import ALL, Choices, Options
from ullage.planner.study._executed import StepCapture
from ullage.planner.study._options import capture_options
from ullage.planner.study._study import Study
from ullage.planner.study._transfers import largest_sent, transfers_of
from ullage.solver._instance import NEVER_FITS, OptionFacts, StepModel


@dataclass(frozen=True)
class Composed:
    """The solver's model of a step, and the compute times of the plain step."""

    model: StepModel
    pace: Pace


def model_of(s: Study, choices: Choices = ALL) -> StepModel:
    """Return the model of some choices; capture one step per option first, unless that is done."""
    return composed(s, choices).model


def composed(s: Study, choices: Choices = ALL) -> Composed:
    """Return the model of some choices with the step's pace."""
    capture_options(s)
    key = choices.key(s), tuple(s.captures), s.explored.unlinked
    return s.derived(key, lambda: _compose(s, choices))


def _compose(s: Study, choices: Choices) -> Composed:
    """Compose the study's captures, see above."""
    options = choices.of(s)
    order = tuple(u.fqn for u in s.units)
    rank = {f: i for i, f in enumerate(order)}
    tables = Tables(s)
    facts: list[dict[str, OptionFacts]] = [{} for _ in order]
    sent = {n: _sent(s, s.captures[n], order) for n in tables.names}
    for u, fqn in enumerate(order):
        for option in options[fqn]:
            v = rank[s.explored.shown.get((fqn, option), fqn)]  # the unit that ran with the option
            n = next((n for n in tables.names if _runs(s.captures[n], order[v]) == option), "")
            if not n or not tables.matches(u, v):
                continue
            seconds = tables.added_seconds(v, n)
            seconds = 0.0 if option == KEEP else max(seconds, 1e-9) + s.replay_seconds(fqn, option)
            # in a run a unit is recomputed or keeps all its saved tensors: a sweep of the runtime has no selective kind
            record = _needed(tables.of[n], fqn) if option == KEEP else 0 if option == RECOMPUTE else NEVER_FITS
            own, leaves = tables.own_peak(u, v, n), sent[n].get(order[v], 0)
            facts[u][option.name] = OptionFacts(option, tables.held[n][v], own, seconds, record, leaves)
    nothing = OptionFacts(KEEP, 0, 0, 0.0)  # a unit that this step does not call
    pruned = tuple(tuple(_prune(list(f.values()))) or (nothing,) for f in facts)
    pairs = {n: tables.held[n] for n in tables.names if n.startswith("pairs")}
    links = _run_facts(s, options, order, tables.of[tables.base_name], pairs)
    model = StepModel(order, pruned, tuple(tables.outside_peaks()), s.plain_steps.seconds, **links)
    return Composed(model if choices.together else replace(model, linked=()), _pace(s, order, tables.of[KEEP.name]))


def _sent(s: Study, capture: StepCapture, order: tuple[str, ...]) -> dict[str, int]:
    """Return the bytes offloaded per unit, in whole blocks of the file."""
    units, sent = frozenset(order), dict[str, int]()
    for t in transfers_of(capture):
        fqn = next((m for m in t.modules if m in units), "")
        if t.out:
            sent[fqn] = sent.get(fqn, 0) + whole_blocks(t.nbytes)
    return sent


def _pace(s: Study, order: tuple[str, ...], plain: dict[Any, Segment]) -> Pace:
    """Return the compute times of the plain step, from its segments in their order."""
    seconds = {(phase, f): 0.0 for phase in ("forward", "backward") for f in order}
    middle = rest = 0.0
    inside = False  # after a unit's forward, and before the backward of any
    for key, segment in plain.items():
        if key[:2] in seconds:
            seconds[key[:2]] += segment.seconds
            inside = key[0] == "forward"
        elif inside:
            middle += segment.seconds
        else:
            rest += segment.seconds
    forward, backward = (tuple(seconds[phase, f] for f in order) for phase in ("forward", "backward"))
    largest = largest_sent(s.device.round_bytes, *s.captures.values())
    return Pace(forward, backward, middle, rest, s.plain_session.inst.accumulate, largest)


def _needed(table: dict[Any, Segment], fqn: str) -> int:
    """Return the bytes that a unit's forward needs on top of those alive at its start."""
    return max((g.peak - g.start for k, g in table.items() if k[:2] == ("forward", fqn)), default=0)


def _run_facts(
    s: Study, options: Options, order: tuple[str, ...], base: dict[Any, Segment], held: dict[str, list[int]]
) -> dict[str, Any]:
    """Return the model's facts about runs of units: see `StepModel`."""
    freed = [0] * len(order)
    for label, of_units in held.items():
        for u, fqn in enumerate(order):
            place = s.captures[label].assignment[fqn].place
            able = all(RECOMPUTE in options[f] for f in order[max(u - 1, 0) : u + 1])
            able &= fqn not in s.explored.unlinked
            if able and place is not None and place.depth and s.captures[label].session.links(fqn):
                freed[u] = max(-of_units[u], 0)

    def over(phase: str, fqn: str) -> list[Segment]:
        return [g for k, g in base.items() if k[:2] == (phase, fqn)]

    return {
        "linked": tuple(b > 0 for b in freed),
        "link_bytes": tuple(freed),
        "forward_seconds": tuple(
            sum(g.seconds for g in over("forward", f)) + s.replay_seconds(f, RECOMPUTE) for f in order
        ),
        "forward_peak_bytes": tuple(_needed(base, f) for f in order),
        "backward_base_bytes": tuple(max((g.start for g in over("backward", f)), default=0) for f in order),
        "forward_base_bytes": tuple(max((g.start for g in over("forward", f)), default=0) for f in order),
    }


def _runs(capture: StepCapture, fqn: str) -> Option:
    return capture.assignment.get(fqn, KEEP)


def _prune(options: list[OptionFacts]) -> list[OptionFacts]:
    """Drop options that another one beats in time, held, own peak and sent bytes. Cheapest first, ties by name."""
    options.sort(key=lambda o: (o.seconds, o.sent_bytes, o.held_bytes, o.own_peak_bytes, o.option.name))
    kept: list[OptionFacts] = []
    for o in options:
        if not any(
            k.held_bytes <= o.held_bytes and k.own_peak_bytes <= o.own_peak_bytes and k.sent_bytes <= o.sent_bytes
            for k in kept
        ):
            kept.append(o)
    return kept
