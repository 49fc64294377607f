"""How much is held, and when it is let go of: exact at every point, with transfers held back by the test."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ullage as ul
from tests.offload.conftest import Gate, data, until, when
from ullage.offload import DiskTicket
from ullage.offload._disk_state import Books
from ullage.offload._record import Charge

Hold = Callable[[], Gate]


def watched(nbytes: int) -> tuple[torch.Tensor, list[str]]:
    """A tensor, and the names of the threads in which its memory is freed."""
    where: list[str] = []
    array = data(nbytes).numpy().copy()
    weakref.finalize(array, lambda: where.append(threading.current_thread().name))
    return torch.from_numpy(array), where


def test_put_waits_for_room(tmp_path: Path, hold_writes: Hold) -> None:
    with ul.DiskStore(tmp_path, "1MiB", backlog_bytes=30_000) as store:
        gate = hold_writes()
        tickets = [store.put(data(10_000, i)) for i in range(3)]
        assert store.backlog_bytes == 30_000 and store.stats.stalled_write_seconds == 0
        putter = threading.Thread(target=lambda: tickets.append(store.put(data(1, 3))))
        putter.start()
        putter.join(0.1)
        assert putter.is_alive() and store.backlog_bytes == 30_000 and store.tickets == 3
        gate.opened.set()
        putter.join(20)
        assert 0 < store.stats.stalled_write_seconds < 20
        store.flush()
        assert store.backlog_bytes == 0 and store.tickets == 4
        assert all(torch.equal(t.get(), data(t.nbytes, i)) for i, t in enumerate(tickets))


def test_backlog_never_above_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at on every change, while four threads put."""
    seen: list[int] = []
    real = Books._charge

    def looked_at(self: Books, *arguments: object) -> None:
        real(self, *arguments)
        seen.append(self.held[Charge.BACKLOG])

    monkeypatch.setattr(Books, "_charge", looked_at)
    with ul.DiskStore(tmp_path, "8MiB", backlog_bytes=100_000, poison=True) as store:
        kept: dict[int, list[DiskTicket]] = {n: [] for n in range(4)}

        def work(n: int) -> None:
            kept[n] += [store.put(data(30_000 - n, 10 * n + i)) for i in range(10)]

        workers = [threading.Thread(target=work, args=(n,)) for n in kept]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(20)
        for n, tickets in kept.items():
            assert len(tickets) == 10
            assert all(torch.equal(t.get(), data(30_000 - n, 10 * n + i)) for i, t in enumerate(tickets))
    assert 29_997 <= max(seen) <= 100_000


def test_larger_than_the_backlog(tmp_path: Path) -> None:
    """Written when `put` returns, and not counted: the caller has it all the while."""
    for bound in (0, 9_999):
        with ul.DiskStore(tmp_path, "1MiB", backlog_bytes=bound) as store:
            source, freed_in = watched(10_000)
            ticket = store.put(source)
            assert store.stats.writes == 1 and store.backlog_bytes == 0
            del source
            assert freed_in == ["MainThread"] and torch.equal(ticket.get(), data(10_000))


@pytest.mark.parametrize("in_caller", [True, False])
def test_thread_of_release(tmp_path: Path, hold_writes: Hold, in_caller: bool) -> None:
    with ul.DiskStore(tmp_path, "1MiB", release_in_caller=in_caller, threads=1) as store:
        gate = hold_writes()
        source, freed_in = watched(10_000)
        ticket = store.put(source)
        del source
        gate.wait_entered()
        assert store.backlog_bytes == 10_000 and not freed_in
        gate.opened.set()
        if in_caller:
            until(lambda: store.stats.writes == 1)
            assert store.backlog_bytes == 10_000 and not freed_in
            store.poll()
            assert freed_in == ["MainThread"]
        else:
            until(lambda: bool(freed_in))
            assert freed_in == ["ullage-offload-0"]
        assert store.backlog_bytes == 0
        assert torch.equal(ticket.get(), data(10_000)) and store.stats.reads == 1


def test_written_but_still_here(tmp_path: Path) -> None:
    """Asked for before the caller has let go of it: handed back, and let go of then."""
    with ul.DiskStore(tmp_path, "1MiB") as store:
        source = data(10_000)
        ticket = store.put(source)
        until(lambda: store.stats.writes == 1)
        assert store.backlog_bytes == 10_000 and ticket.get().data_ptr() == source.data_ptr()
        assert store.backlog_bytes == 0 and store.stats.forwarded_bytes == 10_000
        assert torch.equal(ticket.get(), source) and store.stats.reads == 1
        other = store.put(data(10_000, 1))
        until(lambda: store.stats.writes == 2)
        other.prefetch()  # it stays, as read ahead
        assert (store.backlog_bytes, store.ahead_bytes, store.stats.reads) == (0, 10_000, 1)
        assert torch.equal(other.get(), data(10_000, 1)) and store.resident_bytes == store.staging_bytes
        assert store.stats.reads == 1 and torch.equal(other.get(), data(10_000, 1)) and store.stats.reads == 2


