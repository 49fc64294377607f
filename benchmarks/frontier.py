"""ullage against its peers, at equal bytes, measured.

`python benchmarks/frontier.py [--quick] [--only MODEL ...] [--rounds N] [--inductor]` writes results/frontier.json and, from it, the
tables results/frontier.md. With --quick or --only it prints the tables and writes nothing. A whole run takes hours; with --parts DIR
each model that is done is kept in DIR and not measured again by the next run.

Per model (`_models.py`): every peer (`_peers.py`) is measured for peak and step time. For every peer whose peak is below the plain
step's, ullage plans with that peak, in bytes, as the budget; the plan is applied and measured in the same way. Peaks are the CPU
allocator's own record. Times are those of one thread, taken in turns (`_timing.py`). Peers that are the same step, allocation by
allocation, and plans that decide the same are timed once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from _frontier_table import tables
from _machine import machine
from _models import MODELS, QUICK
from _peers import PEERS
from _timing import allocator, ask, say

SEED, TURNS = 0, 8
GROUP = 12  # contenders alive together
OVERHEAD = 300 * 2**20  # bytes of a process beside its step's peak: Python, compiled graphs
QUICK_COMPILED = ("0.2", "0.5", "0.8")


def memory_limit() -> int:
    """Bytes that contenders that are alive together may take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024 // 2
    return 8 * 2**30


def same_steps(peers: dict[str, Any]) -> None:
    """Mark compiled peers that allocate exactly as one before them: `same_as` names it."""
    seen: dict[str, str] = {}
    for name, peer in peers.items():
        if "error" not in peer and PEERS[name].group != "eager":
            key = f"{PEERS[name].group} {peer['signature']}"
            if key in seen:
                peer["same_as"] = seen[key]
            else:
                seen[key] = name


def grouped(pairs: list[list[dict[str, Any]]], sizes: dict[str, int]) -> list[list[dict[str, Any]]]:
    """Cut pairs that are to be compared into groups that fit into memory; each group has the plain step."""
    plain = {"name": "plain", "kind": "plain"}
    limit, groups = memory_limit(), [[plain]]
    for pair in pairs:
        group = groups[-1]
        new = [c for c in pair if c not in group]
        total = sum(sizes[c["name"]] + OVERHEAD for c in [*group, *new])
        if len(group) > 1 and (len(group) + len(new) > GROUP or total > limit):
            groups.append(group := [plain])
            new = pair
        group += new
    return groups


def measure_model(model: str, peers: list[str], rounds: int) -> dict[str, Any]:
    """Everything about one model, as plain data."""
    with tempfile.TemporaryDirectory() as folder:
        reference = str(Path(folder) / "plain.pt")
        contenders = [{"name": "plain", "kind": "plain"}, *({"name": p, "kind": "peer"} for p in peers)]
        peaks = ask(model, {"what": "record", "contenders": contenders, "reference": reference})
        plain = peaks.pop("plain")
        if "error" in plain:
            return {"error": plain["error"]}
        same_steps(peaks)
        told = {n: p for n, p in peaks.items() if "error" not in p and "same_as" not in p}
        budgets = sorted({p["peak_bytes"] for p in told.values() if p["peak_bytes"] < plain["peak_bytes"]})
        say(f"{model}: planning for {len(budgets)} budgets")
        planned = ask(model, {"what": "plans", "budgets": budgets, "folder": folder})
        plans = _distinct(planned)
        recorded = ask(model, {"what": "record", "contenders": [c for c, _ in plans.values()], "reference": reference})
        facts = {identity: {**d, **recorded[c["name"]]} for identity, (c, d) in plans.items()}
        pairs = _pairs(told, plain, planned, {i: c for i, (c, _) in plans.items() if "error" not in facts[i]})
        sizes = {n: p["peak_bytes"] for n, p in told.items()} | {"plain": plain["peak_bytes"]}
        sizes |= {c["name"]: facts[i].get("peak_bytes", 0) for i, (c, _) in plans.items()}
        timed = []
        for k in range(rounds):
            for g, group in enumerate(grouped(pairs, sizes)):
                say(f"{model}: round {k + 1} of {rounds}, group {g + 1}: {len(group)} contenders")
                seed = f"{SEED} {model} {k} {g}"
                timed.append(ask(model, {"what": "turns", "contenders": group, "turns": TURNS, "seed": seed}))
    if seconds(timed, "plain") is None:
        return {"error": f"the plain step was not timed: {_timing_of(timed, 'plain').get('error')}"}
    return _summary(model, plain, peaks, planned, facts, timed)


