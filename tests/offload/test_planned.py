"""Plans that have saved tensors on disk: what they promise, what is said of them, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

import ullage as ul
from tests import zoo
from tests.offload.planned import (
    CAPACITY,
    offload,
    tower,
)
from tests.small import next_byte
from ullage.workload import run_step


def test_what_is_kept_of_a_block_on_disk(tmp_path: Path) -> None:
    work = tower()
    plan, plain = offload(work, tmp_path), ul.plan(work, policy="none")
    t = plan.predicted.traffic
    rows = 8 * 32
    # input, normalised input, what gelu takes and what it gives; statistics are smaller than a block of the file
    a_block = rows * 4 * (64 + 64 + 256 + 256)
    assert t is not None and plan.disk is not None
    assert t.sent_bytes == 4 * a_block - rows * 4 * 64  # all but the first block's input, which is the user's batch
    window = plan.disk.window_bytes
    assert window > 0 and plan.disk.reserved_bytes == 2 * window + 2**20
    without = msgspec.structs.replace(plan, disk=msgspec.structs.replace(plan.disk, window_bytes=0))
    measured = ul.measure(work, plan=without, steps=2)
    assert measured.peak_bytes == plan.predicted.peak_bytes - plan.disk.reserved_bytes
    assert ul.measure(work, plan=plan, steps=2).peak_bytes <= plan.predicted.peak_bytes - 2**20
    assert plan.predicted.peak_bytes <= plain.predicted.peak_bytes


def test_a_budget_is_a_promise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt = zoo.GPT(layers=2, width=128, heads=4, seq=128)
    work = ul.Workload(gpt, zoo.text_ids(4, 128), loss=next_byte, optimizer=zoo.adamw)
    profile = ul.profile(work, costs="roofline")
    disk: Any = {"profile": profile, "disk_directory": tmp_path, "disk_budget": "1GiB"}
    with pytest.raises(ul.BudgetInfeasible) as least:
        ul.plan(work, 1024, **disk)
    smallest = least.value.smallest_bytes
    with pytest.raises(ul.BudgetInfeasible) as without:
        ul.plan(work, 1024, profile=profile)
    assert smallest < without.value.smallest_bytes
    plan = ul.plan(work, (3 * smallest + profile.peak_bytes) // 4, **disk)
    assert plan.budget_bytes is not None and plan.predicted.peak_bytes <= plan.budget_bytes
    assert ul.measure(work, plan=plan, steps=2).peak_bytes <= plan.predicted.peak_bytes
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_never_slower_than_without(tmp_path: Path) -> None:
    """Alone shows it at four budgets from the least to the plain step's."""
    work = tower()
    profile = ul.profile(work, costs="roofline")
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
    t = again.predicted.traffic
    assert t is not None
    assert again.endurance == ul.offload.endurance_note(t.sent_bytes, 1 / again.predicted.step_seconds)
    assert f"  endurance  offload writes {t.sent_bytes / 2**20:.2f} MiB per step, " in str(again)
    assert "offloads everything to disk" in str(again) and "hidden" in str(again) and str(tmp_path) in str(again)


