"""Predicted peak of a step around one op, against the allocator's record; writes results/prediction_ops.{json,md}.

`python benchmarks/prediction_ops.py [--only OP ...] [--samples N]`

Every op with a derivative of torch's own op database, on its largest sample (shapes there are small and odd): forward, sum,
backward. `ul.profile` predicts the peak of a first and of a later step; both are judged. Exits with 1 if fewer than 98 % of
the ops that run on fake tensors are predicted to the byte.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from _machine import machine
from _op_steps import OpStep, names, steps

import ullage as ul
import ullage.planner.study._study
from ullage.measure._measure import _peaks
from ullage.measure._state import preserved

WANTED_SHARE = 0.98
RESULTS = Path(__file__).parent / "results"
BOUNDED = "an upper bound"

Row = dict[str, Any]


def judged(step: OpStep) -> Row:
    """The step's predicted and recorded peaks, first and later; or why it is refused."""
    head: Row = {"op": step.name, "dtype": str(step.dtype).removeprefix("torch."), "shapes": step.shapes}
    try:
        profile = ul.profile(step.workload())
    except ul.UllageError as error:
        return {**head, "refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    inst = step.workload().instance()
    with preserved(inst) as state:
        recorded = _peaks(inst, state)[1]
    predicted = [profile.first_step_peak_bytes, profile.later_step_peak_bytes]
    found = [recorded[0], recorded[2]]
    differences = [p - f for p, f in zip(predicted, found, strict=True)]
    row = {**head, "predicted_bytes": predicted, "recorded_bytes": found, "difference_bytes": differences}
    row["bounded"] = any("upper bound" in note for note in profile.notes)
    return row


def verdict(row: Row) -> str:
    """What became of a step."""
    if "refused" in row:
        return "refused"
    if not any(row["difference_bytes"]):
        return "exact"
    return BOUNDED if row["bounded"] and min(row["difference_bytes"]) >= 0 else "off"


def share_exact(rows: list[Row]) -> float:
    """Of the steps that run on fake tensors."""
    counts = Counter(map(verdict, rows))
    return counts["exact"] / max(len(rows) - counts["refused"], 1)


def line(row: Row) -> str:
    """A row of the table."""
    if "refused" in row:
        return f"| {row['op']} | | | {row['refused']} |"
    predicted, recorded, difference = (row[f"{k}_bytes"] for k in ("predicted", "recorded", "difference"))
    worst = max(range(2), key=lambda k: abs(difference[k]))
    share = difference[worst] / recorded[worst]
    what = verdict(row) if verdict(row) == "exact" else f"{verdict(row)}: {difference[worst]:+,} bytes, {share:+.1%}"
    return f"| {row['op']} | {predicted[worst]:,} | {recorded[worst]:,} | {what} |"


def as_markdown(facts: dict[str, Any], rows: list[Row]) -> str:
    """What is not exact first, then all."""
    counts = Counter(map(verdict, rows))
    heads = ["| op | predicted bytes | recorded bytes | |", "|---|---:|---:|---|"]
    lines = [
        "# Predicted peak of steps around single ops, against the allocator's record",
        "",
        ", ".join(f"{k} {v}" for k, v in facts.items()) + ".",
        "",
        f"{len(rows)} steps, one for each op of torch's own op database that has a derivative on a CPU, on its largest sample: forward, sum, "
        f"backward, a first and a later step. {counts['exact']} of the {len(rows) - counts['refused']} that run on fake tensors are "
        f"predicted to the byte, {share_exact(rows):.1%}; {counts[BOUNDED]} get an upper bound that is said to be one, "
        f"{counts['off']} are off, {counts['refused']} are refused.",
        "",
        "## Not exact",
        "",
        *heads,
        *[line(r) for r in rows if verdict(r) not in ("exact", "refused")],
        "",
        "## Refused",
        "",
        *heads,
        *[line(r) for r in rows if verdict(r) == "refused"],
        "",
        "## Exact",
        "",
        *heads,
        *[line(r) for r in rows if verdict(r) == "exact"],
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Judge the ops, print what is not exact and every 50th line of progress, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names(), metavar="OP", help="only these ops; no files")
    parser.add_argument("--samples", type=int, default=1, help="samples of different sizes per op; no files if above 1")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    wanted = options.only or names()
    # times are not judged here: those of the host are taken once, not for every op
    ullage.planner.study._study.measure_host = functools.cache(ullage.planner.study._study.measure_host)
    rows: list[Row] = []
    begin = time.perf_counter()
    for step in steps(set(wanted), options.samples):
        rows.append(judged(step))
        if verdict(rows[-1]) != "exact":
            print(line(rows[-1]), flush=True)
        if len(rows) % 50 == 0:
            print(
                f"[{len(rows)} steps, {time.perf_counter() - begin:4.0f} s] {share_exact(rows):.1%} exact", flush=True
            )
    print(f"{len(rows)} steps: {dict(Counter(map(verdict, rows)))}, {share_exact(rows):.2%} exact")
    if not options.only and options.samples == 1:
        facts = machine()
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "prediction_ops.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
        (RESULTS / "prediction_ops.md").write_text(as_markdown(facts, rows))
    return 0 if share_exact(rows) >= WANTED_SHARE else 1


if __name__ == "__main__":
    raise SystemExit(main())
