"""One contender: a model with one way to save activations on it, in a process of its own.

A contender is plain data: {"name", "kind": "plain", "peer" or "plan", and "plan": path of a saved plan}.
"""

from __future__ import annotations

import gc
import hashlib
import os
import resource
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _models import MODELS, workload
from _peers import PEERS
from torch import Tensor

import ullage as ul
from ullage.measure._allocator import record_steps
from ullage.measure._measure import keep_pages, resident_bytes
from ullage.planner.decide import _planner as planner
from ullage.planner.plan._budget import Budget
from ullage.workload import Instance, run_step
from ullage.workload._step import compute_loss

Contender = dict[str, Any]
RECORDED = 3  # the first step makes the optimizer's state, the first two or three prove a plan's logs: as `ul.measure`
MIN_WARMUP, MAX_WARMUP, FEW_FAULTS = 4, 12, 16


def prepare(model: str, contender: Contender) -> Instance:
    """The workload with the contender on it, ready to run. Raises what the contender raises."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    work = workload(model)
    if contender["kind"] == "peer":
        PEERS[contender["name"]].apply(work.model, MODELS[model])
    elif contender["kind"] == "plan":
        ul.Plan.load(contender["plan"]).apply(work.model)
    inst = work.instance()
    if contender["kind"] == "peer" and PEERS[contender["name"]].group != "eager":
        _compile(inst)
    gc.collect()
    return inst


def _compile(inst: Instance) -> None:
    """Have it compiled, outside any record: a forward and a backward that leave no trace in gradients and buffers."""
    buffers = [b.clone() for b in inst.model.buffers()]
    compute_loss(inst).backward()
    for p in inst.model.parameters():
        p.grad = None
    for b, was in zip(inst.model.buffers(), buffers, strict=True):
        b.copy_(was)


def record(model: str, contender: Contender, reference: str) -> dict[str, Any]:
    """Peak in bytes, the step's signature, and how the results compare with the plain step's.

    Peaks are those of `ul.measure`: the allocator's record over three steps, above what is there before. The signature is a digest
    of the sizes of all allocations and frees of the third. Compared with those that the plain contender left in the file `reference`:
    the losses of the three steps, buffers after them, and gradients of one more forward and backward from the initial parameters.
    """
    inst = prepare(model, contender)
    initial = [p.detach().clone() for p in inst.model.parameters()]
    torch.manual_seed(1)
    live = resident_bytes(inst)
    losses: list[float] = []

    def step() -> None:
        loss = run_step(inst)
        assert loss is not None
        losses.append(loss.item())

    peaks = []
    for events in record_steps(step, RECORDED):
        peak = live
        for event in events:
            live += event.nbytes
            peak = max(peak, live)
        peaks.append(peak)
    sizes = ",".join(str(e.nbytes) for e in events)
    found = {"peak_bytes": max(peaks), "step_peaks": peaks, "signature": hashlib.sha256(sizes.encode()).hexdigest()}
    now = {
        "losses": losses,
        "buffers": [b.clone() for b in inst.model.buffers()],
        "gradients": _gradients(inst, initial),
    }
    if contender["kind"] == "plain":
        torch.save(now, reference)
        return found | {"losses": losses}
    return found | {"losses": losses, **_compare(now, torch.load(reference))}


def _gradients(inst: Instance, initial: list[Tensor]) -> list[Tensor | None]:
    """Gradients at the initial parameters, under a seed."""
    with torch.no_grad():
        for p, was in zip(inst.model.parameters(), initial, strict=True):
            p.copy_(was)
    torch.manual_seed(2)
    compute_loss(inst).backward()
    return [p.grad for p in inst.model.parameters()]


def _compare(now: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """What is bitwise equal, and how far off losses (relative) and gradients (relative, in the 2-norm over all of them) are."""
    pairs = list(zip(now["gradients"], plain["gradients"], strict=True))
    far = size = 0.0
    for a, b in pairs:
        zero = torch.zeros_like(a if b is None else b) if a is not None or b is not None else torch.zeros(())
        far += float(((zero if a is None else a) - (zero if b is None else b)).double().square().sum())
        size += float((zero if b is None else b).double().square().sum())
    off = [abs(a - b) / max(abs(b), 1e-30) for a, b in zip(now["losses"], plain["losses"], strict=True)]
    return {
        "losses_equal": now["losses"] == plain["losses"],
        "gradients_equal": all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs),
        "buffers_equal": all(torch.equal(a, b) for a, b in zip(now["buffers"], plain["buffers"], strict=True)),
        "first_loss_off": off[0],
        "losses_off": max(off),
        "gradients_off": (far / max(size, 1e-30)) ** 0.5,
    }


def make_plans(model: str, budgets: list[int], folder: str) -> dict[str, Any]:
    """One study, and a plan per budget and for the smallest feasible one, saved in `folder`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    work = workload(model)
    start = time.perf_counter()
    study = planner.prepare(work)  # as `ul.frontier` does: many plans on one
    smallest = planner.smallest_bytes(study)
    found: dict[str, Any] = {"smallest_bytes": smallest, "study_seconds": time.perf_counter() - start, "plans": {}}
    for budget in sorted({*budgets, smallest}):
        start = time.perf_counter()
        try:
            plan = planner.decide(study, Budget(budget))
        except ul.BudgetInfeasible as error:
            found["plans"][str(budget)] = {
                "error": f"infeasible: ullage's smallest is {error.smallest_bytes / 2**20:.1f} MiB"
            }
            continue
        except ul.UllageError as error:
            found["plans"][str(budget)] = {"error": f"{type(error).__name__}: {error}"}
            continue
        path = Path(folder) / f"{model}-{budget}.json"
        plan.save(path)
        found["plans"][str(budget)] = {
            "path": str(path),
            "identity": identity(plan),
            "plan_seconds": time.perf_counter() - start,
            "predicted_bytes": plan.predicted.peak_bytes,
            "predicted_slowdown": plan.predicted.step_seconds / plan.baseline.step_seconds,
            "actions": _actions(plan),
        }
    return found


def _actions(plan: ul.Plan) -> dict[str, int]:
    counts: dict[str, int] = {}
    for d in plan.decisions:
        counts[d.action] = counts.get(d.action, 0) + 1
    return counts


def identity(plan: ul.Plan) -> str:
    """A digest of what a plan does: everything but the budget, forecasts, notes and explanations."""
    import msgspec

    data = msgspec.to_builtins(plan)
    for key in ("budget_bytes", "predicted", "baseline", "lower_bound_seconds", "gap", "notes", "environment"):
        data.pop(key, None)
    for decision in data["decisions"]:
        for key in ("bytes_freed", "seconds_added", "recomputed_ops", "reason"):
            decision.pop(key, None)
    return hashlib.sha256(msgspec.json.encode(data, order="sorted")).hexdigest()


def timed_step(inst: Instance) -> dict[str, float]:
    """One step: seconds of wall time and of processor time, page faults."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    wall, cpu = time.perf_counter(), time.process_time()
    run_step(inst)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall, "cpu": cpu, "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults}


def serve(model: str, contender: Contender, conn: Any) -> None:
    """Warm up until a step makes no page faults, say so, then run a timed step whenever asked for one."""
    if "jemalloc" not in os.environ.get("LD_PRELOAD", ""):
        keep_pages()
    inst = prepare(model, contender)
    for k in range(MAX_WARMUP):
        faults = timed_step(inst)["faults"]
        if k + 1 >= MIN_WARMUP and faults < FEW_FAULTS:
            break
    conn.send({"warmup": k + 1, "faults": faults})
    while conn.recv() == "step":
        conn.send(timed_step(inst))
