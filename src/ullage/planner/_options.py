"""Which options each unit could have, and one captured step per option."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ullage.capture import OptionFailed, Session, UnitFacts
from ullage.capture._trace import Signature
from ullage.mechanisms import KEEP, OFFLOAD, RECOMPUTE, Option
from ullage.planner._failed import take_away
from ullage.planner._levels import Levels, find_levels
from ullage.planner._links import linkable, pairs
from ullage.planner._study import Study
from ullage.planner._tiers import OffloadTier
from ullage.runtime import ATTENTION, MATMUL, ROUTING
from ullage.runtime._keep import OpsRule, kind_of, named_rule
from ullage.runtime._tier import LEAST_BYTES

Calls = frozenset[tuple[str, int]]
MATMULS = Option("select", "matmul_attention")


@dataclass(frozen=True)
class Found:
    """Units, the options of each, and why it does not have others, by (unit, option)."""

    units: tuple[UnitFacts, ...]
    options: dict[str, list[Option]]
    reasons: dict[tuple[str, str], str]


def find_options(session: Session, units: Sequence[UnitFacts], tier: OffloadTier | None) -> Found:
    """Which units have routing outputs or must be kept, and the options of each, as the plain step shows them."""
    reasons: dict[tuple[str, str], str] = {}
    units = tuple(_with_routing(session, u) for u in units)
    options = {u.fqn: _possible(session, u, reasons) for u in units}
    if tier is not None:  # nothing is run again, so every unit can do that
        for of_unit in options.values():
            of_unit.append(OFFLOAD[tier.name])
    return Found(units, options, reasons)


def _ops_of(session: Session, fqn: str) -> list[Signature]:
    stacks = {i for i, s in enumerate(session.tracker.stacks) if fqn in s}
    t = session.trace
    return [
        session.signatures[t.signature[i]]
        for i in range(t.marks[1])
        if t.stack[i] in stacks and t.phase[i] == "forward"
    ]


def _with_routing(session: Session, unit: UnitFacts) -> UnitFacts:
    ops = _ops_of(session, unit.fqn)
    if any("c10d" in o.func.namespace for o in ops):
        return replace(unit, keep_reason=unit.keep_reason or "it runs collectives, which a replay would run again")
    return replace(unit, routing=any(o.func in ROUTING for o in ops))


def _possible(session: Session, unit: UnitFacts, reasons: dict[tuple[str, str], str]) -> list[Option]:
    if unit.keep_reason:
        reasons[unit.fqn, "keep"] = unit.keep_reason
        return [KEEP]
    ops = _ops_of(session, unit.fqn)
    if any(isinstance(a, float) and a > 0 for o in ops if o.func in ATTENTION for a in o.args[3:5]):
        reasons[unit.fqn, "select:attention"] = "attention with dropout draws, so it is always run again"
    matmuls = any(o.func in MATMUL for o in ops)
    return [KEEP, RECOMPUTE, *([MATMULS] if matmuls else [])]


def capture_options(s: Study) -> None:
    """Run one step per option, with that option on every unit that has it; then one per level that the op logs show.

    An option that fails on a unit is taken from it, with the reason noted. Done once: options taken away since then stay so.
    """
    if not s.explored.begin():
        return
    _capture(s, RECOMPUTE.name, lambda fqn: _like(s, fqn, RECOMPUTE))
    if s.tier is not None:
        whole = OFFLOAD[s.tier.name]
        _capture(s, whole.name, lambda fqn: _like(s, fqn, whole))
    able = [u.fqn for u in s.units if _has(s, u.fqn, RECOMPUTE)]
    if not able:
        return
    # also on units without matmuls: what is learnt there is the op log
    _capture(s, MATMULS.name, lambda fqn: MATMULS if _may(s, fqn, MATMULS) else _like(s, fqn, RECOMPUTE))
    found = {f: levels for f, levels in find_levels(s, able).items() if _has(s, f, RECOMPUTE)}
    for fqn, levels in found.items():
        s.explored.add(fqn, levels.options)
    of_units = {f: levels.options for f, levels in found.items()}
    for k in range(max(map(len, of_units.values()), default=0)):
        _capture(s, f"level {k}", functools.partial(_level_of, s, of_units, k))
    if s.tier is not None:
        _capture_sent(s, s.tier, found)
    for parity in {k % 2 for k in linkable(s)}:
        _capture(s, f"pairs {parity}", lambda fqn, parity=parity: pairs(s, parity)[fqn])  # type: ignore[misc]


def _capture_sent(s: Study, tier: OffloadTier, levels: Mapping[str, Levels]) -> None:
    """Levels whose kept tensors are offloaded: all of them, or as many as are sent while the unit's forward computes."""
    for label, which in (("offloaded", _everything), ("offloaded in part", _hidden)):
        sent = {f: _sent(x.options, tier, functools.partial(which, s, f, tier, x)) for f, x in levels.items()}
        for fqn, options in sent.items():
            s.explored.add(fqn, options)
        for k in range(max(map(len, sent.values()), default=0)):
            _capture(s, f"level {k} {label}", functools.partial(_level_of, s, sent, k))


