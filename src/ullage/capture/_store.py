"""The store of a captured step: it frees an offloaded tensor at once, and brings it back when it is asked for.

A real store also holds tensors on their way, bounded by its backlog and read-ahead; the planner adds those bounds. The moment of
each transfer is recorded, so that its time can be simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, UntypedStorage

from ullage._errors import OffloadError
from ullage.offload import Stats


@dataclass(frozen=True)
class Transfer:
    """One storage is offloaded or brought back.

    Attributes:
        op: index of the next op.
        ticket: number of the storage, the same for both ways.
        nbytes: its bytes.
        out: it is offloaded.
        modules: the running modules, outermost first.
    """

    op: int
    ticket: int
    nbytes: int
    out: bool
    modules: tuple[str, ...]


class _CapturedTicket:
    """A ticket of a `CapturedStore`."""

    def __init__(self, store: CapturedStore, number: int, source: Tensor) -> None:
        self._store, self._number = store, number
        self.nbytes = source.numel()
        self._device = source.device

    def prefetch(self) -> None:
        """Do nothing: the simulation decides when a prefetch starts."""

    def get(self, late: Callable[[], None] | None = None) -> Tensor:
        """Return a new tensor, as a read would make."""
        self._store.note(self._number, self.nbytes, out=False)
        return torch.empty(self.nbytes, dtype=torch.uint8, device=self._device)

    def recover(self) -> Tensor:
        """Raise: no write fails here, so there is nothing to recover. See `Ticket.recover`."""
        raise OffloadError("a captured store: nothing to recover: no write fails there")

    def drop(self) -> None:
        """Free its place."""
        self._store.note_drop(self._number)

    def __del__(self) -> None:
        self._store.note_drop(self._number)


class CapturedStore:
    """The store of a captured step, see above.

    Args:
        now: returns the index of the next op, and the running modules.
        device: type of the device that tensors are offloaded from.
    """

    get_blocks, resident_bytes, staging_bytes = False, 0, 0
    stats = Stats()

    def __init__(self, now: Callable[[], tuple[int, tuple[str, ...]]], device: str) -> None:
        self.transfers: list[Transfer] = []
        self.dropped: dict[int, int] = {}  # by ticket, the op that came next
        self._now, self._device, self._tickets = now, device, 0

    def note(self, ticket: int, nbytes: int, out: bool) -> None:
        """Record a transfer."""
        op, modules = self._now()
        self.transfers.append(Transfer(op, ticket, nbytes, out, modules))

    def note_drop(self, ticket: int) -> None:
        """Record that a place is free."""
        self.dropped.setdefault(ticket, self._now()[0])

    def takes(self, device: torch.device) -> bool:
        """Return True for tensors of the device that the step runs on."""
        return device.type == self._device

    def put(self, source: Tensor | UntypedStorage) -> _CapturedTicket:
        """Offload a tensor: note it, and hold nothing of it."""
        assert isinstance(source, Tensor)
        self._tickets += 1
        ticket = _CapturedTicket(self, self._tickets, source)
        self.note(self._tickets, ticket.nbytes, out=True)
        return ticket

    def poll(self) -> None:
        """Nothing is held."""

    def flush(self) -> None:
        """Nothing is held."""

    def wait_until_resident_at_most(self, nbytes: int) -> bool:
        """Nothing is held."""
        return True

    def close(self) -> None:
        """Nothing is held."""