def test_a_plan_takes_no_more_than_the_file_holds(tmp_path: Path) -> None:
    work = tower()
    plan = offload(work, tmp_path)
    assert plan.disk is not None
    options = {"disk_directory": tmp_path, "disk_budget": "256KiB"}
    with pytest.raises(ul.BudgetInfeasible):
        ul.plan(
            work,
            plan.predicted.later_step_peak_bytes - plan.disk.reserved_bytes + 2**20,
            forbid=["recompute", "select"],
            **options,
        )
    with pytest.raises(ul.BudgetError, match="disk_budget: 256.00 KiB, but 2.44 MiB are offloaded at once"):
        ul.plan(work, policy="offload", **options)


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
        ({"host_budget": "1GiB", "device": "cpu"}, ul.DeviceError, "the CPU, which has none beside it"),
        ({"host_budget": "1KiB", "device": "h200"}, ul.BudgetError, "host_budget='1KiB': give at least 4096 bytes"),
        (
            {"host_budget": "1GiB", "device": "h200", "disk_directory": "/tmp", "disk_budget": "1MiB"},
            ul.ArgumentError,
            "host_budget and disk_budget: .*one of them",
        ),
        ({"device": "h200", "disk_directory": "/tmp", "disk_budget": "1MiB"}, ul.DeviceError, "h200 can't go to disk"),
        ({"checksums": True}, ul.ArgumentError, "checksums: .*give disk_directory and disk_budget too"),
        ({"host_budget": "1GiB", "device": "h200", "checksums": True}, ul.ArgumentError, "checksums: .*disk_budget"),
        ({"policy": "offload"}, ul.ArgumentError, "policy 'offload': .*disk_directory"),
        ({"pin": {"0": "offload:disk"}}, ul.ArgumentError, "pin '0'='offload:disk': .*disk_directory"),
        ({"pin": {"0": "select:addmm[0]@disk"}}, ul.ArgumentError, "disk_directory"),
        ({"pin": {"0": "offload:tape"}}, ul.ArgumentError, "no such action"),
    ],
)
def test_arguments_that_mean_nothing(options: dict[str, Any], kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        ul.plan(tower(1), **{"budget": "1MiB", **options})


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_only_plans_have_tensors_leave(tier: str) -> None:
    with pytest.raises(ul.ArgumentError, match=f"only a plan offloads tensors .*leave `@{tier}` out"):
        ul.checkpoint(nn.Linear(4, 4), torch.ones(4, 4), keep=f"addmm[0]@{tier}")


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    at = ["--disk-directory", str(tmp_path), "--disk-budget", "256MiB"]
    command = [
        sys.executable,
        "-m",
        "ullage",
        "plan",
        "tests/small.py:tiny",
        "--costs",
        "roofline",
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


@pytest.mark.slow
def test_what_is_shown_of_a_plan_with_a_disk(tmp_path: Path) -> None:
    """Alone shows timeline and report of a plan within a budget whose tensors leave."""
    work = zoo.workload("gpt")
    profile = ul.profile(work, costs="roofline")
    disk: Any = {"disk_directory": tmp_path, "disk_budget": "256MiB"}
    plan = ul.plan(work, profile.peak_bytes * 2 // 3, forbid=["recompute", "select"], profile=profile, **disk)
    assert plan.disk is not None and plan.bounds is not None
    shown = ul.timeline(work, plan)
    assert shown.peak_bytes == plan.predicted.peak_bytes == plan.bounds.peak_bytes
    assert plan.bounds.by_category["library workspace"] == plan.disk.reserved_bytes
    page = ul.report(work, plan=plan, points=None)
    assert page.plan.predicted.peak_bytes == plan.predicted.peak_bytes and page.plan.disk == plan.disk


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
    with pytest.raises(ul.BudgetError, match="offloaded at once"):
        ul.plan(both, policy="offload", disk_directory=tmp_path, disk_budget="3MiB")
    plan = ul.plan(both, policy="offload", disk_directory=tmp_path, disk_budget="6MiB")
    assert ul.verify(both, plan, steps=2).ok


def test_pins_that_the_file_can_not_hold(tmp_path: Path) -> None:
    with pytest.raises(ul.BudgetError, match="disk_budget: 64.00 KiB, but .* are offloaded at once"):
        ul.plan(tower(), "100GiB", pin={"*": "offload:disk"}, disk_directory=tmp_path, disk_budget="64KiB")


@pytest.mark.slow
def test_a_small_disk_makes_nothing_slower(tmp_path: Path) -> None:
    """Alone shows disks that hold a part of what could leave."""
    work = tower(6)
    profile = ul.profile(work, costs="roofline")
    plain = ul.plan(work, policy="none", profile=profile).predicted.peak_bytes
    without = ul.plan(work, plain * 3 // 4, profile=profile)
    for budget in ("64KiB", "1MiB", "4MiB"):
        plan = ul.plan(work, plain * 3 // 4, profile=profile, disk_directory=tmp_path, disk_budget=budget)
        assert plan.predicted.step_seconds <= without.predicted.step_seconds * (1 + 1e-9)
