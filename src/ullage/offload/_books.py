"""What a store holds and where: the state of its tensors, without threads, locks or waiting (`_engine` adds those)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ullage.offload._extents import Extents
from ullage.offload._facts import Stats
from ullage.offload._queues import AHEAD, OUT, Queues
from ullage.offload._record import Charge, Failure, Phase, Record
from ullage.offload._staging import POISON


@dataclass(frozen=True)
class Limits:
    """What bounds a store.

    Attributes:
        capacity: bytes of the file, in whole blocks.
        backlog_bytes: bytes of tensors held because they are not written yet.
        ahead_bytes: bytes of tensors that were prefetched and not taken yet.
        release_in_caller: whether written tensors are let go of in a caller's thread.
    """

    capacity: int
    backlog_bytes: int
    ahead_bytes: int
    release_in_caller: bool


class Books:
    """The state of all tensors of a store. Every method needs the engine's lock."""

    def __init__(self, limits: Limits, poison: bool) -> None:
        self.limits, self.poison = limits, poison
        self.extents = Extents(limits.capacity)
        self.queues = Queues()
        self.stats = Stats()
        self.live: set[Record] = set()
        self.orphans: deque[Record] = deque()  # of tickets that nobody holds
        self.held = dict.fromkeys(Charge, 0)  # bytes
        self.failure: Failure | None = None  # the first failed write
        self.outgoing = 0  # records in phase OUT
        self.dying = 0  # dropped while a thread is at work on them
        self._written: list[Record] = []  # their sources wait for a caller to let go of them
        self._wanted: deque[Record] = deque()  # prefetches that wait for room

    def count(self, **more: float) -> None:
        """Add to the counts."""
        self.stats = replace(self.stats, **{name: getattr(self.stats, name) + n for name, n in more.items()})

    # out

    def goes_through(self, record: Record) -> bool:
        """Whether a tensor is larger than the backlog may be: then `put` writes it, and it stays the caller's."""
        return record.weight > self.limits.backlog_bytes

    def has_room(self, record: Record) -> bool:
        """Whether the backlog takes a tensor."""
        return self.goes_through(record) or self.held[Charge.BACKLOG] + record.weight <= self.limits.backlog_bytes

    def place(self, record: Record) -> bool:
        """Give a tensor its place in the file and queue its write; False if there is no place."""
        extents = self.extents.allocate(record.nbytes)
        if extents is None:
            return False
        record.lay_out(extents)
        self.live.add(record)
        if not record.parts:  # of zero bytes
            record.phase = Phase.DISK
            self._release(record)
            return True
        if not self.goes_through(record):
            self._charge(record, Charge.BACKLOG)
        self.outgoing += 1
        self.queues.push(record, OUT)
        return True

    # back

    def want(self, record: Record) -> None:
        """Prefetch a tensor, now or when there is room."""
        if self._is_away(record) and record.parts and not (record.keep or record.wanted):
            record.asked = record.wanted = True
            self._wanted.append(record)
            self.start_wanted()

    @staticmethod
    def _is_away(record: Record) -> bool:
        return record.phase in (Phase.OUT, Phase.DISK) and not record.failure  # a failure is for `get` to tell

    def start_wanted(self) -> bool:
        """Start prefetches that there is room for, in order; those that can never fit are left to `get`.

        Returns whether there is a read to do.
        """
        found = False
        while self._wanted:
            record = self._wanted[0]
            needed = record.weight if record.held is not None else record.nbytes
            if record.wanted and self._is_away(record) and needed <= self.limits.ahead_bytes:
                if self.held[Charge.AHEAD] + needed > self.limits.ahead_bytes:
                    break
                if record.held is None:
                    self.read(record, AHEAD)
                    found = True
                else:  # what is in memory stays there
                    self._charge(record, Charge.AHEAD)
                    record.keep = record.phase is Phase.OUT
                    record.phase = Phase.OUT if record.keep else Phase.READY
            record.wanted = False
            self._wanted.popleft()
        return found

    def read(self, record: Record, level: int) -> None:
        """Queue the read of a tensor that is on disk only."""
        assert record.held is None
        target = torch.empty(record.nbytes, dtype=torch.uint8, device="cpu")
        record.hold(target, original=False)
        if self.poison and record.array is not None:
            record.array.fill(POISON)
        record.phase = Phase.IN
        self._charge(record, Charge.AHEAD)
        self.queues.push(record, level)

    def take_failure(self, record: Record) -> Failure:
        """What went wrong with a tensor. Of a read only once, and with what was read: the next `get` tries again."""
        failure = record.failure
        assert failure is not None
        if record.phase is Phase.DISK:
            record.failure = None
            self._release(record)
        return failure

    def forget_source(self, record: Record) -> None:
        """A source that is written, and has been modified in place since then, is not what was put: it is read back."""
        record.phase, record.keep = Phase.DISK, False
        self._release(record)

    def hand_out(self, record: Record) -> Tensor:
        """Return what is held. It is the caller's from now on, but for a source that is still being written."""
        tensor = record.held
        assert tensor is not None
        record.asked = record.wanted = record.keep = False
        if record.original:
            self.count(forwarded_bytes=record.nbytes)
        if record.phase in (Phase.READY, Phase.DISK):
            record.phase = Phase.DISK
            record.held = None  # so that it is not poisoned
            self._release(record)
        return tensor

    # done

    def finish(self, record: Record, moved: int, failure: Failure | None) -> None:
        """A thread is done with a part, of which it moved so many bytes."""
        record.left -= 1
        if record.phase is Phase.OUT and record.was_written_to:
            record.modified = True
        record.failure = record.failure or failure
        if record.phase is Phase.OUT:
            self.count(bytes_written=moved)
            self.failure = self.failure or failure
        else:
            self.count(bytes_read=moved)
        if not record.left:
            self._finish_all(record)

    def _finish_all(self, record: Record) -> None:
        out, failed = record.phase is Phase.OUT, record.failure is not None
        self.outgoing -= 1 if out else 0
        if record.dropped:
            self.dying -= 1
            self._bury(record)
        elif out and failed:
            record.phase = Phase.FAILED
        elif out:
            self.count(writes=1)
            record.phase = Phase.READY if record.keep else Phase.DISK
        else:
            self.count(reads=0 if failed else 1)
            record.phase = Phase.DISK if failed else Phase.READY
        if record.dropped or record.phase is Phase.DISK:
            record.keep = False
            if self.limits.release_in_caller:
                self._written.append(record)
            else:
                self._release(record)

    def drop(self, record: Record) -> None:
        """Free what a tensor has; when its threads are done with it, if there are any."""
        record.dropped, record.wanted = True, False
        self.live.discard(record)
        self.queues.cancel(record)
        if record.left:
            self.dying += 1
            return
        self.outgoing -= 1 if record.phase is Phase.OUT else 0
        self._bury(record)
        self._release(record)

    def _bury(self, record: Record) -> None:
        self.extents.free(record.extents)
        record.extents = ()

    def reap(self, spared: Record | None = None) -> None:
        """Drop orphans, and let go of what has been written, but for what `spared` holds: it is about to be asked for."""
        while self.orphans:
            record = self.orphans.popleft()
            if not record.dropped:
                self.drop(record)
        if self._written:
            written, self._written = self._written, []
            for record in written:
                if record is spared and not record.dropped:
                    self._written.append(record)
                elif record.dropped or record.phase is Phase.DISK:  # else it was prefetched again
                    self._release(record)

    def clear(self) -> None:
        """Let go of everything."""
        self.queues.clear()
        for record in (*self.live, *self._written):
            self._release(record)
        self.live.clear()
        self._written.clear()
        self._wanted.clear()

    def _charge(self, record: Record, charge: Charge) -> None:
        self.held[record.charge] -= record.weight
        self.held[charge] += record.weight
        record.charge = charge

    def _release(self, record: Record) -> None:
        if self.poison and not record.original and record.held is not None and record.array is not None:
            record.array.fill(POISON)
        self._charge(record, Charge.NONE)
        record.held = record.array = None
