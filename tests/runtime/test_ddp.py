"""Checkpoints under DistributedDataParallel, in two processes of gloo: what PyTorch's tests of it check (`ddp_cases`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.runtime.ddp_cases import CALLS, CASES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available(), reason="a torch without torch.distributed and gloo"
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes says."""
    store = tmp_path_factory.mktemp("ddp") / "store"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.ddp_cases", str(rank), str(store)],
            cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [p.communicate(timeout=240) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], said
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.parametrize("view", [False, True], ids=["", "bucket_view"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_plain_models(name: str, view: bool, found: list[dict[str, Any]]) -> None:
    for of_process in found:
        assert of_process[f"{name}-{view}"] == dict.fromkeys(CALLS, "same")
