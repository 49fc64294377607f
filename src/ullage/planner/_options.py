"""Which options each unit could have, and one captured step per option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ullage.capture import OptionFailed, Session, UnitFacts
from ullage.capture._trace import Signature
from ullage.mechanisms import KEEP, RECOMPUTE, Option
from ullage.planner._study import Study
from ullage.runtime import ATTENTION, LEVELS, MATMUL, ROUTING


def find_options(s: Study) -> None:
    """Note which units have routing outputs or must be kept, and the options of each."""
    s.units = [_with_routing(s.session, u) for u in s.units]
    s.options = {u.fqn: _possible(s, u) for u in s.units}


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
    attention = [o for o in ops if o.func in ATTENTION]
    matmuls = [o for o in ops if o.func in MATMUL]
    levels = ["matmul_attention"] if matmuls else []
    levels += ["half_matmul_attention"] if len(matmuls) > 2 else []
    if any(isinstance(a, float) and a > 0 for o in attention for a in o.args[3:5]):
        s.reasons[unit.fqn, "select:attention"] = "attention with dropout draws, so it is always run again"
    elif attention and matmuls:
        levels.append("attention")
    return [KEEP, RECOMPUTE, *(Option("select", level) for level in LEVELS if level in levels)]


def capture_options(s: Study) -> None:
    """Run one step per option; an option that fails on a unit is taken from it, with the reason noted."""
    every = {o.name for options in s.options.values() for o in options if o != KEEP}
    names = sorted(every, key=lambda n: (n != "recompute", n))
    for name in names:
        while name not in s.captures:
            assignment = {f: _like(options, name) for f, options in s.options.items()}
            s.progress(f"capturing option {name}")
            try:
                s.captures[name] = s.execute(assignment)
            except OptionFailed as failed:
                _take_away(s, failed, assignment[failed.fqn])
                s.session = Session(s.work, s.device.round_bytes, s.device.as_cuda, explores=True)
                s.session.run()
                if not any(o.name == name for options in s.options.values() for o in options):
                    break


def _take_away(s: Study, failed: OptionFailed, used: Option) -> None:
    """An option failed on a unit: take it from all units of that class."""
    kind = next(u.class_name for u in s.units if u.fqn == failed.fqn)
    s.reasons[failed.fqn, used.name] = str(failed.cause)
    for u in s.units:
        if u.class_name == kind:
            s.options[u.fqn] = [o for o in s.options[u.fqn] if o.name != used.name]


def _like(options: Sequence[Option], name: str) -> Option:
    for wanted in (name, "recompute"):
        for option in options:
            if option.name == wanted:
                return option
    return KEEP
