"""Protocols of a store of offloaded tensors and of its tickets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, UntypedStorage

from ullage.offload._facts import Stats


class Ticket(Protocol):
    """One tensor that a store holds, from `put` to `drop`. A ticket that nobody holds any more is dropped."""

    @property
    def nbytes(self) -> int:
        """Its bytes."""

    def prefetch(self) -> None:
        """Start to bring the tensor back before it is asked for; returns at once.

        Read-ahead is bounded: a read that does not fit starts, in order, when `get` has taken or `drop` has freed other tensors.
        `get` raises an error of the read.
        """

    def get(self, late: Callable[[], None] | None = None) -> Tensor:
        """Return the bytes, flat uint8; waits until they are there.

        While the original is still in memory, it is returned itself; otherwise a new tensor that belongs to the caller. May
        be called again until `drop`; each call without a prefetch reads again.

        Args:
            late: called, now or later, if the caller had to wait though the tensor was asked for ahead.

        Raises:
            OffloadError: the bytes could not be written or read back as they were, or the ticket was dropped.
        """

    def recover(self) -> Tensor:
        """Return the original after a failed write, which is kept until `drop`.

        Raises:
            OffloadError: no write of this ticket failed.
        """

    def drop(self) -> None:
        """Free its place. Parts that are not written yet are never written. May be called twice."""


class Store(Protocol):
    """Holds tensors outside of the memory that is short. Safe for threads."""

    def takes(self, device: torch.device) -> bool:
        """Whether tensors on a device can be put."""

    def put(self, source: Tensor | UntypedStorage) -> Ticket:
        """Take a tensor: flat contiguous uint8 on the store's device, or a storage; it must not be written to until `drop`."""

    def poll(self) -> None:
        """Release tensors that have been written. Cheap."""

    def flush(self) -> None:
        """Wait until every tensor that was put is written, and release it."""

    def wait_until_resident_at_most(self, nbytes: int) -> bool:
        """Wait for writes until `resident_bytes` is at most `nbytes`; return False if the remaining writes can't free enough."""

    @property
    def get_blocks(self) -> bool:
        """Does the thread that calls `get` wait in it? If not, reads run in the order of the calls: `get` first what is needed now."""

    @property
    def resident_bytes(self) -> int:
        """Bytes of memory that the store holds."""

    @property
    def staging_bytes(self) -> int:
        """The part of `resident_bytes` that is there all the time: the staging buffers."""

    @property
    def stats(self) -> Stats:
        """Counts since the store was opened."""

    def close(self) -> None:
        """Wait for transfers under way and give everything back. May be called twice."""