def _distinct(planned: dict[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By identity: a contender and what was predicted, one for plans that decide the same."""
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for plan in planned.get("plans", {}).values():
        if "error" not in plan and plan["identity"] not in found:
            contender = {"name": f"plan {plan['identity'][:12]}", "kind": "plan", "plan": plan["path"]}
            keys = ("predicted_bytes", "predicted_slowdown", "actions")
            found[plan["identity"]] = contender, {k: plan[k] for k in keys}
    return found


def _plan_of(planned: dict[str, Any], budget: int) -> dict[str, Any]:
    return planned.get("plans", {}).get(str(budget)) or {"error": planned.get("error", "was not planned")}  # type: ignore[no-any-return]


def _pairs(
    told: dict[str, Any], plain: dict[str, Any], planned: dict[str, Any], runs: dict[str, dict[str, Any]]
) -> list[list[dict[str, Any]]]:
    """Who is compared with whom: peers and plans at their peaks, those of one plan next to each other."""
    pairs, smallest = [], planned.get("smallest_bytes", 0)
    for name, peer in told.items():
        plan = _plan_of(planned, peer["peak_bytes"]) if peer["peak_bytes"] < plain["peak_bytes"] else {}
        opponent = runs.get(plan.get("identity", ""))
        pairs.append([{"name": name, "kind": "peer"}, *([opponent] if opponent else [])])
    least = runs.get(_plan_of(planned, smallest).get("identity", ""))
    if least:
        pairs.append([least])
    return sorted(pairs, key=lambda pair: pair[-1]["name"])


def ratio(timed: list[dict[str, Any]], over: str, under: str, clock: str = "cpu") -> dict[str, Any] | None:
    """Of two contenders' times: within a turn; median over a round's turns; median over rounds. And quartiles of all turns."""
    rounds, every = [], []
    for group in timed:
        if over in group and under in group and "error" not in group[over] and "error" not in group[under]:
            turns = [a / b for a, b in zip(group[over][clock], group[under][clock], strict=True)]
            rounds.append(statistics.median(turns))
            every += turns
    if not rounds:
        return None
    low, _, high = statistics.quantiles(every, n=4)
    return {"value": statistics.median(rounds), "rounds": rounds, "quartiles": [low, high]}


def seconds(timed: list[dict[str, Any]], name: str, clock: str = "cpu") -> float | None:
    """A contender's median step time: of a round's turns, then of the rounds."""
    medians = [statistics.median(g[name][clock]) for g in timed if name in g and "error" not in g[name]]
    return statistics.median(medians) if medians else None


def _timing_of(timed: list[dict[str, Any]], name: str) -> dict[str, Any]:
    errors = [g[name]["error"] for g in timed if name in g and "error" in g[name]]
    times: dict[str, Any] = {"seconds": seconds(timed, name), "wall_seconds": seconds(timed, name, "wall")}
    times["slowdown"] = ratio(timed, name, "plain")
    faults = [statistics.median(g[name]["step_faults"]) for g in timed if name in g and "error" not in g[name]]
    times["faults"] = max(faults, default=0)  # a round's median step
    return times | ({"error": errors[0]} if errors else {})


def _summary(
    model: str,
    plain: dict[str, Any],
    peaks: dict[str, Any],
    planned: dict[str, Any],
    facts: dict[str, Any],
    timed: list[dict[str, Any]],
) -> dict[str, Any]:
    """What the tables are made of."""
    plans = {i: {**f, **_timing_of(timed, f"plan {i[:12]}")} for i, f in facts.items()}
    peers = {n: p if "error" in p or "same_as" in p else {**p, **_timing_of(timed, n)} for n, p in peaks.items()}
    cells = []
    for name, peer in peers.items():
        if "error" in peer or "same_as" in peer or peer["peak_bytes"] >= plain["peak_bytes"]:
            continue
        plan = _plan_of(planned, peer["peak_bytes"])
        cell: dict[str, Any] = {"model": model, "peer": name, "group": PEERS[name].group, "plan": plan.get("identity")}
        cell["error"] = plan.get("error") or plans[plan["identity"]].get("error")
        if cell["error"] is None:
            run = f"plan {plan['identity'][:12]}"
            cell["ratio"], cell["wall_ratio"] = ratio(timed, run, name), ratio(timed, run, name, "wall")
            cell["over_budget"] = plans[plan["identity"]]["peak_bytes"] > peer["peak_bytes"]
        cells.append(cell)
    plain |= _timing_of(timed, "plain")
    smallest = _plan_of(planned, planned.get("smallest_bytes", 0))
    planning = [p["plan_seconds"] for p in planned.get("plans", {}).values() if "plan_seconds" in p]
    return {
        "plain": plain,
        "peers": peers,
        "plans": plans,
        "cells": cells,
        "smallest": smallest.get("identity"),
        "smallest_bytes": planned.get("smallest_bytes"),
        "study_seconds": planned.get("study_seconds"),
        "plan_seconds": statistics.median(planning) if planning else None,
        "planning_error": planned.get("error"),
    }


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help=f"{' and '.join(QUICK)}, fewer budgets of aot_eager; no files"
    )
    parser.add_argument("--only", nargs="+", choices=list(MODELS), metavar="MODEL", help="these models; no files")
    parser.add_argument("--rounds", type=int, help="rounds of timing (3; with --quick 1)")
    parser.add_argument("--inductor", action="store_true", help="measure inductor too, in a table of its own")
    parser.add_argument(
        "--parts",
        type=Path,
        help="keep each model's results in this folder, and take those that are there (same options)",
    )
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 3)
    peers = [n for n, p in PEERS.items() if p.group != "inductor" or options.inductor]
    if options.quick:
        peers = [n for n in peers if PEERS[n].group == "eager" or n.endswith(QUICK_COMPILED)]
    results: dict[str, Any] = {"machine": machine(), "allocator": allocator(), "threads": 1, "rounds": rounds}
    results |= {"turns": TURNS, "seed": SEED, "load": os.getloadavg()[0], "models": {}}
    for model in options.only or (QUICK if options.quick else MODELS):
        part = options.parts / f"{model}.json" if options.parts else None
        if part is not None and part.exists():
            results["models"][model] = json.loads(part.read_text())
            continue
        try:
            found = measure_model(model, peers, rounds)
        except RuntimeError as error:
            found = {"error": str(error)}
        results["models"][model] = found
        if part is not None and "error" not in found:
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(found))
    text = tables(results)
    if not options.quick and not options.only:
        folder = HERE / "results"
        folder.mkdir(exist_ok=True)
        (folder / "frontier.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "frontier.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
