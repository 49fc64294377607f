"""What both stores do, on disk and in host memory: one suite for the two, on simulated streams.

What one of them alone has (files, threads, checksums; pinned memory) is in the files that are named after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import ullage as ul
from tests.offload.hosted import bytes_of, get, put
from tests.offload.planned import gradients, same
from tests.offload.streams import SimulatedLink, ThreadedLink
from tests.offload.test_host_steps import BLOCK_BYTES, Tower

Link = SimulatedLink | ThreadedLink
A_BATCH = 4 * 8 * 32 * 64


@dataclass(frozen=True)
class Kind:
    """One kind of store, opened on a link of its own."""

    name: str
    link: Callable[..., Any]
    open: Callable[..., Any]


@pytest.fixture(params=["disk", "host"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    def disk(link: ThreadedLink, capacity: str, **options: Any) -> ul.DiskStore:
        return ul.DiskStore(tmp_path, capacity, device="cpu", link=link, **{"buffer_bytes": "64KiB", **options})

    def host(link: SimulatedLink, capacity: str, **options: Any) -> ul.HostStore:
        return ul.HostStore(capacity, device="cpu", link=link, **options)

    return Kind("disk", ThreadedLink, disk) if request.param == "disk" else Kind("host", SimulatedLink, host)


@pytest.mark.parametrize("window", [0, BLOCK_BYTES // 2, 2 * BLOCK_BYTES])
@pytest.mark.parametrize("seed", range(2))
def test_twenty_steps_with_buffer_reuse(kind: Kind, seed: int, window: int) -> None:
    """The ops are torch's own and run at once; copies run when they are waited for, or earlier, by chance."""
    link, tower = kind.link(seed, eager=True), Tower(4)
    batches = [torch.full((8, 32, 64), k / 20) for k in range(20)]
    wanted = [tower.plain(x) for x in batches]
    with kind.open(link, "4MiB", backlog_bytes=window, ahead_bytes=window, poison=True) as store:
        late = 0
        for x, gradient in zip(batches, wanted, strict=True):
            assert same(tower.offloaded(x, store), gradient)
            assert store.tickets == 0 and store.backlog_bytes <= window and store.ahead_bytes <= window
            late += sum(site.late for site in tower.sites)
        sent = sum(site.sent_bytes for site in tower.sites)
        assert sent == 4 * BLOCK_BYTES - A_BATCH  # all but the batch
        store.flush()
        stats = store.stats
        assert (store.free_bytes, store.resident_bytes, stats.late_prefetches) == (store.capacity, 0, late)
        if kind.name == "host" or not window:  # a disk need not write what is asked for before its turn
            assert stats.bytes_written == 20 * sent == stats.bytes_read + stats.forwarded_bytes
        assert kind.name == "disk" or late > 0


def test_a_graph_that_is_kept_or_thrown_away(kind: Kind) -> None:
    link, tower = kind.link(2, eager=True), Tower(3)
    x = torch.randn(8, 32, 64)
    tower.model.zero_grad()
    loss = tower.model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    wanted = gradients(tower.model)
    with kind.open(link, "4MiB", poison=True) as store:
        tower.model.zero_grad()
        loss = tower.forward(x, store).square().mean()
        loss.backward(retain_graph=True)
        assert store.tickets == 11
        loss.backward()
        assert same(gradients(tower.model), wanted)
        del loss
        out = tower.forward(x, store)
        assert store.tickets == 11
        del out
        store.flush()
        store.poll()
        assert (store.tickets, store.free_bytes, store.resident_bytes) == (0, store.capacity, 0)


def test_bytes_come_back_in_any_order(kind: Kind) -> None:
    link = kind.link(1)
    with kind.open(link, "1MiB") as store:
        tickets = [put(link, store, bytes_of(10_000 + k, k)) for k in range(8)]
        store.flush()
        order = [3, 0, 7, 7, 1, 6, 2, 5, 4]
        for k in order[::2]:
            tickets[k].prefetch()
        seen = [get(link, tickets[k]) for k in order]
        link.run_all()
        assert seen == [[bytes_of(10_000 + k, k)] for k in order]
        del tickets
        assert store.tickets == 0


def test_a_store_takes_no_more_than_it_holds(kind: Kind) -> None:
    link = kind.link()
    with kind.open(link, "64KiB") as store:
        first = put(link, store, bytes_of(40_000))
        with pytest.raises(ul.OffloadError, match=f"{store.capacity - 40_960} are available"):
            put(link, store, bytes_of(40_000, 1))
        seen = get(link, first)
        link.run_all()
        assert seen == [bytes_of(40_000)]
        first.drop()
        with pytest.raises(ul.OffloadError, match="was dropped"):
            first.get()
        again = put(link, store, bytes_of(64 * 1024, 2))
        assert store.free_bytes == 0
        seen = get(link, again)
        link.run_all()
        assert seen == [bytes_of(64 * 1024, 2)]
