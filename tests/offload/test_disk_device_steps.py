"""Steps whose saved tensors go from a device to disk: on simulated streams, and on a CUDA device where there is one; plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import ullage as ul
from tests.offload.hosted import bytes_of
from tests.offload.planned import offload, same, tower
from tests.offload.streams import ThreadedLink
from tests.offload.test_host_steps import Tower
from ullage.apply import _open
from ullage.cost import find_device
from ullage.offload import Bandwidth
from ullage.planner.study import _tiers
from ullage.planner.study._device import DeviceChoice
from ullage.planner.study._tiers import Disk, TierRequest, choose_tier


@pytest.mark.parametrize("name", ["copy_out", "copy_in"])
def test_a_race_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Without the wait for a copy gradients are wrong: the test above can fail."""
    link, tower = ThreadedLink(eager=True, steps=0), Tower(2)
    x = torch.ones(8, 32, 64)
    wanted = tower.plain(x)
    kept, real = [], getattr(link, name)

    def copy(*arguments: Any) -> Any:
        kept.append(arguments)  # or the simulation would stop us
        real(*arguments)
        return link.mark(link.main)  # done at once

    monkeypatch.setattr(link, name, copy)
    with ul.DiskStore(tmp_path, "4MiB", device="cpu", link=link, backlog_bytes=0, poison=True) as store:
        assert not same(tower.offloaded(x, store), wanted)
        link.run_all()


# plans


def chosen(monkeypatch: pytest.MonkeyPatch, at: Path, choice: DeviceChoice) -> tuple[Disk, dict[str, Any]]:
    """The tier of a device, and what was measured."""
    asked: dict[str, Any] = {}

    def measure(directory: Any, nbytes: int, **options: Any) -> Bandwidth:
        asked.update(options)
        return Bandwidth(2e9, 3e9, True)

    monkeypatch.setattr(_tiers, "choose_device", lambda *_: choice)
    monkeypatch.setattr(_tiers, "measure_bandwidth", measure)
    found = choose_tier(TierRequest(at, "1MiB"), None, None)
    assert isinstance(found, Disk)
    return found, asked


def test_a_device_that_is_here_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = DeviceChoice("NVIDIA H200", find_device("h200"), False, 10**11, "cuda")
    disk, asked = chosen(monkeypatch, tmp_path, here)
    store = {"threads": disk.threads, "buffer_bytes": disk.buffer_bytes, "checksums": False}
    # what it is measured with is what it will be
    assert asked == {"device": "cuda", **store} and disk.device == disk.device_type == "cuda"
    assert (disk.write_bytes_per_second, disk.read_bytes_per_second) == (2e9, 3e9)
    assert msgspec.structs.replace(disk, window_bytes=1000).reserved_bytes == 2000  # staging is the host's
    assert msgspec.convert(msgspec.to_builtins(disk), Disk) == disk
    cpu, asked = chosen(monkeypatch, tmp_path, DeviceChoice("cpu", find_device("cpu"), False, 10**11, "cpu"))
    assert asked == {"device": "cpu", **store} and cpu.device_type == "cpu"
    assert msgspec.structs.replace(cpu, window_bytes=1000).reserved_bytes == 2000 + 2 * 2**19


def test_plans_of_a_cpu_read_as_before(tmp_path: Path) -> None:
    """Nor does their digest change."""
    disk = Disk(directory="/d", capacity_bytes=8192, write_bytes_per_second=1.0, read_bytes_per_second=2.0)
    keys = ["buffer_bytes", "capacity_bytes", "directory", "read_bytes_per_second", "threads", "window_bytes"]
    assert sorted(msgspec.to_builtins(disk)) == [*keys, "write_bytes_per_second"]
    assert msgspec.convert(msgspec.to_builtins(disk), Disk) == disk


def test_an_estimate_has_no_disk(tmp_path: Path) -> None:
    text = "^disk_budget: saved tensors on h200 can't go to disk in an estimate: .* device is not here; .*give host_budget: they go"
    with pytest.raises(ul.DeviceError, match=text):
        ul.plan(tower(1), "1MiB", device="h200", disk_directory=tmp_path, disk_budget="1MiB")


def test_a_plan_opens_its_disk_for_the_device_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tower(2)
    plan = offload(work, tmp_path)
    assert plan.disk is not None and plan.disk.device_type == "cpu"
    other = msgspec.structs.replace(plan, disk=msgspec.structs.replace(plan.disk, device="cuda"))
    forwards = [m.forward.__func__ for m in work.model]
    with pytest.raises(ul.DeviceError, match="of cuda to disk, and the model is on cpu; move the model there, or plan"):
        other.apply(work.model)
    assert [m.forward.__func__ for m in work.model] == forwards
    made: dict[str, Any] = {}
    monkeypatch.setattr(_open, "DiskStore", lambda *_, **options: made.update(options))
    _open.open_store(other, {"disk"}, torch.device("cuda", 1))
    assert made["device"] == torch.device("cuda", 1) and made["buffer_bytes"] == 2**19


