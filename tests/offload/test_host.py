"""The rules of `HostStore` one by one, on streams that go on when the test says so."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import ullage as ul
from tests.offload.streams import FREED, SimulatedLink, bytes_of, get, put
from ullage.offload import HostTicket, Stats, _stalls

POISON = bytes([0xA5])


def opened(link: SimulatedLink, capacity: int | str = "1MiB", **options: Any) -> ul.HostStore:
    return ul.HostStore(capacity, device="cpu", link=link, **options)


def test_a_round_trip() -> None:
    link = SimulatedLink()
    with opened(link) as store:
        tickets = [put(link, store, bytes_of(n, n)) for n in (1, 4096, 4097, 100_001)]
        assert store.free_bytes == 2**20 - 4096 * (1 + 1 + 2 + 25) and store.tickets == 4
        link.run_all()
        store.poll()
        assert store.resident_bytes == store.staging_bytes == 0
        for ticket in tickets:
            first, second = get(link, ticket), get(link, ticket)  # as in a second backward
            assert first == []  # the host has not waited
            link.run_all()
            assert first == second == [bytes_of(ticket.nbytes, ticket.nbytes)]
        stats = store.stats
        assert (stats.writes, stats.bytes_written, stats.reads, stats.bytes_read) == (4, 108_195, 8, 216_390)
        assert (stats.forwarded_bytes, stats.late_prefetches, store.ahead_bytes) == (0, 0, 0)
        for ticket in tickets:
            ticket.drop()
        assert (store.tickets, store.free_bytes) == (0, 2**20)


def test_a_source_is_held_until_it_has_left() -> None:
    link = SimulatedLink()
    with opened(link) as store:
        ticket = put(link, store, bytes_of(10_000))
        source = weakref.ref(ticket._record.held.untyped_storage())
        for _ in range(3):
            store.poll()
            assert source() is not None and store.backlog_bytes == store.resident_bytes == 10_000
            link.run(link.main)
        assert link.waits[0][0] == "out" and not store.stats.stalled_write_seconds  # only the stream out has waited
        link.run(link.out)
        store.poll()
        assert source() is None and store.backlog_bytes == 0


def test_the_stream_waits_for_room_and_the_host_does_not() -> None:
    link = SimulatedLink()
    with opened(link, backlog_bytes=30_000) as store:
        tickets = [put(link, store, bytes_of(10_000, i)) for i in range(3)]
        sources = [weakref.ref(t._record.held.untyped_storage()) for t in tickets]
        assert [name for name, _ in link.waits] == ["out"] * 3 and store.backlog_bytes == 30_000
        tickets += [put(link, store, bytes_of(20_000, 3))]
        assert [name for name, _ in link.waits[3:]] == ["main", "main", "out"]
        assert [e for name, e in link.waits if name == "main"] == [t._record.written for t in tickets[:2]]
        assert [s() is None for s in sources] == [True, True, False] and store.backlog_bytes == 30_000
        again = link.empty(10_000)  # of memory that a copy reads yet
        link.write(again, bytes_of(10_000, 9))
        link.run(link.main)
        assert len(link.main.queue) > 0  # it waits
        link.run_all()
        assert store.stats.stalled_write_seconds == 20_000
        seen = [get(link, t) for t in tickets]
        link.run_all()
        assert seen == [[bytes_of(t.nbytes, i)] for i, t in enumerate(tickets)]


def test_bytes_are_counted_as_the_allocator_rounds_them() -> None:
    link = SimulatedLink()
    link.round_bytes = 512
    with opened(link, backlog_bytes=1023, ahead_bytes=1024) as store:
        tickets = [put(link, store, bytes_of(n, n)) for n in (1, 512)]
        assert store.backlog_bytes == 512  # two would take 1,024
        link.run_all()
        store.poll()
        assert store.resident_bytes == 0
        for ticket in tickets:
            ticket.prefetch()
        assert store.ahead_bytes == 1024
        large = put(link, store, bytes_of(513, 3))
        large.prefetch()
        assert (store.ahead_bytes, store.backlog_bytes) == (1024, 0)  # itself it is larger than the backlog
        seen = [get(link, t) for t in (*tickets, large)]
        link.run_all()
        assert seen == [[bytes_of(1, 1)], [bytes_of(512, 512)], [bytes_of(513, 3)]]
        assert store.resident_bytes == 0


@pytest.mark.parametrize("bound", [0, 9_999])
def test_larger_than_the_backlog(bound: int) -> None:
    """Not counted, and not held when `put` returns: the stream has waited for it, and so for all before it."""
    link = SimulatedLink()
    with opened(link, backlog_bytes=bound) as store:
        small = put(link, store, bytes_of(5_000))
        large = put(link, store, bytes_of(10_000, 1))
        assert store.backlog_bytes == 0 and small._record.held is large._record.held is None
        mains = [e for name, e in link.waits if name == "main"]
        assert mains == [t._record.written for t in (small, large)[bound > 0 :]]
        seen = [get(link, t) for t in (small, large)]
        link.run_all()
        assert seen == [[bytes_of(5_000)], [bytes_of(10_000, 1)]] and store.stats.forwarded_bytes == 0


def test_forwarding() -> None:
    link = SimulatedLink()
    with opened(link, backlog_bytes=40_000, ahead_bytes=25_000) as store:
        tickets = [put(link, store, bytes_of(10_000, i)) for i in range(4)]
        at = [t._record.held.data_ptr() for t in tickets]
        assert [t.get().data_ptr() for t in tickets] == at and store.stats.forwarded_bytes == 40_000
        for ticket in tickets[1:]:
            ticket.prefetch()  # the charge of two moves; there is no room for the last
        assert (store.backlog_bytes, store.ahead_bytes) == (20_000, 20_000)
        tickets[0].drop()
        assert (store.tickets, store.free_bytes) == (3, 2**20 - 3 * 12_288)
        assert store.backlog_bytes == 20_000  # its copy is queued
        link.run_all()
        store.poll()
        assert (store.backlog_bytes, store.ahead_bytes) == (0, 20_000)
        assert tickets[1].get().data_ptr() == at[1] and store.ahead_bytes == 20_000  # the last comes back
        seen = [get(link, t) for t in tickets[1:]]
        link.run_all()
        assert seen == [[bytes_of(10_000, i)] for i in (1, 2, 3)]
        assert (store.stats.reads, store.stats.forwarded_bytes, store.ahead_bytes) == (2, 60_000, 0)


def test_seen_to_have_left_when_it_is_asked_for() -> None:
    link = SimulatedLink()
    with opened(link) as store:
        ticket, other = put(link, store, bytes_of(10_000)), put(link, store, bytes_of(10_000, 1))
        at = ticket._record.held.data_ptr()
        link.run_all()
        assert ticket.get().data_ptr() == at and store.backlog_bytes == 0  # handed back, and let go of
        assert other._record.held is None and store.stats.reads == 0
        seen = get(link, ticket)
        assert store.stats.reads == 1
        link.run_all()
        assert seen == [bytes_of(10_000)]


def test_ahead_bound() -> None:
    link = SimulatedLink()
    with opened(link, backlog_bytes=0, ahead_bytes=25_000) as store:
        tickets = [put(link, store, bytes_of(10_000, i)) for i in range(4)]
        large = put(link, store, bytes_of(25_001, 9))
        large.prefetch()  # never fits: left to `get`
        for ticket in tickets:
            ticket.prefetch()
            ticket.prefetch()
        assert (store.ahead_bytes, store.stats.reads, store.resident_bytes) == (20_000, 2, 20_000)
        link.run_all()
        assert store.ahead_bytes == 20_000
        seen = get(link, tickets[0])
        assert (store.ahead_bytes, store.stats.reads) == (20_000, 3)  # the third has begun
        tickets[1].drop()
        assert (store.ahead_bytes, store.stats.reads) == (20_000, 4)
        others = [get(link, t) for t in (tickets[3], tickets[2], large)]
        assert (store.ahead_bytes, store.stats.reads) == (0, 5)
        link.run_all()
        assert seen == [bytes_of(10_000)]
        assert others == [[bytes_of(10_000, 3)], [bytes_of(10_000, 2)], [bytes_of(25_001, 9)]]


def test_late_prefetches_are_known_later() -> None:
    link = SimulatedLink()
    with opened(link, backlog_bytes=0) as store:
        tickets = [put(link, store, bytes_of(10_000, i)) for i in range(4)]
        link.run_all()
        store.flush()
        before, told = store.stats, []
        for ticket in tickets[:3]:
            ticket.prefetch()
        link.launch(lambda: None, 15_000.0)
        get(link, tickets[0], lambda: told.append(0))  # here by then
        get(link, tickets[1], lambda: told.append(1))  # 5,000 seconds later
        get(link, tickets[3], lambda: told.append(3))  # never asked for ahead: after the third
        assert store.stats - before == Stats(bytes_read=40_000, reads=4) and told == []
        link.run_all()
        assert told == []  # nobody has called the store
        after = store.stats - before
        assert (after.late_prefetches, after.stalled_read_seconds, told) == (1, 25_000.0, [1])
        seen = get(link, tickets[2], lambda: told.append(2))
        link.run_all()
        store.flush()
        assert store.stats - before == after and told == [1] and seen == [bytes_of(10_000, 2)]


def test_on_time_though_not_seen_yet() -> None:
    """At the call the copy is not over; when the stream comes to it, it is."""
    link = SimulatedLink()
    with opened(link, backlog_bytes=0) as store:
        ticket, told = put(link, store, bytes_of(10_000)), []
        ticket.prefetch()
        link.launch(lambda: None, 10_000.0)
        seen = get(link, ticket, lambda: told.append(0))
        assert link.waits[-1] == ("main", ticket._record.ready)
        link.run_all()
        store.poll()
        assert seen == [bytes_of(10_000)]
        assert (store.stats.late_prefetches, store.stats.stalled_read_seconds, told) == (0, 0, [])


def test_told_without_the_lock() -> None:
    """Whoever is told may call the store."""
    link = SimulatedLink()
    with opened(link, backlog_bytes=0) as store:
        ticket, told = put(link, store, bytes_of(10_000)), []
        ticket.prefetch()
        get(link, ticket, lambda: told.append(store.stats.late_prefetches))
        link.run_all()
        store.poll()
        assert told == [1]
        ticket.prefetch()
        get(link, ticket, lambda: told.append(store.stats.late_prefetches))
    assert told == [1, 2]  # at the latest when it is closed


def test_waits_that_are_not_over_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stalls, "MOST_PENDING", 5)
    link = SimulatedLink()
    with opened(link, backlog_bytes=0) as store:
        tickets = [put(link, store, bytes_of(4096, i)) for i in range(9)]
        assert len(store._engine.books.stalls._pending) == 6  # of one call at most more
        assert link.host > 0  # it has waited for the oldest
        seen = [get(link, t) for t in tickets]
        link.run_all()
        assert seen == [[bytes_of(4096, i)] for i in range(9)]


def test_waiting_for_less() -> None:
    link = SimulatedLink()
    with opened(link) as store:
        tickets = [put(link, store, bytes_of(10_000, i)) for i in range(3)]
        assert store.wait_until_resident_at_most(30_000) and store.backlog_bytes == 30_000
        assert store.wait_until_resident_at_most(10_000) and store.backlog_bytes == 10_000
        assert [e for name, e in link.waits if name == "main"] == [t._record.written for t in tickets[:2]]
        tickets[2].prefetch()
        assert not store.wait_until_resident_at_most(9_999) and store.ahead_bytes == 10_000
        assert link.host == 0
        store.flush()
        assert link.host == 30_000 and not link.out.queue and store.stats.stalled_write_seconds > 20_000


def test_written_to_before_it_has_left() -> None:
    link = SimulatedLink()
    with opened(link) as store:
        source = link.empty(10_000)
        ticket, other = store.put(source), store.put(source.untyped_storage())
        source.add_(1)
        for _ in range(2):
            with pytest.raises(
                ul.OffloadError, match="in host memory: a tensor of 10000 bytes was modified by an inplace"
            ):
                ticket.get()
        ticket.prefetch()
        link.run_all()  # it may have met the copy: that it has left now does not help
        store.poll()
        with pytest.raises(ul.OffloadError, match="before it was written") as caught:
            ticket.get()
        assert (caught.value.path, caught.value.nbytes) == (None, 10_000) and store.resident_bytes == 0
        assert other.nbytes == 10_000


@pytest.mark.parametrize("waits", [False, True])
def test_written_to_and_then_let_go_of(waits: bool) -> None:
    """Nobody asked in between: it was queued before the copy was waited for, or seen to be done."""
    link = SimulatedLink()
    with opened(link) as store:
        source = link.empty(10_000)
        ticket = store.put(source)
        ticket.prefetch()
        source.add_(1)
        if not waits:
            link.run_all()
        assert store.wait_until_resident_at_most(0) and store.ahead_bytes == 0
        del source
        with pytest.raises(ul.OffloadError, match="before it was written"):
            ticket.get()


def test_written_to_after_the_stream_has_waited() -> None:
    link = SimulatedLink()
    with opened(link) as store:
        source = link.empty(10_000)
        link.write(source, bytes_of(10_000))
        ticket = store.put(source)
        store.wait_until_resident_at_most(0)
        source.detach_()  # no new counter
        torch._C._autograd._unsafe_set_version_counter((source,), (source._version + 1,))
        link.write(source, bytes_of(10_000, 1))
        seen = get(link, ticket)
        link.run_all()
        assert seen == [bytes_of(10_000)]


def test_kept_by_a_prefetch_and_written_to_after_it_has_left() -> None:
    link = SimulatedLink()
    with opened(link) as store:
        source = link.empty(10_000)
        link.write(source, bytes_of(10_000))
        ticket = store.put(source)
        ticket.prefetch()
        link.run_all()
        store.poll()
        assert (store.ahead_bytes, store.backlog_bytes) == (10_000, 0)
        source.zero_()
        seen = get(link, ticket)
        assert (store.stats.reads, store.stats.forwarded_bytes) == (1, 0)
        link.run_all()
        assert seen == [bytes_of(10_000)]


def test_a_place_is_not_written_to_while_it_is_read() -> None:
    link = SimulatedLink()
    with opened(link, 3 * 4096, backlog_bytes=0) as store:
        ticket = put(link, store, bytes_of(10_000))
        link.run_all()
        seen = get(link, ticket)
        ready = ticket._record.ready
        ticket.drop()
        assert store.free_bytes == store.capacity
        again = put(link, store, bytes_of(4096, 1))
        assert ("out", ready) in link.waits
        link.run(link.main, link.out)
        assert len(link.out.queue) > 0  # it waits
        link.run_all()
        assert seen == [bytes_of(10_000)]
        apart = [n for n, e in link.waits if e is ready].count("out")
        put(link, store, bytes_of(4096, 2))
        assert [n for n, e in link.waits if e is ready].count("out") == apart == 1  # it is over
        assert again.nbytes == 4096


def test_a_target_that_nobody_takes() -> None:
    """Its memory goes back at once; the stream waits before it is written to again."""
    link = SimulatedLink()
    with opened(link, backlog_bytes=0) as store:
        ticket = put(link, store, bytes_of(10_000))
        link.run_all()
        with link.use(link.side):
            ticket.prefetch()
        ready = ticket._record.ready
        ticket.drop()
        assert store.resident_bytes == 0 and link.waits[-1] == ("side", ready)
        with link.use(link.side):
            again = link.empty(10_000)
            link.write(again, bytes_of(10_000, 1))
        link.run(link.side)
        assert len(link.side.queue) > 0
        seen: list[bytes] = []
        link.read(again, seen.append, link.side)
        link.run_all()
        assert seen == [bytes_of(10_000, 1)]


def test_streams_other_than_before() -> None:
    """Each tensor's own stream waits for it; what is handed to another is in order there, and not reused too early."""
    link = SimulatedLink()
    with opened(link, backlog_bytes=10_000) as store:
        ticket = put(link, store, bytes_of(10_000))
        with link.use(link.side):
            seen = get(link, ticket)  # the original
            assert link.waits[-1] == ("side", ticket._record.born)
            put(link, store, bytes_of(5_000, 1))
        assert ("main", ticket._record.written) in link.waits and ("side", ticket._record.written) not in link.waits
        ticket.prefetch()
        with link.use(link.side):
            again = get(link, ticket)
        assert link.waits[-1] == ("side", ticket._record.ready)
        link.write(link.empty(10_000), bytes_of(10_000, 2))  # the same memory
        link.run(link.main, link.out, link.into)
        assert len(link.main.queue) > 0
        link.run_all()
        assert seen == again == [bytes_of(10_000)]


