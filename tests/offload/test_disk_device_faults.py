"""What goes wrong with a `DiskStore` of a device: the disk, the device, processes; the data is never wrong and no thread is lost."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ullage as ul
from tests.offload.conftest import data, until
from tests.offload.hosted import bytes_of, get, put
from tests.offload.streams import ThreadedLink
from tests.offload.test_faults import fails
from ullage.offload import DiskTicket, _link
from ullage.offload._link import CudaLink

LOST = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"


def opened(link: ThreadedLink, at: Path, capacity: int | str = "1MiB", **options: Any) -> ul.DiskStore:
    return ul.DiskStore(at, capacity, device="cpu", link=link, **options)


def alive(store: ul.DiskStore) -> bool:
    return all(thread.is_alive() for thread in store._engine._threads)


def test_a_write_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = ThreadedLink()
    with opened(link, tmp_path) as store:
        before = put(link, store, bytes_of(5_000, 1))
        store.flush()
        source = link.empty(10_000)
        link.write(source, bytes_of(10_000))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fails(errno.ENOSPC))
            ticket = store.put(source)
            until(lambda: store._engine.books.outgoing == 0)
        text = f"^offload store in {tmp_path}: could not write a tensor of 10000 bytes: No space left on device .ENOSPC.; free"
        for use in (ticket.get, ticket.get, lambda: store.put(source), store.flush):
            with pytest.raises(ul.OffloadError, match=text):
                use()
        with link.use(link.side):
            kept = ticket.recover()
            assert kept.data_ptr() == source.data_ptr() and link.waits[-1][0] == "side"
        seen = get(link, before)
        link.run_all()
        assert seen == [bytes_of(5_000, 1)] and kept.numpy().tobytes() == bytes_of(10_000) and alive(store)
        ticket.drop()
        assert store.backlog_bytes == 0
    assert link.pinned == []


def test_a_read_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = ThreadedLink()
    with opened(link, tmp_path, poison=True) as store:
        ticket = put(link, store, bytes_of(10_000))
        store.flush()
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fails(errno.EIO))
            with pytest.raises(ul.OffloadError, match="could not read a tensor of 10000 bytes: Input/output error"):
                ticket.get()
            ticket.prefetch()
            until(lambda: ticket._record.failure is not None and not ticket._record.left)
            patch.setattr(os, "preadv", lambda *_: 0)
            with pytest.raises(ul.OffloadError, match="Input/output error"):
                ticket.get()
            with pytest.raises(ul.OffloadError, match="only 0 of 12288 bytes came back"):
                ticket.get()
        seen = get(link, ticket)
        link.run_all()
        assert seen == [bytes_of(10_000)] and store.ahead_bytes == 0 and alive(store)


def test_short_transfers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = ThreadedLink()
    with opened(link, tmp_path, poison=True, checksums=True) as store:
        calls = {"pwritev": 0, "preadv": 0}
        for name in calls:
            real = getattr(os, name)

            def short(fd: int, buffers: Any, offset: int, real: Any = real, name: str = name) -> int:
                calls[name] += 1
                return real(fd, [buffers[0][:8192]], offset)  # type: ignore[no-any-return]

            monkeypatch.setattr(os, name, short)
        ticket = put(link, store, bytes_of(100_000))
        store.flush()
        seen = get(link, ticket)
        link.run_all()
        assert seen == [bytes_of(100_000)] and calls == {"pwritev": 13, "preadv": 13}


def broken(link: ThreadedLink, patch: pytest.MonkeyPatch, how: str) -> None:
    """Copies, or waits for them, end in an error of the device; what was queued may still run."""
    real = link.synchronize if how == "synchronize" else getattr(link, how)

    def breaks(*arguments: Any) -> Any:
        if how == "synchronize":
            patch.setattr(link, "synchronize", real)  # once
        else:
            real(*arguments)
        raise RuntimeError(LOST)

    patch.setattr(link, how, breaks)


@pytest.mark.parametrize("how", ["copy_out", "synchronize"])
def test_the_device_fails_on_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    link = ThreadedLink()
    with opened(link, tmp_path, threads=1) as store:
        before = put(link, store, bytes_of(9_000, 1))
        store.flush()
        with monkeypatch.context() as patch:
            broken(link, patch, how)
            ticket = put(link, store, bytes_of(10_000))
            until(lambda: store._engine.books.outgoing == 0)
        assert not link.out.queue  # the staging buffer has other uses now
        text = "could not write a tensor of 10000 bytes: cpu reports an error in a copy: CUDA error: an illegal memory access was "
        text += "encountered; it may be of any kernel before: .*CUDA_LAUNCH_BLOCKING=1 .*The tensor is still in memory"
        for use in (ticket.get, store.flush):
            with pytest.raises(ul.OffloadError, match=text):
                use()
        assert ticket.recover().numpy().tobytes() == bytes_of(10_000)
        seen = get(link, before)
        link.run_all()
        assert seen == [bytes_of(9_000, 1)] and alive(store)


@pytest.mark.parametrize("how", ["copy_in", "synchronize"])
def test_the_device_fails_on_the_way_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The copy is over before its target is let go of, and the next `get` tries again."""
    link = ThreadedLink()
    with opened(link, tmp_path, threads=1, poison=True) as store:
        ticket, other = put(link, store, bytes_of(10_000)), put(link, store, bytes_of(9_000, 1))
        store.flush()
        with monkeypatch.context() as patch:
            broken(link, patch, how)
            ticket.prefetch()
            until(lambda: ticket._record.failure is not None and not ticket._record.left)
        assert not link.into.queue
        with pytest.raises(
            ul.OffloadError, match="could not read a tensor of 10000 bytes: cpu reports an error in a copy: CUDA"
        ):
            ticket.get()
        seen = [get(link, t) for t in (ticket, other)]
        link.run_all()
        assert seen == [[bytes_of(10_000)], [bytes_of(9_000, 1)]] and store.resident_bytes == 0 and alive(store)


