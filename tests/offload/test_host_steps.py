"""Steps whose saved tensors are in a `HostStore`: on simulated streams, and on a CUDA device where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ullage as ul
from tests.offload.hosted import bytes_of
from tests.offload.planned import Block, gradients, same
from tests.offload.streams import SimulatedLink
from ullage.runtime import Site, Tier, run_offloaded

BLOCK_BYTES = 4 * 8 * 32 * (64 + 64 + 256 + 256)  # of a block: its input, normalised input, what gelu takes and gives


class Tower:
    """Blocks that are run with a tier by hand."""

    def __init__(self, blocks: int, device: torch.device | str = "cpu", width: int = 64) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(Block(width) for _ in range(blocks))).to(device)
        self.sites: list[Site] = []

    def plain(self, x: Tensor) -> list[Tensor]:
        self.model.zero_grad()
        self.model(x).square().mean().backward()
        return gradients(self.model)

    def offloaded(self, x: Tensor, store: ul.HostStore) -> list[Tensor]:
        self.model.zero_grad()
        self.forward(x, store).square().mean().backward()
        store.poll()
        return gradients(self.model)

    def forward(self, x: Tensor, store: ul.HostStore) -> Tensor:
        tier = Tier(store)
        self.sites = [Site(str(i), tier=tier) for i in range(len(self.model))]
        for site, block in zip(self.sites, self.model, strict=True):
            x = run_offloaded(site, block, (x,), {})
        return x


def test_a_race_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wait for what comes back, gradients are wrong: the test above can fail."""
    link, tower = SimulatedLink(eager=True, steps=0), Tower(3)
    x = torch.ones(8, 32, 64)
    wanted = tower.plain(x)
    with ul.HostStore("4MiB", device="cpu", backlog_bytes=0, poison=True, link=link) as store:
        loss = tower.forward(x, store).square().mean()
        kept: list[Tensor] = []
        real = link.empty

        def empty(nbytes: int) -> Tensor:
            kept.append(real(nbytes))  # or the simulation would stop us
            return kept[-1]

        monkeypatch.setattr(link, "empty", empty)
        monkeypatch.setattr(store._engine.books.stalls, "wait", lambda *_, **__: None)
        tower.model.zero_grad()
        loss.backward()
        assert not same(gradients(tower.model), wanted)


def test_who_was_late_holds_no_ticket() -> None:
    """A unit is told later, when its graph is gone."""
    link, tower = SimulatedLink(0, eager=True), Tower(2)
    with ul.HostStore("4MiB", device="cpu", backlog_bytes=0, link=link) as store:
        tower.offloaded(torch.ones(8, 32, 64), store)
        assert store.tickets == 0
        store.flush()
        assert sum(site.late for site in tower.sites) == store.stats.late_prefetches > 0


def test_tensors_of_another_device_stay() -> None:
    with ul.HostStore("1MiB", device="cpu", link=SimulatedLink()) as store:
        assert Tier(store).pack(torch.empty(4096, device="meta"), Site("u")) is None and store.tickets == 0
        assert store.takes(torch.device("cpu")) and not store.takes(torch.device("cuda", 0))


def test_what_is_needed_now_comes_before_what_is_needed_next() -> None:
    link, tower = SimulatedLink(0, eager=True), Tower(2)
    with ul.HostStore("4MiB", device="cpu", backlog_bytes=0, link=link) as store:
        x = tower.forward(torch.ones(8, 32, 64), store)
        link.run_all()
        began, waits = link.main.time, len(link.waits)
        x.sum().backward()
        mains = [event.at - began for name, event in link.waits[waits:] if name == "main"]  # type: ignore[operator]
        assert mains[0] == 4 * 8 * 32 * 256  # one tensor's time: what gelu gave, of the last block


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
def test_round_trips_on_a_gpu(cuda: torch.device) -> None:
    sizes = [0, 1, 4095, 4096, 4097, 1_000_003, 30_000_000]
    wanted = [torch.frombuffer(bytearray(bytes_of(n, n) or b"\0"), dtype=torch.uint8)[:n] for n in sizes]
    with ul.HostStore("64MiB", device="cuda", backlog_bytes="8MiB", ahead_bytes="8MiB", poison=True) as store:
        assert store.device == cuda and store._engine.books.slab.is_pinned()
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
        assert store.stats.writes == 3 * 6
    del wanted


