"""The simulation of torch's CUDA caching allocator: segments worked out by hand, and a slow reading of the rules."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ullage as ul
from tests.small import blocks
from ullage.cost import CachingAllocator

KIB, MIB = 2**10, 2**20


def reserved(*steps: int) -> int:
    """Bytes reserved after allocations (positive: bytes) and frees (negative: -k frees the k-th allocation, from 1)."""
    allocator, addresses = CachingAllocator(), list[int]()
    for step in steps:
        if step > 0:
            addresses.append(allocator.allocate(step))
        else:
            allocator.free(addresses[-step - 1])
    return allocator.reserved_bytes


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        ((1,), 2 * MIB),
        ((MIB, MIB), 2 * MIB),  # two of the largest small blocks fill a segment
        ((MIB, MIB, 1), 4 * MIB),
        ((MIB + 1,), 20 * MIB),
        ((10 * MIB - 512,), 20 * MIB),
        ((10 * MIB,), 10 * MIB),
        ((10 * MIB + 1,), 12 * MIB),
        ((9 * MIB, 9 * MIB, 2 * MIB), 20 * MIB),
        ((9 * MIB, 9 * MIB, 3 * MIB), 40 * MIB),
        ((30 * MIB, -1, 29 * MIB, MIB + 512), 50 * MIB),  # a rest of 1 MiB is not split off
        ((30 * MIB, -1, 28 * MIB, 2 * MIB), 30 * MIB),
        ((4 * MIB, 4 * MIB, 4 * MIB, -1, -2, 8 * MIB), 20 * MIB),  # freed neighbours merge
        ((4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB, -1, -3, 8 * MIB), 40 * MIB),  # these are none
        ((8 * MIB, 12 * MIB, -1, 512), 22 * MIB),  # a small block is never cut from a large segment
        ((20 * MIB, 40 * MIB, -1, -2, 18 * MIB, 40 * MIB), 60 * MIB),  # the smallest that is large enough
    ],
)
def test_segments(steps: tuple[int, ...], wanted: int) -> None:
    assert reserved(*steps) == wanted


def test_no_bytes_need_no_segment() -> None:
    allocator = CachingAllocator()
    address = allocator.allocate(0)
    allocator.free(address)
    assert (address, allocator.reserved_bytes) == (-1, 0)


@dataclass
class _Piece:
    start: int
    size: int
    owner: int | None = None


class _Slow:
    """The rules once more, read another way: segments as lists of pieces, all of which are looked at each time."""

    def __init__(self) -> None:
        self.pools: dict[str, list[list[_Piece]]] = {"small": [], "large": []}
        self.base = 0

    def allocate(self, owner: int, nbytes: int) -> int:
        size = (nbytes + 511) // 512 * 512
        pool = self.pools["small" if size <= MIB else "large"]
        fits = [(p.size, p.start, s, k) for s in pool for k, p in enumerate(s) if p.owner is None and p.size >= size]
        if fits:
            _, _, segment, k = min(fits, key=lambda f: f[:2])
        else:
            whole = (
                2 * MIB
                if size <= MIB
                else 20 * MIB
                if size < 10 * MIB
                else (size + 2 * MIB - 1) // (2 * MIB) * (2 * MIB)
            )
            segment, k = [_Piece(self.base, whole)], 0
            self.base += whole
            pool.append(segment)
        piece = segment[k]
        rest = piece.size - size
        if rest >= 512 if size <= MIB else rest > MIB:
            segment[k : k + 1] = [_Piece(piece.start, size), _Piece(piece.start + size, rest)]
        segment[k].owner = owner
        return segment[k].start

    def free(self, owner: int) -> None:
        for segment in (s for pool in self.pools.values() for s in pool):
            for piece in segment:
                if piece.owner == owner:
                    piece.owner = None
            k = 0
            while k + 1 < len(segment):
                a, b = segment[k : k + 2]
                if a.owner is None and b.owner is None:
                    segment[k : k + 2] = [_Piece(a.start, a.size + b.size)]
                else:
                    k += 1


SIZES = st.sampled_from(
    [1, 512, 513, 300 * KIB, MIB - 512, MIB, MIB + 1, 3 * MIB, 9 * MIB, 10 * MIB - 512, 10 * MIB, 11 * MIB, 33 * MIB]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(SIZES, st.integers(0, 5)), max_size=40))
def test_as_a_slow_reading_of_the_rules(steps: list[tuple[int, int]]) -> None:
    fast, slow, alive = CachingAllocator(), _Slow(), dict[int, int]()
    for owner, (nbytes, frees) in enumerate(steps):
        alive[owner] = fast.allocate(nbytes)
        assert alive[owner] == slow.allocate(owner, nbytes)
        for gone in list(alive)[: frees - 3 if frees > 3 else 0]:
            fast.free(alive.pop(gone))
            slow.free(gone)
        assert fast.reserved_bytes == slow.base


def test_reserved_bytes_stand_beside_the_peak_of_an_estimate_for_cuda() -> None:
    work = blocks(batch=2**16)  # activations of 16 MiB
    profile = ul.profile(work, "h200")
    plan = ul.plan(work, device="h200", policy="every_block")
    assert profile.reserved_bytes is not None and profile.reserved_bytes >= profile.peak_bytes
    assert plan.baseline.reserved_bytes == profile.reserved_bytes
    assert plan.predicted.reserved_bytes is not None and plan.predicted.reserved_bytes < profile.reserved_bytes
    assert profile.reserved_bytes % (2 * MIB) == 0
    assert "(torch's allocator, simulated)" in str(plan) and "caching allocator" in str(profile)


def test_a_cpu_has_no_caching_allocator() -> None:
    profile = ul.profile(blocks(), costs="roofline")
    assert profile.reserved_bytes is None and "reserved" not in str(profile)
