"""Plans that have saved tensors on disk: what is promised is what happens, bit for bit, and nothing is left behind."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

import ullage as ul
from tests import zoo
from ullage.mechanisms import OFFLOAD
from ullage.runtime import Site, Tier, run_offloaded
from ullage.workload import run_step

CAPACITY = "32MiB"
LARGE = "256MiB"  # of whole families
FAST = "gpt", "lstm"


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULLAGE_POISON", "1")


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def tower(blocks: int = 4) -> ul.Workload:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(blocks)))
    return ul.Workload(model, torch.randn(8, 32, 64), loss=squares, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))


def squares(out: Tensor, _: Tensor) -> Tensor:
    return out.square().mean()


def offload(work: ul.Workload, at: Path, size: str = CAPACITY, **options: Any) -> ul.Plan:
    return ul.plan(work, policy="offload", disk_directory=at, disk_budget=size, **options)


def mixed(work: ul.Workload, at: Path, size: str = CAPACITY) -> ul.Plan:
    """Of three blocks one on disk, one recomputed, one with the outputs of its first matmul on disk, where they can be."""
    able = {d.unit for d in ul.plan(work, policy="every_block").decisions if d.action == "recompute"}
    units = [d.unit for d in offload(work, at, size).decisions if d.action == OFFLOAD.name]
    pins = {u: "recompute" for u in units[1::3] if u in able}
    for u in units[2::3]:
        for level in ("addmm[0]@disk", "mm[0]@disk", "convolution[0]@disk", "bmm[0]@disk"):
            try:
                offload(work, at, size, pin={u: f"select:{level}"})
            except ul.ArgumentError:
                continue
            pins[u] = f"select:{level}"
            break
    return offload(work, at, size, pin=pins)


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
def test_all_families_are_bitwise_over_twenty_steps(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path, steps=20)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def backward(model: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    model.zero_grad()
    model(x).square().mean().backward(**options)
    return gradients(model)


def store_of(handle: ul.Handle) -> Any:
    assert handle._store is not None
    handle._store.poll()
    return handle._store


def test_what_is_kept_of_a_block_on_disk(tmp_path: Path) -> None:
    work = tower()
    plan, plain = offload(work, tmp_path), ul.plan(work, policy="none")
    t = plan.predicted.traffic
    rows = 8 * 32
    # input, normalised input, what gelu takes and what it gives; statistics are smaller than a block of the file
    a_block = rows * 4 * (64 + 64 + 256 + 256)
    assert t is not None and plan.disk is not None
    assert (t.sent_bytes, plan.disk.window_bytes, plan.disk.reserved_bytes) == (4 * a_block - rows * 4 * 64, 0, 2**20)
    assert t.fetched_bytes == t.sent_bytes  # all but the first block's input, which is the user's batch
    measured = ul.measure(work, plan=plan, steps=2)
    assert measured.peak_bytes == plan.predicted.peak_bytes - plan.disk.reserved_bytes
    assert plan.predicted.peak_bytes < plain.predicted.peak_bytes


@pytest.mark.parametrize("part", [0.25, pytest.param(0.6, marks=pytest.mark.slow)])
def test_a_budget_is_a_promise(part: float, tmp_path: Path) -> None:
    work = zoo.workload("gpt")
    plain, disk = ul.plan(work, policy="none").predicted.peak_bytes, {"disk_directory": tmp_path, "disk_budget": "1GiB"}
    with pytest.raises(ul.BudgetInfeasible) as least:
        ul.plan(work, 1024, **disk)
    smallest = least.value.smallest_bytes
    with pytest.raises(ul.BudgetInfeasible) as without:
        ul.plan(work, 1024)
    assert smallest < without.value.smallest_bytes
    plan = ul.plan(work, int(smallest + part * (plain - smallest)), **disk)
    assert plan.budget_bytes is not None and plan.predicted.peak_bytes <= plan.budget_bytes
    assert ul.measure(work, plan=plan, steps=2).peak_bytes <= plan.predicted.peak_bytes
    assert not list(tmp_path.iterdir())


def test_never_slower_than_without(tmp_path: Path) -> None:
    work = tower()
    profile = ul.profile(work)
    least = ul.plan(work, policy="every_block", profile=profile).predicted.peak_bytes
    plain = ul.plan(work, policy="none", profile=profile).predicted.peak_bytes + 2**20
    for budget in (least + (plain - least) * k // 4 for k in range(4)):
        without = ul.plan(work, budget, profile=profile)
        plan = ul.plan(work, budget, profile=profile, disk_directory=tmp_path, disk_budget=CAPACITY)
        assert plan.predicted.step_seconds <= without.predicted.step_seconds * (1 + 1e-9)
        assert plan.lower_bound_seconds <= plan.predicted.step_seconds


def test_a_plan_is_a_file(tmp_path: Path) -> None:
    plan = offload(tower(), tmp_path)
    plan.save(tmp_path / "plan.json")
    again = ul.Plan.load(tmp_path / "plan.json")
    assert again == plan and again.digest == plan.digest
    assert again.disk is not None and again.disk.directory == str(tmp_path)
    assert "offload:disk" in str(again) and "hidden" in str(again) and str(tmp_path) in str(again)


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
        assert "disk: " in text and "written" in text
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


# faults


def fails(code: int) -> Callable[..., int]:
    def transfer(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    return transfer


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_write_that_fails_in_mid_step(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tower()
    wanted, plan = backward(work.model, work.batch), offload(work, tmp_path)
    before = {k: v.clone() for k, v in work.model.state_dict().items()}
    with plan.apply(work.model):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fails(code))
            with pytest.raises(ul.OffloadError, match=os.strerror(code)):
                backward(work.model, work.batch)
    assert all(torch.equal(v, before[k]) for k, v in work.model.state_dict().items())
    assert same(backward(work.model, work.batch), wanted)
    with plan.apply(work.model):
        assert same(backward(work.model, work.batch), wanted)  # the next run starts clean
    assert not list(tmp_path.iterdir())


def test_a_read_that_fails_in_mid_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tower()
    wanted, plan = backward(work.model, work.batch), offload(work, tmp_path)
    with plan.apply(work.model) as handle:
        work.model.zero_grad()
        loss = work.model(work.batch).square().mean()
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fails(errno.EIO))
            with pytest.raises(ul.OffloadError, match="Input/output error"):
                loss.backward()
        del loss
        assert store_of(handle).tickets == 0
        assert same(backward(work.model, work.batch), wanted)


def test_a_file_that_is_too_small(tmp_path: Path) -> None:
    work = tower()
    wanted, plan = backward(work.model, work.batch), offload(work, tmp_path)
    assert plan.disk is not None
    small = msgspec.structs.replace(plan, disk=msgspec.structs.replace(plan.disk, capacity_bytes=2**20))
    with small.apply(work.model), pytest.raises(ul.OffloadError, match="capacity=1048576"):
        work.model(work.batch)
    with plan.apply(work.model):
        assert same(backward(work.model, work.batch), wanted)


def test_a_plan_takes_no_more_than_the_file_holds(tmp_path: Path) -> None:
    work = tower()
    plan = offload(work, tmp_path)
    options = {"disk_directory": tmp_path, "disk_budget": "256KiB"}
    with pytest.raises(ul.BudgetInfeasible):
        ul.plan(work, plan.predicted.peak_bytes, forbid=["recompute", "select"], **options)
    with pytest.raises(ul.BudgetError, match="disk_budget: 256.00 KiB, but 2.44 MiB are on disk at once"):
        ul.plan(work, policy="offload", **options)


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    work, there = tower(), tmp_path / "there"
    there.mkdir()
    plan = offload(work, there)
    there.rmdir()
    with pytest.raises(ul.OffloadError, match="there"):
        plan.apply(work.model)
    assert not any("forward" in m.__dict__ for m in work.model.modules())  # nothing was touched
    there.mkdir()
    with plan.apply(work.model):
        there.rmdir()  # the file has no name: it is still there
        backward(work.model, work.batch)


def test_a_process_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    script = f"""
import torch, ullage as ul
from tests.offload.test_planned import tower, offload
from pathlib import Path
work = tower(8)
with offload(work, Path({str(tmp_path)!r})).apply(work.model):
    print("started", flush=True)
    while True:
        work.model(work.batch).sum().backward()
