"""What becomes of one idiom: profile, three plans, each applied, measured and verified."""

from __future__ import annotations

import time
import traceback
import warnings
from typing import Any

import torch

import ullage as ul
from _steps import IDIOMS

Row = dict[str, Any]
BUDGETS = ("smallest", "halfway", "plain")


def smallest(work: ul.Workload, profile: ul.Profile) -> int:
    """The least budget that a plan fits."""
    try:
        return ul.plan(work, 1, profile=profile).predicted.peak_bytes
    except ul.BudgetInfeasible as error:
        return error.smallest_bytes


def judged(name: str) -> Row:
    """`outcome` is ok, refused (with ullage's reason), or broken: a budget not kept, bits not equal, an error of another kind."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = IDIOMS[name]
    row: Row = {"idiom": name, "kind": chosen.kind, "reads values": chosen.reads, "stage": "workload"}
    begin = time.perf_counter()
    try:
        _judge(chosen.make(), row)
    except ul.UllageError as error:
        row |= {"outcome": "refused", "why": f"{type(error).__name__}: {error}"}
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        row |= {
            "outcome": "broken",
            "why": f"{type(error).__name__}: {error} ({last.filename.rpartition('/')[2]}:{last.lineno})",
        }
    row["seconds"] = round(time.perf_counter() - begin, 2)
    return row


def _judge(work: ul.Workload, row: Row) -> None:
    row["stage"] = "profile"
    profile = ul.profile(work, costs="roofline")
    row["units"] = [u.fqn for u in profile.units if len(u.options) > 1]
    row["notes"] = [str(n) for n in profile.notes]
    row["bound"] = any("upper bound" in n for n in row["notes"])
    row["promised"] = not any("no peak is promised" in n for n in row["notes"])
    row["stage"] = "measure"
    wrong = []
    plain = ul.measure(work, steps=1).step_peaks
    compared = [(profile.first_step_peak_bytes, plain[0]), (profile.later_step_peak_bytes, plain[-1])]
    row["stage"] = "plan"
    least = smallest(work, profile)
    for label, budget in zip(BUDGETS, (least, (least + profile.peak_bytes) // 2, profile.peak_bytes), strict=True):
        row["stage"] = f"plan at {label}"
        plan = ul.plan(work, budget, profile=profile)
        row["stage"] = f"measure at {label}"
        peaks = ul.measure(work, plan, steps=1).step_peaks
        promised = plan.predicted
        compared += [(promised.first_step_peak_bytes, peaks[0]), (promised.later_step_peak_bytes, peaks[-1])]
        row["stage"] = f"verify at {label}"
        check = ul.verify(work, plan, steps=2)
        if max(peaks) > budget:
            wrong.append(f"{label}: measured {max(peaks):,} bytes, over the budget of {budget:,}")
        if not check.ok:
            wrong.append(f"{label}: not exact: {str(check).splitlines()[0]}")
    row |= {"smallest_bytes": least, "plain_bytes": profile.peak_bytes}
    row["compared"] = [{"predicted_bytes": p, "measured_bytes": m} for p, m in compared]
    row["error"] = max((p / m - 1 for p, m in compared), key=abs)
    row["stage"] = "done"
    row |= {"outcome": "broken", "why": "; ".join(wrong)} if wrong else {"outcome": "ok", "why": ""}
