"""Random programs: is a checkpointed step bitwise the plain one, whatever it does?

`python benchmarks/programs.py [--programs 20000] [--first 0] [--jobs 2]` writes results/programs.json and the table results/programs.md.

Each program (tests/runtime/programs.py) runs three steps plain, under torch's checkpoint and under `ullage.checkpoint`. Compared
bit by bit: outputs, gradients, buffers, attributes and generators. Asked for: no mismatch, no error where torch's step is right,
nothing left alive, and at least 90 % of selective units that can skip ops do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from _machine import machine
from tests.runtime.programs import random_program
from tests.runtime.running import Leaks, checked

EVERY = 250  # programs between two progress lines


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| ullage | torch's checkpoint | programs |", "|---|---|---:|"]
    lines += [f"| {kind} | {theirs} | {n:,} |" for kind, theirs, n in result["kinds"]]
    share = result["skipped"] / max(result["selective"], 1)
    lines.append("")
    lines.append(
        f"{result['programs']:,} programs; {share:.1%} of {result['selective']:,} selective units skipped ops."
    )
    lines += [f"- seed {d['seed']}: {d['kind']}: {d['what']}" for d in result["defects"]]
    return "\n".join(lines) + "\n"


def part(first: int, count: int) -> dict[str, Any]:
    """Judge the programs of some seeds."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kinds: Counter[tuple[str, str]] = Counter()
    defects: list[dict[str, object]] = []
    selective = skipped = 0
    begun = time.monotonic()
    with Leaks() as leaks:
        for n in range(count):
            verdict = checked(random_program(first + n), leaks)
            kinds[verdict.kind, verdict.torch] += 1
            selective, skipped = selective + verdict.selective, skipped + verdict.skipped
            if verdict.defect:
                what = {"kind": verdict.kind, "torch": verdict.torch, "what": verdict.what[:300]}
                defects.append({"seed": first + n, **what})
            if n % EVERY == EVERY - 1 or n + 1 == count:
                seconds = time.monotonic() - begun
                text = f"from {first:,}: {n + 1:,} of {count:,}, {seconds:.0f} s, {len(defects)} defects, skipped {skipped}/{selective}"
                print(text, file=sys.stderr, flush=True)
    return {"kinds": kinds, "defects": defects, "selective": selective, "skipped": skipped}


def main() -> int:
    """Judge, write, print; 1 if something is not as asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 2), help="processes")
    options = parser.parse_args()
    begun = time.monotonic()
    share = -(-options.programs // options.jobs)
    starts = range(0, options.programs, share)
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        counts = [min(share, options.programs - k) for k in starts]
        parts = list(pool.map(part, [options.first + k for k in starts], counts))
    kinds: Counter[tuple[str, str]] = sum((p["kinds"] for p in parts), Counter())
    result: dict[str, Any] = {"machine": machine(), "programs": options.programs, "first_seed": options.first}
    result |= {k: sum(p[k] for p in parts) for k in ("selective", "skipped")}
    result |= {"seconds": round(time.monotonic() - begun), "kinds": [(*k, n) for k, n in kinds.most_common()]}
    result["defects"] = [d for p in parts for d in p["defects"]]
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "programs.json").write_text(json.dumps(result, indent=1) + "\n")
    (results / "programs.md").write_text(table(result))
    print(table(result))
    return 1 if result["defects"] or result["skipped"] < 0.9 * result["selective"] else 0


if __name__ == "__main__":
    sys.exit(main())
