"""The rules of a `DiskStore` of a device one by one, on streams that go on when the test says so, or by chance."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ullage as ul
from tests.offload.conftest import Gate, until
from tests.offload.hosted import bytes_of, get, put
from tests.offload.streams import Stream, ThreadedLink
from ullage.offload import DiskTicket, _record
from ullage.offload._extents import whole_blocks

KIB = 1024
POISON = 0xA5
SIZES = [0, 1, 4095, 4096, 4097, 16_385, 65_537, 100_001]
Hold = Callable[[], Gate]


def opened(link: ThreadedLink, at: Path, capacity: int | str = "1MiB", **options: Any) -> ul.DiskStore:
    return ul.DiskStore(at, capacity, device="cpu", link=link, **options)


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, checksums: bool) -> None:
    monkeypatch.setattr(_record, "PART_BYTES", 16 * KIB)
    link = ThreadedLink(threads)
    options = {"threads": threads, "checksums": checksums, "poison": True, "buffer_bytes": 8 * KIB}
    with opened(link, tmp_path, **options) as store:
        assert [slab.numel() for slab in link.pinned] == [threads * 8 * KIB]
        assert link.pinned[0].data_ptr() == store._engine.staging.buffers[0].__array_interface__["data"][0]
        tickets = [put(link, store, bytes_of(n, n)) for n in SIZES]
        store.flush()
        assert store.resident_bytes == store.staging_bytes == 0  # of the device's memory
        seen = [(get(link, t), get(link, t)) for t in reversed(tickets)]  # as in a second backward
        link.run_all()
        assert seen == [([bytes_of(n, n)], [bytes_of(n, n)]) for n in reversed(SIZES)]
        stats = store.stats
        assert stats.bytes_written == sum(SIZES) and stats.bytes_read == 2 * sum(SIZES) and not stats.forwarded_bytes
        del tickets
        gc.collect()
        store.poll()
        assert (store.tickets, store.free_bytes, store.resident_bytes) == (0, 2**20, 0)
    assert link.pinned == []


@pytest.mark.parametrize("seed", range(6))
def test_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Calls and streams by chance against a dict of what was put, with poison on, and the books checked after each."""
    monkeypatch.setattr(_record, "PART_BYTES", 16 * KIB)
    rng, link = random.Random(seed), ThreadedLink(seed)
    backlog, ahead, capacity = rng.choice([0, 60_000]), 50_000, 60 * 4096
    options = {
        "backlog_bytes": backlog,
        "ahead_bytes": ahead,
        "threads": 1 + seed % 3,
        "release_in_caller": seed % 2 == 0,
    }
    known: dict[DiskTicket, bytes] = {}
    results: list[bool] = []
    asked = 0
    with opened(link, tmp_path, capacity, poison=True, checksums=True, buffer_bytes=8 * KIB, **options) as store:
        for step in range(120):
            act, ticket = rng.choice(["put", "put", "get", "get", "prefetch", "drop", "flush", "go on"]), None
            if known:
                ticket = rng.choice(list(known))
            with link.use(rng.choice([link.main, link.side])):
                if act == "put":
                    data = bytes_of(rng.choice([1, 10_000, 10_000, 24_999, 50_001, 60_001]), step)
                    if sum(whole_blocks(t.nbytes) for t in known) + whole_blocks(len(data)) <= capacity:
                        known[put(link, store, data)] = data
                elif act == "get" and ticket is not None:
                    wanted, asked = known[ticket], asked + 1
                    link.read(ticket.get(), lambda found, wanted=wanted: results.append(found == wanted))
                elif act == "prefetch" and ticket is not None:
                    ticket.prefetch()
                elif act == "drop" and ticket is not None:
                    known.pop(ticket)
                    ticket.drop()
                elif act == "flush":
                    store.flush()
                else:
                    link.go_on(rng.randint(1, 9))
            del ticket
            assert 0 <= store.backlog_bytes <= backlog and 0 <= store.ahead_bytes <= ahead
            assert store.resident_bytes <= backlog + ahead and store.tickets == len(known)
        for ticket, wanted in known.items():
            link.read(ticket.get(), lambda found, wanted=wanted: results.append(found == wanted))
            ticket.drop()
        asked += len(known)
        store.flush()
        store.poll()
        assert (store.tickets, store.free_bytes, store.resident_bytes) == (0, capacity, 0)
        link.run_all()
        assert results == [True] * asked and asked > 20
    assert link.pinned == []


