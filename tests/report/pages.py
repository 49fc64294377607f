"""Timelines that are made, not captured: large ones, and the overview around them."""

from __future__ import annotations

from typing import Any

import numpy as np

import ullage as ul
from ullage.planner import Decision, Forecast, FrontierPoint, PolicyPoint
from ullage.planner.plan._plan import Fingerprint
from ullage.report import Allocations, Events, StepReport
from ullage.report._columns import Column
from ullage.report._timeline import VERSION

PARTS = ("q", "k", "v", "o", "gate", "up", "down", "norm")


def timeline(layers: int = 126, events: int = 100_000, scale: int = 1, micro: int = 1, digest: str = "") -> ul.Timeline:
    """A step and a later one, each `micro` times forwards and backwards through `layers` layers; numbers are seeded."""
    rng = np.random.default_rng(0)
    n, half = events, events // 2
    at = np.arange(n) % half  # within a step
    part = half / (micro + 0.1)  # the last tenth of one is the optimizer's
    index, phase_share = np.minimum((at / part).astype(int), micro - 1), (at % part) / part
    phase = np.where(at >= micro * part, 2, np.where(phase_share < 0.4, 0, 1))
    share = np.where(phase == 0, phase_share / 0.4, np.where(phase == 1, 1 - (phase_share - 0.4) / 0.6, 0.5))
    layer = np.clip((share * layers).astype(int), 0, layers - 1)
    inner = rng.integers(0, len(PARTS), n)
    modules = ["model", "model.layers"]
    modules += [f"model.layers.{k}" for k in range(layers)]
    modules += [f"model.layers.{k}.{p}" for k in range(layers) for p in PARTS]
    leaf = 2 + layers + layer * len(PARTS) + inner
    stacks = [[k] for k in range(len(modules))]

    count = n // 2
    birth = np.sort(rng.integers(0, n, count))
    held = rng.random(count) < 0.3
    death = np.minimum(np.where(held & (phase[birth] == 0), birth + (half - 2 * (birth % half)) // 2, birth + 3), n)
    death = np.maximum(death, birth)
    parameters = np.arange(2 + layers, len(modules))
    kinds = ["parameter", "optimizer state", "activation", "temporary", "gradient"]
    category = np.where(death - birth > 3, 2, np.where(phase[birth] == 1, 4, 3))
    storages = {
        "birth": np.concatenate([np.full(2 * len(parameters), -1), birth]),
        "death": np.concatenate([np.full(2 * len(parameters), n), death]),
        "nbytes": np.concatenate([np.full(2 * len(parameters), 2**20 + 4), rng.integers(1, 2**24, count) * scale]),
        "category": np.concatenate([np.repeat([0, 1], len(parameters)), category]),
        "module": np.concatenate([parameters, parameters, leaf[birth]]),
        "name": np.zeros(2 * len(parameters) + count, int),
    }
    facts = {
        "phase": phase,
        "stack": leaf,
        "op": rng.integers(0, 40, n),
        "source": rng.integers(0, 300, n),
        "seconds": rng.exponential(1e-4, n) * (rng.random(n) < 0.8),  # some take no time
        "recomputed": ((phase == 1) & (rng.random(n) < 0.3)).astype(int),
        "micro_batch": index,
        "inside_bytes": (rng.random(n) < 0.05) * rng.integers(1, 2**20, n),
    }
    made: dict[str, Any] = {
        "version": VERSION,
        "device": "cpu",
        "estimate": False,
        "costs": "roofline",
        "plan_digest": digest,
        "policy": "optimal" if digest else "",
        "budget_bytes": None,
        "actions": {f"model.layers.{k}": "recompute" if digest else "keep" for k in range(layers)},
        "step_seconds": float(facts["seconds"][half:].sum()),
        "first_events": half,
        "workspace_bytes": 8519680,
        "modules": modules,
        "stacks": stacks,
        "ops": [f"aten.op_{k}.default" for k in range(40)],
        "sources": [f"model/modeling.py:{k}" for k in range(300)],
        "categories": kinds,
        "names": [""],
        "events": Events(**{k: Column.of(v) for k, v in facts.items()}),
        "allocations": Allocations(**{k: Column.of(v) for k, v in storages.items()}),
        "notes": [],
    }
    live = ul.Timeline(peak_bytes=0, first_step_peak_bytes=0, later_step_peak_bytes=0, peak_event=0, **made).live_bytes
    peaks = {
        f"{name}_step_peak_bytes": int(live[some].max())
        for name, some in (("first", slice(half)), ("later", slice(half, n)))
    }
    return ul.Timeline(peak_bytes=int(live.max()), peak_event=int(live.argmax()), **peaks, **made)


def overview(plain: ul.Timeline, planned: ul.Timeline, budget: int | None = None) -> StepReport:
    """A plan that recomputes all layers, and a frontier of it and the plain step."""
    plan = ul.Plan(
        version=1,
        budget_bytes=budget,
        policy="optimal",
        device="cpu",
        costs="roofline",
        estimate=False,
        predicted=_forecast(planned),
        baseline=_forecast(plain),
        lower_bound_seconds=planned.step_seconds,
        gap=0.0,
        decisions=[_decision(k, unit) for k, unit in enumerate(planned.actions)],
        shapes={},
        model=Fingerprint("Model", []),
        notes=["made for a test, <b>not</b> captured"],
        environment={},
    )
    points = [
        FrontierPoint(budget_bytes=t.peak_bytes, peak_bytes=t.peak_bytes, step_seconds=t.step_seconds + k, plan=plan)
        for k, t in ((1, planned), (0, plain))
    ]
    policies = [PolicyPoint(policy="none", peak_bytes=plain.peak_bytes, step_seconds=plain.step_seconds, reason="")]
    policies += [PolicyPoint(policy="sqrt", peak_bytes=None, step_seconds=None, reason="it can't be run")]
    frontier = ul.Frontier(
        version=1, device="cpu", estimate=False, costs="roofline", memory_bytes=None, points=points, policies=policies
    )
    return StepReport(
        title="made</script><b>",
        plan=plan,
        plain=plain,
        planned=planned,
        frontier=frontier,
        measured=[],
        notes=plan.notes,
    )


def _forecast(t: ul.Timeline) -> Forecast:
    at = t.peak
    return Forecast(
        peak_bytes=t.peak_bytes,
        step_seconds=t.step_seconds,
        first_step_peak_bytes=t.first_step_peak_bytes,
        later_step_peak_bytes=t.later_step_peak_bytes,
        phase=at.phase,
        module=at.module,
        op=at.op,
    )


def _decision(k: int, unit: str) -> Decision:
    return Decision(
        unit=unit,
        action="recompute",
        bytes_freed=2**20 * (k + 1),
        seconds_added=0.001 * (k + 1),
        recomputed_ops=10,
        reason="needed for the budget",
        buffers=[],
        keeps_routing=False,
        input_elements=1,
    )