def test_poison_of_a_lost_device_ends_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where threads let go of targets themselves."""
    link = ThreadedLink(held=True)
    with opened(link, tmp_path, threads=1, poison=True, release_in_caller=False) as store:
        link.held = False
        ticket = put(link, store, bytes_of(10_000))
        store.flush()
        link.held = True
        ticket.prefetch()
        until(lambda: bool(link.into.queue))

        def lost(*_: Any) -> None:
            raise RuntimeError(LOST)

        ticket.drop()
        with monkeypatch.context() as patch:
            patch.setattr(link, "fill", lost)
            link.run_all()
            until(lambda: store.ahead_bytes == 0)
        link.held = False
        seen = get(link, put(link, store, bytes_of(9_000)))
        link.run_all()
        assert seen == [bytes_of(9_000)] and alive(store)


def test_the_device_is_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = ThreadedLink()
    with opened(link, tmp_path, backlog_bytes=0) as store:
        ticket, other = put(link, store, bytes_of(10_000)), put(link, store, bytes_of(9_000, 1))

        def none(nbytes: int) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(link, "empty", none)
            ticket.prefetch()  # is given up
            store.poll()
            with pytest.raises(torch.OutOfMemoryError):
                ticket.get()
            assert (store.ahead_bytes, store.stats.reads, store.tickets) == (0, 0, 2)
        other.prefetch()
        seen = [get(link, ticket), get(link, other)]
        link.run_all()
        assert seen == [[bytes_of(10_000)], [bytes_of(9_000, 1)]]


@pytest.mark.parametrize("name", ["mark", "fill"])
def test_what_a_lost_device_refuses_is_not_in_the_books(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    link = ThreadedLink()
    with opened(link, tmp_path, backlog_bytes=0, poison=True) as store:
        ticket = put(link, store, bytes_of(10_000))
        source = link.empty(5_000)

        def lost(*_: Any) -> None:
            raise RuntimeError(LOST)

        for use in (ticket.get, lambda: store.put(source)) if name == "mark" else (ticket.get,):
            with monkeypatch.context() as patch:
                patch.setattr(link, name, lost)
                with pytest.raises(RuntimeError, match="illegal memory access"):
                    use()
            assert (store.tickets, store.free_bytes, store.resident_bytes) == (1, 2**20 - 12_288, 0)
        seen = get(link, ticket)
        link.run_all()
        assert seen == [bytes_of(10_000)] and alive(store)


def test_close_waits_for_copies_and_unpins(tmp_path: Path) -> None:
    link = ThreadedLink(held=True)
    store = opened(link, tmp_path, threads=2)
    tickets = [put(link, store, bytes_of(10_000, i)) for i in range(3)]
    until(lambda: len(link.out.queue) == 6)
    link.held = False
    store.close()
    store.close()
    assert link.pinned == [] and store.closed and store.stats.writes == 2 and store.resident_bytes == 0
    for use in (tickets[0].get, store.poll, lambda: store.put(data(1))):
        with pytest.raises(ul.OffloadError, match=f"^offload store in {tmp_path}: is closed; make another"):
            use()


def test_closed_by_a_thread_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = ThreadedLink()
    store = opened(link, tmp_path, threads=3)
    engine, real = store._engine, os.pwritev

    def transfer(*arguments: Any) -> int:
        engine.close()
        return real(*arguments)

    monkeypatch.setattr(os, "pwritev", transfer)
    ticket = put(link, store, bytes_of(10_000))
    until(lambda: not any(thread.is_alive() for thread in engine._threads))
    assert link.pinned == []
    with pytest.raises(ul.OffloadError, match="is closed"):
        ticket.get()
    store.close()


def test_nothing_is_left_pinned_if_it_can_not_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = ThreadedLink()
    fds = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ul.OffloadError, match="No such file"):
        opened(link, tmp_path / "none")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails(errno.EAGAIN))
        with pytest.raises(OSError, match="temporarily unavailable"):
            opened(link, tmp_path)
    assert link.pinned == [] and len(list(Path("/proc/self/fd").iterdir())) == fds


def test_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ul.DeviceError, match="^device='xpu': tensors of the CPU or of a CUDA device go to disk; give one"
    ):
        ul.DiskStore(tmp_path, "1MiB", device="xpu")
    with pytest.raises(ul.ArgumentError, match="^device='cuda:0': the link is to cpu"):
        ul.DiskStore(tmp_path, "1MiB", device="cuda:0", link=ThreadedLink())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ul.DeviceError, match="^device='cuda:1': this process sees no CUDA device"):
        ul.DiskStore(tmp_path, "1MiB", device="cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ul.DeviceError, match="^device='cuda:1': this process sees 1 CUDA devices"):
        ul.measure_bandwidth(tmp_path, device="cuda:1")


def test_staging_that_can_not_be_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    link = object.__new__(CudaLink)
    link.device = torch.device("cpu")
    monkeypatch.setattr(_link.mmap, "mmap", none)
    text = "^offload store: can't have 4.00 MiB .4194304 bytes. pinned: Cannot allocate memory; lower threads or buffer_bytes, free"
    with pytest.raises(ul.OffloadError, match=text):
        ul.DiskStore(tmp_path, "1MiB", device="cpu", link=link)


def test_fork(tmp_path: Path) -> None:
    link = ThreadedLink()
    with opened(link, tmp_path, poison=True) as store:
        ticket, other = put(link, store, bytes_of(10_000)), put(link, store, bytes_of(10_000, 1))
        store.flush()
        other.prefetch()
        until(lambda: store.stats.reads == 1)
        mine, theirs = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: forks and threads
            child = os.fork()
        if not child:
            os.write(theirs, _in_child(store, link, ticket).encode())
            os._exit(0)
        os.close(theirs)
        os.waitpid(child, 0)
        with os.fdopen(mine) as said:
            found = said.read().splitlines()
        text = f"offload store in {tmp_path}: was made in process {os.getpid()}, this is a fork; make another"
        assert found == [text] * 4 + ["no call of the link, 1 pinned, descriptor closed"]
        seen = [get(link, t) for t in (ticket, other)]
        link.run_all()
        assert seen == [[bytes_of(10_000)], [bytes_of(10_000, 1)]]


def _in_child(store: ul.DiskStore, link: ThreadedLink, ticket: DiskTicket) -> str:
    said, called = [], []
    source = data(5)

    def no(name: str) -> Callable[..., Any]:
        return lambda *_: called.append(name)

    for name in ("mark", "current", "wait", "share", "fill", "empty", "unpin", "copy_out", "copy_in", "drain"):
        setattr(link, name, no(name))
    for use in (store.poll, ticket.get, ticket.prefetch, lambda: store.put(source)):
        try:
            use()
        except ul.OffloadError as error:
            said.append(str(error))
    ticket.drop()
    del ticket
    store.close()
    try:
        os.fstat(store._engine.mover.file.fd)
    except OSError:
        said.append(f"{called or 'no'} call of the link, {len(link.pinned)} pinned, descriptor closed")
    return "\n".join(said)


def test_bandwidth(tmp_path: Path) -> None:
    link = ThreadedLink(steps=0)
    found = ul.measure_bandwidth(tmp_path, "1MiB", device="cpu", link=link)
    assert found.write_bytes_per_s > 0 and found.read_bytes_per_s > 0 and link.pinned == []
    # a byte a second: it all went through the link, twice out and then once in; then 32 blocks out and in, and 16 times one
    assert (link.out.time, link.into.time) == (3 * 2**20 + 95 * 4096, 3 * 2**20 + 96 * 4096)
    assert list(tmp_path.iterdir()) == []
