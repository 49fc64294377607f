"""Random programs: is a checkpointed step bitwise the plain one, whatever it does?

`python benchmarks/programs.py [--programs 50000] [--first 0] [--processes 2] [--minutes 60] [--constructs 2] [--size large]` judges them.
It writes results/programs.json and a table, results/programs.md; with `--size small` it writes programs_small.json and programs_small.md. After an
interrupt, or when the minutes are over, it writes how many programs it has judged.

Each program (tests/runtime/programs.py) runs three steps plain, under torch's checkpoint and under `ullage.checkpoint`. Compared
bit by bit: outputs, gradients, buffers, attributes and generators. Asked for: no mismatch, no error where torch's step is right,
nothing left alive, no death of a process, and at least 90 % of selective units that can skip ops do.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from _workers import Found, Workers, work

MEANING = {
    "mismatch": "other bits than the plain step, and nothing said",
    "silent": "runs where the plain step raises",
    "death": "the process ended",
    "leak": "something is left alive",
    "raises": "an error where the plain step is right, and torch's too or the error is not ours",
    "unforeseen": "an error at the first call that does something new, where torch is right",
}
EVERY_SECONDS = 30.0  # between two progress lines where there is no terminal


@dataclass
class Tally:
    """What became of the programs so far."""

    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    defects: list[Found] = field(default_factory=list)
    selective: int = 0
    skipped: int = 0

    @property
    def programs(self) -> int:
        """How many are judged."""
        return sum(self.kinds.values())

    def add(self, found: Found) -> None:
        """One more."""
        self.kinds[found["kind"], found["torch"]] += 1
        self.selective += found["selective"]
        self.skipped += found["skipped"]
        if found["defect"]:
            self.defects.append({k: found[k] for k in ("seed", "kind", "torch", "what")})


class Progress:
    """A bar on a terminal, elsewhere a line now and then; each defect is told as it is found."""

    def __init__(self, tally: Tally, total: int) -> None:
        self.tally, self.total = tally, total
        self.begun = self.told = time.monotonic()
        self.tty = sys.stderr.isatty()

    def __call__(self, found: Found) -> None:
        """One more program is judged."""
        self.tally.add(found)
        if found["defect"]:
            self._print(f"seed {found['seed']}: {found['kind']} (torch: {found['torch']}): {found['what'][:160]}")
        now = time.monotonic()
        if self.tty or now - self.told > EVERY_SECONDS:
            self.told, done = now, self.tally.programs
            rate = done / max(now - self.begun, 1e-9)
            width = 30 * done // self.total
            bar = f"[{'#' * width}{'.' * (30 - width)}] {done:,} of {self.total:,}, {rate:.1f}/s, "
            left = (self.total - done) / max(rate, 1e-9) / 60
            bar += f"{left:.0f} min left, {len(self.tally.defects)} defects"
            print(f"\r\033[K{bar}" if self.tty else bar, end="" if self.tty else "\n", file=sys.stderr, flush=True)

    def _print(self, text: str) -> None:
        print(f"\r\033[K{text}" if self.tty else text, file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| ullage | torch's checkpoint | programs |", "|---|---|---:|"]
    lines += [f"| {kind} | {theirs} | {n:,} |" for kind, theirs, n in result["kinds"]]
    share = result["skipped"] / max(result["selective"], 1)
    counted = ", ".join(f"{result['defect_counts'][kind]:,} {kind} ({why})" for kind, why in MEANING.items())
    lines += [
        "",
        f"{result['programs']:,} {result['size']} programs with constructs {result['constructs']}: {counted}.",
    ]
    lines += ["", f"{share:.1%} of {result['selective']:,} selective units skipped ops."]
    if not result["complete"]:
        lines += ["", f"Stopped before all {result['asked']:,} programs were judged."]
    lines += [""] * bool(result["defects"])
    lines += [f"- seed {d['seed']}: {d['kind']} (torch: {d['torch']}): {d['what']}" for d in result["defects"]]
    return "\n".join(lines) + "\n"


def result_of(tally: Tally, options: argparse.Namespace, complete: bool, seconds: float) -> dict[str, Any]:
    """What is written."""
    from _machine import machine

    counts = Counter(d["kind"] for d in tally.defects)
    result: dict[str, Any] = {"machine": machine(), "programs": tally.programs, "asked": options.programs}
    result |= {
        "first_seed": options.first,
        "constructs": options.constructs,
        "size": options.size,
        "complete": complete,
    }
    result |= {"selective": tally.selective, "skipped": tally.skipped, "seconds": round(seconds)}
    result |= {"kinds": [(*k, n) for k, n in tally.kinds.most_common()]}
    result["defect_counts"] = {kind: counts[kind] for kind in MEANING}
    result["defects"] = sorted(tally.defects, key=lambda d: d["seed"])
    return result


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=50_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", "--jobs", type=int, default=min(os.cpu_count() or 1, 2))
    parser.add_argument("--minutes", type=float, help="stop after this time, and write what was judged")
    parser.add_argument(
        "--constructs", type=int, choices=(1, 2), default=2, help="1: programs as they were without them"
    )
    parser.add_argument(
        "--size", choices=("large", "small"), default="large", help="small: a few ops, units in one unit at most"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results", help="the directory of the results")
    parser.add_argument("--work", type=int, nargs=2, metavar=("FIRST", "COUNT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Judge, write, print; 1 if something is not as asked for."""
    options = _options()
    if options.work:
        work(*options.work, options.constructs, options.size)
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tally, begun = Tally(), time.monotonic()
    workers = Workers(Path(__file__), options.constructs, options.size, Progress(tally, options.programs))
    signal.signal(signal.SIGTERM, lambda *_: workers.stop())
    seconds = options.minutes * 60 if options.minutes is not None else None
    try:
        complete = workers.run(options.first, options.programs, options.processes, seconds)
    except KeyboardInterrupt:
        complete = False
    result = result_of(tally, options, complete and tally.programs == options.programs, time.monotonic() - begun)
    options.output.mkdir(parents=True, exist_ok=True)
    name = "programs" if options.size == "large" else f"programs_{options.size}"
    (options.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.output / f"{name}.md").write_text(table(result))
    print(f"\n{table(result)}")
    return 1 if result["defects"] or result["skipped"] < 0.9 * result["selective"] or not result["complete"] else 0


if __name__ == "__main__":
    sys.exit(main())
