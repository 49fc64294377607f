"""A model far larger than this machine is planned on fake tensors."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_70b_step_is_planned_in_little_memory() -> None:
    """Alone plans a model of real size."""
    options = ["--seq", "8192", "--batch", "2", "--dtype", "bf16", "--device", "h200", "--budget", "700GiB", "--json"]
    command = [sys.executable, "-m", "ullage.cli", "plan", "configs/llama-3-70b.json", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    plan = json.loads(run.stdout)
    assert plan["estimate"] and plan["predicted"]["peak_bytes"] <= 700 * 2**30 < plan["baseline"]["peak_bytes"]
    assert len(plan["decisions"]) >= 80 and any(d["action"] != "keep" for d in plan["decisions"])
    # the largest of all children so far: an upper bound on this one's
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 2 * 2**30
