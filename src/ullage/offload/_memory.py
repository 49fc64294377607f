"""Copy tensors of a store on disk between their memory (the host's or a device's) and a staging buffer.

On a device, copies run in the two streams of a link, which all threads of the store share. Each copy waits for the event that its
tensor waits for, and a thread waits for the event after its own copy, without the GIL: copies that other threads queue in between make
that event later, never earlier. Because the thread waits before it goes on, a source is copied, and a target is whole for
every stream, once its parts are booked. The stream that allocated a tensor orders the reuse of its memory.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ullage._array import bytes_of
from ullage.offload._file import TransferError
from ullage.offload._held import POISON, Held, Part
from ullage.offload._link import Link


class Memory(Protocol):
    """The memory that a store's tensors are in."""

    @property
    def device(self) -> torch.device:
        """The device, with its index."""

    @property
    def link(self) -> Link | None:
        """Copies to and from a device; None for the host's memory."""

    def hold(self, tensor: Tensor) -> Held:
        """Hold a tensor in the state that work queued in the current stream leaves it in."""

    def new(self, nbytes: int) -> Held:
        """A new flat uint8 tensor, allocated in the current stream.

        Raises:
            torch.OutOfMemoryError: the device has no memory for it.
        """


class HeldOnHost:
    """A `Held` in the host's memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._array = tensor, bytes_of(tensor)

    def copy_out(self, start: int, staging: np.ndarray) -> None:
        """See `Held.copy_out`."""
        np.copyto(staging, self._array[start : start + len(staging)])

    def copy_in(self, staging: np.ndarray, start: int) -> None:
        """See `Held.copy_in`."""
        np.copyto(self._array[start : start + len(staging)], staging)

    def poison(self) -> None:
        """See `Held.poison`."""
        self._array.fill(POISON)

    def hand_over(self) -> None:
        """Nothing to do."""


class HostMemory:
    """The `Memory` of tensors on the CPU."""

    device = torch.device("cpu")
    link = None

    def hold(self, tensor: Tensor) -> Held:
        """See `Memory.hold`."""
        return HeldOnHost(tensor)

    def new(self, nbytes: int) -> Held:
        """See `Memory.new`."""
        return HeldOnHost(torch.empty(nbytes, dtype=torch.uint8, device="cpu"))


class HeldOnDevice:
    """A `Held` in a device's memory; copies of it run after the work that was queued in the current stream when it was made."""

    def __init__(self, tensor: Tensor, link: Link) -> None:
        self.tensor, self._link = tensor, link
        self._stream = link.current()
        self._born = link.mark(self._stream)

    def copy_out(self, start: int, staging: np.ndarray) -> None:
        """See `Held.copy_out`."""
        slab, part = torch.from_numpy(staging), Part(0, start, len(staging))
        try:
            self._link.synchronize(self._link.copy_out(self.tensor, slab, [part], [self._born]))
        except BaseException as error:
            raise self._given_up(error) from error

    def copy_in(self, staging: np.ndarray, start: int) -> None:
        """See `Held.copy_in`."""
        slab, part = torch.from_numpy(staging), Part(0, start, len(staging))
        try:
            self._link.synchronize(self._link.copy_in(slab, self.tensor, [part], [self._born]))
        except BaseException as error:
            raise self._given_up(error) from error

    def _given_up(self, error: BaseException) -> TransferError:
        """The error of a copy, which is over: the staging buffer has other uses, and the tensor is about to be released."""
        with contextlib.suppress(Exception):  # the first error is reported already
            self._link.drain()
        lines = str(error).splitlines() or [type(error).__name__]
        hint = "it may be of any kernel before: run with CUDA_LAUNCH_BLOCKING=1 to see which"
        return TransferError(f"{self._link.device} reports an error in a copy: {lines[0]}", hint)

    def poison(self) -> None:
        """See `Held.poison`."""
        self._link.fill(self.tensor, POISON, self._stream)
        self._born = self._link.mark(self._stream)

    def hand_over(self) -> None:
        """See `Held.hand_over`. Another stream waits for whoever wrote it, and its memory for that stream."""
        stream = self._link.current()
        if stream != self._stream:
            self._link.wait(stream, self._born)
            self._link.share(self.tensor, stream)


class DeviceMemory:
    """The `Memory` of tensors on a link's device."""

    def __init__(self, link: Link) -> None:
        self.link, self.device = link, link.device

    def hold(self, tensor: Tensor) -> Held:
        """See `Memory.hold`."""
        return HeldOnDevice(tensor, self.link)

    def new(self, nbytes: int) -> Held:
        """See `Memory.new`. No inference tensor, whatever mode the caller is in: threads that are in none write to it."""
        with torch.inference_mode(False):
            return HeldOnDevice(self.link.empty(nbytes), self.link)
