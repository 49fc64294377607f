"""How fast a directory takes and gives bytes, by the code that will do it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch

from ullage._bytes import parse_budget
from ullage._errors import ArgumentError
from ullage.offload._extents import BLOCK, whole_blocks
from ullage.offload._facts import Bandwidth
from ullage.offload._store import DiskStore, DiskTicket

_TENSOR_BYTES = 16 * 2**20
_AT_ONCE = 4  # tensors on their way, so that no thread waits for one


def measure_bandwidth(directory: str | Path, nbytes: int | str = "512MiB", *, threads: int = 2) -> Bandwidth:
    """Write and read `nbytes` in tensors of up to 16 MiB through a `DiskStore`, whose file is gone afterwards.

    Drives write faster until their own cache is full: measure with as many bytes as a step offloads, and while nothing
    else runs or with what will run.

    Args:
        directory: where.
        nbytes: how much, a number or a text such as "512MiB"; this much is written twice, and timed once.
        threads: as for the store.

    Raises:
        ArgumentError: `nbytes` is no size, or less than 4 KiB.
        OffloadError: as for `DiskStore`, or a transfer failed.
    """
    total = parse_budget(nbytes, "nbytes").bytes
    if total is None or total < BLOCK:
        raise ArgumentError(f"nbytes={nbytes!r}: give at least {BLOCK} bytes, or a size with its unit such as '512MiB'")
    size = min(_TENSOR_BYTES, total)
    count = total // size
    # random: some drives and filesystems compress. The same block each time: its content does not matter
    block = torch.from_numpy(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
    room = _AT_ONCE * size
    with DiskStore(
        directory, count * whole_blocks(size), threads=threads, backlog_bytes=room, ahead_bytes=room
    ) as store:
        _write(store, block, count)  # the first writes to allocated space change the filesystem's own records too
        began = time.perf_counter()
        tickets = _write(store, block, count)
        wrote = time.perf_counter()
        _read(tickets)
        read = time.perf_counter()
        return Bandwidth(count * size / (wrote - began), count * size / (read - wrote), store.direct)


def _write(store: DiskStore, block: torch.Tensor, count: int) -> list[DiskTicket]:
    tickets = [store.put(block) for _ in range(count)]
    store.flush()
    if not store.direct:  # else these would be the times that memory takes
        fd = store._engine.mover.file.fd
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return tickets


def _read(tickets: list[DiskTicket]) -> None:
    for ticket in tickets:
        ticket.prefetch()
    for ticket in tickets:
        ticket.get()
