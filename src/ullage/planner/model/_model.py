"""Compose homogeneous captures into the timeline of any mixed assignment.

Idea: one step is captured per option, with that option on every unit. For every segment k (a maximal range of ops of one unit
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

from ullage.capture._timeline import segment_keys
from ullage.mechanisms import KEEP, RECOMPUTE, Option
from ullage.offload import whole_blocks
from ullage.planner.model._with_tier import Pace
from ullage.planner.study._choices import ALL, Choices, Options
from ullage.planner.study._executed import StepCapture
from ullage.planner.study._options import capture_options
from ullage.planner.study._study import Study
from ullage.planner.study._transfers import largest_sent, transfers_of
from ullage.solver._instance import NEVER_FITS, OptionFacts, StepModel


@dataclass
class _Segment:
    start: int
    peak: int
    seconds: float


def _segments(s: Study, capture: StepCapture, units: frozenset[str]) -> list[tuple[Any, _Segment]]:
    session = capture.session
    calls = sorted(
        (c for c in session.calls if c.fqn in units and capture.ops.start <= c.first_op < capture.ops.stop),
        key=lambda c: c.first_sequence,
    )
    seen: dict[str, int] = {}
    for i, c in enumerate(calls):  # calls are numbered within the step, so that captures of different steps compare
        seen[c.fqn] = seen.get(c.fqn, -1) + 1
        calls[i] = replace(c, index=seen[c.fqn])
    t = s.timeline(session)
    return [
        (key, _Segment(int(t.before[a]), int(t.peak[a:b].max()), float(t.seconds[a:b].sum())))
        for key, a, b in segment_keys(session.trace, capture.ops, session.tracker.stacks, units, calls)
    ]


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
    names = [KEEP.name, *(n for n in s.captures if n != KEEP.name)]
    captured = {n: _segments(s, s.captures[n], frozenset(order)) for n in names}
    keys = [k for k, _ in captured[KEEP.name]]
    table = {n: _align(keys, captured[n]) for n in names}
    base_name = RECOMPUTE.name if RECOMPUTE.name in s.captures else KEEP.name  # keep, if no unit can be recomputed
    base = [table[base_name][k].start for k in keys]
    delta = {n: [table[n][k].start - b for k, b in zip(keys, base, strict=True)] for n in names}
    held = {n: _held(keys, delta[n], rank) for n in names}
    active = _active(keys, rank)
    workspace = s.device.facts.blas_workspace_bytes
    facts: list[dict[str, OptionFacts]] = [{} for _ in order]
    outside = [0] * (len(order) + 1)
    own_peak: dict[tuple[int, str], int] = {}
    sent = {n: _sent(s, s.captures[n], order) for n in names}
    for i, key in enumerate(keys):
        unit = rank.get(key[1])
        for n in names:
            rest = table[n][key].peak - sum(held[n][w] for w in active[i] if w != unit)
            if unit is None:
                prefix = max(active[i], default=-1) + 1
                outside[prefix] = max(outside[prefix], rest + workspace)
            else:
                later = sum(max(held[m][w] for m in names) for w in active[i] if w > unit)
                own_peak[unit, n] = max(own_peak.get((unit, n), 0), rest + later + workspace)
    for u, fqn in enumerate(order):
        for option in options[fqn]:
            n = next((n for n in names if _runs(s.captures[n], fqn) == option and (u, n) in own_peak), "")
            if not n:
                continue
            seconds = sum(table[n][k].seconds - table[KEEP.name][k].seconds for k in keys if k[1] == fqn)
            seconds = 0.0 if option == KEEP else max(seconds, 1e-9) + s.replay_seconds(fqn, option)
            # in a run a unit is recomputed or keeps all its saved tensors: a sweep of the runtime has no selective kind
            record = _needed(table[n], fqn) if option == KEEP else 0 if option == RECOMPUTE else NEVER_FITS
            facts[u][option.name] = OptionFacts(
                option, held[n][u], own_peak[u, n], seconds, record, sent[n].get(fqn, 0)
            )
    nothing = OptionFacts(KEEP, 0, 0, 0.0)  # a unit that this step does not call
    pruned = tuple(tuple(_prune(list(f.values()))) or (nothing,) for f in facts)
    links = _run_facts(s, options, order, table[base_name], {n: held[n] for n in names if n.startswith("pairs")})
    model = StepModel(order, pruned, tuple(outside), s.plain_steps.seconds, **links)
    return Composed(model if choices.together else replace(model, linked=()), _pace(s, order, table[KEEP.name]))


def _sent(s: Study, capture: StepCapture, order: tuple[str, ...]) -> dict[str, int]:
    """Return the bytes offloaded per unit, in whole blocks of the file."""
    units, sent = frozenset(order), dict[str, int]()
    for t in transfers_of(capture):
        fqn = next((m for m in t.modules if m in units), "")
        if t.out:
            sent[fqn] = sent.get(fqn, 0) + whole_blocks(t.nbytes)
    return sent


def _pace(s: Study, order: tuple[str, ...], plain: dict[Any, _Segment]) -> Pace:
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


def _needed(table: dict[Any, _Segment], fqn: str) -> int:
    """Return the bytes that a unit's forward needs on top of those alive at its start."""
    return max((g.peak - g.start for k, g in table.items() if k[:2] == ("forward", fqn)), default=0)


def _run_facts(
    s: Study, options: Options, order: tuple[str, ...], base: dict[Any, _Segment], held: dict[str, list[int]]
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

    def over(phase: str, fqn: str) -> list[_Segment]:
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


def _align(keys: list[Any], segments: list[tuple[Any, _Segment]]) -> dict[Any, _Segment]:
    """Return segments by the plain step's keys; a segment without a counterpart is merged into the one before."""
    wanted, found, last = set(keys), {}, None
    for key, segment in segments:
        if key in wanted:
            found[key] = segment
            last = key
        elif last is not None:
            f = found[last]
            found[last] = _Segment(f.start, max(f.peak, segment.peak), f.seconds + segment.seconds)
    before = _Segment(segments[0][1].start, segments[0][1].start, 0.0)
    for key in keys:  # a segment without ops in this capture starts and peaks where the one before starts
        before = found.setdefault(key, _Segment(before.start, before.start, 0.0))
    return found


def _held(keys: list[Any], delta: list[int], rank: dict[str, int]) -> list[int]:
    """Return, per unit, the bytes that its forward adds to the difference from the base, summed over a micro-batch's calls.

    Growth outside units, before their backward starts, is charged to the unit before: it holds an output that the base has
    released by then (kept logits, for example).
    """
    held = [0] * len(rank)
    latest: int | None = None
    for i, key in enumerate(keys[:-1]):
        unit, grown = rank.get(key[1]), delta[i + 1] - delta[i]
        if unit is not None and key[0] == "backward":
            break
        if unit is not None:
            held[unit] += grown
            latest = unit
        elif latest is not None:
            held[latest] += max(grown, 0)
    return held


def _active(keys: list[Any], rank: dict[str, int]) -> list[set[int]]:
    """Return, per segment, the units whose forward is done and whose (last) backward has not ended."""
    last = {k[1:3]: i for i, k in enumerate(keys) if k[0] == "backward"}
    open_calls: dict[int, set[int]] = {}
    result = []
    for i, key in enumerate(keys):
        result.append({u for u, calls in open_calls.items() if calls})
        unit, call = rank.get(key[1]), key[2]
        if unit is None:
            continue
        if key[0] == "forward":
            open_calls.setdefault(unit, set()).add(call)
        elif last[key[1:3]] == i:
            open_calls.get(unit, set()).discard(call)
    return result


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
