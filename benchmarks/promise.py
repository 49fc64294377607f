"""The promise: at three budgets per family the measured peak is within the budget, and not by playing safe.

`python benchmarks/promise.py [--only FAMILY ...] [--jobs N]` writes results/promise.json and the table results/promise.md.

Per family: the smallest feasible budget, halfway to the plain peak, and the plain peak. Asked of each:
- the measured peak (the allocator's record, largest of steps 1 to 3) is within the budget;
- the plan is exact: `ul.verify` over 3 steps;
- no single unit can be given its next cheaper option: measured, that is over the budget;
- the smallest feasible budget is no higher than the measured peak of `every_block`;
- at the plain peak nothing is recomputed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from _machine import machine
from tests.zoo import FAMILIES, MORE_FAMILIES, workload

import ullage as ul

NAMES = [*FAMILIES, *MORE_FAMILIES]


def relaxations(plan: ul.Plan, profile: ul.Profile) -> list[tuple[str, ul.Plan]]:
    """The plan with one unit's next cheaper option, for every unit that has one."""
    cheaper = {u.fqn: [o.name for o in u.options] for u in profile.units}
    found = []
    for k, d in enumerate(plan.decisions):
        names = cheaper[d.unit]
        if d.action in names[1:]:
            option = names[names.index(d.action) - 1]
            decisions = [*plan.decisions[:k], msgspec.structs.replace(d, action=option), *plan.decisions[k + 1 :]]
            found.append((f"{d.unit}: {d.action} -> {option}", msgspec.structs.replace(plan, decisions=decisions)))
    return found


def rows_of(family: str) -> list[dict[str, object]]:
    torch.set_num_threads(1)
    work = workload(family)
    profile = ul.profile(work)
    every_block = ul.measure(work, ul.plan(work, policy="every_block", profile=profile), steps=1).peak_bytes
    try:
        ul.plan(work, 1, profile=profile)
        raise AssertionError("one byte is enough?")
    except ul.BudgetInfeasible as error:
        smallest = error.smallest_bytes
    rows = []
    for name, budget in (
        ("smallest", smallest),
        ("halfway", (smallest + profile.peak_bytes) // 2),
        ("plain", profile.peak_bytes),
    ):
        plan = ul.plan(work, budget, profile=profile)
        measured = ul.measure(work, plan, steps=1).peak_bytes
        check = ul.verify(work, plan)
        loose = [n for n, p in relaxations(plan, profile) if ul.measure(work, p, steps=1).peak_bytes <= budget]
        recomputed = sum(d.recomputed_ops for d in plan.decisions)
        kept = {
            "within budget": measured <= budget,
            "exact": check.ok,
            "nothing to relax": not loose,
            "smallest <= every_block": name != "smallest" or budget <= every_block,
            "plain recomputes nothing": name != "plain" or recomputed == 0,
        }
        row = {"family": family, "budget": name, "budget_bytes": budget, "measured_bytes": measured}
        row |= {"predicted_bytes": plan.predicted.peak_bytes, "plain_bytes": profile.peak_bytes}
        row |= {"every_block_bytes": every_block, "recomputed_ops": recomputed, "replays": check.replays}
        row |= {"could_relax": loose, "failed": [k for k, ok in kept.items() if not ok]}
        rows.append(row)
        print(
            f"{family:9} {name:9} budget {budget:>11} measured {measured:>11} {row['failed'] or 'ok'}", file=sys.stderr
        )
    return rows


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| family | budget | bytes | measured | of plain | recomputed ops | kept |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['family']} | | | | | | error: {r['error']} |")
            continue
        share = r["measured_bytes"] / r["plain_bytes"]  # type: ignore[operator]
        kept = "; ".join(r["failed"]) or "yes"  # type: ignore[arg-type]
        lines.append(
            f"| {r['family']} | {r['budget']} | {r['budget_bytes']:,} | {r['measured_bytes']:,} | {share:.0%} "
            f"| {r['recomputed_ops']} | {kept} |"
        )
    return "\n".join(lines) + "\n"


def in_a_process(family: str) -> list[dict[str, object]]:
    run = subprocess.run([sys.executable, __file__, "--rows", family], stdout=subprocess.PIPE, text=True)
    if run.returncode != 0:
        return [{"family": family, "error": "did not finish"}]
    rows: list[dict[str, object]] = json.loads(run.stdout)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="FAMILY", help="these families; no files")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--rows", choices=NAMES, help=argparse.SUPPRESS)  # one family, its rows on stdout
    options = parser.parse_args()
    if options.rows:
        warnings.simplefilter("ignore")
        print(json.dumps(rows_of(options.rows)))
        return 0
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = [row for found in pool.map(in_a_process, options.only or NAMES) for row in found]
    if not options.only:
        results = HERE / "results"
        results.mkdir(exist_ok=True)
        (results / "promise.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
        (results / "promise.md").write_text(table(rows))
    print(table(rows))
    return 1 if any(r.get("failed") or "error" in r for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
