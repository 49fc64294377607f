"""Planning models far larger than this machine, and a whole frontier: seconds and real memory of the command.

`python benchmarks/scale.py` writes results/scale.json and the table results/scale.md. Each command runs alone, in a
process of its own; memory is its largest resident set. Its processor seconds stand beside, as on a machine that others use
too a command waits for them. Exits with 1 if one is over its limit.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from _machine import machine

COMMON = ["--seq", "8192", "--dtype", "bf16", "--optimizer", "adamw", "--device", "h200"]
CASES = [  # (config, batch, budget, limit in seconds); a budget under the plain peak makes the planner work
    ("llama-3-8b", 1, "130GiB", 20),
    ("llama-3-8b", 1, "90GiB", 20),
    ("llama-3-70b", 1, "900GiB", 60),
    ("llama-3-70b", 2, "700GiB", 60),
]
FRONTIER = ("llama-3-70b", 4, 12, 90)  # (config, batch, points, limit in seconds)
MEMORY_LIMITS = {"plan": 2 * 2**30, "frontier": 3 * 2**30}


def timed(verb: str, config: str, batch: int, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the command as the only child of a fresh process, whose children's largest resident set is its own."""
    target = [f"configs/{config}.json", *COMMON, "--batch", str(batch), *options]
    begin = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "ullage.cli", verb, *target, "--json"],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cost = {
        "command": verb,
        "config": config,
        "batch": batch,
        "seconds": round(time.perf_counter() - begin, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "max_resident_bytes": used.ru_maxrss * 1024,
    }
    return cost, json.loads(run.stdout)


def alone(*arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """`timed` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(timed, arguments)


def plan(config: str, batch: int, budget: str, limit: int) -> dict[str, Any]:
    cost, made = alone("plan", config, batch, "--budget", budget)
    actions = [d["action"].partition(":")[0] for d in made["decisions"]]
    counts = ", ".join(f"{actions.count(a)} x {a}" for a in sorted(set(actions)))
    sizes = {"plain_bytes": made["baseline"]["peak_bytes"], "planned_bytes": made["predicted"]["peak_bytes"]}
    return {**cost, "limit_seconds": limit, "asked": budget, "made": counts, **sizes}


def frontier(config: str, batch: int, points: int, limit: int) -> dict[str, Any]:
    cost, made = alone("frontier", config, batch, "--points", str(points))
    found = made["points"]
    sizes = {"plain_bytes": found[-1]["peak_bytes"], "planned_bytes": found[0]["peak_bytes"]}
    return {**cost, "limit_seconds": limit, "asked": f"{points} points", "made": f"{len(found)} plans", **sizes}


def line(r: dict[str, Any]) -> str:
    sizes = " | ".join(f"{r[k] / 2**30:.1f} GiB" for k in ("plain_bytes", "planned_bytes"))
    memory = f"{r['max_resident_bytes'] / 2**20:.0f} MiB"
    cells = f"{r['command']} | {r['config']} | {r['batch']} | {r['asked']} | {r['made']} | {sizes}"
    return f"| {cells} | {r['seconds']} ({r['limit_seconds']}) | {r['processor_seconds']} | {memory} |"


def main() -> int:
    rows = []
    for make, case in [*((plan, c) for c in CASES), (frontier, FRONTIER)]:
        rows.append(make(*case))
        print(rows[-1], file=sys.stderr, flush=True)
    lines = [
        "| command | config | batch | asked | made | plain peak | smallest planned peak | seconds (limit) | of the processor | real memory |",
        "|---|---|---:|---|---|---:|---:|---:|---:|---:|",
        *map(line, rows),
    ]
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "scale.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    (results / "scale.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    late = any(r["seconds"] > r["limit_seconds"] or r["max_resident_bytes"] > MEMORY_LIMITS[r["command"]] for r in rows)
    return int(late)


if __name__ == "__main__":
    sys.exit(main())
