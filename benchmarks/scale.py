"""Planning models far larger than this machine: seconds and real memory of the command.

`python benchmarks/scale.py` writes results/scale.json and the table results/scale.md. Each command runs alone, in a
process of its own; memory is its largest resident set. Exits with 1 if one is over its limit.
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
MEMORY_LIMIT = 2 * 2**30


def timed(config: str, batch: int, budget: str) -> dict[str, Any]:
    """Run the command as the only child of a fresh process, whose children's largest resident set is its own."""
    command = [
        sys.executable,
        "-m",
        "ullage.cli",
        "plan",
        f"configs/{config}.json",
        *COMMON,
        "--batch",
        str(batch),
        "--budget",
        budget,
        "--json",
    ]
    begin = time.perf_counter()
    run = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begin
    plan = json.loads(run.stdout)
    actions = [d["action"] for d in plan["decisions"]]
    return {
        "config": config,
        "batch": batch,
        "budget": budget,
        "seconds": round(seconds, 1),
        "max_resident_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "plain_bytes": plan["baseline"]["peak_bytes"],
        "predicted_bytes": plan["predicted"]["peak_bytes"],
        "actions": {a: actions.count(a) for a in sorted(set(actions))},
    }


def main() -> int:
    rows, late = [], False
    for config, batch, budget, limit in CASES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(timed, (config, batch, budget))
        row["limit_seconds"] = limit
        late |= row["seconds"] > limit or row["max_resident_bytes"] > MEMORY_LIMIT
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    lines = [
        "| config | batch | budget | plan | plain peak | planned peak | seconds (limit) | real memory |",
        "|---|---:|---|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        plan = ", ".join(f"{n} x {a}" for a, n in r["actions"].items())
        sizes = " | ".join(f"{r[k] / 2**30:.1f} GiB" for k in ("plain_bytes", "predicted_bytes"))
        memory = f"{r['max_resident_bytes'] / 2**20:.0f} MiB"
        lines.append(
            f"| {r['config']} | {r['batch']} | {r['budget']} | {plan} | {sizes} | {r['seconds']} ({r['limit_seconds']}) | {memory} |"
        )
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "scale.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    (results / "scale.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(late)


if __name__ == "__main__":
    sys.exit(main())