# on a device


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
def test_round_trips_on_a_gpu(tmp_path: Path, cuda: torch.device) -> None:
    sizes = [0, 1, 4095, 4096, 4097, 1_000_003, 30_000_000]
    wanted = [torch.frombuffer(bytearray(bytes_of(n, n) or b"\0"), dtype=torch.uint8)[:n] for n in sizes]
    options = {"backlog_bytes": "8MiB", "ahead_bytes": "8MiB", "poison": True, "checksums": True}
    with ul.DiskStore(tmp_path, "64MiB", device="cuda", threads=3, **options) as store:
        slab = store._engine.staging._slab
        assert store.device == cuda and slab is not None and slab.is_pinned() and store.staging_bytes == 0
        for _ in range(3):
            tickets = [store.put(w.to(cuda)) for w in wanted]
            assert store.backlog_bytes <= 2**23
            for ticket in tickets:
                ticket.prefetch()
            assert store.ahead_bytes <= 2**23
            for ticket, w in zip(reversed(tickets), reversed(wanted), strict=True):
                assert torch.equal(ticket.get().cpu(), w) and torch.equal(ticket.get().cpu(), w)
            del ticket, tickets
            store.flush()
            assert (store.tickets, store.free_bytes, store.resident_bytes) == (0, 2**26, 0)
    assert not slab.is_pinned()


@pytest.mark.gpu
def test_bounds_on_a_gpu(tmp_path: Path, cuda: torch.device) -> None:
    """What torch's allocator has is what the store says."""
    size, room = 2**24, 3 * 2**24
    with ul.DiskStore(tmp_path, "256MiB", device=cuda, backlog_bytes=room, ahead_bytes=room) as store:
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated(cuda)
        torch.cuda.reset_peak_memory_stats(cuda)
        tickets = []
        for i in range(16):
            tickets.append(store.put(torch.full((size,), i, dtype=torch.uint8, device=cuda)))
            assert torch.cuda.memory_allocated(cuda) - base == store.backlog_bytes <= room
        assert torch.cuda.max_memory_allocated(cuda) - base <= room + size  # and the one that is put
        store.flush()
        assert torch.cuda.memory_allocated(cuda) == base
        for ticket in reversed(tickets):
            ticket.prefetch()
        wrong = torch.zeros((), dtype=torch.int64, device=cuda)
        for i, ticket in reversed(list(enumerate(tickets))):
            wrong += (ticket.get() != i).sum()
        assert wrong.item() == 0 and store.ahead_bytes == 0


@pytest.mark.gpu
def test_other_streams_on_a_gpu(tmp_path: Path, cuda: torch.device) -> None:
    """Put behind a long kernel; taken in another stream; the memory is used again at once."""
    side = torch.cuda.Stream(cuda)
    with ul.DiskStore(tmp_path, "64MiB", device=cuda, poison=True) as store:
        torch.cuda._sleep(10**8)
        x = torch.full((2**24,), 7, dtype=torch.uint8, device=cuda)
        ticket = store.put(x)
        with torch.cuda.stream(side):
            assert int((ticket.get() != 7).sum()) == 0  # the original, which its kernel has yet to write
        del x
        store.flush()
        ticket.prefetch()
        with torch.cuda.stream(side):
            back = ticket.get()
            torch.cuda._sleep(10**8)
            wrong = (back != 7).sum()
            del back
        torch.zeros(2**24, dtype=torch.uint8, device=cuda)
        assert int(wrong) == 0


@pytest.mark.gpu
def test_a_tower_on_a_gpu(tmp_path: Path, cuda: torch.device) -> None:
    tower = Tower(4, cuda, width=512)
    batches = [torch.full((16, 64, 512), k / 20, device=cuda) for k in range(20)]
    wanted = [tower.plain(x) for x in batches]
    stream = torch.cuda.Stream(cuda)
    stream.wait_stream(torch.cuda.current_stream(cuda))
    for window in (0, "32MiB"):
        options = {"backlog_bytes": window, "ahead_bytes": window, "poison": True, "checksums": True}
        with ul.DiskStore(tmp_path, "256MiB", device=cuda, **options) as store, torch.cuda.stream(stream):
            for x, gradient in zip(batches, wanted, strict=True):
                assert same(tower.offloaded(x, store), gradient)
                assert store.tickets == 0


@pytest.mark.gpu
def test_a_plan_on_a_gpu(tmp_path: Path, cuda: torch.device) -> None:
    work = tower(4)
    model, x = work.model.to(cuda), work.batch.to(cuda)
    work = ul.Workload(model, x, loss=work.loss, optimizer=work.optimizer)
    plain = Tower.plain(_Run(model), x)
    plan = ul.plan(work, policy="offload", disk_directory=tmp_path, disk_budget="64MiB")
    assert plan.disk is not None and plan.disk.device_type == "cuda"
    with plan.apply(model) as handle:
        assert same(Tower.plain(_Run(model), x), plain)
        assert handle._store is not None and handle._store.stats.bytes_written > 0
    measured = ul.measure_bandwidth(tmp_path, "64MiB", device="cuda")
    assert measured.write_bytes_per_s > 10**7 and measured.read_bytes_per_s > 10**7


class _Run(Tower):
    """A tower of a model that is there."""

    def __init__(self, model: Any) -> None:
        self.model = model
