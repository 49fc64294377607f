"""What a plan knows of the disk it may use, and how it was asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ullage._bytes import format_bytes, parse_budget
from ullage._errors import ArgumentError, BudgetError, DeviceError, OffloadError
from ullage.offload import BLOCK, measure_bandwidth
from ullage.planner._channels import Channels, Overlap
from ullage.planner._device import choose_device

MEASURED_BYTES = 2**27  # written and read to measure a directory


class Disk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where saved tensors may go, and how fast.

    Attributes:
        directory: an existing one; a plan's handle makes a file there that has no name.
        capacity_bytes: of that file.
        write_bytes_per_second, read_bytes_per_second: measured there.
        window_bytes: tensors on their way out may hold so many bytes of memory, and those that come ahead of their use too.
        threads, buffer_bytes: of the store; each thread has a staging buffer, which is in memory all the time.
    """

    directory: str
    capacity_bytes: int
    write_bytes_per_second: float
    read_bytes_per_second: float
    window_bytes: int = 0
    threads: int = 2
    buffer_bytes: int = 2**19

    @property
    def reserved_bytes(self) -> int:
        """Memory beside what is alive in a step from whose moment of saving on the tensors that leave are gone."""
        return 2 * self.window_bytes + self.threads * self.buffer_bytes

    @property
    def channels(self) -> Channels:
        """What moves tensors."""
        return Channels(self.write_bytes_per_second, self.read_bytes_per_second, self.window_bytes)


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a plan moves in a later step, as simulated.

    Attributes:
        sent_bytes, fetched_bytes: written and read back; what is asked for on its way out is not read.
        hidden_seconds: of transfers, behind compute.
        stalled_seconds: the step waits for transfers; part of its `step_seconds`.
        late_prefetches: how often it waits for what was asked for ahead.
    """

    sent_bytes: int
    fetched_bytes: int
    hidden_seconds: float
    stalled_seconds: float
    late_prefetches: int

    @classmethod
    def of(cls, seen: Overlap) -> Traffic:
        """From a simulation."""
        return cls(
            sent_bytes=seen.sent_bytes,
            fetched_bytes=seen.fetched_bytes,
            hidden_seconds=seen.hidden_seconds,
            stalled_seconds=seen.stalled_seconds,
            late_prefetches=seen.late,
        )


@dataclass(frozen=True)
class DiskRequest:
    """What `plan`'s arguments say of places beside the device's memory: see there."""

    directory: str | Path | None = None
    budget: int | str | None = None
    host_budget: int | str | None = None


def choose_disk(
    request: DiskRequest, work: Any, device: str | None, progress: Callable[[str], None] | None = None
) -> Disk | None:
    """The disk that a request names, its speed measured; None if it names none.

    Raises:
        ArgumentError: one without the other. BudgetError: not a size. DeviceError: not for this device.
        OffloadError: the directory is no place for a file of that size.
    """
    directory, budget = request.directory, request.budget
    if directory is None and budget is None and request.host_budget is None:
        return None
    kind = choose_device(work, device)
    cpu = kind.facts.kind == "cpu" and not kind.estimate
    if request.host_budget is not None:
        if cpu:
            raise DeviceError(
                "host_budget: pinned memory beside a CUDA device; this model is on the CPU, which has none beside it"
            )
        raise DeviceError("host_budget: not there yet; on a CUDA device plans can keep, recompute and select")
    if directory is None or budget is None:
        missing = "disk_directory" if directory is None else "disk_budget"
        raise ArgumentError(
            f"{missing}: not given; tensors go to disk only where a directory and its bytes are both named"
        )
    if not cpu:
        raise DeviceError(
            f"disk_budget: saved tensors on {kind.name} can't go to disk yet, only those of a model on the CPU"
        )
    capacity = parse_budget(budget, "disk_budget").bytes
    if capacity is None or capacity < BLOCK:
        raise BudgetError(
            f"disk_budget={budget!r}: give at least {BLOCK} bytes, or a size with its unit such as '64GiB'"
        )
    _check_room(directory, capacity)
    if progress is not None:
        progress(f"measuring how fast {directory} is")
    speed = measure_bandwidth(directory, min(capacity, MEASURED_BYTES))
    return Disk(
        directory=os.path.realpath(directory),
        capacity_bytes=capacity,
        write_bytes_per_second=speed.write_bytes_per_s,
        read_bytes_per_second=speed.read_bytes_per_s,
    )


def _check_room(directory: str | Path, capacity: int) -> None:
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise OffloadError(
            f"disk_directory {directory}: {error.strerror or error}; name one that is there", str(directory)
        ) from error
    if free < capacity:
        raise OffloadError(
            f"disk_budget: {format_bytes(capacity)}, but {directory} has {format_bytes(free)} free; free some, or lower it",
            str(directory),
            capacity,
        )
