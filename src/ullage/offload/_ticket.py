"""What the tickets of all stores are: a record, and the engine that is called with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class _Opened(Protocol):
    """A store, as its tickets see it."""

    @property
    def _engine(self) -> Any: ...


class EngineTicket:
    """A `Ticket`: see there. It holds its store, and gives its place back when nobody holds it."""

    __slots__ = ("__weakref__", "_record", "_store")

    def __init__(self, store: _Opened, record: Any) -> None:
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
