"""What the system does wrong comes out as an error of ours, with the data never wrong and never lost in silence."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ullage as ul
from tests.offload.conftest import data, until
from ullage.offload import DiskTicket, _record

ACTIONS = {
    errno.ENOSPC: "free space there, lower the capacity or name another directory",
    errno.EIO: r"the drive reports an error, see the kernel's log \(dmesg\)",
    errno.EROFS: "the filesystem is read-only: name another directory",
    errno.EDQUOT: "the disk quota is used up",
}


def fails(number: int) -> Callable[..., int]:
    def transfer(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    return transfer


@pytest.mark.parametrize("number", ACTIONS, ids=errno.errorcode.get)
def test_write_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    with ul.DiskStore(tmp_path, "1MiB") as store:
        before = store.put(data(10_000))
        store.flush()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fails(number))
            source = data(10_001, 1)
            ticket = store.put(source)
            until(lambda: store._engine.books.outgoing == 0)
        text = f"^offload store in {tmp_path}: could not write a tensor of 10001 bytes: "
        text += rf"{os.strerror(number)} \({errno.errorcode[number]}\); {ACTIONS[number]}.*\. The tensor is still in memory "
        for use in (ticket.get, ticket.get, lambda: store.put(data(5)), store.flush):
            with pytest.raises(ul.OffloadError, match=text) as caught:
                use()
            assert (caught.value.path, caught.value.nbytes) == (str(tmp_path), 10_001)
        with pytest.raises(ul.OffloadError, match=text):
            store.wait_until_resident_at_most(0)
        assert ticket.recover().data_ptr() == source.data_ptr() and store.backlog_bytes == 10_001
        assert torch.equal(before.get(), data(10_000))  # what was written can be read
        ticket.prefetch()
        ticket.drop()
        assert store.backlog_bytes == 0 and store.tickets == 1 and store.free_bytes == 2**20 - 12_288


def test_write_through_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ul.DiskStore(tmp_path, "1MiB", backlog_bytes=0) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fails(errno.EIO))
            with pytest.raises(ul.OffloadError, match="could not write a tensor of 10000 bytes: Input/output error"):
                store.put(data(10_000))
        assert store.tickets == 0 and store.free_bytes == 2**20 and store.resident_bytes == store.staging_bytes


def test_put_that_waits_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ul.DiskStore(tmp_path, "1MiB", backlog_bytes=10_000) as store:
        failing = threading.Event()

        def transfer(*_: Any) -> int:
            failing.wait(20)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwritev", transfer)
        ticket = store.put(data(10_000))
        threading.Timer(0.05, failing.set).start()
        with pytest.raises(ul.OffloadError, match="could not write a tensor of 10000 bytes: No space left on device"):
            store.put(data(1))
        assert torch.equal(ticket.recover(), data(10_000)) and store.tickets == 1


def test_part_of_a_tensor_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part of many; meanwhile the original is handed back, later `get` tells."""
    monkeypatch.setattr(_record, "PART_BYTES", 4096)
    real, entered, go_on, both = os.pwritev, threading.Semaphore(0), threading.Event(), threading.Event()

    def transfer(fd: int, buffers: Any, offset: int) -> int:
        assert both.wait(20)  # the store takes nothing more once a write has failed
        if offset == 8192:
            raise OSError(errno.EIO, "Input/output error")
        if offset > 8192:
            entered.release()
            assert go_on.wait(20)
        return real(fd, buffers, offset)

    with ul.DiskStore(tmp_path, "1MiB", threads=1) as store:
        monkeypatch.setattr(os, "pwritev", transfer)
        ticket, other = store.put(data(20_000)), store.put(data(4096, 1))
        both.set()
        assert entered.acquire(timeout=20)  # at work on the other: what was left of the first is not tried
        go_on.set()
        with pytest.raises(ul.OffloadError, match="could not write a tensor of 20000 bytes: Input/output error"):
            ticket.get()
        assert torch.equal(ticket.recover(), data(20_000))
        until(lambda: store.stats.writes == 1)
        assert torch.equal(other.get(), data(4096, 1)) and store.stats.bytes_written == 8192 + 4096


