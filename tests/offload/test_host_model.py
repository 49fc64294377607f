"""Any order of calls and of streams against a dict of what was put, with poison on, and the books checked after each."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

import ullage as ul
from tests.offload.hosted import bytes_of
from tests.offload.streams import SimulatedLink
from ullage.offload import HostTicket, _stalls
from ullage.offload._extents import whole_blocks

CAPACITY, BACKLOG, AHEAD = 24 * 4096, 30_000, 25_000
SIZES = [0, 1, 4096, 10_000, 10_000, 10_000, 16_385, 24_999, 25_001, 30_001]


class AnyOrder(RuleBasedStateMachine):
    tickets = Bundle("tickets")

    @initialize(seed=st.integers(0, 2**20), poison=st.booleans(), backlog=st.sampled_from([0, BACKLOG]))
    def open(self, seed: int, poison: bool, backlog: int) -> None:
        self.link = SimulatedLink(seed)
        self.backlog, self.seed, self.late = backlog, 0, 0
        self.known: dict[HostTicket, bytes] = {}
        self.read: list[bool] = []
        self.asked = 0
        self.store = ul.HostStore(
            CAPACITY, device="cpu", backlog_bytes=backlog, ahead_bytes=AHEAD, poison=poison, link=self.link
        )

    def taken(self) -> int:
        return sum(whole_blocks(t.nbytes) for t in self.known)

    def stream(self, side: bool) -> Any:
        return self.link.side if side else self.link.main

    @rule(target=tickets, nbytes=st.sampled_from(SIZES), side=st.booleans())
    def put(self, nbytes: int, side: bool) -> HostTicket | None:
        self.seed += 1
        data = bytes_of(nbytes, self.seed)
        with self.link.use(self.stream(side)):
            source = self.link.empty(nbytes)
            self.link.write(source, data)
            if whole_blocks(nbytes) > CAPACITY - self.taken():
                with pytest.raises(ul.OffloadError, match=f"{CAPACITY - self.taken()} are available"):
                    self.store.put(source)
                return None
            ticket = self.store.put(source)
        self.known[ticket] = data
        return ticket

    @rule(ticket=tickets, side=st.booleans())
    def get(self, ticket: HostTicket | None, side: bool) -> None:
        if ticket in self.known:
            wanted = self.known[ticket]
            with self.link.use(self.stream(side)):
                self.asked += 1
                self.link.read(ticket.get(self._late), lambda found: self.read.append(found == wanted))
        elif ticket is not None:
            with pytest.raises(ul.OffloadError, match="was dropped"):
                ticket.get()

    def _late(self) -> None:
        self.late += 1

    @rule(ticket=tickets, side=st.booleans())
    def prefetch(self, ticket: HostTicket | None, side: bool) -> None:
        if ticket in self.known:
            with self.link.use(self.stream(side)):
                ticket.prefetch()

    @rule(ticket=consumes(tickets))
    def drop(self, ticket: HostTicket | None) -> None:
        if self.known.pop(ticket, None) is not None:  # type: ignore[arg-type]
            ticket.drop()  # type: ignore[union-attr]

    @rule(ticket=tickets)
    def drop_and_keep_the_ticket(self, ticket: HostTicket | None) -> None:
        self.drop(ticket)

    @rule(target=tickets, ticket=consumes(tickets), side=st.booleans())
    def put_in_its_place(self, ticket: HostTicket | None, side: bool) -> HostTicket | None:
        """While it is on its way to whoever got it last."""
        if ticket not in self.known:
            return None
        nbytes = ticket.nbytes
        self.get(ticket, side)
        self.drop(ticket)
        return self.put(nbytes, not side)

    @rule(steps=st.integers(1, 12))
    def go_on(self, steps: int) -> None:
        self.link.go_on(steps)
        assert all(self.read)

    @rule(at_most=st.integers(0, BACKLOG), side=st.booleans())
    def wait(self, at_most: int, side: bool) -> None:
        with self.link.use(self.stream(side)):
            if self.store.wait_until_resident_at_most(self.store.ahead_bytes + at_most):
                return
        assert self.store.backlog_bytes == 0

    @rule()
    def flush(self) -> None:
        self.store.flush()
        assert self.store.backlog_bytes == 0

    @rule()
    def poll(self) -> None:
        self.store.poll()

    @invariant()
    def books(self) -> None:
        if not hasattr(self, "store"):
            return
        store = self.store
        assert store.tickets == len(self.known) and store.free_bytes == CAPACITY - self.taken()
        assert 0 <= store.backlog_bytes <= self.backlog and 0 <= store.ahead_bytes <= AHEAD
        assert store.resident_bytes == store.backlog_bytes + store.ahead_bytes
        assert len(store._engine.books.stalls._pending) <= _stalls.MOST_PENDING

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for ticket in list(self.known):
                self.get(ticket, False)
                self.drop(ticket)
            self.store.flush()
            self.store.poll()
            assert self.store.free_bytes == CAPACITY and self.store.resident_bytes == self.store.tickets == 0
            self.link.run_all()
            assert len(self.read) == self.asked and all(self.read)
            assert self.store.stats.late_prefetches == self.late
            self.store.close()
            assert self.link.pinned == []


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
