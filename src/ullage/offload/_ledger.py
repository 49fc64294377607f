"""Accounts that every store keeps: places, held tensors and what they are charged to, and prefetches that wait for room."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from torch import Tensor

from ullage.offload._extents import Extents
from ullage.offload._facts import Stats
from ullage.offload._record import Charge, Phase, Record

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Limits:
    """Bounds of a store.

    Attributes:
        capacity: bytes of the store, in whole blocks.
        backlog_bytes: bytes of tensors held because they are not written yet.
        ahead_bytes: bytes of tensors that were prefetched and not taken yet.
        release_in_caller: whether written tensors are released in a caller's thread.
        round_bytes: what the memory's allocator rounds a tensor up to.
        threads: that move its parts.
    """

    capacity: int
    backlog_bytes: int
    ahead_bytes: int
    release_in_caller: bool = True
    round_bytes: int = 1
    threads: int = 1


class Ledger(ABC, Generic[R]):
    """The state of all tensors of a store. Every method needs the engine's lock."""

    def __init__(self, limits: Limits, poison: bool) -> None:
        self.limits, self.poison = limits, poison
        self.extents = Extents(limits.capacity)
        self.stats = Stats()
        self.live: set[R] = set()
        self.orphans: deque[R] = deque()  # of tickets that nobody holds
        self.held = dict.fromkeys(Charge, 0)  # bytes
        self._wanted: deque[R] = deque()  # prefetches that wait for room

    def count(self, **more: float) -> None:
        """Add to the counts."""
        self.stats = replace(self.stats, **{name: getattr(self.stats, name) + n for name, n in more.items()})

    # out

    def goes_through(self, record: R) -> bool:
        """Whether a tensor is larger than the backlog may be: then `put` writes it, and it stays the caller's."""
        return self._takes(record.weight) > self.limits.backlog_bytes

    def has_room(self, record: R) -> bool:
        """Whether the backlog takes a tensor."""
        return (
            self.goes_through(record)
            or self.held[Charge.BACKLOG] + self._takes(record.weight) <= self.limits.backlog_bytes
        )

    def _fits_backlog(self, record: R) -> bool:
        return not self.goes_through(record) and self.has_room(record)

    def _takes(self, nbytes: int) -> int:
        """Bytes that the allocator gives out for so many."""
        return -(-nbytes // self.limits.round_bytes) * self.limits.round_bytes

    # back

    def want(self, record: R) -> None:
        """Prefetch a tensor, now or when there is room."""
        if self._is_away(record) and record.parts and not (record.keep or record.wanted):
            record.asked = record.wanted = True
            self._wanted.append(record)
            self.start_wanted()

    @staticmethod
    def _is_away(record: R) -> bool:
        return record.phase in (Phase.OUT, Phase.AWAY) and not record.failure  # a failure is for `get` to tell

    def start_wanted(self) -> bool:
        """Start prefetches that there is room for, in order; those that can never fit are left to `get`.

        Returns whether there is a read to do.
        """
        found = False
        while self._wanted:
            record = self._wanted[0]
            needed = self._takes(record.weight if record.held is not None else record.nbytes)
            if record.wanted and self._is_away(record) and needed <= self.limits.ahead_bytes:
                if self.held[Charge.AHEAD] + needed > self.limits.ahead_bytes:
                    break
                if record.held is None:
                    self.read_ahead(record)
                    found = True
                else:  # a tensor that is still in memory stays there
                    self._charge(record, Charge.AHEAD)
                    record.keep = record.phase is Phase.OUT
                    record.phase = Phase.OUT if record.keep else Phase.READY
            record.wanted = False
            self._wanted.popleft()
        return found

    @abstractmethod
    def read_ahead(self, record: R) -> None:
        """Start to read a tensor that is in the store only."""

    def forget_source(self, record: R) -> None:
        """Drop a written source that has been modified in place since it was put: the tensor is read back instead."""
        record.phase, record.keep = Phase.AWAY, False
        self._release(record)

    def hand_out(self, record: R) -> Tensor:
        """Return the held tensor. It belongs to the caller from now on, unless it is a source that is still being written."""
        tensor = record.held
        assert tensor is not None
        record.asked = record.wanted = record.keep = False
        if record.original:
            self.count(forwarded_bytes=record.nbytes)
            if record.phase is Phase.OUT and record.charge is Charge.AHEAD and self._fits_backlog(record):
                self._charge(record, Charge.BACKLOG)  # no longer ahead of its use, but on its way out still
        if record.phase in (Phase.READY, Phase.AWAY):
            record.phase = Phase.AWAY
            record.held = None  # so that it is not poisoned
            self._release(record)
        return tensor

    # done

    @abstractmethod
    def drop(self, record: R) -> None:
        """Free a tensor's place and memory."""

    def reap(self, spared: R | None = None) -> None:
        """Drop orphans. A store also releases written sources, except `spared`, which is about to be read."""
        while self.orphans:
            record = self.orphans.popleft()
            if not record.dropped:
                self.drop(record)

    def _bury(self, record: R) -> None:
        self.extents.free(record.extents)
        record.extents = ()

    def _charge(self, record: R, charge: Charge) -> None:
        weight = self._takes(record.weight)
        self.held[record.charge] -= weight
        self.held[charge] += weight
        record.charge = charge

    def _release(self, record: R) -> None:
        self._charge(record, Charge.NONE)
        record.held = None
