"""`HostStore`: the arguments, checks and words around a `HostEngine`."""

from __future__ import annotations

import os
import weakref

import torch
from torch import Tensor, UntypedStorage

from ullage._bytes import format_bytes
from ullage._errors import ArgumentError
from ullage.offload._arguments import flat_source, size_of, whole_size
from ullage.offload._facts import Stats
from ullage.offload._host_engine import HostEngine
from ullage.offload._ledger import Limits
from ullage.offload._link import CudaLink, Link
from ullage.offload._opened import EngineTicket, OpenedStore
from ullage.offload._protocol import Store, Ticket

MIB = 2**20


class HostTicket(EngineTicket):
    """A `Ticket` of a `HostStore`. In `get` the current stream waits, the host does not; `late` is called in a later call of the store's.

    No write fails here but with the device, so `recover` always raises.
    """

    __slots__ = ()


class HostStore(OpenedStore):
    """Holds tensors of a CUDA device in pinned host memory of fixed size, taken when the store is made.

    ```
    with HostStore("64GiB", device="cuda") as store:
        ticket = store.put(activation.untyped_storage())  # returns at once
        del activation
        ...
        ticket.prefetch()
        ...
        data = ticket.get()  # flat uint8 on the device; the current stream waits for it
        ticket.drop()
    ```

    A tensor is read in the order of the stream that is current at `put`, as by a kernel there. Until the ticket is dropped, other
    streams must wait for that stream, once the tensor is copied, before they write to it; such writes are not noticed.

    Args:
        capacity: bytes of host memory, a number or a text such as "64GiB". Each tensor takes whole blocks of 4 KiB; it fits if
            their sum does.
        device: the CUDA device whose tensors are put.
        backlog_bytes: bytes of tensors that are held because they are not copied yet. While there is no room for another, `put`
            makes the current stream wait for the oldest. A larger tensor it copies before it returns; with 0, every tensor.
        ahead_bytes: bytes that `prefetch` may bring back before `get` takes them.
        poison: for tests: places that are free, and new tensors before they are filled, hold 0xA5, so that a race shows.
        link: the link that copies; None for CUDA's streams.

    Attributes:
        capacity: as given, in whole blocks.
        device: as given, with its index.
        notes: sentences for the user about the memory.

    Raises:
        ArgumentError: a size that means nothing, or a device that is not the link's.
        DeviceError: not a CUDA device, or there is none.
        OffloadError: the host has not that much memory, or it can't be pinned.
    """

    _engine: HostEngine

    def __init__(
        self,
        capacity: int | str,
        *,
        device: torch.device | str,
        backlog_bytes: int | str = 256 * MIB,
        ahead_bytes: int | str = 256 * MIB,
        poison: bool = False,
        link: Link | None = None,
    ) -> None:
        room = size_of("backlog_bytes", backlog_bytes), size_of("ahead_bytes", ahead_bytes)
        wanted = whole_size("capacity", capacity)
        if link is None:
            link = CudaLink(device)
        elif torch.device(device) != link.device:
            raise ArgumentError(f"device={str(device)!r}: the link is to {link.device}")
        limits = Limits(wanted, *room, round_bytes=link.round_bytes)
        self._engine = HostEngine(link, limits, poison)
        self.capacity, self.device = limits.capacity, link.device
        self.notes = _notes(self.capacity)
        self._finalizer = weakref.finalize(self, self._engine.close)  # also when the interpreter exits

    def takes(self, device: torch.device) -> bool:
        """See `Store.takes`."""
        return device == self.device

    def put(self, source: Tensor | UntypedStorage) -> HostTicket:
        """Start to copy a tensor out; the current stream waits while the backlog is full.

        Args:
            source: flat contiguous uint8 tensor on the store's device, or a storage there. The whole storage counts as held
                until it is copied. It must not be written to before the ticket is dropped.

        Raises:
            ArgumentError: not such a tensor.
            OffloadError: no place in the store; closed; or this is a fork.
        """
        return HostTicket(self, self._engine.put(flat_source(source, self.device)))

    def flush(self) -> None:
        """See `Store.flush`. The host waits here, also for streams that wait: then `stats` is whole."""
        self._engine.flush()

    def wait_until_resident_at_most(self, nbytes: int) -> bool:
        """See `Store.wait_until_resident_at_most`. Streams wait, the host does not."""
        return self._engine.wait_at_most(nbytes)

    @property
    def get_blocks(self) -> bool:
        """See `Store.get_blocks`."""
        return False

    @property
    def staging_bytes(self) -> int:
        """0: nothing is there all the time."""
        return 0

    @property
    def stats(self) -> Stats:
        """Counts since the store was opened. Copies count when they are queued, waits when they are over."""
        return self._engine.stats

    def close(self) -> None:
        """Wait for the copies under way, drop all tensors, free the memory. Tickets can't be used after it."""
        self._finalizer()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.tickets} tensors, {format_bytes(self.free_bytes)} free"
        return f"<HostStore of {self.device}, {format_bytes(self.capacity)}: {state}>"


def _notes(capacity: int) -> tuple[str, ...]:
    """Warnings about so much memory that can't be swapped out."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if capacity <= there // 2:
        return ()
    return (f"{format_bytes(capacity)} of this machine's {format_bytes(there)} are locked until the store is closed",)


def _as_protocols(store: HostStore, ticket: HostTicket) -> tuple[Store, Ticket]:
    """For the type checker: they are what the protocols say."""
    return store, ticket
