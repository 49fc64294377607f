"""The allocator: nothing overlaps, free runs are joined, and only the sum of free bytes decides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.offload._extents import BLOCK, Extent, Extents, whole_blocks

BLOCKS = 64
SIZES = st.integers(1, 20 * BLOCK)


@given(st.lists(st.one_of(SIZES, st.integers(-100, -1)), max_size=120))
def test_any_order(program: list[int]) -> None:
    """A positive number is allocated, a negative one frees one of those taken."""
    extents, taken = Extents(BLOCKS * BLOCK), []
    for n in program:
        free = extents.free_bytes
        if n > 0:
            found = extents.allocate(n)
            assert (found is None) == (whole_blocks(n) > free)
            if found is not None:
                assert sum(e.length for e in found) == whole_blocks(n)
                taken.append(found)
        elif taken:
            extents.free(taken.pop(n % len(taken)))
        check(extents, [e for found in taken for e in found])
    for found in taken:
        extents.free(found)
    assert extents.free_runs == (Extent(0, BLOCKS * BLOCK),) and extents.free_bytes == BLOCKS * BLOCK


def check(extents: Extents, taken: list[Extent]) -> None:
    """Taken and free runs tile the file, in whole blocks, and no two free ones touch."""
    runs = sorted([*taken, *extents.free_runs], key=lambda e: e.offset)
    assert [r.offset for r in runs] == [0, *(r.end for r in runs)][: len(runs)]
    assert (runs[-1].end if runs else 0) == extents.capacity
    assert all(r.length > 0 and r.offset % BLOCK == 0 and r.length % BLOCK == 0 for r in runs)
    free = extents.free_runs
    assert all(a.end < b.offset for a, b in zip(free, free[1:], strict=False))
    assert sum(r.length for r in free) == extents.free_bytes


def test_best_fit() -> None:
    extents = Extents(10 * BLOCK)
    pieces = [extents.allocate(n * BLOCK) for n in (3, 1, 2, 1, 3)]
    for i in (0, 2):
        extents.free(pieces[i] or ())
    assert extents.allocate(2 * BLOCK) == (Extent(4 * BLOCK, 2 * BLOCK),)
    assert extents.allocate(1) == (Extent(0, BLOCK),)


def test_laid_out_over_several_runs() -> None:
    extents = Extents(8 * BLOCK)
    pieces = [extents.allocate(n * BLOCK) for n in (2, 1, 3, 1, 1)]
    for i in (0, 2, 4):
        extents.free(pieces[i] or ())
    assert extents.allocate(5 * BLOCK + 1) == (
        Extent(3 * BLOCK, 3 * BLOCK),
        Extent(0, 2 * BLOCK),
        Extent(7 * BLOCK, BLOCK),
    )
    assert extents.free_bytes == 0 and extents.allocate(1) is None and extents.allocate(0) == ()


def test_freed_twice() -> None:
    extents = Extents(4 * BLOCK)
    found = extents.allocate(BLOCK) or ()
    extents.free(found)
    with pytest.raises(ValueError, match="is free already"):
        extents.free(found)
    with pytest.raises(ValueError, match="not in whole blocks"):
        Extents(BLOCK + 1)
