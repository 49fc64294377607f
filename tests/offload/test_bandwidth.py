"""Measured through the store, with nothing left; and the note on endurance."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

import ullage as ul
from ullage.offload import Bandwidth, Stats, _bandwidth, endurance_note


def test_bandwidth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drive that takes 20 ms per transfer out and 10 ms per transfer in, one at a time, on a clock that counts these alone."""
    real_write, real_read = os.pwritev, os.preadv
    moved, now = {"out": 0, "in": 0}, [0.0]

    def write(fd: int, buffers: Any, offset: int) -> int:
        now[0] += 0.02
        moved["out"] += len(buffers[0])
        return real_write(fd, buffers, offset)

    def read(fd: int, buffers: Any, offset: int) -> int:
        now[0] += 0.01
        moved["in"] += len(buffers[0])
        return real_read(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", write)
    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(_bandwidth.time, "perf_counter", lambda: now[0])
    found = ul.measure_bandwidth(tmp_path, "8MiB", threads=1)
    assert isinstance(found, Bandwidth) and isinstance(found.direct, bool)
    # transfers are of 2 MiB
    assert found.write_bytes_per_s == pytest.approx(100 * 2**20)
    assert found.read_bytes_per_s == pytest.approx(200 * 2**20)
    assert found.transfer_seconds == pytest.approx(0.015)  # a block out, or one back
    assert found.wait_seconds == pytest.approx(0, abs=1e-12)
    # twice and once, what a store tries when it opens, and 32 and 16 blocks
    assert moved == {"out": 2 * 2**23 + 49 * 4096, "in": 2**23 + 49 * 4096}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["pwritev", "preadv"])
def test_nothing_left_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real, calls = getattr(os, name), []

    def transfer(fd: int, buffers: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 2:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    fds = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(os, name, transfer)
    with pytest.raises(ul.OffloadError, match="Input/output error"):
        ul.measure_bandwidth(tmp_path, "8MiB")
    assert list(tmp_path.iterdir()) == [] and len(list(Path("/proc/self/fd").iterdir())) == fds


def test_a_store_of_one_block(tmp_path: Path) -> None:
    assert ul.measure_bandwidth(tmp_path, 4096).write_bytes_per_s > 0


def test_bandwidth_arguments(tmp_path: Path) -> None:
    for wrong in (100, "50% of plain"):
        with pytest.raises(ul.ArgumentError, match="^nbytes=.*: give at least 4096 bytes"):
            ul.measure_bandwidth(tmp_path, wrong)
    with pytest.raises(ul.OffloadError, match="No such file"):
        ul.measure_bandwidth(tmp_path / "none", 4096)


def test_endurance() -> None:
    start = "offload writes 10.00 GiB per step, 464 TB per day"
    assert (
        endurance_note(10 * 2**30, 0.5)
        == f"{start}; compare with the terabytes written (TBW) that the drive is rated for"
    )
    assert endurance_note(10 * 2**30, 0.5, 1200) == f"{start}; a drive rated for 1200 TBW lasts 2.6 days of training"
    assert endurance_note(0, 0.5, 1200) == "offload writes 0 B per step, 0 TB per day; that wears no drive"
    for wrong, name in (((-1, 1.0), "bytes_per_step"), ((1, 0.0), "steps_per_second"), ((1, 1.0, 0.0), "tbw")):
        with pytest.raises(ul.ArgumentError, match=f"^{name}="):
            endurance_note(*wrong)


def test_difference_of_stats() -> None:
    before, after = Stats(5, 4, 3, 2, 1, 0, 0.25, 0.5), Stats(15, 14, 13, 12, 11, 10, 1.25, 1.5)
    assert after - before == Stats(10, 10, 10, 10, 10, 10, 1.0, 1.0)
