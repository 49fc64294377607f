"""Copies between a device and pinned host memory, in the order that streams give.

`CudaLink` has one stream out and one stream in. Nothing here waits for the device but `synchronize`, `drain` and `unpin`.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ullage._bytes import format_bytes
from ullage._errors import DeviceError, OffloadError
from ullage.offload._held import Part

Stream = Any  # compared and hashed, else opaque
Event = Any  # opaque

_POISON_BYTES = 2**20  # of a device's memory, for tests only: what poison of the slab is copied from


class Link(Protocol):
    """Copies in streams of its own: those out run one after the other in the order of the calls, and so do those in.

    Safe for threads: what several queue at once runs in some order, each copy after its own events, and the event it returns after it.
    """

    @property
    def device(self) -> torch.device:
        """The device, with its index."""

    @property
    def round_bytes(self) -> int:
        """Bytes that the device's allocator rounds a tensor up to."""

    def pin(self, nbytes: int, lower: str = "the capacity") -> Tensor:
        """Return pinned host memory: flat uint8, page-aligned. `lower`: the argument that an error tells the caller to lower.

        Raises:
            OffloadError: there is not that much, or it can't be pinned.
        """

    def unpin(self, slab: Tensor) -> None:
        """Give it back; copies must be over."""

    def current(self) -> Stream:
        """The stream that ops on the device go to now, in this thread."""

    def empty(self, nbytes: int) -> Tensor:
        """A new flat uint8 tensor on the device, in the current stream's order: kernels queued there may still use its memory."""

    def fill(self, target: Tensor, value: int, stream: Stream) -> None:
        """Overwrite a tensor on the device, in a stream's order."""

    def mark(self, stream: Stream) -> Event:
        """Record an event in a stream: it is done when all work queued there so far is."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Have later work of a stream run after an event; the host goes on."""

    def share(self, tensor: Tensor, stream: Stream) -> None:
        """Use a tensor of another stream in this one: its memory is not reused before that is over."""

    def copy_out(self, source: Tensor, slab: Tensor, parts: Sequence[Part], after: Iterable[Event]) -> Event:
        """Queue a copy to the slab, after some events. `source` must be held until the event returned is done."""

    def copy_in(self, slab: Tensor, target: Tensor, parts: Sequence[Part], after: Iterable[Event]) -> Event:
        """Queue a copy from the slab, after some events. `target` must be held until the event returned is done."""

    def fill_slab(self, slab: Tensor, parts: Sequence[Part], value: int, after: Iterable[Event]) -> None:
        """Overwrite places of the slab, in the order of copies out, after some events."""

    def done(self, event: Event) -> bool:
        """Whether an event is done; does not wait."""

    def synchronize(self, event: Event) -> None:
        """Wait for an event, without the GIL."""

    def drain(self) -> None:
        """Wait for all copies."""

    def seconds_between(self, first: Event, second: Event) -> float | None:
        """How much later the second was done, below zero if it was earlier; None while not both are done."""


