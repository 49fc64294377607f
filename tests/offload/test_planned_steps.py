"""Steps with saved tensors on disk are bit for bit the plain ones, whatever is done with the graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

import ullage as ul
from tests import zoo
from tests.offload.planned import (
    LARGE,
    backward,
    gradients,
    mixed,
    offload,
    same,
    squares,
    store_of,
    tower,
)
from ullage.runtime import Site, Tier, run_offloaded
from ullage.workload import run_step

FAST = ("lstm",)


def check_family(family: str, at: Path, steps: int) -> None:
    work = zoo.workload(family)
    plan = mixed(work, at, LARGE)
    assert plan.predicted.traffic is not None and plan.predicted.traffic.sent_bytes > 0
    found = ul.verify(work, plan, steps=steps)
    assert found.ok, str(found)
    assert not list(at.iterdir())


@pytest.mark.parametrize("family", FAST)
def test_families_are_bitwise(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_all_families_are_bitwise(family: str, tmp_path: Path) -> None:
    """Alone shows what leaves in each family's ops; that buffers are used again over twenty steps is shown of a tower."""
    check_family(family, tmp_path, steps=5)


def test_twenty_steps_with_buffer_reuse(tmp_path: Path) -> None:
    work = tower()
    model, plan = work.model, mixed(work, tmp_path)
    wanted = [backward(model, torch.full((8, 32, 64), k / 20)) for k in range(20)]
    with plan.apply(model) as handle:
        for k in range(20):
            assert same(backward(model, torch.full((8, 32, 64), k / 20)), wanted[k])
            assert store_of(handle).tickets == 0
        units = {u.fqn: u for u in handle.report().units}
        assert units["0"].sent_bytes == 20 * 4 * 8 * 32 * (64 + 256 + 256)
        assert (units["1"].action, units["1"].recomputed, units["1"].sent_bytes) == ("recompute", 20, 0)
        assert (units["2"].action, units["2"].sent_bytes) == ("select:addmm[0]@disk", 20 * 4 * 8 * 32 * 256)
        text = str(handle.report())
        assert "disk: " in text and "written" in text and "; offload writes " in text and " TB per day" in text
    stats = handle.report().store
    assert stats is not None and stats.bytes_written > 0
    assert same(backward(model, torch.zeros(8, 32, 64)), wanted[0])
    assert not list(tmp_path.iterdir())


def test_a_graph_that_is_kept(tmp_path: Path) -> None:
    work = tower()
    model, x = work.model, torch.randn(8, 32, 64)
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    wanted = gradients(model)
    with mixed(work, tmp_path).apply(model) as handle:
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward(retain_graph=True)
        assert store_of(handle).tickets > 0
        loss.backward()
        assert same(gradients(model), wanted)
        del loss
        assert store_of(handle).tickets == 0


def test_a_graph_without_a_backward_gives_its_place_back(tmp_path: Path) -> None:
    work = tower()
    with offload(work, tmp_path).apply(work.model) as handle:
        out = work.model(work.batch)
        assert store_of(handle).tickets == 15
        del out
        store = store_of(handle)
        assert (store.tickets, store.free_bytes, store.backlog_bytes) == (0, store.capacity, 0)


def test_an_exception_in_mid_backward(tmp_path: Path) -> None:
    work = tower()
    model = work.model
    wanted = backward(model, work.batch)
    with mixed(work, tmp_path).apply(model) as handle:
        out = model[:2](work.batch)
        out.register_hook(lambda _: 1 / 0)
        loss = model[2:](out).square().mean()
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        del out, loss
        gc.collect()
        assert store_of(handle).tickets == 0 and store_of(handle).free_bytes == store_of(handle).capacity
        assert same(backward(model, work.batch), wanted)


def test_two_models_in_one_process(tmp_path: Path) -> None:
    one, two = tower(), tower(3)
    wanted = backward(one.model, one.batch), backward(two.model, two.batch)
    with offload(one, tmp_path).apply(one.model), offload(two, tmp_path).apply(two.model):
        for model in (one.model, two.model):
            model.zero_grad()
        losses = [w.model(w.batch).square().mean() for w in (one, two)]
        for loss in losses:
            loss.backward()
        assert same(gradients(one.model), wanted[0]) and same(gradients(two.model), wanted[1])


def test_removed_between_forward_and_backward(tmp_path: Path) -> None:
    work = tower()
    wanted = backward(work.model, work.batch)
    handle = offload(work, tmp_path).apply(work.model)
    work.model.zero_grad()
    loss = work.model(work.batch).square().mean()
    handle.remove()
    loss.backward()
    assert same(gradients(work.model), wanted)


