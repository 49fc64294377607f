"""What pinned host memory is worth for a model that is too large for this machine: predicted, nothing is run.

`python benchmarks/offload_host.py [--config FILE] [--batch N] [--seq N] [--device NAME] [--host-budget BYTES]` writes
results/offload_host.json and the table results/offload_host.md: at four budgets between the peak of every block recomputed and the
plain one, the fastest plan that keeps, recomputes and selects, and the fastest one that may have saved tensors go to host memory
too. Times are a roofline's and a simulation's, with the link of the device table. Exits with 1 if a plan is over its budget, or slower with host memory than without.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from _machine import machine
from _timing import say

import ullage as ul
from ullage.cost import find_device
from ullage.workload import load_target

SHARES = (0.1, 0.35, 0.6, 0.85)  # of the way from every block recomputed to the plain step
GIB = 2**30


def row_of(plan: ul.Plan, seconds: float) -> dict[str, Any]:
    t, host = plan.predicted.traffic, plan.host
    return {
        "peak_bytes": plan.predicted.peak_bytes,
        "ratio": plan.predicted.step_seconds / plan.baseline.step_seconds,
        "lower_bound_ratio": plan.lower_bound_seconds / plan.baseline.step_seconds,
        "actions": plan.counts(),
        "sent_bytes": t.sent_bytes if t is not None else 0,
        "stalled_seconds": t.stalled_seconds if t is not None else 0.0,
        "pinned_bytes": host.capacity_bytes if host is not None else 0,
        "window_bytes": host.window_bytes if host is not None else 0,
        "planned_in_seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| budget | step over plain, without | with host memory | at least | sent a step | pinned | stalled | planned in |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        a, b = r["without"], r["with"]
        lines.append(
            f"| {r['budget_bytes'] / GIB:.1f} GiB | {a['ratio']:.4f} | {b['ratio']:.4f} | {b['lower_bound_ratio']:.4f} | {b['sent_bytes'] / GIB:.1f} GiB "
            f"| {b['pinned_bytes'] / GIB:.1f} GiB | {1e3 * b['stalled_seconds']:.0f} ms | {a['planned_in_seconds']:.0f} + {b['planned_in_seconds']:.0f} s |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default=str(HERE.parent / "configs" / "llama-3-8b.json"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--device", default="h200")
    parser.add_argument("--host-budget", default="200GiB")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    work = load_target(args.config, batch=args.batch, seq=args.seq, dtype="bf16")
    ends = [ul.plan(work, policy=p, device=args.device).predicted.peak_bytes for p in ("every_block", "none")]
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        budget = int(ends[0] + share * (ends[1] - ends[0]))
        row: dict[str, Any] = {"budget_bytes": budget}
        for name, options in (("without", {}), ("with", {"host_budget": args.host_budget})):
            began = time.perf_counter()
            row[name] = row_of(ul.plan(work, budget, args.device, **options), time.perf_counter() - began)
        rows.append(row)
        say(f"{budget / GIB:.1f} GiB: {row['without']['ratio']:.4f}, with host memory {row['with']['ratio']:.4f}")
    name = f"{Path(args.config).stem}, batch {args.batch}, {args.seq} positions, bf16"
    title = f"{name}, on {find_device(args.device).title}: predicted. Plain peak {ends[1] / GIB:.1f} GiB, every block recomputed {ends[0] / GIB:.1f} GiB."
    lines = [title, "", *table(rows)]
    if not args.no_write:
        facts = {"machine": machine(), "model": name, "device": args.device, "ends_bytes": ends}
        (HERE / "results" / "offload_host.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
        (HERE / "results" / "offload_host.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    over = [
        r
        for r in rows
        if r["with"]["peak_bytes"] > r["budget_bytes"] or r["with"]["ratio"] > r["without"]["ratio"] + 1e-9
    ]
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