def test_poison() -> None:
    link = SimulatedLink()
    with opened(link, 6 * 4096, backlog_bytes=0, poison=True) as store:
        ticket, stays = put(link, store, bytes(9_000)), put(link, store, bytes_of(4096))
        ticket.prefetch()
        target = ticket._record.held
        link.run(link.main, link.out)
        assert target.numpy().tobytes() == POISON * 9_000
        link.run_all()
        assert target.numpy().tobytes() == bytes(9_000)
        ticket.drop()
        assert link.pinned[0][:9_000].numpy().tobytes() == bytes(9_000)  # in the order of the streams
        link.run_all()
        assert target.numpy().tobytes() == link.pinned[0][:9_000].numpy().tobytes() == POISON * 9_000
        seen = get(link, stays)
        link.run_all()
        assert seen == [bytes_of(4096)]
        source = link.empty(4096)
        link.write(source, bytes_of(4096, 1))
        store.put(source).drop()
        link.run_all()
        store.poll()
        assert source.numpy().tobytes() == bytes_of(4096, 1)  # the caller's is left alone


def test_poison_is_in_the_order_of_the_memory() -> None:
    """Of a target that nobody took, where another stream is current when it is dropped; and of a place that is read yet."""
    link = SimulatedLink()
    with opened(link, backlog_bytes=0, poison=True) as store:
        ticket = put(link, store, bytes_of(10_000))
        link.run_all()
        with link.use(link.side):
            ticket.prefetch()
        ticket.drop()
        seen: list[bytes] = []
        with link.use(link.side):
            again = link.empty(10_000)
            link.write(again, bytes_of(10_000, 1))
        link.run(link.side, link.out, link.into)
        link.run(link.main)
        link.read(again, seen.append)
        link.run_all()
        assert seen == [bytes_of(10_000, 1)]
        other = put(link, store, bytes_of(10_000, 2))
        link.run_all()
        back = get(link, other)
        other.drop()
        link.run(link.out)
        assert len(link.out.queue) > 0  # it waits
        link.run_all()
        assert back == [bytes_of(10_000, 2)] and store.free_bytes == store.capacity


