"""Which options each unit could have, and one captured step per option."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ullage.capture import OptionFailed, Session, UnitFacts
from ullage.capture._trace import Signature
from ullage.mechanisms import KEEP, OFFLOAD, RECOMPUTE, Option
from ullage.planner._failed import take_away
from ullage.planner._levels import find_levels
from ullage.planner._links import linkable, pairs
from ullage.planner._study import Study
from ullage.runtime import ATTENTION, MATMUL, ROUTING
from ullage.runtime._keep import OpsRule, kind_of, named_rule
from ullage.runtime._tier import LEAST_BYTES

if TYPE_CHECKING:
    from ullage.planner._tiers import OffloadTier

Calls = frozenset[tuple[str, int]]
MATMULS = Option("select", "matmul_attention")


def find_options(s: Study) -> None:
    """Note which units have routing outputs or must be kept, and the options of each."""
    s.units = [_with_routing(s.session, u) for u in s.units]
    s.options = {u.fqn: _possible(s, u) for u in s.units}
    if s.tier is not None:  # nothing is run again, so every unit can do that
        for options in s.options.values():
            options.append(OFFLOAD[s.tier.name])


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


def _possible(s: Study, unit: UnitFacts) -> list[Option]:
    if unit.keep_reason:
        s.reasons[unit.fqn, "keep"] = unit.keep_reason
        return [KEEP]
    ops = _ops_of(s.session, unit.fqn)
    if any(isinstance(a, float) and a > 0 for o in ops if o.func in ATTENTION for a in o.args[3:5]):
        s.reasons[unit.fqn, "select:attention"] = "attention with dropout draws, so it is always run again"
    matmuls = any(o.func in MATMUL for o in ops)
    return [KEEP, RECOMPUTE, *([MATMULS] if matmuls else [])]


def capture_options(s: Study) -> None:
    """Run one step per option, with that option on every unit that has it; then one per level that the op logs show.

    An option that fails on a unit is taken from it, with the reason noted. Done once: options taken away since then stay so.
    """
    if s.options_captured:
        return
    s.options_captured = True
    _capture(s, RECOMPUTE.name, lambda fqn: _like(s.options[fqn], RECOMPUTE))
    if s.tier is not None:
        whole = OFFLOAD[s.tier.name]
        _capture(s, whole.name, lambda fqn: _like(s.options[fqn], whole))
    able = [u.fqn for u in s.units if RECOMPUTE in s.options[u.fqn]]
    if not able:
        return
    # also on units without matmuls: what is learnt there is the op log
    _capture(s, MATMULS.name, lambda fqn: MATMULS if _may(s, fqn, MATMULS) else _like(s.options[fqn], RECOMPUTE))
    for fqn, found in find_levels(s, able).items():
        if RECOMPUTE in s.options[fqn]:
            s.options[fqn] += [o for o in found if o not in s.options[fqn]]
            s.levels[fqn] = found
    for k in range(max(map(len, s.levels.values()), default=0)):
        _capture(s, f"level {k}", functools.partial(_level, s, k))
    if s.tier is not None:
        _capture_sent(s, s.tier)
    for parity in {k % 2 for k in linkable(s)}:
        _capture(s, f"pairs {parity}", lambda fqn, parity=parity: pairs(s, parity)[fqn])  # type: ignore[misc]


def _capture_sent(s: Study, tier: OffloadTier) -> None:
    """Levels of which what is kept leaves memory: all of it, or as much as leaves while the unit's forward computes."""
    for label, which in (("offloaded", _everything), ("offloaded in part", _hidden)):
        sent = {f: _sent(found, tier, functools.partial(which, s, f, tier)) for f, found in s.levels.items()}
        for fqn, options in sent.items():
            s.options[fqn] += [o for o in options if o not in s.options[fqn]]
        for k in range(max(map(len, sent.values()), default=0)):
            _capture(s, f"level {k} {label}", functools.partial(_level_of, s, sent, k))


def _sent(levels: Sequence[Option], tier: OffloadTier, which: Callable[[Calls], Calls]) -> list[Option]:
    """Of these levels the calls that `which` names leave; a level of which it names none is left out."""
    rules = [named_rule(o.level, False) for o in levels]
    sent = [r.sent(tier.name, leaving) for r in rules if isinstance(r, OpsRule) and (leaving := which(r.calls))]
    return [Option("select", r.text) for r in sent]


def _everything(s: Study, fqn: str, tier: OffloadTier, calls: Calls) -> Calls:
    return calls


def _hidden(s: Study, fqn: str, tier: OffloadTier, calls: Calls) -> Calls:
    """The largest calls that, together, leave while the unit's forward computes."""
    sizes, leaving = s.call_bytes[fqn], set()
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
        lambda fqn: option if fqn in fqns and option in s.options[fqn] else _like(s.options[fqn], RECOMPUTE),
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
            s.captures[label] = s.execute(assignment)
        except OptionFailed as failed:
            take_away(s, failed)


def _level(s: Study, k: int, fqn: str) -> Option:
    return _level_of(s, s.levels, k, fqn)


def _level_of(s: Study, levels: Mapping[str, list[Option]], k: int, fqn: str) -> Option:
    found = [o for o in levels.get(fqn, ()) if o in s.options[fqn]]
    return found[min(k, len(found) - 1)] if found else _like(s.options[fqn], RECOMPUTE)


def _may(s: Study, fqn: str, option: Option) -> bool:
    """Can a unit be run again, and has this option not been taken from it?"""
    return RECOMPUTE in s.options[fqn] and (fqn, option.name) not in s.reasons


def _like(options: Sequence[Option], wanted: Option) -> Option:
    return wanted if wanted in options else KEEP