class Writes(nn.Module):
    """Writes to what `exp` has saved: autograd refuses that."""

    def forward(self, x: Tensor) -> Tensor:
        out = x.exp()
        kept = out * 3
        out.add_(1)
        return kept


class Spares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp() * 3


def written_to(at: Path, window: int) -> tuple[nn.Module, ul.Plan, Tensor]:
    model, x = nn.Sequential(nn.Linear(64, 64), Writes()), torch.randn(64, 64)
    with pytest.raises(RuntimeError, match="inplace operation"):
        model(x).sum().backward()
    base = offload(tower(1), at)
    assert base.disk is not None
    other = ul.plan(ul.Workload(nn.Sequential(nn.Linear(64, 64), nn.GELU()), x, loss=squares), policy="none")
    row = msgspec.structs.replace(base.decisions[0], unit="1", buffers=[], input_elements=64 * 64)
    disk = msgspec.structs.replace(base.disk, window_bytes=window)
    return model, msgspec.structs.replace(base, decisions=[row], model=other.model, disk=disk), x


def test_what_is_written_to_before_it_has_left(tmp_path: Path, hold_writes: Callable[[], Any]) -> None:
    model, plan, x = written_to(tmp_path, 2**20)
    with plan.apply(model):
        gate = hold_writes()
        loss = model(x).sum()
        gate.opened.set()
        with pytest.raises(ul.OffloadError, match="modified by an inplace operation before it was written"):
            loss.backward()


def test_what_is_written_to_afterwards_is_as_it_was_saved(tmp_path: Path) -> None:
    model, plan, x = written_to(tmp_path, 0)
    spared = nn.Sequential(model[0], Spares())
    wanted = backward(spared, x)
    with plan.apply(model):
        assert same(backward(model, x), wanted)


def test_inference_is_not_touched(tmp_path: Path) -> None:
    work = tower()
    with offload(work, tmp_path).apply(work.model) as handle, torch.no_grad():
        work.model(work.batch)
        assert store_of(handle).stats.bytes_written == 0


def test_steps_of_the_workload(tmp_path: Path) -> None:
    work = tower()
    plan = offload(work, tmp_path)
    instance = work.instance()
    with plan.apply(instance.model) as handle:
        for _ in range(3):
            run_step(instance)
        assert handle.report().store is not None and store_of(handle).tickets == 0


class Cells(nn.Module):
    """Its gates are chunks of one storage, each with a version counter of its own, and written to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.cell(x)
        return h + c


@pytest.mark.parametrize("window", [0, 2**24])
def test_chunks_with_counters_of_their_own(window: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    work = ul.Workload(nn.Sequential(*(Cells() for _ in range(4))), torch.randn(64, 64), loss=squares)
    plan = offload(work, tmp_path, units=["*"])
    assert {d.action for d in plan.decisions} == {"offload:disk"} and plan.disk is not None
    wanted = backward(work.model, work.batch)
    wide = msgspec.structs.replace(plan, disk=msgspec.structs.replace(plan.disk, window_bytes=window))
    with wide.apply(work.model):
        for _ in range(5):
            assert same(backward(work.model, work.batch), wanted)


def test_a_source_that_is_written_to_after_it_has_left_is_read_back(tmp_path: Path) -> None:
    with ul.DiskStore(tmp_path, "1MiB", backlog_bytes="1MiB", ahead_bytes="1MiB") as store:
        x = torch.arange(4096, dtype=torch.float32)
        ticket, was = store.put(x.detach().view(torch.uint8)), x.clone()
        store._engine.flush()
        ticket.prefetch()
        x.zero_()
        assert torch.equal(ticket.get().view(torch.float32), was)


def test_subclasses_stay(tmp_path: Path) -> None:
    class Odd(Tensor):
        pass

    with ul.DiskStore(tmp_path, "1MiB") as store:
        assert Tier(store).pack(torch.ones(4096).as_subclass(Odd), Site("u")) is None


def test_tuples_of_tensors_without_a_gradient_stay(tmp_path: Path) -> None:
    class Rotates(nn.Module):
        def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
            return x.exp() * angles[0] + x * angles[1]

    x, angles = torch.ones(4096, requires_grad=True), (torch.ones(4096), torch.ones(4096))
    with ul.DiskStore(tmp_path, "1MiB") as store:
        site = Site("u", tier=Tier(store))
        out = run_offloaded(site, Rotates(), (x, angles), {})
        assert site.sent_bytes == 4 * 4096  # what exp makes; x is a leaf
        del out
