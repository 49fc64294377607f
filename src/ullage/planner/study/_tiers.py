"""The tier of a plan, to which saved tensors may be offloaded, and the arguments that ask for one.

A plan has one tier at most: pinned host memory beside a CUDA device, or a disk beside a device of this machine.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from ullage._bytes import format_bytes, parse_budget
from ullage._errors import ArgumentError, BudgetError, DeviceError, OffloadError
from ullage.apply import HandleReport
from ullage.offload import BLOCK, measure_bandwidth, measure_link
from ullage.planner.study._device import DeviceChoice, choose_device
from ullage.solver._channels import Channels, Overlap

# Bytes moved to measure a directory or a link: 128 MiB take half a second at 250 MB/s, and are many times a drive's or a link's
# cost of one transfer.
MEASURED_BYTES = 2**27
# A plan's store. Each thread has one staging buffer, which counts against the budget on a CPU: so few and small ones.
DISK_THREADS, DISK_BUFFER_BYTES = 2, 2**19


class OffloadTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where saved tensors may be offloaded to, and how fast: a `Disk` or a `Host`.

    Attributes:
        capacity_bytes: size of the file, or of the pinned memory.
        write_bytes_per_second, read_bytes_per_second: speed out and back.
        window_bytes: device bytes that tensors on their way out may hold; tensors that come back before their use may hold as many
            again.
        transfer_seconds, wait_seconds: seconds per transfer on top of its bytes, and per wait on top of the transfer (a thread
            must wake up). If they were not measured, a plan's file leaves them out, so that its digest is that of older versions.
    """

    name: ClassVar[str] = ""
    argument: ClassVar[str] = ""  # the argument of `plan` that gives its bytes

    capacity_bytes: int
    write_bytes_per_second: float
    read_bytes_per_second: float
    window_bytes: int = 0
    transfer_seconds: float | msgspec.UnsetType = msgspec.UNSET
    wait_seconds: float | msgspec.UnsetType = msgspec.UNSET

    @property
    def reserved_bytes(self) -> int:
        """Extra device bytes the store needs on top of the simulated step, where an offloaded tensor vanishes when it is saved."""
        return 2 * self.window_bytes

    @property
    def channels(self) -> Channels:
        """The channels of the simulation."""
        return Channels(
            self.write_bytes_per_second,
            self.read_bytes_per_second,
            self.window_bytes,
            self.transfer_seconds or 0.0,
            self.wait_seconds or 0.0,
        )


