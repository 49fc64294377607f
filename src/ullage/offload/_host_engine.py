"""The lock of a store in host memory, and the order of the steps of each call.

There are no threads: each call queues its copies on the device's streams, and notices the copies that are finished by then.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from torch import Tensor

from ullage.offload._facts import Stats
from ullage.offload._failures import full, modified, refused
from ullage.offload._guard import Guard
from ullage.offload._host_state import HostBooks, HostRecord
from ullage.offload._ledger import Limits
from ullage.offload._link import Link
from ullage.offload._record import Charge, Phase


class HostEngine(Guard[HostRecord]):
    """Carries out the calls of a `HostStore` and its tickets; the store adds arguments and words. Owns the pinned memory."""

    def __init__(self, link: Link, limits: Limits, poison: bool) -> None:
        self.link, self.books = link, HostBooks(limits, poison, link)
        super().__init__(None, self.books)

    def put(self, source: Tensor) -> HostRecord:
        """Queue a copy out; the stream waits for room in the backlog, the host does not."""
        with self._entered():
            self._check_open()
            record = self.books.put(source)
            if record is None:
                raise full(None, source.numel(), self.books.extents)
            return record

    def prefetch(self, record: HostRecord) -> None:
        """Queue a copy in, now or when there is room."""
        with self._entered(record):
            self._check_open(record)
            self.books.want(record)

    def get(self, record: HostRecord, late: Callable[[], None] | None = None) -> Tensor:
        """Return the bytes; the current stream waits for them, the host does not."""
        with self._entered(record):
            self._check_open(record)
            if not record.parts:
                return self.link.empty(0)
            if record.was_written_to and record.phase is Phase.OUT:
                record.modified = True
            elif record.was_written_to:
                self.books.forget_source(record)
            if record.modified:
                raise modified(None, record.nbytes)
            tensor = self.books.take(record, late)
            self.books.reap()
            self.books.start_wanted()
            return tensor

    def recover(self, record: HostRecord) -> Tensor:
        """No write fails by itself: an error of the device is one of all its streams."""
        with self._entered():
            self._check_open(record)
            raise refused(None, "nothing to recover: no write of this tensor failed; call get()")

    def drop(self, record: HostRecord) -> None:
        """Free a place; does nothing after `close` or in another process."""
        if self._forked or self.closing:
            return
        with self._entered():
            if not record.dropped:
                self.books.drop(record)
                self.books.start_wanted()

    def poll(self) -> None:
        """Release each source whose copy is done."""
        with self._entered():
            self._check_open()

    def wait_at_most(self, nbytes: int) -> bool:
        """Have streams wait for copies until no more than `nbytes` are held; False if those that are left can't bring that."""
        with self._entered():
            self._check_open()
            while self.resident_bytes > nbytes:
                if not self.books.let_oldest_go():
                    return False
        return True

    def flush(self) -> None:
        """Wait until nothing is on its way out, and until it is known how long streams have waited."""
        with self._entered():
            self._check_open()
            self._wait_for_writes()
            self.books.stalls.finish()
            self.books.book_stalls()

    def _wait_for_writes(self) -> None:
        if self.books.leaving:
            began = time.perf_counter()
            self.books.synchronize_writes()
            self.books.count(stalled_write_seconds=time.perf_counter() - began)

    @property
    def resident_bytes(self) -> int:
        """Backlog and read-ahead."""
        return self.books.held[Charge.BACKLOG] + self.books.held[Charge.AHEAD]

    @property
    def stats(self) -> Stats:
        """Counts, with waits that are over by now."""
        if not (self.closing or self._forked):
            with self._entered(start=False):
                pass
        return self.books.stats

    @contextlib.contextmanager
    def _entered(self, spared: HostRecord | None = None, start: bool = True) -> Iterator[None]:
        """Hold the lock; do overdue work first. Callbacks about late copies run without it."""
        self._check_process()
        try:
            with self._changed:
                if not self.closing:
                    self.books.book_stalls()
                    if start:
                        self.books.reap(spared)
                        self.books.start_wanted()
                yield
        finally:
            self._tell()

    def _tell(self) -> None:
        with contextlib.suppress(IndexError):  # another thread may take the last one
            while self.books.told:
                self.books.told.popleft()()

    def close(self) -> None:
        """Wait for the copies under way, drop all tensors, unpin the memory."""
        if self._forked or self._closed:
            return
        self.closing = True
        try:
            with self._changed:
                self._let_go()
        finally:
            self._tell()

    def _let_go(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self.link.drain()
            self.books.stalls.finish()
            self.books.book_stalls()
        finally:  # after an error of the device nothing is under way any more
            slab = self.books.slab
            self.books.clear()
            self.books.slab = slab.new_empty(0)
            self.link.unpin(slab)

    def close_in_child(self) -> None:
        """After a fork: the child's pages would keep the memory taken. It can't use the device, so nothing else is touched."""
        if not self._closed:
            self._closed = True
            self.books.slab = self.books.slab.new_empty(0)
