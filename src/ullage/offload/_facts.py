"""Counts and speeds of a store: plain facts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ullage._bytes import format_bytes
from ullage._errors import ArgumentError


@dataclass(frozen=True)
class Stats:
    """Counts since a store was opened. The difference of two is what happened between: `store.stats - before`.

    Attributes:
        bytes_written: bytes of tensors that went to the store (each is padded to 4 KiB there), broken-off writes included.
        bytes_read: bytes of tensors that came from the store.
        forwarded_bytes: bytes that `get` handed back without I/O, because the original was still in memory.
        writes: tensors written whole.
        reads: tensors read whole.
        late_prefetches: calls of `get` that had to wait although `prefetch` had been called.
        stalled_write_seconds: time that `put`, `flush` and `wait_until_resident_at_most` waited.
        stalled_read_seconds: time that `get` waited.

    In a `HostStore` copies count when they are queued; it is streams that wait, and their waits count once they are over.
    """

    bytes_written: int = 0
    bytes_read: int = 0
    forwarded_bytes: int = 0
    writes: int = 0
    reads: int = 0
    late_prefetches: int = 0
    stalled_write_seconds: float = 0.0
    stalled_read_seconds: float = 0.0

    def __sub__(self, before: Stats) -> Stats:
        names = [f.name for f in dataclasses.fields(self)]
        return Stats(**{n: getattr(self, n) - getattr(before, n) for n in names})


@dataclass(frozen=True)
class Bandwidth:
    """Result of `measure_bandwidth` or `measure_link`.

    Attributes:
        write_bytes_per_s: bytes per second out.
        read_bytes_per_s: bytes per second back.
        direct: whether the page cache was bypassed, as always in pinned memory; if not, reads may be faster than the drive is.
        transfer_seconds: seconds that each of many transfers takes beside its bytes; zero where that was not measured.
        wait_seconds: seconds a waiting thread needs to wake up after the transfer; zero where that was not measured.
    """

    write_bytes_per_s: float
    read_bytes_per_s: float
    direct: bool
    transfer_seconds: float = 0.0
    wait_seconds: float = 0.0


def endurance_note(bytes_per_step: int, steps_per_second: float, tbw: float | None = None) -> str:
    """One sentence on what offloading writes per day, and how long a drive lasts at that rate.

    Args:
        bytes_per_step: bytes written in one step (`Stats.bytes_written` of a step).
        steps_per_second: steps per second.
        tbw: terabytes (10^12 bytes) that the drive is rated for, from its data sheet.

    Raises:
        ArgumentError: a number that is not above zero (`bytes_per_step` may be zero).
    """
    if bytes_per_step < 0:
        raise ArgumentError(f"bytes_per_step={bytes_per_step}: can't be negative")
    if not steps_per_second > 0:
        raise ArgumentError(f"steps_per_second={steps_per_second}: must be above zero")
    if tbw is not None and not tbw > 0:
        raise ArgumentError(f"tbw={tbw}: must be above zero, the terabytes written that the drive is rated for")
    per_day = bytes_per_step * steps_per_second * 86_400 / 1e12
    text = f"offload writes {format_bytes(bytes_per_step)} per step, {per_day:.3g} TB per day"
    if tbw is None:
        return f"{text}; compare with the terabytes written (TBW) that the drive is rated for"
    if per_day == 0:
        return f"{text}; that wears no drive"
    return f"{text}; a drive rated for {tbw:g} TBW lasts {tbw / per_day:,.1f} days of training"