def test_failed_write_that_nobody_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ul.DiskStore(tmp_path, "1MiB")
    monkeypatch.setattr(os, "pwritev", fails(errno.EIO))
    ticket = store.put(data(10_000))
    until(lambda: store._engine.books.outgoing == 0)
    ticket.drop()
    with pytest.warns(
        ul.UllageWarning, match="a tensor of 10000 bytes could not be written: Input/output error .* no result"
    ):
        store.close()
    store.close()  # said once


@pytest.mark.parametrize("direct", [True, False])
def test_short_transfers_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    """Short ones of odd lengths, also ones that move nothing, as long as they do not do so again and again."""
    with ul.DiskStore(tmp_path, "1MiB", poison=True, checksums=True) as store:
        object.__setattr__(store._engine.mover.file, "direct", direct)
        if not direct:
            import fcntl

            fd = store._engine.mover.file.fd
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        calls: dict[str, list[int]] = {"pwritev": [], "preadv": []}
        for name, taken in calls.items():
            monkeypatch.setattr(os, name, _short(getattr(os, name), taken))
        tickets = [store.put(data(n, n)) for n in (100_000, 4096, 1)]
        store.flush()
        assert all(torch.equal(t.get(), data(t.nbytes, t.nbytes)) for t in tickets)
        assert all(len(taken) >= 100_000 // 9000 and 0 in taken for taken in calls.values())


def _short(real: Callable[..., int], taken: list[int]) -> Callable[..., int]:
    """Says at most 8,999 bytes, not in whole blocks, though it moves up to 12,288; every third call moves none."""

    def transfer(fd: int, buffers: Any, offset: int) -> int:
        if len(taken) % 3 == 2:
            taken.append(0)
            return 0
        whole = len(buffers[0])
        taken.append(min(real(fd, [buffers[0][: min(whole, 12_288)]], offset), 8_999 if whole > 9_000 else whole))
        return taken[-1]

    return transfer


def test_nothing_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ul.DiskStore(tmp_path, "1MiB") as store:
        ticket = store.put(data(10_000))
        store.flush()
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", lambda *_: 0)
            with pytest.raises(
                ul.OffloadError, match="could not read a tensor of 10000 bytes: only 0 of 12288 bytes came back"
            ):
                ticket.get()
        assert torch.equal(ticket.get(), data(10_000))  # the next get tries again
        monkeypatch.setattr(os, "pwritev", lambda *_: 0)
        with pytest.raises(
            ul.OffloadError, match="could not write a tensor of 10 bytes: only 0 of 4096 bytes were taken"
        ):
            store.put(data(10)), store.flush()


def test_file_cut_short(tmp_path: Path) -> None:
    with ul.DiskStore(tmp_path, "1MiB") as store:
        first, second = store.put(data(8192)), store.put(data(10_000, 1))
        store.flush()
        os.truncate(store._engine.mover.file.fd, 8192 + 5000)
        assert torch.equal(first.get(), data(8192))
        with pytest.raises(
            ul.OffloadError,
            match="only 4096 of 12288 bytes came back at offset 8192, as if the file had been cut short; check",
        ):
            second.get()
        assert store.stats.reads == 1 and store.resident_bytes == store.staging_bytes


def test_prefetch_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ul.DiskStore(tmp_path, "1MiB", poison=True) as store:
        ticket = store.put(data(10_000))
        store.flush()
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fails(errno.EIO))
            ticket.prefetch()
            until(lambda: ticket._record.failure is not None and not ticket._record.left)
        store.poll()
        assert store.ahead_bytes == 0
        ticket.prefetch()  # is for `get` to tell
        assert store.ahead_bytes == 0
        with pytest.raises(
            ul.OffloadError, match="could not read a tensor of 10000 bytes: Input/output error .*dmesg"
        ) as caught:
            ticket.get()
        assert "recover" not in str(caught.value)
        assert torch.equal(ticket.get(), data(10_000)) and torch.equal(store.put(data(7)).get(), data(7))