def test_a_copy_out_waits_for_what_wrote_the_tensor(tmp_path: Path) -> None:
    link = ThreadedLink(held=True)
    with opened(link, tmp_path, threads=1) as store:
        ticket = put(link, store, bytes_of(10_000))
        source = weakref.ref(ticket._record.held.untyped_storage())
        until(lambda: bool(link.out.queue))
        link.run(link.out)
        store.poll()
        assert link.out.queue and store.stats.writes == 0 and store.backlog_bytes == 10_000 and source() is not None
        link.run(link.main, link.out)
        until(lambda: store.stats.writes == 1)
        assert store.stats.stalled_write_seconds == 0 and [name for name, _ in link.waits] == ["out"]
        store.poll()
        assert source() is None and store.backlog_bytes == 0
        link.held = False
        seen = get(link, ticket)
        link.run_all()
        assert seen == [bytes_of(10_000)]


def test_a_thread_waits_for_its_own_copy(tmp_path: Path) -> None:
    """Of two that share the stream: the first one's tensor is written while the second's copy is still to come."""
    link = ThreadedLink(held=True)
    with opened(link, tmp_path, threads=2) as store:
        first = put(link, store, bytes_of(10_000))
        until(lambda: len(link.out.queue) == 3)  # the wait, the copy, its event
        with link.use(link.side):
            second = put(link, store, bytes_of(9_000, 1))
        until(lambda: len(link.out.queue) == 6)
        link.run(link.main, link.out)
        until(lambda: store.stats.writes == 1)
        assert len(link.out.queue) == 3 and store.stats.bytes_written == 10_000
        link.held = False
        store.flush()
        seen = [get(link, t) for t in (first, second)]
        link.run_all()
        assert seen == [[bytes_of(10_000)], [bytes_of(9_000, 1)]]


def test_a_copy_in_waits_for_whoever_uses_the_memory(tmp_path: Path) -> None:
    """The allocator gives out memory that kernels, queued before, still read."""
    link = ThreadedLink(held=True)
    with opened(link, tmp_path, threads=1) as store:
        ticket = put(link, store, bytes_of(10_000))
        link.held = False
        store.flush()
        link.run_all()
        link.held = True
        before, seen = link.empty(10_000), []
        link.write(before, bytes_of(10_000, 1))
        link.read(before, seen.append)
        at = before.data_ptr()
        del before
        ticket.prefetch()
        assert ticket._record.held.data_ptr() == at
        until(lambda: bool(link.into.queue))
        link.run(link.into)
        assert link.into.queue and store.stats.reads == 0
        link.run(link.main, link.into)
        until(lambda: store.stats.reads == 1)
        back = get(link, ticket)
        link.run_all()
        assert seen == [bytes_of(10_000, 1)] and back == [bytes_of(10_000)]


def test_what_is_ready_is_whole_for_every_stream(tmp_path: Path) -> None:
    """Handed to another stream: that waits for who wrote an original, and memory is not reused before it has run."""
    link = ThreadedLink(held=True)
    with opened(link, tmp_path, threads=1) as store:
        ticket = put(link, store, bytes_of(10_000))
        with link.use(link.side):
            original = get(link, ticket)
        link.run(link.side)
        assert original == [] and link.side.queue  # the kernel of the main stream has not run
        link.held = False
        store.flush()
        link.run_all()
        ticket.prefetch()
        until(lambda: store.stats.reads == 1)
        link.run_all()
        with link.use(link.side):
            back = get(link, ticket)
        link.write(link.empty(10_000), bytes_of(10_000, 2))  # the same memory
        link.run(link.main)
        assert link.main.queue  # it waits for the side stream
        link.run_all()
        assert original == back == [bytes_of(10_000)]


