"""A corpus of steps as people write them: which of them profile, plan, apply and verify at three budgets, unchanged.

`python benchmarks/steps.py [--only IDIOM_OR_KIND ...] [--jobs N] [--seconds S] [--list]`

The steps are in `_steps/`, one per idiom, listed by kind. Each runs in a process of its own, with a time limit: its profile's peaks
of the first and a later step are compared with the allocator's record, and so are those of plans at the smallest budget, halfway
to the plain peak, and at the plain peak; each plan is verified. Writes results/steps.{json,md}. Exits with 1 if less than
97 % come through, or a prediction is off: by any byte where a step reads no values, by more than 0.5 % where it does; where the
profile says that a kernel's bytes are an upper bound, if it is none. Where the profile says that no peak is promised (under `torch.compile`),
its error is shown and not judged.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from _machine import machine
from _steps import IDIOMS
from _steps._judge import Row, judged

SHARE, READS_LIMIT = 0.97, 0.005
RESULTS = HERE / "results"


def _work(name: str, out: Connection) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what torch and libraries say of a step
    out.send(judged(name))


class Running:
    """One idiom in a process; `row` is what became of it, once it has ended or its time is over."""

    def __init__(self, name: str, seconds: float) -> None:
        context = multiprocessing.get_context("fork")  # torch is imported once
        self.name, self.end = name, time.monotonic() + seconds
        self.read, write = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(name, write))
        self.process.start()
        write.close()

    def row(self) -> Row | None:
        """None while it goes on."""
        if self.read.poll():
            try:
                row: Row = self.read.recv()
            except EOFError:
                self.process.join()
                row = self._died(f"the process ended with {self.process.exitcode}")
            self.process.join()
            return row
        if time.monotonic() < self.end:
            return None
        self.process.kill()
        self.process.join()
        return self._died("no answer within the time limit")

    def _died(self, why: str) -> Row:
        chosen = IDIOMS[self.name]
        return {
            "idiom": self.name, "kind": chosen.kind, "reads values": chosen.reads, "outcome": "broken", "why": why, "stage": "?",
        }  # fmt: skip


def run(names: list[str], jobs: int, seconds: float) -> list[Row]:
    """The rows of these idioms, in their order; a line for each as it ends."""
    todo, running, rows = list(reversed(names)), list[Running](), dict[str, Row]()
    begin = time.monotonic()
    while todo or running:
        while todo and len(running) < jobs:
            running.append(Running(todo.pop(), seconds))
        wait([r.read for r in running], timeout=0.5)
        for one in list(running):
            row = one.row()
            if row is not None:
                running.remove(one)
                rows[one.name] = row
                at = f"[{len(rows)}/{len(names)}, {time.monotonic() - begin:4.0f} s]"
                print(f"{at} {row['outcome']:8} {one.name}: {said(row)}", flush=True)
    return [rows[n] for n in names]


def said(row: Row) -> str:
    """How a row ended, in a line."""
    if row["outcome"] == "ok":
        off = "" if within(row) else " OFF"
        return f"{row['error']:+.3%}{off}, {len(row['units'])} units can be planned, {row['seconds']} s"
    return f"at {row['stage']}: {row['why'][:300]}"


def within(row: Row) -> bool:
    """Are the predictions as near as asked?"""
    if row["outcome"] != "ok" or not row["promised"]:
        return True
    if row["bound"]:
        return row["error"] >= 0  # type: ignore[no-any-return]
    return abs(row["error"]) <= READS_LIMIT if row["reads values"] else row["error"] == 0


def as_markdown(facts: dict[str, Any], rows: list[Row]) -> str:
    """A table by kind, then what did not come through, then all idioms."""
    good, exact = [r for r in rows if r["outcome"] == "ok"], [r for r in rows if not r["reads values"]]
    lines = ["# Steps as people write them", "", ", ".join(f"{k} {v}" for k, v in facts.items()) + ".", ""]
    lines += [
        f"{len(good)} of {len(rows)} ({len(good) / len(rows):.1%}) profile, plan, apply and verify at three budgets, unchanged. "
        f"Predicted = measured to the byte in {sum(r['outcome'] == 'ok' and r['error'] == 0 for r in exact)} of "
        f"{sum(r['outcome'] == 'ok' for r in exact)} that read no values.",
        "",
        "| kind | idioms | came through | refused | broken | worst error, no values read | worst error, values read |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    for kind, own in kinds.items():
        outcomes = [sum(r["outcome"] == o for r in own) for o in ("ok", "refused", "broken")]
        errors = [
            max((r["error"] for r in own if r["outcome"] == "ok" and r["reads values"] is reads), key=abs, default=None)
            for reads in (False, True)
        ]
        told = ["" if e is None else f"{e:+.3%}" for e in errors]
        lines.append(f"| {kind} | {len(own)} | {' | '.join(map(str, [*outcomes, *told]))} |")
    bad = [r for r in rows if r["outcome"] != "ok" or not within(r)]
    if bad:
        lines += ["", "| did not come through, or off | where | why |", "|---|---|---|"]
        lines += [f"| {r['idiom']} | {r['stage']} | {_cell(r)} |" for r in bad]
    lines += ["", "| kind | idiom | plain | smallest | units that can be planned |", "|---|---|---:|---:|---:|"]
    for r in good:
        lines.append(
            f"| {r['kind']} | {r['idiom']} | {r['plain_bytes']:,} | {r['smallest_bytes']:,} | {len(r['units'])} |"
        )
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    why = row["why"] or f"prediction off by {row['error']:+.3%}"
    return str(why)[:400].replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """Run the idioms, print a line for each, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these idioms or kinds; no files")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 2), help="idioms at a time")
    parser.add_argument("--seconds", type=float, default=300.0, help="time limit of one idiom")
    parser.add_argument("--list", action="store_true", help="print the idioms by kind, and end")
    options = parser.parse_args()
    if options.list:
        for name, one in IDIOMS.items():
            print(f"{one.kind}: {name}")
        return 0
    chosen = options.only
    names = [n for n, i in IDIOMS.items() if not chosen or n in chosen or i.kind in chosen]
    rows = run(names, options.jobs, options.seconds)
    if not chosen:
        RESULTS.mkdir(exist_ok=True)
        facts = machine()
        (RESULTS / "steps.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
        (RESULTS / "steps.md").write_text(as_markdown(facts, rows))
    good = sum(r["outcome"] == "ok" for r in rows)
    print(f"{good} of {len(rows)} came through; {sum(not within(r) for r in rows)} predictions off")
    return 0 if good >= SHARE * len(rows) and all(map(within, rows)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