def test_what_is_asked_for_before_it_has_left_comes_after_that() -> None:
    link = SimulatedLink()
    with opened(link, backlog_bytes=0) as store:
        ticket = put(link, store, bytes_of(10_000))
        seen = get(link, ticket)
        link.run(link.into)
        assert len(link.into.queue) > 0 and ("in", ticket._record.written) in link.waits
        link.run_all()
        assert seen == [bytes_of(10_000)]


def test_memory_that_is_let_go_of_is_overwritten_by_the_link() -> None:
    """The simulation would show an error: here there is one, on purpose."""
    link = SimulatedLink()
    source, seen = link.empty(100), []
    link.write(source, bytes_of(100))
    link.read(source, seen.append, link.side)  # without an event
    del source
    link.run(link.main)
    link.run(link.side)
    assert seen == [bytes([FREED]) * 100]


def test_laid_out_over_gaps() -> None:
    link = SimulatedLink()
    with opened(link, 40 * 4096, poison=True) as store:
        tickets = [put(link, store, bytes_of(4096 * n, n)) for n in (7, 1, 9, 1, 22)]
        for i in (0, 2, 4):
            tickets[i].drop()
        large = put(link, store, bytes_of(38 * 4096 - 5, 99))
        assert store.free_bytes == 0 and len(large._record.parts) == 3
        store.flush()
        seen = [get(link, t) for t in (large, tickets[1], tickets[3])]
        link.run_all()
        assert seen == [[bytes_of(38 * 4096 - 5, 99)], [bytes_of(4096, 1)], [bytes_of(4096, 1)]]


def test_tickets_that_nobody_holds() -> None:
    link = SimulatedLink()
    with opened(link) as store:
        loop: list[object] = [put(link, store, bytes_of(5_000))]
        loop.append(loop)
        kept: HostTicket | None = put(link, store, bytes_of(6_000))
        del loop
        gc.collect()
        assert (store.tickets, store.free_bytes, store.backlog_bytes) == (1, 2**20 - 2 * 4096, 11_000)
        with store._engine._changed:  # the collector runs under the lock: later
            del kept
            assert store.tickets == 1
        link.run_all()
        store.poll()
        assert (store.tickets, store.free_bytes, store.resident_bytes) == (0, 2**20, 0)