def test_poison(tmp_path: Path) -> None:
    link = ThreadedLink(held=True)
    with opened(link, tmp_path, threads=1, poison=True, buffer_bytes=8 * KIB) as store:
        ticket = put(link, store, bytes(6_000))
        link.held = False
        store.flush()
        assert (link.pinned[0] == POISON).all()
        link.run_all()
        link.held = True
        with link.use(link.side):
            ticket.prefetch()
        held = ticket._record.held
        until(lambda: bool(link.into.queue))
        link.run(link.side)
        assert (held == POISON).all()  # before the copy comes
        link.run(link.into)
        until(lambda: store.stats.reads == 1)
        assert not held.any()
        ticket.drop()
        link.run(link.main, link.out, link.into)
        assert not held.any()  # in the order of the stream that has its memory
        link.run(link.side)
        assert (held == POISON).all() and (link.pinned[0] == POISON).all()


def test_dropped_while_it_is_copied(tmp_path: Path) -> None:
    """Source and target live until the copy is over, and so does the place in the file."""
    link = ThreadedLink(held=True)
    with opened(link, tmp_path, 12_288, threads=1) as store:
        out = put(link, store, bytes_of(10_000))
        source = weakref.ref(out._record.held.untyped_storage())
        until(lambda: bool(link.out.queue))
        out.drop()
        store.poll()
        assert source() is not None and (store.free_bytes, store.backlog_bytes, store.tickets) == (0, 10_000, 0)
        link.run_all()
        again = put(link, store, bytes_of(10_001, 1))  # waits for the place
        assert source() is None
        link.held = False
        store.flush()
        link.run_all()
        link.held = True
        again.prefetch()
        target = weakref.ref(again._record.held.untyped_storage())
        until(lambda: bool(link.into.queue))
        again.drop()
        store.poll()
        assert target() is not None and (store.free_bytes, store.ahead_bytes) == (0, 10_001)
        link.run_all()
        store.flush()
        assert target() is None and (store.free_bytes, store.resident_bytes) == (12_288, 0)


@pytest.mark.parametrize("when", ["queued", "copied", "written"])
def test_written_to_in_place(tmp_path: Path, hold_writes: Hold, when: str) -> None:
    """On its way out it raises, though the copy may be over; afterwards what comes back is what was put."""
    link = ThreadedLink(held=True)
    with opened(link, tmp_path, threads=1) as store:
        source = link.empty(10_000)
        link.write(source, bytes_of(10_000))
        gate = hold_writes()
        ticket = store.put(source)
        until(lambda: bool(link.out.queue))
        if when != "queued":
            link.run_all()
            gate.wait_entered()
        if when == "written":
            gate.opened.set()
            until(lambda: store.stats.writes == 1)
        source.detach().zero_()
        link.held = False
        if when == "written":
            seen = get(link, ticket)
            link.run_all()
            assert seen == [bytes_of(10_000)] and store.stats.forwarded_bytes == 0
            return
        for _ in range(2):
            with pytest.raises(
                ul.OffloadError, match="a tensor of 10000 bytes was modified by an inplace operation before"
            ):
                ticket.get()
            gate.opened.set()
            store.flush()
        assert store.resident_bytes == 0


def test_bounds(tmp_path: Path) -> None:
    """The host waits for room in the backlog, as for tensors of the CPU, and what does not fit ahead starts later."""
    link = ThreadedLink(held=True)
    with opened(link, tmp_path, threads=2, backlog_bytes=30_000, ahead_bytes=25_000, poison=True) as store:
        tickets = [put(link, store, bytes_of(10_000, i)) for i in range(3)]
        assert store.backlog_bytes == 30_000 and store.stats.stalled_write_seconds == 0
        putter = threading.Thread(target=lambda: tickets.append(put(link, store, bytes_of(10_000, 3))))
        putter.start()
        putter.join(0.05)
        assert putter.is_alive() and store.backlog_bytes == 30_000
        link.held = False
        putter.join(20)
        assert store.stats.stalled_write_seconds > 0
        assert store.wait_until_resident_at_most(10_000) and store.resident_bytes <= 10_000
        assert store.wait_until_resident_at_most(0)
        for ticket in tickets:
            ticket.prefetch()
        until(lambda: store.stats.reads == 2)
        assert store.ahead_bytes == store.resident_bytes == 20_000
        assert not store.wait_until_resident_at_most(0)  # no write left brings it
        seen = [get(link, t) for t in tickets]
        link.run_all()
        assert seen == [[bytes_of(10_000, i)] for i in range(4)] and store.ahead_bytes == 0