"""
    root = Path(__file__).parents[2]
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=root, text=True)
    assert child.stdout is not None and child.stdout.readline() == "started\n"
    time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not list(tmp_path.iterdir())


# arguments


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"disk_budget": "1GiB"}, ul.ArgumentError, "disk_directory: not given"),
        ({"disk_directory": "/tmp"}, ul.ArgumentError, "disk_budget: not given"),
        ({"disk_directory": "/nowhere", "disk_budget": "1MiB"}, ul.OffloadError, "/nowhere"),
        ({"disk_directory": "/tmp", "disk_budget": "lots"}, ul.BudgetError, "disk_budget"),
        ({"disk_directory": "/tmp", "disk_budget": "50%"}, ul.BudgetError, "disk_budget='50%'"),
        (
            {"disk_directory": "/tmp", "disk_budget": "1KiB"},
            ul.BudgetError,
            "disk_budget='1KiB': give at least 4096 bytes",
        ),
        (
            {"disk_directory": "/tmp", "disk_budget": "900TiB"},
            ul.OffloadError,
            "disk_budget: 921600.00 GiB, but /tmp has",
        ),
        ({"host_budget": "1GiB"}, ul.DeviceError, "the CPU, which has none beside it"),
        ({"host_budget": "1GiB", "device": "h200"}, ul.DeviceError, "not there yet"),
        ({"device": "h200", "disk_directory": "/tmp", "disk_budget": "1MiB"}, ul.DeviceError, "h200 can't go to disk"),
        ({"policy": "offload"}, ul.ArgumentError, "policy 'offload': .*disk_directory"),
        ({"pin": {"0": "offload:disk"}}, ul.ArgumentError, "pin '0'='offload:disk': .*disk_directory"),
        ({"pin": {"0": "select:addmm[0]@disk"}}, ul.ArgumentError, "disk_directory"),
        ({"pin": {"0": "offload:tape"}}, ul.ArgumentError, "no such action"),
    ],
)
def test_arguments_that_mean_nothing(options: dict[str, Any], kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        ul.plan(tower(1), **{"budget": "1MiB", **options})


def test_only_plans_have_a_disk() -> None:
    with pytest.raises(ul.ArgumentError, match="only a plan has a disk"):
        ul.checkpoint(nn.Linear(4, 4), torch.ones(4, 4), keep="addmm[0]@disk")


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    at = ["--disk-directory", str(tmp_path), "--disk-budget", "256MiB"]
    command = [
        sys.executable,
        "-m",
        "ullage",
        "plan",
        "examples/gpt.py:workload",
        "--policy",
        "offload",
        *at,
        "-o",
        str(out),
    ]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    plan = ul.Plan.load(out)
    assert "disk  " in run.stdout and plan.disk is not None and plan.disk.capacity_bytes == 2**28


def test_steps_of_the_workload(tmp_path: Path) -> None:
    work = tower()
    plan = offload(work, tmp_path)
    instance = work.instance()
    with plan.apply(instance.model) as handle:
        for _ in range(3):
            run_step(instance)
        assert handle.report().store is not None and store_of(handle).tickets == 0


def test_a_monitor_sees_what_leaves(tmp_path: Path) -> None:
    work = tower()
    instance = work.instance()
    with offload(work, tmp_path).apply(instance.model) as handle, ul.Monitor(handle, jsonl=tmp_path / "run.jsonl") as m:
        for _ in range(4):
            with m.step(samples=8):
                run_step(instance)
    found = [msgspec.json.decode(line) for line in (tmp_path / "run.jsonl").read_bytes().splitlines()[1:]]
    sent = sum(u.sent_bytes for u in handle.report().units)
    assert [r["offloaded_bytes"] for r in found if "offloaded_bytes" in r] == [sent // 4] * 4
    assert m.summary().offloaded_bytes == sent / 4 and "offloaded per step" in str(m)


def test_what_is_shown_of_a_plan_with_a_disk(tmp_path: Path) -> None:
    work = zoo.workload("gpt")
    plain = ul.plan(work, policy="none").predicted.peak_bytes
    plan = ul.plan(work, plain * 2 // 3, forbid=["recompute", "select"], disk_directory=tmp_path, disk_budget="256MiB")
    assert plan.disk is not None and plan.bounds is not None
    shown = ul.timeline(work, plan)
    assert shown.peak_bytes == plan.predicted.peak_bytes == plan.bounds.peak_bytes
    assert plan.bounds.by_category["library workspace"] == plan.disk.reserved_bytes
    page = ul.report(work, plan=plan, points=None)
    assert page.plan.predicted.peak_bytes == plan.predicted.peak_bytes and page.plan.disk == plan.disk


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
    assert {d.action for d in plan.decisions} == {OFFLOAD.name} and plan.disk is not None
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


def test_two_backwards_of_one_step_have_room(tmp_path: Path) -> None:
    """A graph that is kept holds its place, as the capture sees."""
    work = tower()
    optimizer = torch.optim.SGD(work.model.parameters(), lr=0.1)

    def step(model: nn.Module, x: Tensor) -> None:
        first = model(x).square().mean()
        first.backward(retain_graph=True)
        second = model(x * 2).square().mean()
        second.backward()
        optimizer.step()
        optimizer.zero_grad()

    both = ul.Workload(work.model, work.batch, step=step)
    with pytest.raises(ul.BudgetError, match="on disk at once"):
        ul.plan(both, policy="offload", disk_directory=tmp_path, disk_budget="3MiB")
    plan = ul.plan(both, policy="offload", disk_directory=tmp_path, disk_budget="6MiB")
    assert ul.verify(both, plan, steps=2).ok


def test_pins_that_the_file_can_not_hold(tmp_path: Path) -> None:
    with pytest.raises(ul.BudgetError, match="disk_budget: 64.00 KiB, but .* on disk at once"):
        ul.plan(tower(), "100GiB", pin={"*": "offload:disk"}, disk_directory=tmp_path, disk_budget="64KiB")


def test_a_small_disk_makes_nothing_slower(tmp_path: Path) -> None:
    work = tower(6)
    profile = ul.profile(work)
    plain = ul.plan(work, policy="none", profile=profile).predicted.peak_bytes
    without = ul.plan(work, plain * 3 // 4, profile=profile)
    for budget in ("64KiB", "1MiB", "4MiB"):
        plan = ul.plan(work, plain * 3 // 4, profile=profile, disk_directory=tmp_path, disk_budget=budget)
        assert plan.predicted.step_seconds <= without.predicted.step_seconds * (1 + 1e-9)


def test_the_file_goes_with_the_handle(tmp_path: Path) -> None:
    work = tower(2)
    plan = offload(work, tmp_path)
    inst = work.instance()
    model = inst.model
    handle = plan.apply(model)
    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    gc.collect()
    gc.disable()
    try:
        del handle, model, inst, work
        assert len(os.listdir("/proc/self/fd")) == files - 1  # noqa: PTH208
    finally:
        gc.enable()
