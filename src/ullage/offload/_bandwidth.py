"""Measure how fast a directory or the host memory of a device takes and gives bytes, with the stores' own code."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ullage._bytes import parse_budget
from ullage._errors import ArgumentError
from ullage._stats import median
from ullage.offload._extents import BLOCK, whole_blocks
from ullage.offload._facts import Bandwidth
from ullage.offload._host import HostStore, HostTicket
from ullage.offload._link import CudaLink, Event, Link
from ullage.offload._protocol import Ticket
from ullage.offload._store import DiskStore, DiskTicket

_TENSOR_BYTES = 16 * 2**20  # size of the tensors written and read: about a saved tensor's
_COPY_BYTES = 64 * 2**20  # so large that the fixed cost of a copy does not show
_BLOCKS = 32  # single blocks timed for the cost per transfer
_AT_ONCE = 4  # tensors on their way, so that no thread waits for one


def measure_bandwidth(
    directory: str | Path,
    nbytes: int | str = "512MiB",
    *,
    threads: int = 2,
    buffer_bytes: int | str = 2 * 2**20,
    checksums: bool = False,
    device: torch.device | str = "cpu",
    link: Link | None = None,
) -> Bandwidth:
    """Write and read `nbytes` in tensors of up to 16 MiB through a `DiskStore`, which leaves no file.

    Drives write faster until their own cache is full: measure with as many bytes as a step offloads, and while nothing
    else runs or with what will run.

    Args:
        directory: where the file is made; it must be there.
        nbytes: bytes, a number or a text such as "512MiB". They are written twice, and timed the second time; then come some
            50 blocks of 4 KiB.
        threads: how many transfer, as for the store.
        buffer_bytes: bytes of each thread's staging buffer, as for the store.
        checksums: whether they are made and compared, as for the store.
        device: where the tensors are. From a CUDA device the speeds are those of the whole way to the disk and back.
        link: what copies to and from a device, as for the store.

    Raises:
        ArgumentError: `nbytes` is no size, or less than 4 KiB.
        DeviceError, OffloadError: as for `DiskStore`, or a transfer failed.
    """
    total = _total(nbytes)
    size = min(_TENSOR_BYTES, total)
    count = total // size
    # random: some drives and filesystems compress. The same block each time: its content does not matter
    block = torch.from_numpy(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
    room = _AT_ONCE * size
    with DiskStore(
        directory,
        count * whole_blocks(size),
        threads=threads,
        backlog_bytes=room,
        ahead_bytes=room,
        buffer_bytes=buffer_bytes,
        checksums=checksums,
        device=device,
        link=link,
    ) as store:
        block = block.to(store.device)
        _write(store, block, count)  # the first writes to allocated space change the filesystem's own records too
        began = time.perf_counter()
        tickets = _write(store, block, count)
        wrote = time.perf_counter()
        _read(tickets)
        read = time.perf_counter()
        del tickets
        small = _seconds_of_blocks(store, block[:BLOCK])
        return Bandwidth(count * size / (wrote - began), count * size / (read - wrote), store.direct, *small)


def measure_link(device: torch.device | str, nbytes: int | str = "512MiB", *, link: Link | None = None) -> Bandwidth:
    """Copy `nbytes` out and back in tensors of up to 64 MiB through a `HostStore`, timed by the device's events.

    The current stream of the device has the copies to itself if nothing else is queued: measure while nothing else runs, or with
    what will run on the same links.

    Args:
        device: a CUDA device.
        nbytes: how much, a number or a text such as "512MiB"; this much host memory is pinned, and given back.
        link: as for the store.

    Raises:
        ArgumentError: `nbytes` is no size, or less than 4 KiB.
        DeviceError, OffloadError: as for `HostStore`.
    """
    total = _total(nbytes)
    size = min(_COPY_BYTES, total)
    count, room = total // size, _AT_ONCE * size
    link = CudaLink(device) if link is None else link
    with HostStore(count * whole_blocks(size), device=device, backlog_bytes=room, ahead_bytes=room, link=link) as store:
        block = link.empty(size)
        link.fill(block, 0, link.current())
        _copy_out(store, link, block, count)  # the first copies come while clocks are still low
        tickets, out = _copy_out(store, link, block, count)
        del block
        began = link.mark(link.current())
        _read(tickets)
        back = _seconds_since(began, link)
        return Bandwidth(count * size / out, count * size / back, direct=True)


def _total(nbytes: int | str) -> int:
    total = parse_budget(nbytes, "nbytes").bytes
    if total is None or total < BLOCK:
        raise ArgumentError(f"nbytes={nbytes!r}: give at least {BLOCK} bytes, or a size with its unit such as '512MiB'")
    return total


def _copy_out(store: HostStore, link: Link, block: torch.Tensor, count: int) -> tuple[list[HostTicket], float]:
    began = link.mark(link.current())
    tickets = [store.put(block) for _ in range(count)]
    store.wait_until_resident_at_most(0)
    return tickets, _seconds_since(began, link)


def _seconds_since(began: Event, link: Link) -> float:
    """Waits until all that the current stream was given is over."""
    ended = link.mark(link.current())
    link.synchronize(ended)
    seconds = link.seconds_between(began, ended)
    assert seconds is not None
    return seconds


def _write(store: DiskStore, block: torch.Tensor, count: int) -> list[DiskTicket]:
    tickets = [store.put(block) for _ in range(count)]
    store.flush()
    if not store.direct:  # else these would be the times that memory takes
        fd = store._engine.mover.file.fd
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return tickets


def _seconds_of_blocks(store: DiskStore, block: torch.Tensor) -> tuple[float, float]:
    """Seconds of a block out, or of one back, in a queue of them; and how much longer it takes if each is waited for."""
    count = min(_BLOCKS, store.capacity // BLOCK)
    began = time.perf_counter()
    tickets = [store.put(block) for _ in range(count)]
    store.flush()
    _read(tickets)
    queued = (time.perf_counter() - began) / (2 * count)
    del tickets
    alone = []
    for _ in range(_BLOCKS // 2):
        began = time.perf_counter()
        ticket = store.put(block)
        store.flush()
        ticket.get()
        alone.append((time.perf_counter() - began) / 2)
        ticket.drop()
    return queued, max(median(sorted(alone)) - queued, 0.0)


def _read(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        ticket.prefetch()
    for ticket in tickets:
        ticket.get()
