"""Random programs: is a checkpointed step bitwise the plain one, whatever it does?

`python benchmarks/programs.py [--programs 20000] [--first 0]` writes results/programs.json and the table results/programs.md.

Each program (tests/runtime/programs.py) runs three steps plain, under torch's checkpoint and under `ullage.checkpoint`. Compared
bit by bit: outputs, gradients, buffers, attributes and generators. Asked for: no mismatch, no error where torch's step is right,
nothing left alive, and at least 90 % of selective units that can skip ops do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from _machine import machine
from tests.runtime.programs import random_program
from tests.runtime.running import Leaks, checked

EVERY = 250  # programs between two progress lines


def table(result: dict[str, object]) -> str:
    lines = ["| ullage | torch's checkpoint | programs |", "|---|---|---:|"]
    lines += [f"| {kind} | {theirs} | {n:,} |" for kind, theirs, n in result["kinds"]]  # type: ignore[attr-defined]
    share = result["skipped"] / max(result["selective"], 1)  # type: ignore[operator, call-overload]
    lines.append("")
    lines.append(
        f"{result['programs']:,} programs; {share:.1%} of {result['selective']:,} selective units skipped ops."
    )
    lines += [f"- seed {d['seed']}: {d['kind']}: {d['what']}" for d in result["defects"]]  # type: ignore[attr-defined]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds: Counter[tuple[str, str]] = Counter()
    defects: list[dict[str, object]] = []
    selective = skipped = 0
    begun = time.monotonic()
    with Leaks() as leaks:
        for n in range(options.programs):
            seed = options.first + n
            verdict = checked(random_program(seed), leaks)
            kinds[verdict.kind, verdict.torch] += 1
            selective, skipped = selective + verdict.selective, skipped + verdict.skipped
            if verdict.defect:
                defects.append({"seed": seed, "kind": verdict.kind, "torch": verdict.torch, "what": verdict.what[:300]})
            if n % EVERY == EVERY - 1 or n + 1 == options.programs:
                seconds = time.monotonic() - begun
                text = f"{n + 1:,} of {options.programs:,}, {seconds:.0f} s, {len(defects)} defects, skipped {skipped}/{selective}"
                print(text, file=sys.stderr, flush=True)
    result: dict[str, object] = {"machine": machine(), "programs": options.programs, "first_seed": options.first}
    result |= {"seconds": round(time.monotonic() - begun), "selective": selective, "skipped": skipped}
    result |= {"kinds": [(*k, n) for k, n in kinds.most_common()], "defects": defects}
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "programs.json").write_text(json.dumps(result, indent=1) + "\n")
    (results / "programs.md").write_text(table(result))
    print(table(result))
    return 1 if defects or skipped < 0.9 * selective else 0


if __name__ == "__main__":
    sys.exit(main())
