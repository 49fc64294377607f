"""Find the options of each unit, and capture one step per option."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ullage.capture import OptionFailed, Session, UnitFacts
from ullage.capture._trace import Signature
from ullage.mechanisms import KEEP, RECOMPUTE, Option, Replays, UnitView, mechanisms
from ullage.planner.study._failed import take_away
from ullage.planner.study._links import linkable, pairs
from ullage.planner.study._study import Study
from ullage.planner.study._tiers import OffloadTier
from ullage.runtime import ROUTING, Learnt


@dataclass(frozen=True)
class Found:
    """Units with their options; and why a unit lacks an option, by (unit, option)."""

    units: tuple[UnitFacts, ...]
    options: dict[str, list[Option]]
    reasons: dict[tuple[str, str], str]


def find_options(session: Session, units: Sequence[UnitFacts], tier: OffloadTier | None) -> Found:
    """Find, by the plain step, the units with routing outputs, those that must be kept, and the offers of mechanisms to each."""
    ops = _ops_of(session, {u.fqn for u in units})
    found = Found(tuple(_with_routing(u, ops[u.fqn]) for u in units), {}, {})
    for unit in found.units:
        _offer(found, unit, UnitView(unit.fqn, ops[unit.fqn], unit.routing), tier)
    return found


def _offer(found: Found, unit: UnitFacts, view: UnitView, tier: OffloadTier | None) -> None:
    """Note a unit's offers. A mechanism that runs forwards again makes none to a unit that can only be kept."""
    if unit.keep_reason:
        found.reasons[unit.fqn, KEEP.name] = unit.keep_reason
    options = found.options[unit.fqn] = []
    for mechanism in mechanisms():
        if not unit.keep_reason or mechanism.replays is Replays.NOTHING:
            offer = mechanism.offers(view, tier)
            options += offer.options
            found.reasons.update({(unit.fqn, name): why for name, why in offer.reasons.items()})


def views_of(session: Session, units: Sequence[UnitFacts]) -> list[UnitView]:
    """Return units in the form that mechanisms get them."""
    ops = _ops_of(session, {u.fqn for u in units})
    return [UnitView(u.fqn, ops[u.fqn], u.routing) for u in units]


def _ops_of(session: Session, fqns: Collection[str]) -> dict[str, list[Signature]]:
    """Return per module the ops of its forwards in the first step. One pass over the trace serves all modules."""
    inside = [[fqn for fqn in stack if fqn in fqns] for stack in session.tracker.stacks]
    found: dict[str, list[Signature]] = {fqn: [] for fqn in fqns}
    t = session.trace
    for i in range(t.marks[1]):
        if t.phase[i] == "forward":
            for fqn in dict.fromkeys(inside[t.stack[i]]):  # once, also where a module calls itself
                found[fqn].append(session.signatures[t.signature[i]])
    return found


def _with_routing(unit: UnitFacts, ops: Sequence[Signature]) -> UnitFacts:
    if any("c10d" in o.func.namespace for o in ops):
        return replace(unit, keep_reason=unit.keep_reason or "it runs collectives, which a replay would run again")
    return replace(unit, routing=any(o.func in ROUTING for o in ops))


def capture_options(s: Study) -> None:
    """Have every mechanism capture its options, each in one step on all units that have it; then pairs of units recomputed together.

    An option that fails on a unit is taken from it, with the reason noted. This happens once per study.
    """
    if not s.explored.begin():
        return
    offered = list(dict.fromkeys(o for options in s.options.values() for o in options))
    exploration = StudyExploration(s)
    for mechanism in mechanisms():
        mechanism.explore(exploration, [o for o in offered if o.mechanism is mechanism])
    for parity in {k % 2 for k in linkable(s)}:
        _capture(s, f"pairs {parity}", lambda parity=parity: pairs(s, parity))  # type: ignore[misc]


@dataclass(frozen=True)
class StudyExploration:
    """A study in the form that mechanisms get it: `ullage.mechanisms.Exploration`."""

    s: Study

    @cached_property
    def units(self) -> Sequence[UnitView]:
        return views_of(self.s.session, self.s.units)

    @property
    def tier(self) -> OffloadTier | None:
        return self.s.tier

    @property
    def round_bytes(self) -> int:
        return self.s.device.round_bytes

    def has(self, fqn: str, option: Option) -> bool:
        return option in self.s.options[fqn] and not self.s.explored.failed(fqn, option.name)

    def may(self, fqn: str, option: Option) -> bool:
        return self.has(fqn, RECOMPUTE) and (fqn, option.name) not in self.s.reasons

    def add(self, fqn: str, options: Sequence[Option]) -> None:
        self.s.explored.add(fqn, options)

    def capture(self, label: str, choose: Callable[[str], Option | None]) -> None:
        def assignment() -> dict[str, Option]:
            otherwise = {u.fqn: RECOMPUTE if self.has(u.fqn, RECOMPUTE) else KEEP for u in self.s.units}
            return {fqn: choose(fqn) or option for fqn, option in otherwise.items()}

        _capture(self.s, label, assignment)

    def show(self, fqns: Sequence[str], option: Option, by: str) -> None:
        self.s.explored.show([f for f in fqns if self.has(f, option)], option, by)

    def learnt(self, fqn: str) -> tuple[Learnt, Sequence[float]] | None:
        session = self.s.session
        logs = list(session.family.logs_of(session.inst.model.get_submodule(fqn)).values())
        if not logs:
            return None
        # one log per input signature: the rules are found on the longest and hold for all
        learnt = max(logs, key=lambda entry: len(entry.log.ops))
        return learnt, _log_seconds(self.s, session, learnt)

    def forward_seconds(self, fqn: str) -> float:
        return self.s.forward_seconds.get(fqn, 0.0) / max(self.s.plain_session.inst.accumulate, 1)


def _log_seconds(s: Study, session: Session, learnt: Learnt) -> list[float]:
    """Return per op of the log the time of the same op in the trace, in the last call of that unit in a forward.

    The trace also has ops of the runtime's own (`detach`), which the log leaves out.
    """
    seconds, trace = s.timeline(session).seconds, session.trace
    call = next(c for c in reversed(session.calls) if c.fqn == learnt.name)
    at, found = call.first_op, []
    for op in learnt.log.ops:
        k = at
        while k < call.last_op and session.signatures[trace.signature[k]].func is not op.func:
            k += 1
        if k < call.last_op:
            found.append(float(seconds[k]))
            at = k + 1
        else:  # the tracker recorded it as another op
            found.append(0.0)
    return found


def capture_also(s: Study, option: Option, fqns: Sequence[str]) -> None:
    """Run one step with one more option on these units; a unit on which it fails loses it, with the reason noted."""
    on = frozenset(fqns)
    StudyExploration(s).capture(
        option.name, lambda fqn: option if fqn in on and not s.explored.failed(fqn, option.name) else None
    )


def _capture(s: Study, label: str, choose: Callable[[], Mapping[str, Option]]) -> None:
    while label not in s.captures:
        assignment = choose()  # again after a failure, which takes options away
        if all(o == KEEP for o in assignment.values()):
            return
        s.progress(f"capturing option {label}")
        try:
            s.explored.keep_capture(label, s.capture(assignment))
        except OptionFailed as failed:
            take_away(s, failed)
