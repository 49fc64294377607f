"""The examples run, in seconds, as their first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ullage as ul
from ullage.workload import load_target

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow) if p.stem == "llama" else p for p in EXAMPLES],
    ids=lambda p: p.stem,
)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    if "__main__" not in path.read_text():
        pytest.skip("a target only")
    command = [sys.executable, str(path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert not done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_it_is_a_target(path: Path) -> None:
    work = load_target(f"{path}:workload")
    assert isinstance(work, ul.Workload)
    if "__main__" not in path.read_text():  # the others plan it when they run
        assert ul.profile(work, costs="roofline").peak_bytes > 0
