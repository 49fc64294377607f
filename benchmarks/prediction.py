"""Predicted peak against the allocator's record, for every family; writes results/prediction.json.

`python benchmarks/prediction.py [family ...]`
"""

from __future__ import annotations

import json
import platform
import sys
import warnings
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.zoo import FAMILIES, workload

import ullage as ul


def rows_of(name: str, autocast: torch.dtype | None, accumulate: int) -> list[dict[str, object]]:
    work = workload(name, autocast, accumulate)
    profile = ul.profile(work)
    plans: list[ul.Plan | None] = [None, ul.plan(work, policy="every_block", profile=profile)]
    rows = []
    for plan in plans:
        measured = ul.measure(work, plan, steps=1)
        source = profile if plan is None else plan.predicted
        predicted = (source.first_step_peak_bytes, source.later_step_peak_bytes)
        for step, p, m in ((1, predicted[0], measured.step_peaks[0]), (3, predicted[1], measured.step_peaks[2])):
            row = {"family": name, "plan": "plain" if plan is None else plan.policy, "autocast": str(autocast)}
            row |= {
                "accumulate": accumulate,
                "step": step,
                "predicted": p,
                "measured": m,
                "start": measured.start_bytes,
            }
            row |= {"error": p / m - 1, "error_of_transient": (p - m) / (m - measured.start_bytes)}
            rows.append(row)
            print(
                f"{name:9} {row['plan']:12} {autocast!s:15} x{accumulate} step {step}: {p:>11} {m:>11} {p / m - 1:+.4%}",
                flush=True,
            )
    return rows


def main() -> None:
    warnings.simplefilter("ignore")
    results: list[dict[str, object]] = []
    for name in sys.argv[1:] or FAMILIES:
        for autocast, accumulate in ((None, 1), (torch.bfloat16, 1), (None, 4)):
            try:
                results += rows_of(name, autocast, accumulate)
            except ul.UllageError as error:
                print(f"{name}: {error}", flush=True)
                results.append(
                    {"family": name, "autocast": str(autocast), "accumulate": accumulate, "failed": str(error)}
                )
    meta = {
        "date": str(date.today()),
        "torch": str(torch.__version__),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    out = Path(__file__).parent / "results" / "prediction.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"meta": meta, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