@pytest.mark.gpu
def test_bounds_on_a_gpu(cuda: torch.device) -> None:
    """What torch's allocator has is what the store says, and the host is far ahead of the device all the while."""
    size, room = 2**24, 3 * 2**24
    with ul.HostStore("1GiB", device=cuda, backlog_bytes=room, ahead_bytes=room) as store:
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated(cuda)
        torch.cuda.reset_peak_memory_stats(cuda)
        tickets = []
        for i in range(32):
            tickets.append(store.put(torch.full((size,), i, dtype=torch.uint8, device=cuda)))
            assert torch.cuda.memory_allocated(cuda) - base == store.backlog_bytes <= room
        assert torch.cuda.max_memory_allocated(cuda) - base <= room + size  # and the one that is put
        store.flush()
        assert torch.cuda.memory_allocated(cuda) == base
        torch.cuda.reset_peak_memory_stats(cuda)
        wrong = torch.zeros((), dtype=torch.int64, device=cuda)
        for ticket in reversed(tickets):
            ticket.prefetch()
        for i, ticket in reversed(list(enumerate(tickets))):
            wrong += (ticket.get() != i).sum()
        peak = torch.cuda.max_memory_allocated(cuda) - base
        assert wrong.item() == 0 and store.ahead_bytes == 0
        assert peak <= room + 2 * size + 2**20  # read ahead, the one in use, and what it is compared to


@pytest.mark.gpu
def test_waits_on_a_gpu(cuda: torch.device) -> None:
    """Negative times between events are no stall: what has come back before it is needed is not late."""
    with ul.HostStore("256MiB", device=cuda, backlog_bytes=0) as store:
        ticket = store.put(torch.ones(2**27, dtype=torch.uint8, device=cuda))
        store.flush()
        before, told = store.stats, []
        assert before.stalled_write_seconds > 0
        ticket.prefetch()
        torch.cuda._sleep(10**9)  # about half a second, the copy a few ms
        ticket.get(lambda: told.append("on time"))
        store.flush()
        assert store.stats.late_prefetches == 0 and store.stats.stalled_read_seconds == 0 and told == []
        ticket.prefetch()
        ticket.get(lambda: told.append("late"))
        store.flush()
        assert store.stats.late_prefetches == 1 and store.stats.stalled_read_seconds > 0 and told == ["late"]


@pytest.mark.gpu
def test_a_tower_on_a_gpu(cuda: torch.device) -> None:
    tower = Tower(6, cuda, width=512)
    batches = [torch.full((64, 128, 512), k / 20, device=cuda) for k in range(20)]
    wanted = [tower.plain(x) for x in batches]
    stream = torch.cuda.Stream(cuda)
    stream.wait_stream(torch.cuda.current_stream(cuda))
    for options in ({"backlog_bytes": 0, "ahead_bytes": 0}, {"backlog_bytes": "256MiB", "ahead_bytes": "256MiB"}):
        with ul.HostStore("4GiB", device=cuda, poison=True, **options) as store, torch.cuda.stream(stream):
            for x, gradient in zip(batches, wanted, strict=True):
                assert same(tower.offloaded(x, store), gradient)
                assert store.tickets == 0 and store.free_bytes == store.capacity


@pytest.mark.gpu
def test_the_bandwidth_of_a_link(cuda: torch.device) -> None:
    before: Any = torch.cuda.memory_allocated(cuda)
    found = ul.measure_link(cuda)
    assert found.direct and found.write_bytes_per_s > 10**9 and found.read_bytes_per_s > 10**9
    assert torch.cuda.memory_allocated(cuda) == before
