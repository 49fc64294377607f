"""Staging buffers: the pages that direct I/O reads and writes, one fixed pool per store."""

from __future__ import annotations

import mmap

import numpy as np
from torch import Tensor

from ullage.offload._link import Link


class Staging:
    """A page-aligned buffer per thread, resident from the start; pinned, if there is a link, until `close`.

    The pages are shared with child processes, which never touch them. Private ones would be copied on the first write
    after a fork, and on Linux before 6.5 a direct read under way then lands in the copy that the child has.

    Raises:
        OffloadError: they can't be pinned.
    """

    def __init__(self, threads: int, nbytes: int, link: Link | None = None) -> None:
        self._link = link
        self._slab: Tensor | None = None
        if link is None:
            populate = getattr(mmap, "MAP_POPULATE", 0)  # Python 3.10 has it on Linux
            flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | populate
            pages = mmap.mmap(-1, threads * nbytes, flags=flags)
            whole = np.frombuffer(pages, dtype=np.uint8)  # keeps the pages; the last array unmaps them
        else:
            self._slab = link.pin(threads * nbytes, "threads or buffer_bytes")
            whole = self._slab.numpy()
        self.buffers = [whole[i * nbytes : (i + 1) * nbytes] for i in range(threads)]
        self.nbytes = threads * nbytes

    def close(self) -> None:
        """Unpin them; copies must be over. May be called twice."""
        slab, self._slab = self._slab, None
        if self._link is not None and slab is not None:
            self._link.unpin(slab)
