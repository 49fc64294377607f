"""An engine's record of one tensor, and the moving of its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
from torch import Tensor

from ullage.offload._checksum import Checksum
from ullage.offload._extents import Extent, whole_blocks
from ullage.offload._file import StoreFile, TransferError, read_all, write_all
from ullage.offload._held import POISON, Held, Part

PART_BYTES = 8 * 2**20  # parts of one tensor go to different threads; small enough to break off between two
SPLIT_BYTES = 2**19  # no part is smaller for the threads' sake: waking one takes as long as moving some 100 KiB


class Phase(Enum):
    """A tensor's place."""

    OUT = "on its way out"  # its source is held
    AWAY = "in the store"  # nothing is held, except a source that the caller has yet to release
    IN = "on its way in"  # its target is held
    READY = "in memory"  # held and whole, and in the store too
    FAILED = "not written"  # its source is held


class Charge(Enum):
    """The account that a held tensor is counted in."""

    NONE = "nothing"
    BACKLOG = "waiting to be written"
    AHEAD = "read ahead"


@dataclass(frozen=True)
class Failure:
    """An error of a transfer, without the exception: that would hold frames, and so tensors."""

    action: str
    nbytes: int
    cause: str
    hint: str


class Record:
    """The state of one ticket; only the engine touches it, under its lock."""

    def __init__(self, source: Tensor) -> None:
        self.nbytes = source.numel()
        self.phase = Phase.OUT
        self.extents: tuple[Extent, ...] = ()
        self.parts: tuple[Part, ...] = ()
        self.failure: Failure | None = None
        self.held: Tensor | None = None
        self.original = True  # `held` is the tensor that was put
        self.weight = 0  # bytes of the storage of `held`
        self.version = source._version
        self.modified = False  # in place, before it was written
        self.charge = Charge.NONE
        self.keep = False  # prefetched while on its way out: stays in memory once written
        self.asked = False  # prefetched since the last get
        self.wanted = False  # prefetched, and waits for room
        self.dropped = False
        self.hold(source, original=True)

    @property
    def was_written_to(self) -> bool:
        """Whether the source has been modified in place since it was put."""
        return self.original and self.held is not None and self.held._version != self.version

    def hold(self, tensor: Tensor, original: bool) -> None:
        """Keep a tensor alive."""
        self.held, self.original = tensor, original
        self.weight = tensor.untyped_storage().nbytes()

    def lay_out(self, extents: tuple[Extent, ...], most: int) -> None:
        """Cut the tensor into parts of at most `most` bytes, in whole blocks, each in one extent."""
        parts, start = [], 0
        for extent in extents:
            for offset in range(extent.offset, extent.end, most):
                length = min(most, extent.end - offset, self.nbytes - start)
                parts.append(Part(offset, start, length))
                start += length
        self.extents, self.parts = extents, tuple(parts)


class FileRecord(Record):
    """One whose parts threads move."""

    def __init__(self, source: Held) -> None:
        self.memory: Held | None = source  # that of `held`
        self.sums: list[int] = []
        self.left = 0  # parts that are queued or under way
        super().__init__(source.tensor)

    @property
    def is_here(self) -> bool:
        """Whether `held` is the tensor, whole. After a failed read there is a target, which is not."""
        return self.phase in (Phase.OUT, Phase.READY) or (
            self.phase is Phase.AWAY and self.held is not None and self.original
        )

    def hold_target(self, target: Held) -> None:
        """Keep a tensor alive that is about to be read."""
        self.memory = target
        self.hold(target.tensor, original=False)


@dataclass(frozen=True)
class Mover:
    """Moves parts between memory and file, through a staging buffer.

    Attributes:
        file: the file.
        checksum: makes checksums; None for none.
        poison: overwrite the staging buffer once it has been used.
    """

    file: StoreFile
    checksum: Callable[[], Checksum] | None
    poison: bool

    def write(self, source: Held, part: Part, staging: np.ndarray) -> int:
        """Write a part of a tensor; return its checksum, 0 without."""
        found = self.checksum() if self.checksum else None
        for at in range(0, part.length, len(staging)):
            n = min(len(staging), part.length - at)
            padded = staging[: whole_blocks(n)]
            source.copy_out(part.start + at, padded[:n])
            padded[n:] = 0
            if found:
                found.update(padded[:n])
            write_all(self.file, padded, part.offset + at)
            if self.poison:
                padded.fill(POISON)
        return found.intdigest() if found else 0

    def read(self, target: Held, part: Part, staging: np.ndarray, expected: int) -> None:
        """Read a part into a tensor and compare its checksum, if there is one."""
        found = self.checksum() if self.checksum else None
        for at in range(0, part.length, len(staging)):
            n = min(len(staging), part.length - at)
            padded = staging[: whole_blocks(n)]
            read_all(self.file, padded, part.offset + at)
            if found:
                found.update(padded[:n])
            target.copy_in(padded[:n], part.start + at)
            if self.poison:
                padded.fill(POISON)
        if found and found.intdigest() != expected:
            cause = f"checksum mismatch in {part.length} bytes at offset {part.offset}: they are not what was written"
            raise TransferError(cause, "test the drive and the memory of this machine, use another drive")