def test_forwarding(tmp_path: Path, hold_writes: Hold) -> None:
    with ul.DiskStore(tmp_path, "1MiB", threads=1) as store:
        gate = hold_writes()
        sources = [data(10_000, i) for i in range(4)]
        tickets = [store.put(s) for s in sources]
        gate.wait_entered()
        for ticket, source in zip(tickets, sources, strict=True):
            assert all(ticket.get().data_ptr() == source.data_ptr() for _ in range(2))
        assert store.stats.forwarded_bytes == 80_000 and store.stats.stalled_read_seconds == 0
        tickets[1].prefetch()  # its charge moves
        assert (store.backlog_bytes, store.ahead_bytes) == (30_000, 10_000)
        tickets[0].drop()  # a thread is at work on it: its place is free when that is done
        tickets[2].drop()  # never goes out
        assert (store.backlog_bytes, store.ahead_bytes) == (20_000, 10_000) and store.tickets == 2
        assert store.free_bytes == 2**20 - 3 * 12_288
        gate.opened.set()
        store.flush()
        assert store.free_bytes == 2**20 - 2 * 12_288
        assert (store.backlog_bytes, store.ahead_bytes) == (0, 10_000)
        assert store.stats.writes == 2 and store.stats.bytes_written == 30_000
        assert tickets[1].get().data_ptr() == sources[1].data_ptr()
        assert (store.ahead_bytes, store.stats.reads, store.stats.late_prefetches) == (0, 0, 0)
        assert torch.equal(tickets[3].get(), sources[3]) and store.stats.reads == 1


def test_ahead_bound(tmp_path: Path, hold_reads: Hold) -> None:
    with ul.DiskStore(tmp_path, "1MiB", ahead_bytes=25_000, poison=True) as store:
        tickets = [store.put(data(10_000, i)) for i in range(4)]
        large = store.put(data(25_001))
        store.flush()
        gate = hold_reads()
        large.prefetch()  # never fits: left to `get`
        for ticket in tickets:
            ticket.prefetch()
            ticket.prefetch()
        assert store.ahead_bytes == 20_000 and store.resident_bytes == store.staging_bytes + 20_000
        gate.opened.set()
        until(lambda: store.stats.reads == 2)
        assert store.ahead_bytes == 20_000
        assert torch.equal(tickets[0].get(), data(10_000))
        assert store.ahead_bytes == 20_000  # the third has begun
        tickets[1].drop()
        until(lambda: store.stats.reads == 4)
        assert store.ahead_bytes == 20_000
        assert all(torch.equal(tickets[i].get(), data(10_000, i)) for i in (3, 2))
        assert store.ahead_bytes == 0 and store.stats.late_prefetches == 0
        assert torch.equal(large.get(), data(25_001)) and store.stats.late_prefetches == 1


def test_late_prefetch(tmp_path: Path, hold_reads: Hold) -> None:
    with ul.DiskStore(tmp_path, "1MiB", threads=1) as store:
        tickets = [store.put(data(10_000, i)) for i in range(3)]
        store.flush()
        gate = hold_reads()
        for ticket in tickets:
            ticket.prefetch()
        gate.wait_entered()
        opener = when(lambda: store.stats.late_prefetches == 1, gate, 0.1)
        told: list[str] = []
        found = tickets[2].get(lambda: told.append(str(store.poll())))  # before the second, which nobody waits for
        assert torch.equal(found, data(10_000, 2)) and len(told) == 1  # and without the lock
        opener.join(20)
        assert store.stats.late_prefetches == 1 and 0.09 <= store.stats.stalled_read_seconds < 20
        until(lambda: store.stats.reads == 3)
        assert gate.offsets == [0, 24_576, 12_288]
        before = store.stats
        assert torch.equal(tickets[1].get(lambda: told.append("on time")), data(10_000, 1)) and len(told) == 1
        assert store.stats - before == ul.offload.Stats() and before.bytes_read == 30_000


def test_dropped_while_read(tmp_path: Path, hold_reads: Hold) -> None:
    with ul.DiskStore(tmp_path, 12_288, threads=1, poison=True) as store:
        ticket = store.put(data(10_000))
        store.flush()
        gate = hold_reads()
        ticket.prefetch()
        gate.wait_entered()
        ticket.drop()
        assert store.free_bytes == 0 and store.ahead_bytes == 10_000 and store.tickets == 0
        threading.Timer(0.05, gate.opened.set).start()
        again = store.put(data(10_001, 1))  # waits for the place, as a thread is about to leave it
        store.flush()
        assert store.resident_bytes == store.staging_bytes and torch.equal(again.get(), data(10_001, 1))


