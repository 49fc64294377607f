"""Transfers that a test holds, breaks or counts: `os.pwritev` and `os.preadv` are what the store calls."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

Transfer = Callable[[int, Any, int], int]


class Gate:
    """Holds transfers until it is opened."""

    def __init__(self, real: Transfer) -> None:
        self.real, self.opened, self.entered = real, threading.Event(), threading.Semaphore(0)
        self.offsets: list[int] = []

    def __call__(self, fd: int, buffers: Any, offset: int) -> int:
        self.offsets.append(offset)
        self.entered.release()
        assert self.opened.wait(20)
        return self.real(fd, buffers, offset)

    def wait_entered(self) -> None:
        assert self.entered.acquire(timeout=20)


@pytest.fixture
def hold_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Gate]]:
    yield from _holder(monkeypatch, "pwritev")


@pytest.fixture
def hold_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Gate]]:
    yield from _holder(monkeypatch, "preadv")


def _holder(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[Callable[[], Gate]]:
    gates: list[Gate] = []

    def hold() -> Gate:
        gates.append(Gate(getattr(os, name)))
        monkeypatch.setattr(os, name, gates[-1])
        return gates[-1]

    yield hold
    for gate in gates:
        gate.opened.set()


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    """No test leaves a file in its directory, or a thread of a store."""
    yield
    if any(_left(tmp_path)):
        gc.collect()  # a traceback holds frames, and those a graph
    assert _left(tmp_path) == ([], [])


def _left(folder: Path) -> tuple[list[Path], list[str]]:
    files = [p for p in folder.rglob("*") if "ullage" in p.name]
    return files, [t.name for t in threading.enumerate() if t.name.startswith("ullage-offload")]


def data(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def when(condition: Callable[[], bool], gate: Gate, seconds: float = 0.0) -> threading.Thread:
    """Open a gate once something is so, and some time after."""

    def wait() -> None:
        until(condition)
        time.sleep(seconds)
        gate.opened.set()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "never happened"
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of plans' stores are overwritten when they are let go of."""
    monkeypatch.setenv("ULLAGE_POISON", "1")
