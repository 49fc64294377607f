"""Who waits for whom in a `HostStore`, how long, and what is seen of writes in place; on streams that the test has go on."""

from __future__ import annotations

import pytest
import torch

import ullage as ul
from tests.offload.hosted import bytes_of, get, opened, put
from tests.offload.streams import SimulatedLink
from ullage.offload import Stats, _stalls

POISON = bytes([0xA5])


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


def test_what_is_asked_for_before_it_has_left_comes_after_that() -> None:
    link = SimulatedLink()
    with opened(link, backlog_bytes=0) as store:
        ticket = put(link, store, bytes_of(10_000))
        seen = get(link, ticket)
        link.run(link.into)
        assert len(link.into.queue) > 0 and ("in", ticket._record.written) in link.waits
        link.run_all()
        assert seen == [bytes_of(10_000)]
