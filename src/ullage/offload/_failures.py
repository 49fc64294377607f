"""The errors of a store in use, in words: which store (a directory, or None for host memory), what happened, what to do."""

from __future__ import annotations

from ullage._bytes import format_bytes
from ullage._errors import OffloadError
from ullage.offload._extents import Extents, whole_blocks
from ullage.offload._record import Failure


def _store(directory: str | None) -> str:
    return f"offload store in {'host memory' if directory is None else directory}"


def refused(directory: str | None, why: str) -> OffloadError:
    """A call that the store can't take."""
    return OffloadError(f"{_store(directory)}: {why}", directory)


def failed(directory: str | None, failure: Failure) -> OffloadError:
    """A failed transfer."""
    text = f"could not {failure.action} a tensor of {failure.nbytes} bytes: {failure.cause}; {failure.hint}"
    if failure.action == "write":
        text += ". The tensor is still in memory (Ticket.recover), and nothing more is put into this store"
    return OffloadError(f"{_store(directory)}: {text}", directory, failure.nbytes)


def modified(directory: str | None, nbytes: int) -> OffloadError:
    """The error for a source that was written to too early."""
    text = f"a tensor of {nbytes} bytes was modified by an inplace operation before it was written; the plain step fails too"
    return OffloadError(
        f"{_store(directory)}: {text}, or put() was given a tensor that is still in use", directory, nbytes
    )


def full(directory: str | None, nbytes: int, extents: Extents) -> OffloadError:
    """No place for a tensor."""
    needed = f"a tensor of {nbytes} bytes needs {whole_blocks(nbytes)} bytes (blocks of 4 KiB)"
    there = f"{extents.free_bytes} are available of capacity={extents.capacity} ({format_bytes(extents.capacity)})"
    text = f"{_store(directory)}: {needed}, {there}; raise it, or drop tensors earlier; under a plan: plan again with the step as it runs"
    return OffloadError(text, directory, nbytes)
