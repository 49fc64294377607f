"""A simulation of torch's CUDA caching allocator: the bytes it reserves for a list of allocations.

Idea: the allocator takes segments from the driver and cuts blocks out of them, so that it holds more than tensors do. Which segments it
takes follows from the order of allocations and frees alone, so it can be replayed without a device.

Rules: "Memory management" in torch's notes on CUDA semantics, and `c10/cuda/CUDACachingAllocator.cpp`. Sizes are rounded to 512 bytes.
Blocks of up to 1 MiB are cut from segments of 2 MiB, larger ones of less than 10 MiB from segments of 20 MiB; the others have a segment
of their own, rounded to 2 MiB. The smallest free block that is large enough is taken, and split if enough is left. Freed neighbours
merge.

Known non-optimalities: one stream, no expandable segments and no options of `PYTORCH_ALLOC_CONF`, and no segment is given back, which
the real allocator does when the device is full.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

ROUND = 512
SMALL = 1 << 20  # the largest small block; the rest of a large block is split off if it is larger
SMALL_SEGMENT = 2 << 20
LARGE_SEGMENT = 20 << 20
LEAST_OWN_SEGMENT = 10 << 20
SEGMENT_ROUND = 2 << 20


@dataclass(eq=False, slots=True)
class _Block:
    address: int
    size: int
    small: bool
    free: bool = False
    before: _Block | None = None  # neighbours in the same segment
    after: _Block | None = None


class CachingAllocator:
    """Follows allocations and frees.

    Attributes:
        reserved_bytes: bytes of all segments.
    """

    def __init__(self) -> None:
        self.reserved_bytes = 0
        # free blocks of each pool by (size, address), which is the order in which the allocator prefers them
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._at: dict[int, _Block] = {}  # by address

    def allocate(self, nbytes: int) -> int:
        """Allocate bytes, and return the address to free them by; -1 for none."""
        if nbytes <= 0:
            return -1
        size = _rounded(nbytes, ROUND)
        small = size <= SMALL
        free = self._free[small]
        k = bisect_left(free, (size, -1))
        if k < len(free):
            block = self._at[free.pop(k)[1]]
            block.free = False
        else:
            block = self._segment(size, small)
        self._split(block, size)
        return block.address

    def free(self, address: int) -> None:
        """Free the block at an address."""
        if address < 0:
            return
        block = self._at[address]
        if block.before is not None and block.before.free:
            block = self._merged(block.before, block, block.before)
        if block.after is not None and block.after.free:
            self._merged(block, block.after, block.after)
        self._offer(block)

    def _segment(self, size: int, small: bool) -> _Block:
        if small:
            nbytes = SMALL_SEGMENT
        elif size < LEAST_OWN_SEGMENT:
            nbytes = LARGE_SEGMENT
        else:
            nbytes = _rounded(size, SEGMENT_ROUND)
        # segments lie one after the other here; blocks of two never merge, because they are no neighbours
        block = self._at[self.reserved_bytes] = _Block(self.reserved_bytes, nbytes, small)
        self.reserved_bytes += nbytes
        return block

    def _split(self, block: _Block, size: int) -> None:
        left = block.size - size
        if left < ROUND if block.small else left <= SMALL:
            return
        rest = _Block(block.address + size, left, block.small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.size, block.after = size, rest
        self._at[rest.address] = rest
        self._offer(rest)

    def _merged(self, first: _Block, second: _Block, was_free: _Block) -> _Block:
        """Return the first of two neighbours, grown by the second; `was_free` is the one that was on offer."""
        free = self._free[first.small]
        free.pop(bisect_left(free, (was_free.size, was_free.address)))
        del self._at[second.address]
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        return first

    def _offer(self, block: _Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, block.address))


def _rounded(nbytes: int, to: int) -> int:
    return -(-nbytes // to) * to
