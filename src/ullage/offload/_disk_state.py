"""State of a store on disk: its tensors and their places, without threads, locks or waiting (`_engine` adds those)."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ullage.offload import _record
from ullage.offload._extents import whole_blocks
from ullage.offload._ledger import Ledger, Limits
from ullage.offload._memory import Memory
from ullage.offload._queues import AHEAD, OUT, Queues
from ullage.offload._record import Charge, Failure, FileRecord, Phase


class Books(Ledger[FileRecord]):
    """The state of all tensors of a store on disk. Every method needs the engine's lock."""

    def __init__(self, limits: Limits, poison: bool, memory: Memory) -> None:
        super().__init__(limits, poison)
        self.memory = memory
        self.queues = Queues()
        self.failure: Failure | None = None  # the first failed write
        self.outgoing = 0  # records in phase OUT
        self.dying = 0  # dropped while a thread is at work on them
        self._written: list[FileRecord] = []  # their sources wait for a caller to release them

    def place(self, record: FileRecord) -> bool:
        """Give a tensor its place in the file and queue its write; False if there is no place."""
        extents = self.extents.allocate(record.nbytes)
        if extents is None:
            return False
        record.lay_out(extents, self._part_bytes(record.nbytes))
        record.sums = [0] * len(record.parts)
        self.live.add(record)
        if not record.parts:  # of zero bytes
            record.phase = Phase.AWAY
            self._release(record)
            return True
        if not self.goes_through(record):
            self._charge(record, Charge.BACKLOG)
        self.outgoing += 1
        self.queues.push(record, OUT)
        return True

    def _part_bytes(self, nbytes: int) -> int:
        """Bytes of a part of a tensor, so small that all threads work on a tensor that is waited for."""
        share = whole_blocks(-(-nbytes // self.limits.threads))
        return min(max(share, _record.SPLIT_BYTES), _record.PART_BYTES)

    # back

    def read_ahead(self, record: FileRecord) -> None:
        """See `Ledger.read_ahead`. If the device has no memory for it, it is left to `get`."""
        with contextlib.suppress(torch.OutOfMemoryError):
            self.read(record, AHEAD)

    def read(self, record: FileRecord, level: int) -> None:
        """Queue the read of a tensor that is on disk only.

        Raises:
            torch.OutOfMemoryError: the device has no memory for it.
        """
        assert record.held is None
        target = self.memory.new(record.nbytes)
        if self.poison:
            target.poison()
        record.hold_target(target)
        record.phase = Phase.IN
        self._charge(record, Charge.AHEAD)
        self.queues.push(record, level)

    def take_failure(self, record: FileRecord) -> Failure:
        """Return a tensor's failure. That of a read is returned once, with the bytes read: the next `get` tries again."""
        failure = record.failure
        assert failure is not None
        if record.phase is Phase.AWAY:
            record.failure = None
            self._release(record)
        return failure

    def hand_out(self, record: FileRecord) -> Tensor:
        """See `Ledger.hand_out`; to the current stream."""
        assert record.memory is not None
        record.memory.hand_over()
        return super().hand_out(record)

    # done

    def finish(self, record: FileRecord, moved: int, failure: Failure | None) -> None:
        """Note that a thread has finished a part, and how many bytes of it moved."""
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

    def _finish_all(self, record: FileRecord) -> None:
        out, failed = record.phase is Phase.OUT, record.failure is not None
        self.outgoing -= 1 if out else 0
        if record.dropped:
            self.dying -= 1
            self._bury(record)
        elif out and failed:
            record.phase = Phase.FAILED
        elif out:
            self.count(writes=1)
            record.phase = Phase.READY if record.keep else Phase.AWAY
        else:
            self.count(reads=0 if failed else 1)
            record.phase = Phase.AWAY if failed else Phase.READY
        if record.dropped or record.phase is Phase.AWAY:
            record.keep = False
            if self.limits.release_in_caller:
                self._written.append(record)
            else:
                self._release(record)

    def drop(self, record: FileRecord) -> None:
        """Free a tensor's place and memory, at once or when the threads that work on it have finished."""
        record.dropped, record.wanted = True, False
        self.live.discard(record)
        self.queues.cancel(record)
        if record.left:
            self.dying += 1
            return
        self.outgoing -= 1 if record.phase is Phase.OUT else 0
        self._bury(record)
        self._release(record)

    def reap(self, spared: FileRecord | None = None) -> None:
        """Drop orphans, and release written sources, except `spared`, which is about to be read."""
        super().reap(spared)
        if self._written:
            written, self._written = self._written, []
            for record in written:
                if record is spared and not record.dropped:
                    self._written.append(record)
                elif record.dropped or record.phase is Phase.AWAY:  # else it was prefetched again
                    self._release(record)

    def clear(self) -> None:
        """Drop all tensors."""
        self.queues.clear()
        for record in (*self.live, *self._written):
            self._release(record)
        self.live.clear()
        self._written.clear()
        self._wanted.clear()

    def _release(self, record: FileRecord) -> None:
        if self.poison and not record.original and record.held is not None and record.memory is not None:
            # an error of the device, which the next transfer meets too, must not end the thread that may be here
            with contextlib.suppress(RuntimeError):
                record.memory.poison()
        super()._release(record)
        record.memory = None
