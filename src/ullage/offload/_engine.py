"""The threads of a store, and its one lock.

The lock guards the books; transfers run outside of it. Threads decide over no tensor's life: targets are allocated by the
caller, in `prefetch` and `get`, and sources are released by the caller too (with `release_in_caller`), so that a record
of the allocations of the caller's thread is whole.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

from ullage._errors import OffloadError
from ullage.offload._disk_state import Books
from ullage.offload._failures import failed, full, modified, refused
from ullage.offload._file import cause_of, hint_for
from ullage.offload._guard import Guard
from ullage.offload._ledger import Limits
from ullage.offload._memory import Memory
from ullage.offload._queues import URGENT
from ullage.offload._record import Charge, Failure, FileRecord, Mover, Phase
from ullage.offload._staging import Staging


class Engine(Guard[FileRecord]):
    """Carries out the calls of a `DiskStore` and its tickets; the store adds arguments and words. Owns the file and the staging buffers."""

    def __init__(self, mover: Mover, staging: Staging, limits: Limits, memory: Memory) -> None:
        self.mover, self.staging, self.memory = mover, staging, memory
        self.staging_bytes = staging.nbytes if memory.link is None else 0  # of the memory that tensors are in
        self.books = Books(limits, mover.poison, memory)
        super().__init__(mover.file.directory, self.books)
        self.failure_said = False
        self._abandoned = False
        self._threads = [
            threading.Thread(target=_work, args=(self, buffer), name=f"ullage-offload-{i}", daemon=True)
            for i, buffer in enumerate(staging.buffers)
        ]
        self._working = len(self._threads)
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # the system starts no more threads
            self.closing = True
            raise

    def put(self, source: Tensor) -> FileRecord:
        """Start a write; waits for room in the backlog."""
        books = self.books
        with self._entered():
            self._check_usable()
            record = FileRecord(self.memory.hold(source))
            while not (books.has_room(record) and books.place(record)):
                if books.has_room(record) and not books.dying:
                    raise full(self._where, record.nbytes, books.extents)
                self._wait_for_writes()
            self._changed.notify_all()
            if books.goes_through(record) and record.parts:
                self._write_through(record)
        return record

    def _write_through(self, record: FileRecord) -> None:
        try:
            while record.phase is Phase.OUT:
                self._wait_for_writes(usable=False)  # another tensor's failed write is no reason to stop
            if record.failure:
                raise self._error(record.failure)
        except BaseException:
            self.books.drop(record)
            raise

    def prefetch(self, record: FileRecord) -> None:
        """Start a read, now or when there is room."""
        with self._entered(record):
            self._check_open(record)
            self.books.want(record)
            self._changed.notify_all()

    def get(self, record: FileRecord, late: Callable[[], None] | None = None) -> Tensor:
        """Return the bytes; waits for them. `late`: see `Ticket.get`."""
        tensor, was_late = self._get(record)
        if was_late and late is not None:
            late()
        return tensor

    def _get(self, record: FileRecord) -> tuple[Tensor, bool]:
        """The bytes, and whether they were waited for though asked for ahead."""
        waited = was_late = False
        with self._entered(record):
            while True:
                self._check_open(record)
                if record.failure and record.phase in (Phase.FAILED, Phase.AWAY):
                    raise self._error(self.books.take_failure(record))
                if not record.parts:
                    return self.memory.new(0).tensor, False
                if record.was_written_to and record.phase is Phase.OUT:
                    record.modified = True
                elif record.was_written_to and record.phase in (Phase.READY, Phase.AWAY):
                    self.books.forget_source(record)
                if record.modified:
                    raise modified(self._where, record.nbytes)
                if record.is_here:
                    tensor = self.books.hand_out(record)
                    if self.books.start_wanted():
                        self._changed.notify_all()
                    return tensor, was_late
                if not waited and record.asked:
                    was_late = True
                    self.books.count(late_prefetches=1)
                if record.phase is Phase.AWAY:
                    record.wanted = False
                    self.books.read(record, URGENT)
                    self._changed.notify_all()
                elif not waited:
                    self.books.queues.promote(record)
                waited = True
                self._wait("stalled_read_seconds", record)

    def recover(self, record: FileRecord) -> Tensor:
        """Return the source of a failed write."""
        with self._entered():
            self._check_open(record)
            if record.phase is not Phase.FAILED or record.held is None:
                raise refused(self._where, "nothing to recover: no write of this tensor failed; call get()")
            assert record.memory is not None
            record.memory.hand_over()
            return record.held

    def drop(self, record: FileRecord) -> None:
        """Free a place; does nothing after `close` or in another process."""
        if self._forked or self.closing:
            return
        with self._entered():
            if not record.dropped:
                self.books.drop(record)
                self.books.start_wanted()
                self._changed.notify_all()

    def poll(self) -> None:
        """Release each source that is written."""
        with self._entered():
            self._check_open()

    def wait_at_most(self, nbytes: int) -> bool:
        """Wait until no more than `nbytes` are resident; False if the writes that are left can't bring that."""
        with self._entered():
            self._check_usable()
            while self.resident_bytes > nbytes:
                if not (self.books.outgoing or self.books.dying):
                    return False
                self._wait_for_writes()
        return True

    def flush(self) -> None:
        """Wait until nothing is on its way out."""
        with self._entered():
            self._check_usable()
            while self.books.outgoing or self.books.dying:
                self._wait_for_writes()

    @property
    def resident_bytes(self) -> int:
        """Backlog and read-ahead, and staging where tensors are."""
        return self.staging_bytes + self.books.held[Charge.BACKLOG] + self.books.held[Charge.AHEAD]

    @contextlib.contextmanager
    def _entered(self, spared: FileRecord | None = None) -> Iterator[None]:
        """Hold the lock; do overdue work first."""
        self._check_process()
        with self._changed:
            self.books.reap(spared)
            if self.books.start_wanted():
                self._changed.notify_all()
            yield

    def _wait(self, counter: str, spared: FileRecord | None = None) -> None:
        began = time.perf_counter()
        try:
            self._changed.wait()
        finally:
            self.books.count(**{counter: time.perf_counter() - began})
        self.books.reap(spared)

    def _wait_for_writes(self, usable: bool = True) -> None:
        self._wait("stalled_write_seconds")
        if usable:
            self._check_usable()
        else:
            self._check_open()

    def _check_usable(self) -> None:
        self._check_open()
        if self.books.failure:
            raise self._error(self.books.failure)

    def _error(self, failure: Failure) -> OffloadError:
        self.failure_said |= failure.action == "write"
        return failed(self._where, failure)

    # the threads

    def take(self) -> tuple[FileRecord, int] | None:
        """Wait for a part to move; None when it is time to go."""
        with self._changed:
            while not self.closing:
                job = self.books.queues.pop()
                if job:
                    return job
                self._changed.wait()
        return None

    def move(self, record: FileRecord, number: int, staging: np.ndarray) -> None:
        """Move a part and book it."""
        out, part, moved, failure = record.phase is Phase.OUT, record.parts[number], 0, None
        try:
            if record.memory is not None and not (record.failure or record.dropped):
                if out:
                    record.sums[number] = self.mover.write(record.memory, part, staging)
                else:
                    self.mover.read(record.memory, part, staging, record.sums[number])
                moved = part.length
        except BaseException as error:  # whatever it is, the caller must hear of it, and the thread must live
            failure = Failure("write" if out else "read", record.nbytes, cause_of(error), hint_for(error))
        with self._changed:
            self.books.finish(record, moved, failure)
            self._changed.notify_all()

    def leave(self) -> None:
        """A thread ends. The last one closes up if `close` could not."""
        with self._changed:
            self._working -= 1
            self._changed.notify_all()
            if self._abandoned and not self._working:
                self._let_go()

    def close(self) -> None:
        """Stop the threads, drop all tensors, close the file."""
        if self._forked:
            return
        self.closing = True
        if threading.current_thread() in self._threads:
            # the collector runs here, maybe under the lock; the other threads are told by `leave`
            self._abandoned = True
            return
        with self._changed:
            self.books.queues.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        with self._changed:
            self._let_go()

    def _let_go(self) -> None:
        if not self._closed:
            self._closed = True
            self.books.clear()
            os.close(self.mover.file.fd)
            self.staging.close()

    def close_in_child(self) -> None:
        """After a fork: the child's descriptor would keep the space of the file taken. It can't use a device, so nothing is unpinned."""
        if not self._closed:
            self._closed = True
            os.close(self.mover.file.fd)


def _work(engine: Engine, staging: np.ndarray) -> None:
    try:
        while job := engine.take():
            engine.move(*job, staging)
            del job  # so that it keeps nothing while the thread waits
    finally:
        engine.leave()
