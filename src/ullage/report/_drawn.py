"""Data for a page's script, as plain numbers and names: a timeline, the tree at its peak, a frontier, measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ullage.planner import Frontier
from ullage.report._compare import LETTERS, Comparison
from ullage.report._overview import StepReport
from ullage.report._records import PHASES, Array
from ullage.report._thin import PARTS, kept_events
from ullage.report._timeline import Timeline
from ullage.report._tree import tree


def drawn_overview(o: StepReport) -> dict[str, Any]:
    """All of a report's drawings. Bytes are exact; seconds have nine digits."""
    return {
        "views": {"plain": drawn_timeline(o.plain)} | ({"planned": drawn_timeline(o.planned)} if o.planned is not None else {}),
        "budget": o.plan.budget_bytes,
        "stalled": o.plan.predicted.traffic.stalled_seconds if o.plan.predicted.traffic is not None else None,
        "frontier": _frontier(o.frontier) if o.frontier is not None else None,
        "today": {"peak": o.judged.peak_bytes, "seconds": _short(o.judged.step_seconds), "name": "this plan" if o.planned is not None else "the plain step"},
        "measured": [
            {"name": m.name, "planned": m.planned, "times": [_short(x) for x in m.measurement.step_times]} for m in o.measured
        ],
    }  # fmt: skip


def drawn_comparison(c: Comparison) -> dict[str, Any]:
    """Return a bar per side: the bytes alive at its peak by category, or only the peak if the side knows no more."""
    return {
        "sides": [{"letter": letter, "name": s.name, "peak": s.peak_bytes, "parts": s.by_category} for letter, s in zip(LETTERS, c.sides, strict=False)],
        "categories": [r.name for r in c.by_category],
    }  # fmt: skip


def drawn_timeline(t: Timeline, parts: int = PARTS) -> dict[str, Any]:
    """Return the events of both steps that are drawn, and the tensors alive at the peak.

    `steps[name]` has a list per fact, an entry per event that is shown; names are indices into the lists beside it. `peak` of
    a step is an index into those, too.
    """
    kept = {name: kept_events(t, name, parts) for name in t.steps}
    every = np.concatenate(list(kept.values()))
    e = t.events
    modules = _named([*t.modules, ""], t.innermost, every)  # -1: none
    ops, sources = _named(t.ops, e.op.values, every), _named(t.sources, e.source.values, every)
    nodes = tree(t)
    places = {node.key: k for k, node in enumerate(nodes)}
    categories = list(dict.fromkeys([*t.live_by_category, *(n.category for n in nodes if n.category)]))
    return {
        "peak": t.peak_bytes,
        "peakStep": "first" if t.peak_event < t.first_events else "later",
        "seconds": _short(t.step_seconds),
        "categories": categories,
        "phases": list(PHASES),
        "modules": modules[0],
        "ops": ops[0],
        "sources": sources[0],
        "transfers": {name: _lanes(t, name) for name in t.steps} if t.transfers else None,
        "steps": {name: _step(t, name, at, modules[1], ops[1], sources[1]) for name, at in kept.items()},
        "tree": {
            "labels": [n.label for n in nodes],
            "parents": [places[n.parent] if n.parent is not None else -1 for n in nodes],
            "category": [categories.index(n.category) if n.category else -1 for n in nodes],
            "bytes": [n.nbytes for n in nodes],
        },
    }


def _named(names: Sequence[str], index: Array, kept: Array) -> tuple[list[str], Array]:
    """The names that are used, and per event of the timeline which of them; wrong for events that are not kept."""
    used, inverse = np.unique(index[kept], return_inverse=True)
    found = np.zeros(len(index), np.int64)
    found[kept] = inverse
    return [names[k] for k in used], found


def _step(t: Timeline, name: str, at: Array, modules: Array, ops: Array, sources: Array) -> dict[str, Any]:
    some, e = t.steps[name], t.events
    starts = t.start_seconds[at] - t.start_seconds[some.start]
    return {
        "events": some.stop - some.start,
        "seconds": _short(float(e.seconds.values[some].sum())),
        "peak": int(t.live_bytes[at].argmax()),
        "event": (at - some.start).tolist(),
        "start": [_short(x) for x in starts],
        "live": {c: n[at].tolist() for c, n in t.live_by_category.items() if n[at].any()},
        "phase": e.phase.values[at].tolist(),
        "micro": e.micro_batch.values[at].tolist(),
        "again": e.recomputed.values[at].tolist(),
        "module": modules[at].tolist(),
        "op": ops[at].tolist(),
        "source": sources[at].tolist(),
    }


def _lanes(t: Timeline, name: str) -> list[dict[str, Any]]:
    """Transfers of offloaded tensors in a step, out and back, each as columns; seconds from the step's begin."""
    begin = float(t.start_seconds[t.steps[name].start])
    lanes = []
    for out in (True, False):
        some = [x for x in t.transfers if x.step == name and x.out == out]
        lanes.append(
            {
                "name": "offloaded" if out else "brought back",
                "start": [_short(x.start_seconds - begin) for x in some],
                "seconds": [_short(x.seconds) for x in some],
                "bytes": [x.nbytes for x in some],
            }
        )
    return lanes


def _frontier(f: Frontier) -> dict[str, Any]:
    ran = [p for p in f.policies if p.peak_bytes is not None and p.step_seconds is not None]
    return {
        "peak": [p.peak_bytes for p in f.points],
        "seconds": [_short(p.step_seconds) for p in f.points],
        "policies": [{"name": p.policy, "peak": p.peak_bytes, "seconds": _short(p.step_seconds or 0.0)} for p in ran],
        "memory": f.memory_bytes,
    }


def _short(seconds: float) -> float:
    """Nine digits: times are predicted to a few."""
    return float(f"{seconds:.9g}")
