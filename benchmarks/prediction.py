"""Predicted peak against the allocator's record, for every family of the test zoo; writes results/prediction.{json,md}.

`python benchmarks/prediction.py [--only FAMILY ...] [--jobs N]`

Every family runs in a process of its own, in fp32 and bf16 autocast, with 1 and 4 micro-batches, plain and under three
plans; the first and the third step are judged. Exits with 1 if a row is over a limit or a combination fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from _machine import machine
from tests.zoo import FAMILIES, workload

import ullage as ul

PEAK_LIMIT, TRANSIENT_LIMIT = 0.01, 0.02  # of the whole peak, and of the part alive only during the step
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
ACCUMULATE = (1, 4)
PLANS = ("plain", "every_block", "selective", "75% of plain")
RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


def make_plan(work: ul.Workload, profile: ul.Profile, name: str) -> ul.Plan | None:
    """None for the plain step; a budget that no plan fits is raised to the smallest that one does."""
    if name == "plain":
        return None
    if "%" not in name:
        return ul.plan(work, policy=name, profile=profile)
    try:
        return ul.plan(work, name, profile=profile)
    except ul.BudgetInfeasible as error:
        return ul.plan(work, error.smallest_bytes, profile=profile)


def judged(work: ul.Workload, profile: ul.Profile, plan: ul.Plan | None) -> list[Row]:
    """Steps 1 and 3: predicted, measured and both errors."""
    source = profile if plan is None else plan.predicted
    found = ul.measure(work, plan, steps=1)
    rows = []
    for step, predicted in ((1, source.first_step_peak_bytes), (3, source.later_step_peak_bytes)):
        measured = found.step_peaks[step - 1]
        rows.append(
            {
                "step": step,
                "predicted_bytes": predicted,
                "measured_bytes": measured,
                "start_bytes": found.start_bytes,
                "error": predicted / measured - 1,
                "transient_error": (predicted - measured) / (measured - found.start_bytes),
            }
        )
    return rows


def rows_of(family: str) -> list[Row]:
    """All combinations of one family."""
    rows: list[Row] = []
    for precision, accumulate in itertools.product(PRECISIONS, ACCUMULATE):
        head = {"family": family, "precision": precision, "accumulate": accumulate}
        work = workload(family, PRECISIONS[precision], accumulate)
        profile: ul.Profile | None = None
        for name in PLANS:
            try:
                profile = profile or ul.profile(work)
                plan = make_plan(work, profile, name)
                recomputed = sum(d.recomputed_ops for d in plan.decisions) if plan is not None else 0
                rows += [{**head, "plan": name, "recomputed_ops": recomputed, **r} for r in judged(work, profile, plan)]
            except ul.UllageError as error:
                rows.append({**head, "plan": name, "failed": f"{type(error).__name__}: {error}"})
    return rows


def run_family(family: str, threads: int) -> list[Row]:
    """`rows_of` in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--rows-of", family]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=False
    )
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [{"family": family, "failed": why}]
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def is_bad(row: Row) -> bool:
    """A failed combination, or an error over a limit."""
    return "failed" in row or abs(row["error"]) > PEAK_LIMIT or abs(row["transient_error"]) > TRANSIENT_LIMIT


def summary(family: str, rows: list[Row]) -> tuple[str, float, float, int, int]:
    """(family, worst error of the peak, worst error of the transient part, judged steps, bad rows)."""
    judged_rows = [r for r in rows if "failed" not in r]
    worst = max((abs(r["error"]) for r in judged_rows), default=float("nan"))
    transient = max((abs(r["transient_error"]) for r in judged_rows), default=float("nan"))
    return family, worst, transient, len(judged_rows), sum(map(is_bad, rows))


def as_markdown(facts: dict[str, Any], results: dict[str, list[Row]]) -> str:
    """One table row per family: the worst errors over all its combinations."""
    lines = [
        "# Predicted peak against the allocator's record",
        "",
        ", ".join(f"{k} {v}" for k, v in facts.items()) + ".",
        "",
        f"Each family: {' and '.join(PRECISIONS)}, {' and '.join(map(str, ACCUMULATE))} micro-batches, AdamW, plans "
        f"{', '.join(PLANS)}; steps 1 and 3. The transient part is the peak minus the bytes the step started with. "
        f"Limits: {PEAK_LIMIT:.0%} of the peak, {TRANSIENT_LIMIT:.0%} of the transient part.",
        "",
        "| family | largest difference | worst error of the peak | worst error of the transient part | judged steps "
        "| over a limit or failed |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for family, rows in results.items():
        _, worst, transient, count, bad = summary(family, rows)
        most = max((abs(r["predicted_bytes"] - r["measured_bytes"]) for r in rows if "failed" not in r), default=0)
        lines.append(f"| {family} | {most:,} bytes | {worst:.3%} | {transient:.3%} | {count} | {bad} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the families, print a line for each, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, metavar="FAMILY", help="only these families; no files")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 2), help="families at a time")
    parser.add_argument("--rows-of", choices=FAMILIES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rows_of:
        warnings.simplefilter("ignore")
        print(json.dumps(rows_of(options.rows_of)))
        return 0
    families = options.only or list(FAMILIES)
    threads = max((os.cpu_count() or 1) // options.jobs, 1)
    found: dict[str, list[Row]] = {}
    begin = time.perf_counter()
    with ThreadPoolExecutor(options.jobs) as pool:
        running = {pool.submit(run_family, f, threads): f for f in families}
        for done in as_completed(running):
            family = running[done]
            found[family] = done.result()
            _, worst, transient, count, bad = summary(family, found[family])
            print(
                f"[{len(found)}/{len(families)}, {time.perf_counter() - begin:4.0f} s] {family:8} peak {worst:.3%}, "
                f"transient {transient:.3%}, {count} judged, {bad} bad",
                flush=True,
            )
            for row in filter(is_bad, found[family]):
                print(f"    {row}", flush=True)
    facts, results = machine(), {f: found[f] for f in families}
    rows = [r for f in families for r in results[f]]
    if not options.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "prediction.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
        (RESULTS / "prediction.md").write_text(as_markdown(facts, results))
    return 1 if any(map(is_bad, rows)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
