"""`DiskStore`: the arguments, checks and words around an `Engine`."""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from pathlib import Path

import torch
from torch import Tensor, UntypedStorage

from ullage._bytes import format_bytes
from ullage._errors import ArgumentError, DeviceError, UllageWarning
from ullage.offload._arguments import flat_source, size_of, whole_size
from ullage.offload._checksum import checksum_maker
from ullage.offload._engine import Engine
from ullage.offload._facts import Stats
from ullage.offload._file import open_file
from ullage.offload._ledger import Limits
from ullage.offload._link import CudaLink, Link
from ullage.offload._memory import DeviceMemory, HostMemory, Memory
from ullage.offload._opened import EngineTicket, OpenedStore
from ullage.offload._protocol import Store, Ticket
from ullage.offload._record import Mover
from ullage.offload._staging import Staging

MIB = 2**20


class DiskTicket(EngineTicket):
    """A `Ticket` of a `DiskStore`. What `get` returns the current stream may use at once; `late` is called before it returns."""

    __slots__ = ()


class DiskStore(OpenedStore):
    """Holds tensors of the CPU or of a CUDA device in one nameless file of fixed size, which vanishes with the process.

    ```
    with DiskStore("/scratch", "64GiB") as store:
        ticket = store.put(activation.untyped_storage())  # returns at once, unless the backlog is full
        del activation
        ...
        ticket.prefetch()
        ...
        data = ticket.get()  # flat uint8: data.view(dtype).as_strided(shape, strides, offset)
        ticket.drop()
    ```

    A tensor of a device is read in the order of the stream that is current at `put`, as by a kernel there, and handed to the
    stream that is current at `get`. The host waits, in `put` and `get`; no stream does.

    Args:
        directory: where the file is made; it must be there.
        capacity: bytes of the file, a number or a text such as "64GiB"; taken from the filesystem at once. Each tensor
            takes whole blocks of 4 KiB; it fits if their sum does.
        checksums: compare the bytes read with those written; XXH3 if `xxhash` is installed, else CRC-32.
        threads: number of threads that transfer.
        poison: for tests: buffers that are free, and new ones before they are filled, hold 0xA5, so that a race shows.
        backlog_bytes: bytes of tensors that are held because they are not written yet; `put` waits while there is no
            room. A larger tensor is written before `put` returns; with 0, every one.
        ahead_bytes: bytes that `prefetch` may bring back before `get` takes them.
        release_in_caller: release a written tensor at the next call by the caller (`put`, `get`, `poll`, ...), in its
            thread, so that allocation records of that thread are whole; else at once, in a thread of the store.
        buffer_bytes: bytes of the staging buffer of each thread, and so of the largest transfer. Of the host's memory; pinned
            for a CUDA device.
        device: the device of the tensors: the CPU or a CUDA device.
        link: the link that copies to and from a device; None for CUDA's streams, or for the CPU.

    Attributes:
        directory, capacity: as given, the capacity in whole blocks.
        device: as given, with its index.
        direct: whether transfers bypass the page cache.
        notes: sentences for the user about the file.

    Raises:
        ArgumentError: a size or number that means nothing, or a device that is not the link's.
        DeviceError: neither the CPU nor a CUDA device, or there is none.
        OffloadError: the directory is missing, not a directory, not writable, or has too little space; or staging buffers can't be
            pinned.
    """

    _engine: Engine

    def __init__(
        self,
        directory: str | Path,
        capacity: int | str,
        *,
        checksums: bool = False,
        threads: int = 2,
        poison: bool = False,
        backlog_bytes: int | str = 256 * MIB,
        ahead_bytes: int | str = 256 * MIB,
        release_in_caller: bool = True,
        buffer_bytes: int | str = 2 * MIB,
        device: torch.device | str = "cpu",
        link: Link | None = None,
    ) -> None:
        memory = _memory_of(device, link)
        limits = Limits(
            whole_size("capacity", capacity),
            size_of("backlog_bytes", backlog_bytes),
            size_of("ahead_bytes", ahead_bytes),
            release_in_caller,
            memory.link.round_bytes if memory.link is not None else 1,
            threads,
        )
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise ArgumentError(f"threads={threads!r}: must be a whole number above zero")
        size = whole_size("buffer_bytes", buffer_bytes)
        with contextlib.ExitStack() as undo:
            staging = Staging(threads, size, memory.link)
            undo.callback(staging.close)
            file = open_file(os.fspath(directory), limits.capacity, staging.buffers[0])
            undo.callback(os.close, file.fd)
            self._engine = Engine(Mover(file, checksum_maker() if checksums else None, poison), staging, limits, memory)
            undo.pop_all()
        self.directory, self.capacity, self.device = file.directory, file.capacity, memory.device
        self.direct, self.notes = file.direct, file.notes
        self._finalizer = weakref.finalize(self, self._engine.close)  # also when the interpreter exits

    def takes(self, device: torch.device) -> bool:
        """See `Store.takes`."""
        return device == self.device

    def put(self, source: Tensor | UntypedStorage) -> DiskTicket:
        """Start to write a tensor; waits while the backlog is full.

        Args:
            source: flat contiguous uint8 tensor on the store's device, or a storage there. The whole storage counts as held
                until it is written. It must not be written to before the ticket is dropped.

        Raises:
            ArgumentError: not such a tensor.
            OffloadError: no place in the file; a write failed before; closed; or this is a fork.
        """
        return DiskTicket(self, self._engine.put(flat_source(source, self.device)))

    def flush(self) -> None:
        """See `Store.flush`.

        Raises:
            OffloadError: a write failed.
        """
        self._engine.flush()

    def wait_until_resident_at_most(self, nbytes: int) -> bool:
        """See `Store.wait_until_resident_at_most`; `nbytes` includes `staging_bytes`.

        Raises:
            OffloadError: a write failed.
        """
        return self._engine.wait_at_most(nbytes)

    @property
    def get_blocks(self) -> bool:
        """See `Store.get_blocks`."""
        return True

    @property
    def staging_bytes(self) -> int:
        """The part of `resident_bytes` that is there all the time: on the CPU, mapped pages, not from torch's allocator.

        0 for a CUDA device: the buffers are in the host's memory, `threads` x `buffer_bytes` of it, pinned.
        """
        return self._engine.staging_bytes

    @property
    def stats(self) -> Stats:
        """Counts since the store was opened."""
        return self._engine.books.stats

    def close(self) -> None:
        """Wait for the transfers under way, drop all tensors, free the file. Tickets can't be used after it."""
        self._finalizer()
        failure = self._engine.books.failure
        if failure and not self._engine.failure_said:
            self._engine.failure_said = True
            text = f"offload store in {self.directory}: a tensor of {failure.nbytes} bytes could not be written: {failure.cause}"
            warnings.warn(f"{text}; it was not asked for, so no result is wrong", UllageWarning, stacklevel=2)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.tickets} tensors, {format_bytes(self.free_bytes)} free"
        return f"<DiskStore in {self.directory}, {format_bytes(self.capacity)}: {state}>"


def _memory_of(device: torch.device | str, link: Link | None) -> Memory:
    """The memory of a device, checked."""
    given = torch.device(device)
    if link is not None:
        if given != link.device:
            raise ArgumentError(f"device={str(device)!r}: the link is to {link.device}")
        return DeviceMemory(link)
    if given.type == "cpu":
        return HostMemory()
    if given.type != "cuda":
        raise DeviceError(f"device={str(given)!r}: tensors of the CPU or of a CUDA device go to disk; give one of them")
    return DeviceMemory(CudaLink(given))


def _as_protocols(store: DiskStore, ticket: DiskTicket) -> tuple[Store, Ticket]:
    """For the type checker: they are what the protocols say."""
    return store, ticket
