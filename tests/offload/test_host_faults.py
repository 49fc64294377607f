"""What goes wrong with a `HostStore`, and what is refused; other processes; what is left afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ullage as ul
from tests.offload.hosted import bytes_of, get, opened, put
from tests.offload.streams import SimulatedLink
from ullage.offload import HostTicket, _host

ROOT = Path(__file__).parents[2]


def test_arguments() -> None:
    link = SimulatedLink()
    with pytest.raises(ul.DeviceError, match="^device='cpu': has no tier in host memory: memory is the host's there"):
        ul.HostStore("1MiB", device="cpu")
    with pytest.raises(ul.DeviceError, match="^device='xpu': .* for CUDA devices only; give a CUDA device"):
        ul.HostStore("1MiB", device="xpu")
    with pytest.raises(ul.ArgumentError, match="^device='cuda:0': the link is to cpu"):
        ul.HostStore("1MiB", device="cuda:0", link=link)
    for wrong in ({"capacity": 100}, {"capacity": 0}, {"backlog_bytes": "half"}, {"ahead_bytes": -1}):
        with pytest.raises(ul.UllageError, match=f"^{next(iter(wrong))}="):
            ul.HostStore(**{"capacity": 4096, "device": "cpu", "link": link, **wrong})
    assert link.pinned == []
    with opened(link) as store:
        for source in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)[::2]):
            with pytest.raises(ul.ArgumentError, match="^source: torch.* not flat contiguous uint8"):
                store.put(source)
        with pytest.raises(ul.ArgumentError, match="^source: a tensor on meta; copy it to the CPU"):
            store.put(torch.zeros(3, dtype=torch.uint8, device="meta"))
        assert (store.tickets, store.device, store.notes) == (0, torch.device("cpu"), ())
        assert repr(store) == "<HostStore of cpu, 1.00 MiB: 0 tensors, 1.00 MiB free>"


def test_much_of_the_machine_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SC_PHYS_PAGES": 500, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(_host.os, "sysconf", sizes.__getitem__)
    with opened(SimulatedLink(), "1MiB") as store:
        assert store.notes == ("1.00 MiB of this machine's 1.95 MiB are locked until the store is closed",)
    with opened(SimulatedLink(), 4096 * 250) as store:
        assert store.notes == ()


def test_full() -> None:
    link = SimulatedLink()
    with opened(link, 5 * 4096 + 100) as store:
        assert store.capacity == 5 * 4096
        kept = put(link, store, bytes_of(4097))
        before = len(link.waits)
        with pytest.raises(ul.OffloadError) as caught:
            put(link, store, bytes_of(3 * 4096 + 1))
        assert str(caught.value) == (
            "offload store in host memory: a tensor of 12289 bytes needs 16384 bytes (blocks of 4 KiB), 12288 are available "
            "of capacity=20480 (20.00 KiB); raise it, or drop tensors earlier; under a plan: plan again with the step as it runs"
        )
        assert (caught.value.path, caught.value.nbytes, len(link.waits)) == (None, 12_289, before)
        fits = put(link, store, bytes_of(3 * 4096))
        assert (store.free_bytes, store.tickets, kept.nbytes) == (0, 2, 4097)
        kept.drop()
        again = put(link, store, bytes_of(5_000, 1))  # its place is free though nothing has been copied yet
        seen = [get(link, t) for t in (fits, again)]
        link.run_all()
        assert seen == [[bytes_of(3 * 4096)], [bytes_of(5_000, 1)]]


def test_after_drop_and_close() -> None:
    link = SimulatedLink()
    store = opened(link)
    tickets = [put(link, store, bytes_of(10_000)) for _ in range(2)]
    tickets[1].drop()
    tickets[1].drop()
    for call in (tickets[1].get, tickets[1].prefetch, tickets[1].recover):
        with pytest.raises(ul.OffloadError, match="^offload store in host memory: this tensor was dropped"):
            call()
    with pytest.raises(ul.OffloadError, match="nothing to recover: no write of this tensor failed"):
        tickets[0].recover()
    sources = [weakref.ref(t._record.held.untyped_storage()) for t in tickets]
    stats, slab = store.stats, weakref.ref(link.pinned[0].untyped_storage())
    store.close()
    store.close()
    assert store.closed and [s() for s in sources] == [None, None] and link.pinned == [] and slab() is None
    assert repr(store) == "<HostStore of cpu, 1.00 MiB: closed>"
    assert store.stats == stats and store.resident_bytes == store.tickets == 0
    for use in (
        tickets[0].get,
        tickets[0].prefetch,
        tickets[0].recover,
        store.poll,
        store.flush,
        lambda: store.wait_until_resident_at_most(0),
        lambda: store.put(torch.zeros(1, dtype=torch.uint8)),
    ):
        with pytest.raises(ul.OffloadError, match="^offload store in host memory: is closed; make another"):
            use()
    tickets[0].drop()


def test_store_that_nobody_holds() -> None:
    link = SimulatedLink()
    ticket = put(link, opened(link), bytes_of(10_000))
    seen = get(link, ticket)  # a ticket holds its store
    link.run_all()
    assert seen == [bytes_of(10_000)] and len(link.pinned) == 1
    del ticket
    assert link.pinned == []


def test_the_device_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    link = SimulatedLink()
    with opened(link, backlog_bytes=0) as store:
        ticket, other = put(link, store, bytes_of(10_000)), put(link, store, bytes_of(9_000))

        def none(nbytes: int) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(link, "empty", none)
            ticket.prefetch()  # is given up
            store.poll()
            assert (store.ahead_bytes, store.stats.reads) == (0, 0)
            with pytest.raises(torch.OutOfMemoryError):
                ticket.get()
            assert (store.ahead_bytes, store.stats.reads, store.tickets) == (0, 0, 2)
        other.prefetch()
        seen = [get(link, ticket), get(link, other)]
        link.run_all()
        assert seen == [[bytes_of(10_000)], [bytes_of(9_000)]]


@pytest.mark.parametrize("name", ["copy_out", "copy_in"])
def test_a_copy_that_is_queued_in_part(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is let go of when that part is over, and the books are as before."""
    link = SimulatedLink()
    with opened(link, backlog_bytes=50_000) as store:
        kept = put(link, store, bytes_of(5_000))
        store.flush()
        before = store.free_bytes, store.tickets, store.resident_bytes
        real = getattr(link, name)

        def breaks(*arguments: Any) -> Any:
            real(*arguments)
            raise RuntimeError("CUDA error: unspecified launch failure")

        with monkeypatch.context() as patch:
            patch.setattr(link, name, breaks)
            with pytest.raises(RuntimeError, match="unspecified"):
                put(link, store, bytes_of(7_000)) if name == "copy_out" else kept.get()
            assert not link.out.queue and not link.into.queue
        assert (store.free_bytes, store.tickets, store.resident_bytes) == before
        seen = [get(link, t) for t in (kept, put(link, store, bytes_of(7_000, 1)))]
        link.run_all()
        assert seen == [[bytes_of(5_000)], [bytes_of(7_000, 1)]]


