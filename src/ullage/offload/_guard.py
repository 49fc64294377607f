"""Refuse calls of a store after `close` or in a fork, and never wait for its lock in the garbage collector."""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from typing import Generic

from ullage.offload._failures import refused
from ullage.offload._ledger import Ledger, R


class Guard(ABC, Generic[R]):
    """The part of an engine that all stores have: its one lock, which guards `books`.

    Args:
        where: the directory; None in host memory.
        books: the state of all tensors.
    """

    def __init__(self, where: str | None, books: Ledger[R]) -> None:
        self._where, self._books = where, books
        self.closing = False
        self._closed = False
        self._pid = os.getpid()
        self._changed = threading.Condition(threading.Lock())
        _GUARDS.add(self)

    def orphan(self, record: R) -> None:
        """Drop the record of a ticket that nobody holds: now, or soon if the lock is taken. Never waits.

        The garbage collector calls this anywhere, also in a thread that holds the lock, and after the interpreter's end
        has begun: `closing` is looked at first, as it needs no module.
        """
        if self.closing or self._forked:
            return
        self._books.orphans.append(record)
        if self._changed.acquire(blocking=False):
            try:
                self._books.reap()
            finally:
                self._changed.release()

    @abstractmethod
    def close_in_child(self) -> None:
        """After a fork, close the child's copies of the store's resources."""

    @property
    def _forked(self) -> bool:
        return os.getpid() != self._pid

    def _check_process(self) -> None:
        if self._forked:
            raise refused(self._where, f"was made in process {self._pid}, this is a fork; make another")

    def _check_open(self, record: R | None = None) -> None:
        if self.closing:
            raise refused(self._where, "is closed; make another")
        if record and record.dropped:
            raise refused(self._where, "this tensor was dropped; get it before")


_GUARDS: weakref.WeakSet[Guard] = weakref.WeakSet()  # type: ignore[type-arg]


def _after_fork() -> None:
    for guard in list(_GUARDS):
        guard.close_in_child()


os.register_at_fork(after_in_child=_after_fork)
