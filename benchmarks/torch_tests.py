"""What PyTorch's own tests of checkpointing check: torch's checkpoint and ullage's side by side.

`python benchmarks/torch_tests.py [--output DIRECTORY]` writes results/torch_tests.json and the table results/torch_tests.md. The cases
(tests/runtime/torch_cases/) are written anew, from what PyTorch's tests check; nothing of theirs is run or fetched. Asked for: each case
passes, or has its row in docs/runtime.md's table of differences.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from _machine import machine
from tests.runtime.torch_cases import CASES, judge, ours, torchs


def _row(name: str, found: dict[str, Any]) -> str:
    cells = [
        f"{r['how']}{': ' + r['why'] if r['why'] else ''}".replace("|", "\\|")
        for r in (found["torch"], found["ullage"])
    ]
    return f"| {name.replace('_', ' ')} | {found['of'] or '(ours)'} | {cells[0]} | {cells[1]} | {found['row']} |"


def _table(result: dict[str, Any]) -> str:
    cases, of = result["cases"], result["machine"]
    counts = {who: Counter(c[who]["how"] for c in cases.values()) for who in ("torch", "ullage")}
    told = [f"{who}: " + ", ".join(f"{n} {how}" for how, n in sorted(c.items())) for who, c in counts.items()]
    lines = [
        "# What PyTorch's tests of checkpointing check",
        "",
        f"{of['date']}, {of['cpu']}, {of['cores']} cores, Python {of['python']}, torch {of['torch']}, ullage {of['ullage']}.",
        "",
        f"{len(cases)} cases; {'; '.join(told)}. Where ullage does not do as torch on purpose, the last column names the row of",
        "docs/runtime.md's table of differences.",
        "",
        "| case | PyTorch's test | torch | ullage | difference |",
        "|---|---|---|---|---|",
        *[_row(name, found) for name, found in cases.items()],
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run all cases; 1 if one fails that has no row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results", help="the directory of the results")
    output = parser.parse_args().output
    cases: dict[str, Any] = {}
    for name, one in CASES.items():
        found = cases[name] = {
            "of": one.of,
            "row": one.row,
            "torch": asdict(judge(one, torchs)),
            "ullage": asdict(judge(one, ours)),
        }
        print(f"{name}: torch {found['torch']['how']}, ullage {found['ullage']['how']}", file=sys.stderr, flush=True)
    result = {"machine": machine(), "cases": cases}
    output.mkdir(parents=True, exist_ok=True)
    (output / "torch_tests.json").write_text(json.dumps(result, indent=1) + "\n")
    text = _table(result)
    (output / "torch_tests.md").write_text(text)
    print(text)
    return int(any((c["ullage"]["how"] == "fails") != bool(c["row"]) for c in cases.values()))


if __name__ == "__main__":
    raise SystemExit(main())