def test_a_lost_device_leaves_nothing_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    link = SimulatedLink()
    store = opened(link)
    ticket = put(link, store, bytes_of(5_000))
    link.run_all()

    def lost() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with monkeypatch.context() as patch:
        patch.setattr(link, "drain", lost)
        with pytest.raises(RuntimeError, match="device-side assert"):
            store.close()
    assert link.pinned == [] and store.closed and store.resident_bytes == 0
    store.close()
    ticket.drop()


def test_threads() -> None:
    """Each puts, asks ahead and gets its own; links of devices are safe for threads, so the simulation is locked here."""
    link, errors = SimulatedLink(), []
    turn = threading.RLock()
    for name in ("copy_out", "copy_in", "mark", "wait", "done", "empty", "fill", "fill_slab", "go_on", "read", "write"):
        real = getattr(link, name)

        def locked(*arguments: Any, real: Callable[..., Any] = real) -> Any:
            with turn:
                return real(*arguments)

        setattr(link, name, locked)
    with opened(link, "4MiB", backlog_bytes=40_000, ahead_bytes=40_000, poison=True) as store:

        def work(n: int) -> None:
            try:
                for k in range(20):
                    wanted = [bytes_of(3_000 + n, 1000 * n + 10 * k + i) for i in range(3)]
                    tickets = [put(link, store, w) for w in wanted]
                    link.go_on(5)
                    for ticket in reversed(tickets):
                        ticket.prefetch()
                    seen = [get(link, t) for t in tickets]
                    while not all(seen):
                        link.go_on(5)
                    assert seen == [[w] for w in wanted]
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert errors == []
        store.poll()
        assert (store.tickets, store.free_bytes, store.stats.writes) == (0, 2**22, 240)


def test_fork() -> None:
    link = SimulatedLink()
    with opened(link) as store:
        ticket, other = put(link, store, bytes_of(10_000)), put(link, store, bytes_of(10_000, 1))
        link.run_all()
        store.poll()
        other.prefetch()
        mine, theirs = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: forks and threads
            child = os.fork()
        if not child:
            os.write(theirs, _in_child(store, ticket).encode())
            os._exit(0)
        os.close(theirs)
        os.waitpid(child, 0)
        with os.fdopen(mine) as said:
            found = said.read().splitlines()
        text = f"offload store in host memory: was made in process {os.getpid()}, this is a fork; make another"
        assert found == [text] * 4 + ["0 bytes of the memory, 0 copies more"]
        seen = [get(link, t) for t in (ticket, other)]
        link.run_all()
        assert seen == [[bytes_of(10_000)], [bytes_of(10_000, 1)]]


def _in_child(store: ul.HostStore, ticket: HostTicket) -> str:
    said, link = [], store._engine.link
    before = len(link.waits)  # type: ignore[attr-defined]
    for use in (store.poll, ticket.get, ticket.prefetch, lambda: store.put(torch.zeros(5, dtype=torch.uint8))):
        try:
            use()
        except ul.OffloadError as error:
            said.append(str(error))
    ticket.drop()
    del ticket
    store.stats  # noqa: B018 - asks no device
    store.close()
    more = len(link.waits) - before  # type: ignore[attr-defined]
    said.append(f"{store._engine.books.slab.numel()} bytes of the memory, {more} copies more")
    return "\n".join(said)


AT_EXIT = """
import ullage as ul
from tests.offload.hosted import bytes_of, put
from tests.offload.streams import SimulatedLink
class Link(SimulatedLink):
    def unpin(self, slab):
        super().unpin(slab)
        print("unpinned", len(self.pinned), self.out.time, flush=True)
link = Link()
store = ul.HostStore("1MiB", device="cpu", link=link)
tickets = [put(link, store, bytes_of(5000)) for _ in range(3)]
"""


def test_at_exit_copies_are_over_before_the_memory_goes() -> None:
    command = [sys.executable, "-W", "error", "-c", AT_EXIT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "unpinned 0 15000.0\n", "")
