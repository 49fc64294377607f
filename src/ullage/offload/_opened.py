"""Common base of stores and of tickets: an engine, and a record that it is called with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ullage.offload._record import Charge

if TYPE_CHECKING:
    from typing_extensions import Self


class EngineTicket:
    """A `Ticket`: see there. It holds its store, and gives its place back when nobody holds it."""

    __slots__ = ("__weakref__", "_record", "_store")

    def __init__(self, store: OpenedStore, record: Any) -> None:
        self._store, self._record = store, record

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self._record.nbytes  # type: ignore[no-any-return]

    def prefetch(self) -> None:
        """See `Ticket.prefetch`. A tensor that is still on its way out stays in memory instead, if it fits."""
        self._store._engine.prefetch(self._record)

    def get(self, late: Callable[[], None] | None = None) -> Tensor:
        """See `Ticket.get`.

        Raises:
            OffloadError: the bytes could not be written or read back as they were, were written to before they had left, or
                the ticket was dropped.
            torch.OutOfMemoryError: the device has no memory for it.
        """
        return self._store._engine.get(self._record, late)  # type: ignore[no-any-return]

    def recover(self) -> Tensor:
        """See `Ticket.recover`."""
        return self._store._engine.recover(self._record)  # type: ignore[no-any-return]

    def drop(self) -> None:
        """See `Ticket.drop`."""
        self._store._engine.drop(self._record)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.nbytes} bytes>"

    def __del__(self) -> None:
        self._store._engine.orphan(self._record)


class OpenedStore(ABC):
    """Common base of stores: answers from their engine, which a subclass makes."""

    _engine: Any

    def poll(self) -> None:
        """See `Store.poll`. Call it at the end of a step: tensors that the graph has dropped by then are released."""
        self._engine.poll()

    @property
    def resident_bytes(self) -> int:
        """Bytes of the memory of the store's device that are there because of it: not yet released, brought back ahead, and on the CPU staging."""
        return self._engine.resident_bytes  # type: ignore[no-any-return]

    @property
    def backlog_bytes(self) -> int:
        """The part of `resident_bytes` of tensors that are not written or copied yet, or are and were not released yet."""
        return self._engine.books.held[Charge.BACKLOG]  # type: ignore[no-any-return]

    @property
    def ahead_bytes(self) -> int:
        """The part of `resident_bytes` that was or is being brought back, or that a prefetch kept from leaving."""
        return self._engine.books.held[Charge.AHEAD]  # type: ignore[no-any-return]

    @property
    def free_bytes(self) -> int:
        """Bytes of its capacity that are not taken."""
        return self._engine.books.extents.free_bytes  # type: ignore[no-any-return]

    @property
    def tickets(self) -> int:
        """How many tensors the store has: put, and not dropped. 0 after a step, or something leaks."""
        return len(self._engine.books.live)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._engine.closing  # type: ignore[no-any-return]

    @abstractmethod
    def close(self) -> None:
        """See `Store.close`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
