"""The bytes that torch's CUDA caching allocator would reserve for a captured trace."""

from __future__ import annotations

from collections import defaultdict

from ullage.capture._timeline import effective_bytes
from ullage.cost import CachingAllocator
from ullage.planner.study._executed import StepCapture
from ullage.planner.study._study import Study


def reserved_bytes(s: Study, last: StepCapture) -> int | None:
    """Return the bytes reserved when a captured step and all steps before it have run; None on a device without a caching allocator.

    Of a kernel's inner allocations only their sum is known, so they count as one block. A library's workspace (cuBLAS) is allocated
    before the step.
    """
    if s.device.facts.kind != "cuda":
        return None
    trace, costs = last.session.trace, s.costs(last.session)
    born, dying = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
    sizes = [effective_bytes(storage, trace, costs) for storage in trace.storages]
    for k, storage in enumerate(trace.storages):
        if storage.death >= storage.birth:
            born[max(storage.birth, -1)].append(k)
            dying[storage.death].append(k)
    allocator, address = CachingAllocator(), dict[int, int]()
    allocator.allocate(s.device.facts.blas_workspace_bytes)
    for i in range(-1, last.ops.stop):
        for k in born.get(i, ()):
            address[k] = allocator.allocate(sizes[k])
        if i >= 0:
            inside = trace.inside.get(i, costs[trace.signature[i]].internal_bytes + trace.numbers[i])
            allocator.free(allocator.allocate(inside - sum(sizes[k] for k in born.get(i, ()))))
        for k in dying.get(i, ()):
            allocator.free(address.pop(k))
    return allocator.reserved_bytes
