"""Any order of calls against a dict of what was put, with poison on, and the books checked after each."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

import ullage as ul
from tests.offload.conftest import data
from ullage.offload import DiskTicket, _record
from ullage.offload._extents import whole_blocks

CAPACITY, BACKLOG, AHEAD = 64 * 4096, 90_000, 70_000
PART = _record.PART_BYTES


def _failing(*_: Any) -> int:
    raise OSError(errno.EIO, "Input/output error")


class AnyOrder(RuleBasedStateMachine):
    tickets = Bundle("tickets")

    @initialize(
        checksums=st.booleans(),
        in_caller=st.booleans(),
        threads=st.integers(1, 3),
        backlog=st.sampled_from([0, BACKLOG]),
    )
    def open(self, checksums: bool, in_caller: bool, threads: int, backlog: int) -> None:
        _record.PART_BYTES = 4 * 4096
        self.folder = tempfile.TemporaryDirectory()
        self.backlog, self.seed = backlog, 0
        self.known: dict[DiskTicket, bytes] = {}
        self.failed: set[DiskTicket] = set()  # a read of them may have failed since they were last got
        self.store = ul.DiskStore(
            self.folder.name, CAPACITY, poison=True, checksums=checksums, threads=threads, release_in_caller=in_caller,
            backlog_bytes=backlog, ahead_bytes=AHEAD, buffer_bytes=8192,
        )  # fmt: skip

    def taken(self) -> int:
        return sum(whole_blocks(t.nbytes) for t in self.known)

    @rule(target=tickets, nbytes=st.sampled_from([0, 1, 4096, 10_000, 16_385, 40_000, 69_999, 70_001, 90_001]))
    def put(self, nbytes: int) -> DiskTicket | None:
        self.seed += 1
        source = data(nbytes, self.seed)
        if whole_blocks(nbytes) > CAPACITY - self.taken():
            with pytest.raises(ul.OffloadError, match=f"{CAPACITY - self.taken()} are available"):
                self.store.put(source)
            return None
        ticket = self.store.put(source)
        self.known[ticket] = source.numpy().tobytes()
        return ticket

    @rule(ticket=tickets)
    def get(self, ticket: DiskTicket | None) -> None:
        if ticket in self.known:
            self._get(ticket)
            if ticket in self.failed:  # it was told
                assert ticket.get().numpy().tobytes() == self.known[ticket]
                self.failed.discard(ticket)
        elif ticket is not None:
            with pytest.raises(ul.OffloadError, match="was dropped"):
                ticket.get()

    @rule(ticket=tickets)
    def get_while_reads_fail(self, ticket: DiskTicket | None) -> None:
        """What is in memory comes back all the same, else there is an error; prefetches under way may fail too."""
        if ticket in self.known:
            real = os.preadv
            os.preadv = _failing  # type: ignore[assignment]
            try:
                self.failed |= set(self.known)
                self._get(ticket)
            finally:
                os.preadv = real

    def _get(self, ticket: DiskTicket) -> None:
        """One error, of a read that failed, or the right bytes."""
        try:
            found = ticket.get()
        except ul.OffloadError as error:
            assert ticket in self.failed and "Input/output error" in str(error)
        else:
            assert found.numpy().tobytes() == self.known[ticket]
            self.failed.discard(ticket)

    @rule(ticket=tickets)
    def prefetch(self, ticket: DiskTicket | None) -> None:
        if ticket in self.known:
            ticket.prefetch()

    @rule(ticket=consumes(tickets))
    def drop(self, ticket: DiskTicket | None) -> None:
        if self.known.pop(ticket, None) is not None:  # type: ignore[arg-type]
            ticket.drop()  # type: ignore[union-attr]

    @rule(ticket=tickets)
    def drop_and_keep_the_ticket(self, ticket: DiskTicket | None) -> None:
        self.drop(ticket)

    @rule(at_most=st.integers(0, BACKLOG))
    def wait(self, at_most: int) -> None:
        limit = self.store.staging_bytes + self.store.ahead_bytes + at_most
        self.store.wait_until_resident_at_most(limit)
        assert self.store.resident_bytes <= limit

    @rule()
    def flush(self) -> None:
        self.store.flush()
        assert self.store.backlog_bytes == 0 and self.store.free_bytes == CAPACITY - self.taken()

    @rule()
    def poll(self) -> None:
        self.store.poll()

    @invariant()
    def books(self) -> None:
        if not hasattr(self, "store"):
            return
        store = self.store
        assert store.tickets == len(self.known) and store.free_bytes <= CAPACITY - self.taken()
        assert 0 <= store.backlog_bytes <= self.backlog and 0 <= store.ahead_bytes <= AHEAD
        held = store.resident_bytes - store.staging_bytes
        assert 0 <= held <= self.backlog + AHEAD

    def teardown(self) -> None:
        _record.PART_BYTES = PART
        if hasattr(self, "store"):
            for ticket in self.known:
                self.get(ticket)
                ticket.drop()
            self.store.flush()
            self.store.poll()
            assert self.store.free_bytes == CAPACITY and self.store.resident_bytes == self.store.staging_bytes
            self.store.close()
            self.folder.cleanup()


AnyOrder.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def test_poison(tmp_path: Path) -> None:
    """A buffer that is free, or not filled yet, has nothing of a tensor in it."""
    with ul.DiskStore(tmp_path, "1MiB", poison=True, threads=1) as store:
        ticket = store.put(torch.zeros(10_000, dtype=torch.uint8))
        store.flush()
        assert (store._engine.staging.buffers[0][:12_288] == 0xA5).all()
        ticket.prefetch()
        held = ticket._record.held
        assert held is not None
        ticket.drop()
        store.flush()
        assert (held == 0xA5).all() and (store._engine.staging.buffers[0][:12_288] == 0xA5).all()
