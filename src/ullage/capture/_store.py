"""The store of a captured step: an offloaded tensor is gone at once, and brought back when it is asked for.

What a real store holds beside that, while tensors are on their way, is bounded by its backlog and read-ahead; the planner adds
those bounds. The moment of each transfer is recorded, so that its time can be simulated.
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
    """One storage leaves or comes back.

    Attributes:
        op: index of the op that comes next.
        ticket: which storage; the same number when it comes back.
        nbytes: its bytes.
        out: it leaves.
        modules: those that run, outermost first.
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
        """Nothing: when it starts is the simulation's to say."""

    def get(self, late: Callable[[], None] | None = None) -> Tensor:
        """A new tensor, as a read would make."""
        self._store.note(self._number, self.nbytes, out=False)
        return torch.empty(self.nbytes, dtype=torch.uint8, device=self._device)

    def recover(self) -> Tensor:
        """See `Ticket.recover`: no write fails here."""
        raise OffloadError("a captured store: nothing to recover: no write fails there")

    def drop(self) -> None:
        """Its place is free."""
        self._store.note_drop(self._number)

    def __del__(self) -> None:
        self._store.note_drop(self._number)


class CapturedStore:
    """See the module's docstring.

    Args:
        now: gives the index of the op that comes next, and the modules that run.
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
        """True for tensors of the device where the step runs."""
        return device.type == self._device

    def put(self, source: Tensor | UntypedStorage) -> _CapturedTicket:
        """Drop a tensor."""
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
