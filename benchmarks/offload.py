"""A GPT whose saved tensors may go to disk: keep, recompute, offload and the mix of them, at four budgets.

`python benchmarks/offload.py --disk [--directory DIR] [--rounds N] [--turns N]` writes results/offload.json and the table
results/offload.md; DIR (here by default) is where the files are made.

Four budgets: two below what recomputing alone can reach, the smallest that it reaches, and halfway from there to the plain peak.
At each, the fastest plan with recomputation and selection only, with disk only, and with all of them. Peaks are those of
`ul.measure` (the allocator's record); steps take turns with plain ones in processes of their own (see `_timing.py`), and since a
step waits for the disk, wall times are compared, as ratios to the plain step of the same turn. Beside the measured ratio is
the predicted one: the simulation of the plan's transfers. Exits with 1 if a measured peak is over its budget, if results
are not bitwise the plain step's, or if a plan with a disk is predicted to be slower than the one without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from _contender import RECORDED
from _machine import machine
from _models import workload
from _timing import allocator, ask, say

import ullage as ul

MODEL = "gpt-long"
CAPACITY = "2GiB"
KINDS: dict[str, dict[str, Any]] = {
    "recompute": {},
    "offload": {"forbid": ["recompute", "select"]},
    "mixed": {},
}


def budgets_of(work: ul.Workload, profile: ul.Profile, disk: dict[str, Any]) -> list[int]:
    """In bytes, upwards."""
    plain = ul.plan(work, policy="none", profile=profile).predicted.peak_bytes

    def smallest(**options: Any) -> int:
        try:
            ul.plan(work, 1024, profile=profile, **options)
        except ul.BudgetInfeasible as error:
            return error.smallest_bytes
        raise AssertionError("a budget of 1 KiB is not feasible")

    without, with_disk = smallest(), smallest(**disk)
    say(f"smallest {without:,} bytes, with a disk {with_disk:,}, plain {plain:,}")
    below = [with_disk + (without - with_disk) * k // 2 for k in (0, 1)] if with_disk < without else []
    above = [without + (plain - without) * k // 4 for k in range(0, 6 - len(below), 2)]
    return [*below, *above][:4]


def make_plans(work: ul.Workload, profile: ul.Profile, disk: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """A row per budget and kind."""
    rows = []
    for budget in budgets_of(work, profile, disk):
        for kind, options in KINDS.items():
            row: dict[str, Any] = {"budget_bytes": budget, "kind": kind}
            rows.append(row)
            try:
                plan = ul.plan(work, budget, profile=profile, **options, **({} if kind == "recompute" else disk))
            except ul.BudgetInfeasible as error:
                row["infeasible"] = f"its smallest is {error.smallest_bytes / 2**20:.1f} MiB"
                continue
            path = folder / f"{budget}-{kind}.json"
            plan.save(path)
            row |= {
                "plan": str(path),
                "predicted_bytes": plan.predicted.peak_bytes,
                "predicted_ratio": plan.predicted.step_seconds / plan.baseline.step_seconds,
                "actions": plan.counts(),
                "lower_bound_ratio": plan.lower_bound_seconds / plan.baseline.step_seconds,
            }
            traffic = plan.predicted.traffic
            if traffic is not None and plan.disk is not None:
                row |= {
                    "sent_bytes": traffic.sent_bytes,
                    "hidden_seconds": traffic.hidden_seconds,
                    "stalled_seconds": traffic.stalled_seconds,
                    "window_bytes": plan.disk.window_bytes,
                    "write_bytes_per_second": plan.disk.write_bytes_per_second,
                    "read_bytes_per_second": plan.disk.read_bytes_per_second,
                }
            say(f"{budget / 2**20:.1f} MiB, {kind}: predicted {row['predicted_ratio']:.3f}, {plan.counts()}")
    return rows


def measure(rows: list[dict[str, Any]], rounds: int, turns: int) -> None:
    """Fill in measured peaks and ratios."""
    plain = {"name": "plain", "kind": "plain"}
    made = [r for r in rows if "plan" in r]
    contenders = [plain] + [
        {"name": f"{r['budget_bytes']} {r['kind']}", "kind": "plan", "plan": r["plan"]} for r in made
    ]
    with tempfile.TemporaryDirectory() as folder:
        reference = str(Path(folder) / "reference.pt")
        recorded = ask(MODEL, {"what": "record", "contenders": contenders, "reference": reference})
    ratios: dict[str, list[float]] = {}
    seconds: list[float] = []
    for k in range(rounds):
        found = ask(MODEL, {"what": "turns", "contenders": contenders, "turns": turns, "seed": f"{MODEL} {k}"})
        walls = {n: f["wall"] for n, f in found.items() if "error" not in f}
        seconds.append(statistics.median(walls["plain"]))
        for name, wall in walls.items():
            ratios.setdefault(name, []).append(
                statistics.median(a / b for a, b in zip(wall, walls["plain"], strict=True))
            )
    for row, contender in zip(made, contenders[1:], strict=True):
        reply = recorded[contender["name"]]
        row["error"] = reply.get("error", "")
        row["measured_bytes"] = reply.get("peak_bytes")
        row["bitwise"] = all(reply.get(k) for k in ("losses_equal", "gradients_equal", "buffers_equal"))
        row["measured_ratios"] = ratios.get(contender["name"], [])
        row["measured_ratio"] = statistics.median(row["measured_ratios"]) if row["measured_ratios"] else None
        row["plain_seconds"] = statistics.median(seconds)
        row.pop("plan")


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| budget | may use | measured peak | step over plain, measured | predicted | sent a step | stalled, predicted | decisions |",
        "|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for r in rows:
        head = f"| {r['budget_bytes'] / 2**20:.1f} MiB | {r['kind']} |"
        if "infeasible" in r:
            lines.append(f"{head} | infeasible | | | | {r['infeasible']} |")
            continue
        ratio = f"{r['measured_ratio']:.3f}" if r["measured_ratio"] is not None else r["error"]
        sent = f"{r['sent_bytes'] / 2**20:.1f} MiB" if "sent_bytes" in r else ""
        stalled = f"{1e3 * r['stalled_seconds']:.0f} ms" if "stalled_seconds" in r else ""
        peak = f"{r['measured_bytes'] / 2**20:.1f} MiB" if r["measured_bytes"] else ""
        made = ", ".join(f"{n} x {a}" for a, n in r["actions"].items())
        lines.append(f"{head} {peak} | {ratio} | {r['predicted_ratio']:.3f} | {sent} | {stalled} | {made} |")
    return lines


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """What broke a promise."""
    found = [
        f"{r['kind']} at {r['budget_bytes']}: {r['measured_bytes']} bytes measured"
        for r in rows
        if r.get("measured_bytes") and r["measured_bytes"] > r["budget_bytes"]
    ]
    found += [
        f"{r['kind']} at {r['budget_bytes']}: other results than the plain step's"
        for r in rows
        if not r.get("bitwise", True)
    ]
    by_kind = {(r["budget_bytes"], r["kind"]): r.get("predicted_ratio") for r in rows}
    for (budget, kind), ratio in by_kind.items():
        without = by_kind[budget, "recompute"]
        if kind == "mixed" and ratio is not None and without is not None and ratio > without + 1e-9:
            found.append(f"at {budget} the plan with a disk is predicted to be slower: {ratio} over {without}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--disk", action="store_true", required=True, help="the disk tier, the one there is on a CPU")
    parser.add_argument("--directory", default=str(HERE), help="where files of offloaded tensors are made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    work = workload(MODEL)
    disk = {"disk_directory": args.directory, "disk_budget": CAPACITY}
    with tempfile.TemporaryDirectory() as folder:
        profile = ul.profile(work)
        rows = make_plans(work, profile, disk, Path(folder))
        measure(rows, args.rounds, args.turns)
    facts = {"machine": machine(), "allocator": allocator(), "model": MODEL, "recorded_steps": RECORDED}
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "offload.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    lines = [
        f"{MODEL}, plain step {next((r['plain_seconds'] for r in rows if 'plain_seconds' in r), 0.0):.2f} s.",
        "",
        *table(rows),
    ]
    (results / "offload.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    for line in (broken := faults(rows)):
        print(line, file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