def test_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_record, "PART_BYTES", 8192)
    for checksums in (True, False):
        with ul.DiskStore(tmp_path, "1MiB", checksums=checksums) as store:
            ticket, other = store.put(data(20_000)), store.put(data(20_000, 1))
            store.flush()
            _flip_bit(store, ticket, 10_000)
            assert torch.equal(other.get(), data(20_000, 1))
            if checksums:
                with pytest.raises(
                    ul.OffloadError,
                    match="checksum mismatch in 8192 bytes at offset 8192: they are not what was written; test",
                ):
                    ticket.get()
                _flip_bit(store, ticket, 10_000)
                assert torch.equal(ticket.get(), data(20_000))
            else:
                assert (ticket.get() != data(20_000)).nonzero().tolist() == [[10_000]]


def _flip_bit(store: ul.DiskStore, ticket: DiskTicket, at: int) -> None:
    staging = store._engine.staging.buffers[0]
    start = ticket._record.extents[0].offset + at // 4096 * 4096
    fd = store._engine.mover.file.fd
    assert os.preadv(fd, [staging[:4096].data], start) == 4096
    staging[at % 4096] ^= 1
    assert os.pwritev(fd, [staging[:4096].data], start) == 4096


def test_unusable_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for name, text in (
        ("none", "No such file or directory (ENOENT); make"),
        ("file", "Not a directory (ENOTDIR); name a"),
    ):
        with pytest.raises(ul.OffloadError) as caught:
            ul.DiskStore(tmp_path / name, "1MiB")
        assert str(caught.value).startswith(f"offload directory {tmp_path / name}: can't make a file there: {text}")
    for number in (errno.EROFS, errno.EACCES, errno.EMFILE):
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", fails(number))
            with pytest.raises(
                ul.OffloadError,
                match=rf"^offload directory {tmp_path}: can't make a file there: .*\({errno.errorcode[number]}\); ",
            ):
                ul.DiskStore(tmp_path, "1MiB")


def test_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    available = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(ul.OffloadError) as caught:
        ul.DiskStore(tmp_path, available + 2**40)
    assert str(caught.value).startswith(
        f"offload directory {tmp_path}: needs "
    ) and "bytes) are free; free space there, lower" in str(caught.value)
    assert (caught.value.path, caught.value.nbytes) == (str(tmp_path), (available + 2**40) // 4096 * 4096)
    fds = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as patch:  # another process was faster
        patch.setattr(os, "posix_fallocate", fails(errno.ENOSPC))
        with pytest.raises(
            ul.OffloadError,
            match=r"can't allocate 1.00 MiB \(1048576 bytes\) there, \d+ bytes being free: No space left",
        ):
            ul.DiskStore(tmp_path, "1MiB")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fails(errno.EIO))
        with pytest.raises(ul.OffloadError, match="can't write to a file there: Input/output error"):
            ul.DiskStore(tmp_path, "1MiB")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails(errno.EAGAIN))
        with pytest.raises(OSError, match="temporarily unavailable"):
            ul.DiskStore(tmp_path, "1MiB")
    assert len(list(Path("/proc/self/fd").iterdir())) == fds


def test_directory_removed(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    with ul.DiskStore(tmp_path / "gone", "1MiB") as store:
        ticket = store.put(data(10_000))
        (tmp_path / "gone").rmdir()
        other = store.put(data(10_000, 1))
        store.flush()
        assert torch.equal(ticket.get(), data(10_000)) and torch.equal(other.get(), data(10_000, 1))


def test_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ullage.offload import _file

    monkeypatch.setattr(_file, "_filesystem", lambda _: "tmpfs")
    with ul.DiskStore(tmp_path, "1MiB") as store:
        assert store.notes[-1] == f"{tmp_path} is in memory (tmpfs): offloading there frees nothing"
    monkeypatch.undo()
    assert _file._filesystem("/proc") == "proc"
