"""State of a store in host memory: its tensors and their places, and the order in which streams copy and wait.

A source may be freed, and its memory written to again, in the order of the stream that was current at `put`: that is torch's rule
for every kernel that reads it there. So before the source is released, either that stream was made to wait for the copy, or the copy
is found finished. Which source is released next follows the order of calls, not the speed of copies. At that moment the store
looks for writes in place: a write that was queued before may have changed the copy, a later one can't.

A target is allocated in the stream that is current when its copy is queued, and the copy waits for the kernels queued there, because
the allocator may have returned memory that they still use. The stream that gets the target waits for the copy.

A place is free as soon as its ticket is dropped. Copies out run in order, so the next one into it is after the last; it waits
for copies in from there, too.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ullage.offload._extents import Extent
from ullage.offload._held import POISON
from ullage.offload._ledger import Ledger, Limits
from ullage.offload._link import Event, Link, Stream
from ullage.offload._record import Charge, Phase, Record
from ullage.offload._stalls import Stalls


class HostRecord(Record):
    """One that streams move."""

    def __init__(self, source: Tensor, stream: Stream) -> None:
        super().__init__(source)
        self.stream = stream  # that `held` was put from, or was allocated in
        self.born: Event = None  # on that stream, when it was put
        self.written: Event = None  # the copy out is done
        self.ready: Event = None  # the last copy in is done


class HostBooks(Ledger[HostRecord]):
    """The state of all tensors of a store in host memory. Every method needs the engine's lock."""

    def __init__(self, limits: Limits, poison: bool, link: Link) -> None:
        super().__init__(limits, poison)
        self.link = link
        self.slab: Tensor = link.pin(limits.capacity)
        self.stalls = Stalls(link)
        self.told: deque[Callable[[], None]] = deque()  # to be called without the lock
        self.leaving: deque[HostRecord] = deque()  # whose sources are held, oldest first
        self._readers: list[tuple[Extent, Event]] = []  # places that are free, while a copy from there may be under way

    # out

    def put(self, source: Tensor) -> HostRecord | None:
        """Give a tensor its place and queue its copy; None if there is no place."""
        record = HostRecord(source, self.link.current())
        extents = self.extents.allocate(record.nbytes)
        if extents is None:
            return None
        record.lay_out(extents, self.limits.capacity)  # a part per extent
        try:
            if record.parts:
                self._send(record, source)
        except BaseException:
            self._bury(record)
            raise
        self.live.add(record)
        if not record.parts:
            record.phase = Phase.AWAY
            self._release(record)
        elif self.goes_through(record):
            self.leaving.append(record)
            self.let_all_go()
        else:
            self._charge(record, Charge.BACKLOG)
            self.leaving.append(record)
        return record

    def _send(self, record: HostRecord, source: Tensor) -> None:
        while not self.has_room(record):
            self.let_oldest_go()
        with self._drained_on_error():
            record.born = self.link.mark(record.stream)
            after = [record.born, *self._readers_of(record.extents)]
            record.written = self.link.copy_out(source, self.slab, record.parts, after)
        self.count(writes=1, bytes_written=record.nbytes)

    def _readers_of(self, extents: tuple[Extent, ...]) -> list[Event]:
        """Copies from places that may be under way."""
        self._readers = [(place, event) for place, event in self._readers if not self.link.done(event)]
        return [event for place, event in self._readers if any(_overlap(place, e) for e in extents)]

    def let_oldest_go(self) -> bool:
        """Have the stream of the source that is held for longest wait for its copy, and release it; False if there is none."""
        if not self.leaving:
            return False
        oldest = self.leaving[0]
        self.stalls.wait(oldest.stream, oldest.written, reads=False)
        self._settle(self.leaving.popleft())
        return True

    def let_all_go(self) -> None:
        """The same for all; as copies run in order, a stream waits for the last one."""
        for stream, written in {r.stream: r.written for r in self.leaving}.items():
            self.stalls.wait(stream, written, reads=False)
        while self.leaving:
            self._settle(self.leaving.popleft())

    def synchronize_writes(self) -> None:
        """Wait for all copies out, and release their sources."""
        while self.leaving:
            self.link.synchronize(self.leaving[0].written)
            self._settle(self.leaving.popleft())

    def _settle(self, record: HostRecord) -> None:
        """Mark a copy out as done; later writes to its source no longer affect the copy."""
        record.modified |= record.was_written_to
        if record.dropped or not record.keep or record.modified:
            record.phase, record.keep = Phase.AWAY, False
            self._release(record)
        else:
            record.phase = Phase.READY

    # back

    def read_ahead(self, record: HostRecord) -> None:
        """See `Ledger.read_ahead`. If the device has no memory for it, it is left to `get`."""
        with contextlib.suppress(torch.OutOfMemoryError):
            self.read(record)

    def read(self, record: HostRecord) -> None:
        """Queue the copy of a tensor that is in the slab only.

        Raises:
            torch.OutOfMemoryError: the device has no memory for it.
        """
        stream = self.link.current()
        target = self.link.empty(record.nbytes)
        with self._drained_on_error():
            if self.poison:
                self.link.fill(target, POISON, stream)
            after = [self.link.mark(stream), record.written]
            record.ready = self.link.copy_in(self.slab, target, record.parts, after)
        record.hold(target, original=False)
        record.stream, record.phase = stream, Phase.READY
        self._charge(record, Charge.AHEAD)
        self.count(reads=1, bytes_read=record.nbytes)

    def take(self, record: HostRecord, late: Callable[[], None] | None) -> Tensor:
        """Hand out a tensor to the current stream."""
        if record.held is None:
            record.wanted = False
            self.read(record)
        assert record.held is not None
        stream = self.link.current()
        if record.original:
            if stream != record.stream:
                self.link.wait(stream, record.born)
            # the read-ahead is for others now: a host that runs ahead would not see for long that the copy is done
            while record.charge is Charge.AHEAD and not self.goes_through(record) and not self.has_room(record):
                self.let_oldest_go()
        else:
            self.stalls.wait(stream, record.ready, reads=True, asked=record.asked, late=late)
        if stream != record.stream:
            self.link.share(record.held, stream)
        return self.hand_out(record)

    # done

    def drop(self, record: HostRecord) -> None:
        """Free a tensor's memory; a source that is still being copied is held until the copy is done."""
        record.dropped, record.wanted, record.keep = True, False, False
        self.live.discard(record)
        if self.poison and record.parts:
            after = [record.ready] if record.ready is not None else []
            self.link.fill_slab(self.slab, record.parts, POISON, after)
        if record.ready is not None and not self.link.done(record.ready):
            self._readers += [(place, record.ready) for place in record.extents]
        self._bury(record)
        if record.phase is not Phase.OUT:
            if record.held is not None and not record.original:
                self._abandon(record, record.held)
            self._release(record)

    def _abandon(self, record: HostRecord, target: Tensor) -> None:
        """A target that nobody took goes back to its stream's memory once the copy into it is done."""
        if not self.link.done(record.ready):
            self.link.wait(record.stream, record.ready)
        if self.poison:
            self.link.fill(target, POISON, record.stream)

    def reap(self, spared: HostRecord | None = None) -> None:
        """Drop orphans, and release sources whose copies are done, except `spared`, which is about to be read."""
        super().reap(spared)
        while self.leaving and self.leaving[0] is not spared and self.link.done(self.leaving[0].written):
            self._settle(self.leaving.popleft())

    def book_stalls(self) -> None:
        """Count waits that are over by now."""
        for stall, seconds in self.stalls.settled():
            if stall.reads:
                late = stall.asked and seconds > 0
                self.count(stalled_read_seconds=seconds, late_prefetches=late)
                if late and stall.late is not None:
                    self.told.append(stall.late)
            else:
                self.count(stalled_write_seconds=seconds)

    def clear(self) -> None:
        """Drop all tensors; copies must be over."""
        for record in (*self.live, *self.leaving):
            self._release(record)
        self.live.clear()
        self.leaving.clear()
        self._wanted.clear()
        self._readers.clear()
        self.stalls.clear()

    @contextlib.contextmanager
    def _drained_on_error(self) -> Iterator[None]:
        """A copy that was queued in part must be over before its memory is released."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the error that is on its way says it
                self.link.drain()
            raise


def _overlap(a: Extent, b: Extent) -> bool:
    return a.offset < b.end and b.offset < a.end
