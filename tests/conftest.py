"""One thread per process: the suite runs as fast on two busy cores, and sums have one order.

`ULLAGE_TEST_TIMES=FILE python -m pytest ...` appends a line per test to FILE: the seconds of processor time that it took,
its fixtures and ended subprocesses with it, and its name. Wall time says little on a shared machine. `sort -rn FILE`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # subprocesses too

import pytest
import torch

torch.set_num_threads(1)
TIMES = os.environ.get("ULLAGE_TEST_TIMES")


def pytest_collection_finish() -> None:
    """Keep the collector from looking through torch's and the tests' own objects, 400,000 of them, again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = sum(os.times()[:4])  # user and system, ours and of children that have ended
    result = yield
    if TIMES:
        with Path(TIMES).open("a") as file:  # one short line at a time: the workers of xdist share the file
            file.write(f"{sum(os.times()[:4]) - before:8.2f} {item.nodeid}\n")
    return result