def test_wait_until_resident(tmp_path: Path, hold_writes: Hold) -> None:
    with ul.DiskStore(tmp_path, "1MiB", threads=1) as store:
        assert store.wait_until_resident_at_most(store.staging_bytes)
        assert not store.wait_until_resident_at_most(store.staging_bytes - 1)
        gate = hold_writes()
        tickets = [store.put(data(10_000, i)) for i in range(3)]
        assert store.wait_until_resident_at_most(store.staging_bytes + 30_000)
        threading.Timer(0.05, gate.opened.set).start()
        assert store.wait_until_resident_at_most(store.staging_bytes + 10_000)
        assert store.backlog_bytes <= 10_000 and store.stats.writes >= 2 and store.stats.stalled_write_seconds > 0
        assert store.wait_until_resident_at_most(store.staging_bytes) and store.stats.writes == 3
        tickets[0].prefetch()
        assert not store.wait_until_resident_at_most(store.staging_bytes)  # no write left brings it


def test_full(tmp_path: Path) -> None:
    with ul.DiskStore(tmp_path, 5 * 4096 + 100) as store:
        assert store.capacity == 5 * 4096
        kept = store.put(data(4097))
        with pytest.raises(ul.OffloadError) as caught:
            store.put(data(3 * 4096 + 1))
        assert str(caught.value) == (
            f"offload store in {tmp_path}: a tensor of 12289 bytes needs 16384 bytes (blocks of 4 KiB), 12288 are available "
            "of capacity=20480 (20.00 KiB); raise it, or drop tensors earlier; under a plan: plan again with the step as it runs"
        )
        assert (caught.value.path, caught.value.nbytes) == (str(tmp_path), 12_289)
        fits = store.put(data(3 * 4096))
        assert store.free_bytes == 0 and store.tickets == 2 and kept.nbytes == 4097
        kept.drop()
        assert torch.equal(fits.get(), data(3 * 4096))


def test_after_drop_and_close(tmp_path: Path, hold_writes: Hold) -> None:
    store = ul.DiskStore(tmp_path, "1MiB", threads=1)
    gate = hold_writes()
    sources = [watched(10_000) for _ in range(3)]
    tickets = [store.put(s) for s, _ in sources]
    freed_in = [where for _, where in sources]
    del sources
    gate.wait_entered()
    tickets[2].drop()
    tickets[2].drop()
    for call in (tickets[2].get, tickets[2].prefetch, tickets[2].recover):
        with pytest.raises(ul.OffloadError, match=f"^offload store in {tmp_path}: this tensor was dropped"):
            call()
    with pytest.raises(ul.OffloadError, match="nothing to recover: no write of this tensor failed"):
        tickets[0].recover()
    opener = when(lambda: store.closed, gate)
    store.close()
    store.close()
    opener.join(20)
    assert store.closed and store.stats.writes == 1 and freed_in == [["MainThread"]] * 3
    assert repr(store) == f"<DiskStore in {tmp_path}, 1.00 MiB: closed>"
    for use in (
        tickets[0].get,
        tickets[0].prefetch,
        tickets[0].recover,
        store.poll,
        store.flush,
        lambda: store.put(data(1)),
    ):
        with pytest.raises(ul.OffloadError, match=f"^offload store in {tmp_path}: is closed; make another"):
            use()
    tickets[0].drop()


def test_close_wakes_who_waits(tmp_path: Path, hold_reads: Hold) -> None:
    store = ul.DiskStore(tmp_path, "1MiB", threads=1)
    first, second = store.put(data(10_000)), store.put(data(10_000))
    store.flush()
    gate = hold_reads()
    said: list[str] = []

    def wait(ticket: DiskTicket) -> None:
        try:
            ticket.get()
        except ul.OffloadError as error:
            said.append(str(error))

    waiting = [threading.Thread(target=wait, args=(t,)) for t in (first, second)]
    for thread in waiting:
        thread.start()
    gate.wait_entered()
    until(lambda: store.ahead_bytes == 20_000)
    waiting.append(when(lambda: store.closed, gate))
    store.close()
    for thread in waiting:
        thread.join(20)
    assert said == [f"offload store in {tmp_path}: is closed; make another"] * 2


def test_store_that_nobody_holds(tmp_path: Path) -> None:
    store = ul.DiskStore(tmp_path, "1MiB")
    ticket = store.put(data(10_000))
    fd = store._engine.mover.file.fd
    del store
    assert torch.equal(ticket.get(), data(10_000))  # a ticket holds its store
    del ticket
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_closed_by_a_thread_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector may run there, find a store that nobody holds, and close it: no thread waits for itself."""
    store = ul.DiskStore(tmp_path, "1MiB", threads=3)
    engine, real = store._engine, os.pwritev

    def transfer(*arguments: Any) -> int:
        engine.close()
        return real(*arguments)

    monkeypatch.setattr(os, "pwritev", transfer)
    ticket = store.put(data(10_000))
    until(lambda: not any(thread.is_alive() for thread in engine._threads))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(engine.mover.file.fd)
    with pytest.raises(ul.OffloadError, match="is closed"):
        ticket.get()
    store.close()