def _sent(levels: Sequence[Option], tier: OffloadTier, which: Callable[[Calls], Calls]) -> list[Option]:
    """Of these levels the calls that `which` names leave; a level of which it names none is left out."""
    rules = [named_rule(o.level, False) for o in levels]
    sent = [r.sent(tier.name, leaving) for r in rules if isinstance(r, OpsRule) and (leaving := which(r.calls))]
    return [Option("select", r.text) for r in sent]


def _everything(s: Study, fqn: str, tier: OffloadTier, levels: Levels, calls: Calls) -> Calls:
    return calls


def _hidden(s: Study, fqn: str, tier: OffloadTier, levels: Levels, calls: Calls) -> Calls:
    """The largest calls that, together, leave while the unit's forward computes."""
    sizes, leaving = levels.call_bytes, set()
    passes = max(s.plain_session.inst.accumulate, 1)
    room = s.forward_seconds.get(fqn, 0.0) / passes * tier.write_bytes_per_second
    for call in sorted(calls, key=lambda c: (-sizes.get(c, 0), c)):
        if LEAST_BYTES <= sizes.get(call, 0) <= room:
            leaving.add(call)
            room -= sizes[call]
    return frozenset(leaving)


def capture_also(s: Study, option: Option, fqns: Sequence[str]) -> None:
    """Run one step with one more option on these units; those on which it fails lose it, with the reason noted."""
    _capture(
        s,
        option.name,
        lambda fqn: option if fqn in fqns and not s.explored.failed(fqn, option.name) else _like(s, fqn, RECOMPUTE),
    )


def finds_something(s: Study, fqn: str, option: Option) -> bool:
    """Is there anything in a unit that this selective option would keep?"""
    rule, counts = named_rule(option.level, False), Counter[Any]()
    for op in _ops_of(s.session, fqn):
        kind = kind_of(op.func, rule)
        if rule(op.func, counts[kind]):
            return True
        counts[kind] += 1
    return False


def _capture(s: Study, label: str, choose: Callable[[str], Option]) -> None:
    while label not in s.captures:
        assignment = {u.fqn: choose(u.fqn) for u in s.units}
        if all(o == KEEP for o in assignment.values()):
            return
        s.progress(f"capturing option {label}")
        try:
            s.explored.keep_capture(label, s.capture(assignment))
        except OptionFailed as failed:
            take_away(s, failed)


def _level_of(s: Study, levels: Mapping[str, Sequence[Option]], k: int, fqn: str) -> Option:
    found = [o for o in levels.get(fqn, ()) if _has(s, fqn, o)]
    return found[min(k, len(found) - 1)] if found else _like(s, fqn, RECOMPUTE)


def _may(s: Study, fqn: str, option: Option) -> bool:
    """Can a unit be run again, and has this option not been taken from it?"""
    return _has(s, fqn, RECOMPUTE) and (fqn, option.name) not in s.reasons


def _has(s: Study, fqn: str, option: Option) -> bool:
    return option in s.options[fqn] and not s.explored.failed(fqn, option.name)


def _like(s: Study, fqn: str, wanted: Option) -> Option:
    return wanted if _has(s, fqn, wanted) else KEEP