class Disk(OffloadTier, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file in a directory; speeds were measured there.

    Attributes:
        directory: an existing directory; a plan's handle makes a nameless file there.
        threads, buffer_bytes: the store's threads, and the size of the staging buffer that each has in host memory all the time.
        device: type of the device whose tensors are offloaded; a plan's file leaves "cpu" out, so that its digest is that of older versions.
        checksums: compare the bytes that come back with those sent; a plan's file leaves it out if it is off.
    """

    name: ClassVar[str] = "disk"
    argument: ClassVar[str] = "disk_budget"

    directory: str
    threads: int = DISK_THREADS
    buffer_bytes: int = DISK_BUFFER_BYTES
    device: str | msgspec.UnsetType = msgspec.UNSET
    checksums: bool | msgspec.UnsetType = msgspec.UNSET

    @property
    def device_type(self) -> str:
        """`device`, also if it is left out."""
        return "cpu" if self.device is msgspec.UNSET else self.device

    @property
    def reserved_bytes(self) -> int:
        """Extra bytes of the store, see `OffloadTier`; on a CPU with the staging buffers."""
        staging = self.threads * self.buffer_bytes if self.device_type == "cpu" else 0
        return 2 * self.window_bytes + staging

    def __str__(self) -> str:
        return f"{self.directory}, {format_bytes(self.capacity_bytes)}{', checksums' if self.checksums else ''}"


class Host(OffloadTier, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Pinned memory of the host, beside a CUDA device; its speeds were measured there, or are the device table's.

    `capacity_bytes` of a plan is what its steps need; its handle pins them once.
    """

    name: ClassVar[str] = "host"
    argument: ClassVar[str] = "host_budget"

    def __str__(self) -> str:
        return f"{format_bytes(self.capacity_bytes)} pinned"


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The transfers of a later step, as simulated.

    Attributes:
        sent_bytes, fetched_bytes: bytes sent and brought back; a tensor that is asked for on its way out is not brought back.
        hidden_seconds: seconds of transfers behind compute.
        stalled_seconds: seconds that the step waits for transfers, part of its `step_seconds`.
        late_prefetches: how often the step waits for a tensor that was prefetched.
    """

    sent_bytes: int
    fetched_bytes: int
    hidden_seconds: float
    stalled_seconds: float
    late_prefetches: int

    @classmethod
    def of(cls, seen: Overlap) -> Traffic:
        """Make it from a simulation."""
        return cls(
            sent_bytes=seen.sent_bytes,
            fetched_bytes=seen.fetched_bytes,
            hidden_seconds=seen.hidden_seconds,
            stalled_seconds=seen.stalled_seconds,
            late_prefetches=seen.late,
        )


@dataclass(frozen=True)
class TierRequest:
    """The arguments of `plan` that ask for a tier: see there."""

    disk_directory: str | Path | None = None
    disk_budget: int | str | None = None
    host_budget: int | str | None = None
    feedback: HandleReport | None = None
    checksums: bool = False

    @property
    def given(self) -> bool:
        """Do they ask for a tier?"""
        return not (self.disk_directory is None and self.disk_budget is None and self.host_budget is None)


def choose_tier(
    request: TierRequest, work: Any, device: str | None, progress: Callable[[str], None] | None = None
) -> OffloadTier | None:
    """Return the tier that a request names, its speed measured; None if it names none.

    Raises:
        ArgumentError: one of a disk's arguments without the other, both tiers, or feedback of a plan with another tier.
        BudgetError: a budget is no size.
        DeviceError: the device can't use this tier.
        OffloadError: the directory has no room for a file of that size, or the memory can't be pinned.
    """
    if request.feedback is not None and not isinstance(request.feedback, HandleReport):
        kind_of = type(request.feedback).__name__
        raise ArgumentError(f"feedback: expected what `Handle.report()` gives, got {kind_of}")
    if request.checksums and request.disk_budget is None:
        raise ArgumentError("checksums: only tensors on a disk have them; give disk_directory and disk_budget too")
    if not request.given:
        if request.feedback is not None:
            raise ArgumentError(
                "feedback: is for plans with a tier; give host_budget, or disk_directory and disk_budget"
            )
        return None
    kind, say = choose_device(work, device), progress or (lambda _: None)
    name = Disk.name if request.host_budget is None else Host.name
    if request.feedback is not None and request.feedback.tier != name:
        before = f"with offload to {request.feedback.tier}" if request.feedback.tier else "without offloading"
        raise ArgumentError(
            f"feedback: of a plan {before}, but this one offloads to {name}; pass the report of a plan with the same tier"
        )
    found = _measured(request, kind, say)
    slower = request.feedback.transfers_slower if request.feedback is not None else 1.0
    return msgspec.structs.replace(
        found,
        write_bytes_per_second=found.write_bytes_per_second / slower,
        read_bytes_per_second=found.read_bytes_per_second / slower,
        transfer_seconds=found.transfer_seconds and found.transfer_seconds * slower,
    )


def _measured(request: TierRequest, kind: DeviceChoice, say: Callable[[str], None]) -> OffloadTier:
    if request.host_budget is None:
        return _disk(request, kind, say)
    if request.disk_directory is not None or request.disk_budget is not None:
        raise ArgumentError("host_budget and disk_budget: a plan offloads tensors to one of them; leave the other out")
    return _host(request.host_budget, kind, say)


def _host(budget: int | str, kind: DeviceChoice, say: Callable[[str], None]) -> Host:
    if kind.facts.kind == "cpu":
        raise DeviceError(
            "host_budget: pinned memory beside a CUDA device; this model is on the CPU, which has none beside it: its memory is the host's"
        )
    capacity = _size("host_budget", budget)
    if kind.estimate:
        out = back = kind.facts.host_link_bytes_per_s
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if capacity > there:
            raise BudgetError(
                f"host_budget: {format_bytes(capacity)}, but this machine has {format_bytes(there)}; lower it"
            )
        say("measuring how fast host memory is reached")
        speed = measure_link(kind.tensors, min(capacity, MEASURED_BYTES))
        out, back = speed.write_bytes_per_s, speed.read_bytes_per_s
    return Host(capacity_bytes=capacity, write_bytes_per_second=out, read_bytes_per_second=back)


def _disk(request: TierRequest, kind: DeviceChoice, say: Callable[[str], None]) -> Disk:
    directory, budget = request.disk_directory, request.disk_budget
    if directory is None or budget is None:
        missing = "disk_directory" if directory is None else "disk_budget"
        raise ArgumentError(
            f"{missing}: not given; tensors go to disk only where a directory and its bytes are both named"
        )
    if kind.estimate:
        raise DeviceError(
            f"disk_budget: saved tensors on {kind.name} can't go to disk in an estimate: the way there is measured, and the device is "
            "not here; plan where it is"
            + (", or give host_budget: they go to pinned host memory then" if kind.facts.kind == "cuda" else "")
        )
    capacity = _size("disk_budget", budget)
    _check_room(directory, capacity)
    say(f"measuring how fast {directory} is")
    speed = measure_bandwidth(
        directory,
        min(capacity, MEASURED_BYTES),
        threads=DISK_THREADS,
        buffer_bytes=DISK_BUFFER_BYTES,
        checksums=request.checksums,
        device=kind.tensors,
    )
    return Disk(
        directory=os.path.realpath(directory),
        capacity_bytes=capacity,
        write_bytes_per_second=speed.write_bytes_per_s,
        read_bytes_per_second=speed.read_bytes_per_s,
        transfer_seconds=speed.transfer_seconds,
        wait_seconds=speed.wait_seconds,
        device=msgspec.UNSET if kind.tensors == "cpu" else kind.tensors,
        checksums=True if request.checksums else msgspec.UNSET,
    )


def _size(name: str, budget: int | str) -> int:
    capacity = parse_budget(budget, name).bytes
    if capacity is None or capacity < BLOCK:
        raise BudgetError(f"{name}={budget!r}: give at least {BLOCK} bytes, or a size with its unit such as '64GiB'")
    return capacity


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
