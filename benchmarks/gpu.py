"""What ullage does on a GPU, in one command and under eight minutes: the tests that need one, and short versions of the benchmarks.

`python benchmarks/gpu.py [--device cpu] [--only PART ...] [--output DIR]` (or `make gpu`) writes gpu/results.json and the page gpu/results.md
into the results. It runs from a clone, too, with torch and ullage's dependencies (numpy, scipy, msgspec, rich, click) there. Each part (benchmarks/_gpu_parts.py) runs in a process of its own with a limit in seconds, so that one that fails or runs out of memory
ends nothing else; the files are written after each. Without a GPU it runs as far as it can on the CPU, and writes only if --output is given. Exits
with 1 if a part fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
sys.path.append(str(HERE.parent / "src"))  # last: an installed ullage goes first

from _gpu_parts import PARTS
from _machine import machine


def run(part: str, device: str) -> dict[str, Any]:
    """A part's findings; it runs in a process of its own."""
    limit = PARTS[part][1] * (1 if device != "cpu" else 8)  # a CPU is slow, and nobody lends it
    began = time.monotonic()
    command = [sys.executable, __file__, "--part", part, "--device", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"rows": [], "failed": [f"not done after {limit} s"], "seconds": limit}
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        found: dict[str, Any] = {"rows": [], "failed": [why]}
    else:
        found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def page(facts: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a table per part."""
    lines = [
        "# On a GPU" if facts["gpu"] else "# Without a GPU",
        "",
        ", ".join(f"{k} {v}" for k, v in facts.items()) + ".",
    ]
    for part, what in found.items():
        lines += [
            "",
            f"## {part.replace('_', ' ')}",
            "",
            f"{what['seconds']} s. " + ("; ".join(what["failed"]) or "Nothing failed."),
        ]
        lines += [f"Left out: {', '.join(what['left out'])}."] if what.get("left out") else []
        if what["rows"]:
            keys = list(what["rows"][0])
            lines += ["", "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
            lines += ["| " + " | ".join(_cell(row.get(k)) for k in keys) + " |" for row in what["rows"]]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _facts(device: str) -> dict[str, Any]:
    import torch

    facts = machine()
    facts["gpu"] = torch.cuda.get_device_name() if device != "cpu" else None
    facts["cuda"] = torch.version.cuda
    return facts


def main() -> int:
    """Run the parts, write after each, print the page."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=here)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--output", type=Path, help="the directory of the results; default: benchmarks/results/gpu, on a GPU"
    )
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        warnings.simplefilter("ignore")
        print(json.dumps(PARTS[options.part][0](options.device)))
        return 0
    output = options.output or (HERE / "results" / "gpu" if options.device != "cpu" else None)
    facts, found = _facts(options.device), dict[str, dict[str, Any]]()
    for k, part in enumerate(options.only or PARTS):
        print(f"[{k + 1} of {len(options.only or PARTS)}] {part}", file=sys.stderr, flush=True)
        found[part] = run(part, options.device)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            (output / "results.json").write_text(json.dumps({"machine": facts, "parts": found}, indent=1) + "\n")
            (output / "results.md").write_text(page(facts, found))
    print(page(facts, found))
    return 1 if any(what["failed"] for what in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
