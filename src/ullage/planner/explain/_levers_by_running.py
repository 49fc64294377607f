"""Levers that run steps of their own: finer units, fewer activations kept, the optimizer's other ways."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ullage.capture import OptionFailed
from ullage.measure._reach import optimizers_of
from ullage.mechanisms import KEEP, RECOMPUTE, Replays
from ullage.planner.explain._names import glob_of, units_of
from ullage.planner.explain._peak_facts import Lever, PeakFacts
from ullage.planner.study._choices import ALL
from ullage.planner.study._executed import Steps
from ullage.planner.study._prepare import with_units
from ullage.planner.study._study import both_steps
from ullage.workload import Instance


def one_by_one(p: PeakFacts) -> Steps:
    """Run the steps with `foreach=False`."""

    def change(inst: Instance) -> None:
        for optimizer in optimizers_of(inst):
            for group in optimizer.param_groups:
                group["foreach"] = False

    return _changed(p, change)


def set_to_none(p: PeakFacts) -> Steps:
    """Run the steps with gradients set to None wherever they are set to zero."""

    def change(inst: Instance) -> None:
        owners: list[Any] = [inst.model, *optimizers_of(inst)]
        for owner in owners:
            clear = functools.partial(owner.zero_grad, set_to_none=True)
            owner.__dict__["zero_grad"] = lambda *_, clear=clear, **__: clear()

    return _changed(p, change)


def _changed(p: PeakFacts, change: Callable[[Instance], None]) -> Steps:
    """Run the steps on a new instance, changed before they run."""
    s = p.s
    session = s.another_session()
    change(session.inst)
    session.run(s.settings(p.assignment), steps=2)
    first, later = both_steps(session, p.assignment)
    return Steps(s.show(first), s.show(later)).with_window(p.steps.later.window_bytes)


def own_peak(p: PeakFacts, runs: int) -> Iterator[Lever]:
    """Lower the bytes that one unit makes and frees in its own forward or backward: recomputed as finer units it holds less at once."""
    ledger, fqn = p.ledger, str(p.ledger.unit[p.at])
    if not fqn:
        return
    kind = next(u.class_name for u in p.s.units if u.fqn == fqn)
    alike = [u.fqn for u in p.s.units if u.class_name == kind]
    born, dies = ledger.birth, np.minimum(ledger.death, ledger.size - 1)
    within = (ledger.category == "") & (born >= 0) & (ledger.phase[born] == ledger.phase[dies])
    within &= np.isin(ledger.unit[born], alike)  # the last op that uses it may be the autograd engine's own, in no unit
    within &= (ledger.unit[dies] == ledger.unit[born]) | (ledger.unit[dies] == "")
    what = f"what one {kind} makes and frees in its own {ledger.phase[p.at]} ({fqn})"
    parts = _parts(p, fqn)
    rebuilt = [f for f in alike if p.assignment.get(f, KEEP) != KEEP]
    alone = all(o.place is None for o in p.assignment.values())
    if fqn in rebuilt and alone and len(parts) > 1 and runs:
        steps = _finer(p, rebuilt, parts)
        if steps is not None:
            glob = glob_of(alike, [u.fqn for u in p.s.units])
            names = [f"{glob if '*' in glob else fqn}.{n}" for n in parts]
            how = f"plan over finer units: units={names}, all of them recomputed"
            yield p.run_instead(what, p.held(within), steps, how)
            return
    yield from p.taken_out(what, within, "a smaller micro-batch, or several modules in its place")


def _parts(p: PeakFacts, fqn: str) -> list[str]:
    """Return the called modules right below a unit that could be units instead: those with children, or not torch's own."""
    model = p.session.inst.model
    called = dict.fromkeys(c.fqn for c in p.session.calls if c.fqn.startswith(fqn + "."))
    outer = [n for n in called if not any(n.startswith(o + ".") for o in called)]
    modules = {n: model.get_submodule(n) for n in outer}
    more = {n for n, m in modules.items() if any(True for _ in m.children())}
    own = {n for n, m in modules.items() if not type(m).__module__.startswith("torch.")}
    return [n.removeprefix(fqn + ".") for n in outer if n in more | own] if more else []


def _finer(p: PeakFacts, rebuilt: list[str], parts: list[str]) -> Steps | None:
    """Run the steps with the parts of these units recomputed, each by itself, instead of the units."""
    others = [u.fqn for u in p.s.units if u.fqn not in rebuilt]
    finer = [f"{f}.{n}" for f in rebuilt for n in parts]
    s = with_units(p.s, [*others, *finer])
    wanted, options = {**p.assignment, **dict.fromkeys(finer, RECOMPUTE)}, ALL.of(s)
    try:
        return s.execute_fresh({f: o for f, o in wanted.items() if o in options.get(f, ())})
    except OptionFailed:
        return None


def kept(p: PeakFacts, runs: int) -> Iterator[Lever]:
    """Run the step without activations that units keep and a plan could drop."""
    ledger = p.ledger
    groups: dict[tuple[str, str], list[str]] = {}
    options = p.choices.of(p.s)
    for u in p.s.units:
        option = p.assignment.get(u.fqn, KEEP)
        if option.replays is not Replays.WHOLE and RECOMPUTE in options[u.fqn]:
            groups.setdefault((u.class_name, option.action), []).append(u.fqn)
    forward = (ledger.category == "") & (ledger.birth >= 0) & (ledger.phase[ledger.birth] == "forward")
    found = []
    for (kind, action), fqns in groups.items():
        out = frozenset().union(*(c.records_out for c in p.session.calls if c.fqn in fqns))
        nbytes = p.held(forward & np.isin(ledger.unit[ledger.birth], fqns) & ~p.records(out))
        if p.matters(nbytes):
            found.append((nbytes, kind, action, fqns))
    for nbytes, kind, action, fqns in sorted(found, reverse=True)[: max(runs, 0)]:
        try:
            steps = p.s.execute_fresh({**p.assignment, **dict.fromkeys(fqns, RECOMPUTE)})
        except OptionFailed:
            continue
        what = f"activations kept by {units_of(len(fqns), kind)} ({action})"
        how = f"a smaller budget, or pin {glob_of(fqns, [u.fqn for u in p.s.units])} to recompute"
        yield p.run_instead(what, nbytes, steps, how)
