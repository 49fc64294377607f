"""What comes back is what went out, bit for bit: sizes, dtypes, layouts in the file, with and without direct I/O."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
from pathlib import Path

import pytest
import torch

import ullage as ul
from tests.offload.conftest import data, until
from ullage.offload import _checksum, _record

KIB = 1024
SIZES = [0, 1, 511, 512, 513, 4095, 4096, 4097, 8191, 8192, 8193, 65_535, 65_536, 65_537, 300_001]


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_record, "PART_BYTES", 16 * KIB)


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, checksums: bool) -> None:
    small_parts(monkeypatch)
    options = {"threads": threads, "checksums": checksums, "poison": True, "buffer_bytes": 8 * KIB}
    with ul.DiskStore(tmp_path, "1MiB", **options) as store:
        sources = [data(n, n) for n in SIZES]
        tickets = [store.put(t) for t in sources]
        store.flush()
        assert store.resident_bytes == store.staging_bytes == threads * 8 * KIB
        for i in (*range(0, len(SIZES), 2), *range(1, len(SIZES), 2)):
            for _ in range(2):  # as in a second backward
                found = tickets[i].get()
                assert found.dtype == torch.uint8 and torch.equal(found, sources[i])
                found.zero_()  # it is the caller's
        assert tickets[3].nbytes == 512 and store.tickets == len(SIZES)
        assert store.free_bytes == 2**20 - sum(-(-n // 4096) * 4096 for n in SIZES)
        stats = store.stats
        assert stats.bytes_written == sum(SIZES) and stats.bytes_read == 2 * sum(SIZES)
        assert (stats.writes, stats.reads) == (len(SIZES) - 1, 2 * (len(SIZES) - 1)) and not stats.forwarded_bytes
        for ticket in tickets:
            ticket.drop()
        assert store.free_bytes == 2**20 and store.tickets == 0


def test_all_threads_are_at_work_on_one_tensor(tmp_path: Path) -> None:
    """Not only on several: a plan with a small window waits for one at a time."""
    for threads, nbytes, parts in ((1, 3, 1), (2, 3, 2), (2, 9, 2), (2, 40, 5), (4, 3, 4), (4, 1, 2), (4, 0.25, 1)):
        with ul.DiskStore(tmp_path, "64MiB", threads=threads) as store:
            source = data(int(nbytes * 2**20), 7)
            ticket = store.put(source)
            found = ticket._record.parts
            assert len(found) == parts, (threads, nbytes)
            assert [p.start for p in found[1:]] == [p.start + p.length for p in found[:-1]]
            assert sum(p.length for p in found) == len(source)
            store.flush()
            assert torch.equal(ticket.get(), source)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    with ul.DiskStore(tmp_path, "1MiB", poison=True) as store:
        bits = data(8 * 15 * 7)
        whole = (bits % 2 == 0) if dtype is torch.bool else bits.view(dtype)
        view = whole[: whole.numel() // 35 * 35].view(35, -1)[3:30:2]
        ticket = store.put(view.untyped_storage())
        store.flush()
        back = ticket.get().view(dtype).as_strided(view.shape, view.stride(), view.storage_offset())
        assert back.contiguous().view(torch.uint8).equal(view.contiguous().view(torch.uint8))


def test_source_at_any_address(tmp_path: Path) -> None:
    whole = data(40_000)
    with ul.DiskStore(tmp_path, "1MiB", poison=True) as store:
        for start in (1, 3, 64, 4095, 4097):
            ticket = store.put(whole[start : start + 10_000])
            assert store.backlog_bytes in (0, 40_000)  # the storage lives as long
            store.flush()
            assert torch.equal(ticket.get(), whole[start : start + 10_000])


def test_laid_out_over_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch)
    with ul.DiskStore(tmp_path, 40 * 4096, poison=True, checksums=True, buffer_bytes="8KiB") as store:
        tickets = [store.put(data(4096 * n, n)) for n in (7, 1, 9, 1, 22)]
        for i in (0, 2, 4):
            tickets[i].drop()
        large = store.put(data(38 * 4096 - 5, 99))
        store.flush()
        assert store.free_bytes == 0 and len(large._record.extents) == 3
        assert torch.equal(large.get(), data(38 * 4096 - 5, 99))
        assert all(torch.equal(tickets[i].get(), data(4096, 1)) for i in (1, 3))


def test_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem that refuses the flag, and one that takes it and refuses the transfer."""
    real_fcntl, real_write = fcntl.fcntl, os.pwritev

    def no_flag(fd: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL and value & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_fcntl(fd, command, value)

    def no_transfer(fd: int, buffers: list[memoryview], offset: int) -> int:
        if real_fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(fd, buffers, offset)

    for module, name, patched in ((fcntl, "fcntl", no_flag), (os, "pwritev", no_transfer)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, patched)
            with ul.DiskStore(tmp_path, "1MiB") as store:
                assert not store.direct and any("refuses direct I/O" in note for note in store.notes)
                ticket = store.put(data(70_001))
                store.flush()
                assert torch.equal(ticket.get(), data(70_001))


def test_file_has_no_name_and_its_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def no_tmpfile(path: str, flags: int, *rest: int, **named: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real_open(path, flags, *rest, **named)

    for patched in (False, True):
        if patched:
            monkeypatch.setattr(os, "open", no_tmpfile)
        with ul.DiskStore(tmp_path, "3MiB") as store:
            found = os.fstat(store._engine.mover.file.fd)
            assert list(tmp_path.iterdir()) == [] and found.st_nlink == 0
            assert found.st_mode & 0o777 == 0o600 and found.st_size == 3 * 2**20 and found.st_blocks * 512 >= 3 * 2**20
            assert any("unlinked at once" in note for note in store.notes) == patched
            ticket = store.put(data(5000))
            store.flush()
            assert torch.equal(ticket.get(), data(5000))


def test_checksums_without_xxhash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "xxhash", None)
    assert _checksum.checksum_maker() is _checksum._Crc32
    made = _checksum.checksum_maker()()
    made.update(b"123456")
    made.update(b"789")
    assert made.intdigest() == 0xCBF43926  # the check value of CRC-32
    with ul.DiskStore(tmp_path, "1MiB", checksums=True) as store:
        ticket = store.put(data(5000))
        store.flush()
        assert torch.equal(ticket.get(), data(5000))


def test_storage_can_still_be_resized(tmp_path: Path) -> None:
    """As FSDP does; `Tensor.numpy` would forbid it for good."""
    source = data(5000)
    with ul.DiskStore(tmp_path, "1MiB") as store:
        store.put(source.untyped_storage()).drop()
        store.flush()
    source.untyped_storage().resize_(0)
    assert source.untyped_storage().nbytes() == 0


def test_tickets_that_nobody_holds(tmp_path: Path) -> None:
    with ul.DiskStore(tmp_path, "1MiB") as store:
        loop: list[object] = [store.put(data(5000))]
        loop.append(loop)
        kept = store.put(data(6000))
        store.flush()
        kept.prefetch()
        until(lambda: store.stats.reads == 1)
        until(lambda: len(store._engine._changed._waiters) == 2)  # no thread has the lock: tickets go at once
        assert (store.tickets, store.free_bytes) == (2, 2**20 - 4 * 4096)
        del loop
        gc.collect()
        assert (store.tickets, store.free_bytes) == (1, 2**20 - 2 * 4096)
        del kept
        assert (store.tickets, store.free_bytes, store.resident_bytes) == (0, 2**20, store.staging_bytes)


def test_arguments(tmp_path: Path) -> None:
    for wrong in ({"capacity": 100}, {"capacity": 0}, {"threads": 0}, {"threads": True}, {"buffer_bytes": 1}):
        with pytest.raises(ul.ArgumentError, match=f"^{next(iter(wrong))}="):
            ul.DiskStore(tmp_path, **{"capacity": 4096, **wrong})
    with pytest.raises(ul.BudgetError, match="^capacity='1': a number without its unit"):
        ul.DiskStore(tmp_path, "1")
    with pytest.raises(ul.ArgumentError, match="^backlog_bytes='50% of plain': give bytes"):
        ul.DiskStore(tmp_path, 4096, backlog_bytes="50% of plain")
    with ul.DiskStore(tmp_path, "1MiB") as store:
        for source in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.uint8), data(10)[::2]):
            with pytest.raises(ul.ArgumentError, match="^source: torch.* not flat contiguous uint8"):
                store.put(source)
        with pytest.raises(ul.ArgumentError, match="^source: a bytes; give a tensor"):
            store.put(b"123")  # type: ignore[arg-type]
        with pytest.raises(ul.ArgumentError, match="^source: a tensor on meta; copy it to the CPU"):
            store.put(torch.zeros(3, dtype=torch.uint8, device="meta"))
        assert store.tickets == 0
