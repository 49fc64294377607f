"""The rules of `HostStore` one by one, on streams that go on when the test says so."""

from __future__ import annotations

import gc
import weakref

import pytest

from tests.offload.hosted import bytes_of, get, opened, put
from tests.offload.streams import FREED, SimulatedLink
from ullage.offload import HostTicket

POISON = bytes([0xA5])


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
