"""`make gpu` runs on a CPU as far as it can, so that it does not rot between two GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
QUICK = ["generators_and_streams"]
REST = ["prediction", "promise", "overhead", "frontier", "offload"]


def _run(parts: list[str], output: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--output", str(output), "--only", *parts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((output / "results.json").read_text())
    assert found["machine"]["gpu"] is None and list(found["parts"]) == parts
    assert all(part["rows"] and part["failed"] == [] for part in found["parts"].values())
    page = (output / "results.md").read_text()
    assert page.startswith("# Without a GPU") and page in done.stdout
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        f"## {p.replace('_', ' ')}" for p in parts
    ]


def test_a_part_runs_on_a_cpu(tmp_path: Path) -> None:
    _run(QUICK, tmp_path)
    assert "Left out: a side stream: needs a GPU." in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_the_other_parts_run_on_a_cpu(tmp_path: Path) -> None:
    """Nothing faster runs a benchmark's code whole; `tests` is left out: it is a pytest in a pytest."""
    _run(REST, tmp_path)
