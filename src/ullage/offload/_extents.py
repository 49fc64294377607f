"""Allocate bytes of the file: best fit, with free runs joined again, in blocks of 4 KiB."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

BLOCK = 4096  # what direct I/O needs its offsets, lengths and addresses to be multiples of, on all common drives


def whole_blocks(nbytes: int) -> int:
    """Round up to whole blocks."""
    return -(-nbytes // BLOCK) * BLOCK


@dataclass(frozen=True)
class Extent:
    """A run of bytes of the file."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.length


class Extents:
    """Free and taken runs of `capacity` bytes. Not safe for threads by itself.

    A request gets the smallest free run that holds it; if none does, several runs, the largest first. So a request fails only if
    the free bytes, added up, are too few, and fragmentation breaks no promise.
    """

    def __init__(self, capacity: int) -> None:
        if capacity % BLOCK:
            raise ValueError(f"capacity={capacity}: not in whole blocks")
        self.capacity = capacity
        self.free_bytes = capacity
        self._free = [Extent(0, capacity)] if capacity else []  # by offset; neighbours never touch

    @property
    def free_runs(self) -> tuple[Extent, ...]:
        """The free runs, by offset."""
        return tuple(self._free)

    def allocate(self, nbytes: int) -> tuple[Extent, ...] | None:
        """Take `nbytes`, in whole blocks; None if fewer are free. Nothing is taken for 0 bytes."""
        wanted = whole_blocks(nbytes)
        if wanted > self.free_bytes:
            return None
        fitting = [run for run in self._free if run.length >= wanted]
        runs = [min(fitting, key=lambda run: run.length)] if fitting else sorted(self._free, key=lambda r: -r.length)
        taken = []
        for run in runs:
            if not wanted:
                break
            taken.append(self._take(run, min(run.length, wanted)))
            wanted -= taken[-1].length
        return tuple(taken)

    def _take(self, run: Extent, length: int) -> Extent:
        at = bisect_left(self._free, run.offset, key=lambda r: r.offset)
        rest = Extent(run.offset + length, run.length - length)
        self._free[at : at + 1] = [rest] if rest.length else []
        self.free_bytes -= length
        return Extent(run.offset, length)

    def free(self, extents: tuple[Extent, ...]) -> None:
        """Give back what `allocate` returned."""
        for extent in extents:
            at = bisect_left(self._free, extent.offset, key=lambda r: r.offset)
            before = self._free[at - 1] if at else None
            after = self._free[at] if at < len(self._free) else None
            if (before and before.end > extent.offset) or (after and after.offset < extent.end):
                raise ValueError(f"{extent}: is free already")
            start, end, first, last = extent.offset, extent.end, at, at
            if before and before.end == start:
                start, first = before.offset, at - 1
            if after and after.offset == end:
                end, last = after.end, at + 1
            self._free[first:last] = [Extent(start, end - start)]
            self.free_bytes += extent.length