def test_larger_than_the_backlog(tmp_path: Path) -> None:
    link = ThreadedLink()
    with opened(link, tmp_path, backlog_bytes=0) as store:
        ticket = put(link, store, bytes_of(10_000))
        assert store.stats.writes == 1 and store.backlog_bytes == 0 and ticket._record.held is None
        seen = get(link, ticket)
        link.run_all()
        assert seen == [bytes_of(10_000)]


def test_tickets_that_nobody_holds(tmp_path: Path) -> None:
    link = ThreadedLink()
    with opened(link, tmp_path, poison=True) as store:
        loop: list[object] = [put(link, store, bytes_of(5000))]
        loop.append(loop)
        kept: DiskTicket | None = put(link, store, bytes_of(6000))
        store.flush()
        kept.prefetch()
        until(lambda: store.stats.reads == 1)
        del loop
        gc.collect()
        with store._engine._changed:  # the collector runs under the lock: later
            del kept
            assert store.tickets >= 1
        store.poll()
        assert (store.tickets, store.free_bytes, store.resident_bytes) == (0, 2**20, 0)


def test_storage_of_nothing(tmp_path: Path) -> None:
    link = ThreadedLink()
    with opened(link, tmp_path) as store:
        ticket = store.put(torch.empty(0, dtype=torch.uint8))
        assert ticket.get().numel() == 0 and store.stats.writes == 0


def test_in_inference_mode(tmp_path: Path) -> None:
    """Threads of the store, which are in no such mode, may not write to tensors that were made in it."""
    link = ThreadedLink()
    with opened(link, tmp_path) as store:
        ticket = put(link, store, bytes_of(5_000))
        store.flush()
        with torch.inference_mode():
            back = ticket.get()
        assert not back.is_inference() and back.numpy().tobytes() == bytes_of(5_000)


def test_takes_its_device_only(tmp_path: Path) -> None:
    link = ThreadedLink()
    with opened(link, tmp_path) as store:
        assert store.takes(torch.device("cpu")) and not store.takes(torch.device("cuda", 0))
        assert store.device == torch.device("cpu") and store.get_blocks
        with pytest.raises(ul.ArgumentError, match="^source: a tensor on meta; copy it to the CPU"):
            store.put(torch.zeros(3, dtype=torch.uint8, device="meta"))
    with ul.DiskStore(tmp_path, "1MiB", threads=3, buffer_bytes="8KiB") as store:
        assert store.staging_bytes == store.resident_bytes == 3 * 8 * KIB and store.device == torch.device("cpu")


def test_copies_are_of_one_part_each(tmp_path: Path) -> None:
    """What two threads queue at once: each copy after its own tensor's event, in whatever order they come."""
    link = ThreadedLink(5)
    streams: list[Stream] = [link.main, link.side]
    with opened(link, tmp_path, "4MiB", threads=4, buffer_bytes=4 * KIB, poison=True, checksums=True) as store:
        tickets = []
        for i in range(24):
            with link.use(streams[i % 2]):
                tickets.append(put(link, store, bytes_of(9_000 + i, i)))
        seen = []
        store.flush()
        for i, ticket in enumerate(tickets):
            with link.use(streams[i // 2 % 2]):
                ticket.prefetch()
        for ticket in tickets:
            seen.append(get(link, ticket))
        link.run_all()
        assert seen == [[bytes_of(9_000 + i, i)] for i in range(24)]
        assert store.stats.bytes_read == store.stats.bytes_written == sum(9_000 + i for i in range(24))