class CudaLink:
    """A `Link` to a CUDA device.

    Raises:
        DeviceError: not a CUDA device, or there is none.
    """

    round_bytes = 512  # kMinBlockSize of torch's caching allocator

    def __init__(self, device: torch.device | str) -> None:
        given = torch.device(device)
        if given.type != "cuda":
            why = (
                "memory is the host's there" if given.type == "cpu" else "pinned memory is there for CUDA devices only"
            )
            raise DeviceError(f"device={str(given)!r}: has no tier in host memory: {why}; give a CUDA device")
        if not torch.cuda.is_available():
            raise DeviceError(f"device={str(given)!r}: this process sees no CUDA device")
        index = torch.cuda.current_device() if given.index is None else given.index
        if index >= torch.cuda.device_count():
            raise DeviceError(f"device={str(given)!r}: this process sees {torch.cuda.device_count()} CUDA devices")
        self.device = torch.device("cuda", index)
        self._out, self._in = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        self._poison: Tensor | None = None

    def pin(self, nbytes: int, lower: str = "the capacity") -> Tensor:
        """See `Link.pin`. Not `pin_memory`: torch's allocator rounds up to powers of two, and keeps memory for itself.

        Pages are shared with child processes, which unmap them: private ones would be copied on the first write after
        a fork, and the device would go on with the old ones.
        """
        try:
            pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise _no_memory(nbytes, error.strerror or str(error), lower) from error
        slab = torch.frombuffer(pages, dtype=torch.uint8)  # holds the mapping, and unmaps it
        with torch.cuda.device(self.device):
            runtime = torch.cuda.cudart()
            code = runtime.cudaHostRegister(slab.data_ptr(), slab.numel(), 0)
            if code != runtime.cudaError.success:
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device=self.device)  # takes the error from CUDA, which the next kernel would report
                raise _no_memory(nbytes, f"CUDA can't pin it: {runtime.cudaGetErrorString(code)}", lower)
        return slab

    def unpin(self, slab: Tensor) -> None:
        """See `Link.unpin`."""
        with torch.cuda.device(self.device):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(slab.data_ptr()))

    def current(self) -> torch.cuda.Stream:
        """See `Link.current`. Autograd runs a node of backward with the stream of its forward."""
        return torch.cuda.current_stream(self.device)

    def empty(self, nbytes: int) -> Tensor:
        """See `Link.empty`."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def fill(self, target: Tensor, value: int, stream: torch.cuda.Stream) -> None:
        """See `Link.fill`."""
        with torch.cuda.stream(stream):
            target.fill_(value)

    def mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """See `Link.mark`. Blocking: who waits for it sleeps, as threads may do for long."""
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """See `Link.wait`."""
        stream.wait_event(event)

    def share(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        """See `Link.share`."""
        tensor.record_stream(stream)

    def copy_out(self, source: Tensor, slab: Tensor, parts: Sequence[Part], after: Iterable[Any]) -> torch.cuda.Event:
        """See `Link.copy_out`. To registered memory `copy_` is one cudaMemcpyAsync, and torch does not track its use."""
        with self._queued(self._out, after):
            for p in parts:
                to, part = slab[p.offset : p.offset + p.length], source[p.start : p.start + p.length]
                to.copy_(part, non_blocking=True)
        return self.mark(self._out)

    def copy_in(self, slab: Tensor, target: Tensor, parts: Sequence[Part], after: Iterable[Any]) -> torch.cuda.Event:
        """See `Link.copy_in`."""
        with self._queued(self._in, after):
            for p in parts:
                part, to = slab[p.offset : p.offset + p.length], target[p.start : p.start + p.length]
                to.copy_(part, non_blocking=True)
        return self.mark(self._in)

    def fill_slab(self, slab: Tensor, parts: Sequence[Part], value: int, after: Iterable[Any]) -> None:
        """See `Link.fill_slab`."""
        with self._queued(self._out, after):
            if self._poison is None:
                self._poison = torch.full((_POISON_BYTES,), value, dtype=torch.uint8, device=self.device)
            for p in parts:
                for at in range(p.offset, p.offset + p.length, _POISON_BYTES):
                    to = slab[at : min(at + _POISON_BYTES, p.offset + p.length)]
                    to.copy_(self._poison[: len(to)], non_blocking=True)

    @contextlib.contextmanager
    def _queued(self, stream: torch.cuda.Stream, after: Iterable[Any]) -> Any:
        for event in after:
            stream.wait_event(event)
        with torch.no_grad(), torch.cuda.stream(stream):
            yield

    def done(self, event: torch.cuda.Event) -> bool:
        """See `Link.done`."""
        return bool(event.query())

    def synchronize(self, event: torch.cuda.Event) -> None:
        """See `Link.synchronize`."""
        event.synchronize()

    def drain(self) -> None:
        """See `Link.drain`."""
        self._out.synchronize()
        self._in.synchronize()

    def seconds_between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float | None:
        """See `Link.seconds_between`."""
        return first.elapsed_time(second) / 1e3 if first.query() and second.query() else None


def _no_memory(nbytes: int, cause: str, lower: str) -> OffloadError:
    size = f"{format_bytes(nbytes)} ({nbytes} bytes)"
    hint = f"lower {lower}, free memory of the host, or raise what a container may lock or use"
    return OffloadError(f"offload store: can't have {size} pinned: {cause}; {hint}", nbytes=nbytes)


def _as_protocol(link: CudaLink) -> Link:
    """For the type checker: it is what the protocol says."""
    return link
