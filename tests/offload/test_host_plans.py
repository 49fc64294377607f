"""Plans that have saved tensors go to pinned host memory, made for a CUDA device that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ullage as ul
from tests.offload.planned import Block, squares, tower
from ullage.cost import find_device
from ullage.mechanisms import Option, option_from_name
from ullage.mechanisms._levels import find_levels
from ullage.offload import whole_blocks
from ullage.planner.decide._planner import decide
from ullage.planner.model._model import model_of
from ullage.planner.plan._budget import Budget
from ullage.planner.study._options import StudyExploration
from ullage.planner.study._prepare import prepare
from ullage.planner.study._tiers import Host, TierRequest, choose_tier
from ullage.runtime.ops._keep import OpsRule

ROWS = 8 * 32  # of a tower's input
FIRST = (
    4 * ROWS * (64 + 256 + 256)
)  # what the first block saves, but for the batch: the normed input, two of its MLP's middle
TOWER = 4 * (FIRST + 4 * ROWS * 64) - 4 * ROWS * 64


def planned(work: ul.Workload, budget: int | str | None = None, host: str = "64MiB", **options: Any) -> ul.Plan:
    return ul.plan(work, budget, device="h200", host_budget=host, **options)


def sizes(work: ul.Workload) -> dict[str, int]:
    return {p: ul.plan(work, policy=p, device="h200").predicted.peak_bytes for p in ("none", "every_block")}


def test_the_offload_policy_and_its_memory() -> None:
    plan = planned(tower(), policy="offload")
    assert {d.action for d in plan.decisions} == {"offload:host"}
    link = find_device("h200").host_link_bytes_per_s
    assert plan.host is not None
    speeds = {"write_bytes_per_second": link, "read_bytes_per_second": link}
    assert plan.host == Host(capacity_bytes=TOWER, window_bytes=4 * ROWS * 256, **speeds)
    t = plan.predicted.traffic
    assert plan.disk is None and plan.tier is plan.host and t is not None
    assert t.sent_bytes == TOWER >= t.fetched_bytes  # what is asked for on its way out is not fetched
    assert f"  host       {t.sent_bytes / 2**20:.2f} MiB out, " in str(plan) and " pinned" in str(plan)


def test_a_file_of_it_reads_back(tmp_path: Path) -> None:
    plan = planned(tower(), policy="offload")
    plan.save(tmp_path / "plan.json")
    again = ul.Plan.load(tmp_path / "plan.json")
    assert again == plan and again.digest == plan.digest
    assert plan.endurance == "" and "endurance" not in str(plan)


@pytest.mark.parametrize(
    ("share", "hosts"),
    [
        (0.5, ("512KiB",)),
        *(pytest.param(s, ("512KiB", "64MiB"), marks=pytest.mark.slow) for s in (0.25, 0.75)),
    ],
)
def test_with_host_memory_no_plan_is_slower(share: float, hosts: tuple[str, ...]) -> None:
    """The slow ones alone show it near both ends, and with room for everything."""
    work = tower(4)
    ends = sizes(work)
    budget = int(ends["every_block"] + share * (ends["none"] - ends["every_block"]))
    without = ul.plan(work, budget, device="h200")
    for host in hosts:
        plan = planned(work, budget, host)
        assert plan.predicted.peak_bytes <= budget
        assert plan.predicted.step_seconds <= without.predicted.step_seconds * (1 + 1e-9)
        if plan.host is not None:
            assert plan.host.capacity_bytes <= {"512KiB": 2**19, "64MiB": 2**26}[host]


def large(blocks: int = 6) -> ul.Workload:
    """Wide enough that what is saved moves in the time of a matmul or two."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Block(512) for _ in range(blocks)))
    return ul.Workload(model, torch.randn(64, 64, 512), loss=squares, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))


def test_a_slow_recompute_and_a_fast_link() -> None:
    """Below what recomputing reaches, the plan has tensors leave."""
    work = large()
    with pytest.raises(ul.BudgetInfeasible) as least:
        ul.plan(work, "1MiB", device="h200")
    budget = least.value.smallest_bytes - 1
    plan = planned(work, budget, "1GiB")
    assert plan.predicted.peak_bytes <= budget and plan.host is not None
    assert any("@host" in d.action or d.action == "offload:host" for d in plan.decisions)


def test_the_window_is_part_of_the_peak() -> None:
    work = large()
    ends = sizes(work)
    plan = planned(work, (ends["none"] + ends["every_block"]) // 2, "1GiB", forbid=["recompute", "select"])
    assert plan.host is not None and plan.bounds is not None
    blas = find_device("h200").blas_workspace_bytes
    assert plan.bounds.by_category["library workspace"] == blas + 2 * plan.host.window_bytes


def test_parts_of_levels_that_hide_behind_a_forward() -> None:
    """Of a level the largest calls leave that, together, move while the unit's forward computes."""
    work = large()
    tier = choose_tier(TierRequest(host_budget="1GiB"), work, "h200")
    assert tier is not None
    s = prepare(work, "h200", tier=tier)
    model_of(s)
    room = s.forward_seconds["3"] * tier.write_bytes_per_second
    parts = [r for o in s.options["3"] if (r := _rule(o)) is not None and 0 < len(r.leaving) < len(r.calls)]
    assert parts
    sizes = find_levels(StudyExploration(s), ["3"], "select")["3"].call_bytes
    for rule in parts:
        sent = sum(sizes[c] for c in rule.leaving)
        assert 0 < sent <= room
        staying = rule.calls - rule.leaving
        assert all(sizes[c] > room - sent for c in staying if sizes[c] >= 4096)


def _rule(option: Option) -> OpsRule | None:
    return OpsRule.from_text(option.level) if "@" in option.level and option.action == "select" else None


def test_pins_name_the_tier() -> None:
    work = tower(3)
    pins = {"0": "offload:host", "1": "select:addmm[0]@host"}
    plan = planned(work, policy="none", pin=pins)
    assert [d.action for d in plan.decisions] == ["offload:host", "select:addmm[0]@host", "keep"]
    t = plan.predicted.traffic
    assert t is not None and t.sent_bytes == FIRST + 4 * ROWS * 256
    assert plan.host is not None and plan.host.capacity_bytes == whole_blocks(t.sent_bytes)
    for action, right in (("offload:disk", "offload:host"), ("select:addmm[0]@disk", r"select:addmm\[0\]@host")):
        said = f"offloads to disk, but this plan's tier is host; pin it to {right}, or give disk_directory and disk_budget instead"
        with pytest.raises(ul.ArgumentError, match=said):
            planned(work, policy="none", pin={"0": action})


def test_one_unit_has_one_tier() -> None:
    assert option_from_name("select:gelu[0]+mm[0,2]@host").tier == "host"
    with pytest.raises(ValueError, match="names disk and host; tensors are offloaded to one of them"):
        option_from_name("select:gelu[0]@disk+mm[0,2]@host")
    with pytest.raises(ValueError, match=r"gelu\[0\] is to stay in memory and to leave it"):
        option_from_name("select:gelu[0]@host+gelu[0]")


def test_a_cpu_has_no_host_tier(tmp_path: Path) -> None:
    """The plan is for another device; the model is as it was."""
    work = tower(2)
    plan = planned(work, policy="offload")
    forwards = [m.forward.__func__ for m in work.model]
    with pytest.raises(ul.DeviceError, match="cpu"):
        plan.apply(work.model)
    assert [m.forward.__func__ for m in work.model] == forwards
    with ul.plan(work, policy="none").apply(work.model):
        pass


def test_decisions_and_the_tier_have_to_match() -> None:
    import msgspec

    work = tower(2)
    plan = msgspec.structs.replace(planned(work, policy="offload"), host=None)
    with pytest.raises(ul.ApplyError, match="to host, but the plan has no `host`"):
        plan.apply(work.model)


def test_levels_are_found_once() -> None:
    """A plan that is read is checked by the options before any are captured: these have the tier's own action only."""
    work = tower(2)
    s = prepare(work, "h200", tier=choose_tier(TierRequest(host_budget="1MiB"), work, "h200"))
    assert [o.name for o in s.options["0"] if o.offloads] == ["offload:host"]


def test_a_frontier_with_host_memory() -> None:
    work = tower(3)
    without = ul.frontier(work, 3, "h200")
    found = ul.frontier(work, 3, "h200", host_budget="64MiB")
    assert [p.policy for p in found.policies] == [*(p.policy for p in without.policies), "offload"]
    assert found.points[0].peak_bytes < without.points[0].peak_bytes
    assert found.points[0].plan.host is not None
    assert found.points[-1].step_seconds == without.points[-1].step_seconds  # the plain step
    small = ul.frontier(work, 2, "h200", host_budget="16KiB").policies[-1]
    assert (small.policy, small.peak_bytes) == ("offload", None) and "host_budget: 16.00 KiB, but" in small.reason


@pytest.mark.slow
def test_a_larger_batch_fits_with_host_memory() -> None:
    """Alone shows `fit` with a tier."""

    def make(batch: int) -> ul.Workload:
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(Block(256) for _ in range(3)))
        return ul.Workload(model, torch.randn(batch, 256, 256), loss=squares)

    budget = ul.plan(make(8), policy="every_block", device="h200").predicted.peak_bytes
    without = ul.fit(make, budget, device="h200", at_least=8, at_most=16)
    found = ul.fit(make, budget, device="h200", at_least=8, at_most=16, host_budget="1GiB")
    assert found.value > without.value >= 8 and found.plan.host is not None


def test_a_plan_of_which_nothing_leaves() -> None:
    """What is saved is smaller than a block; the least memory is pinned, and it is a plan all the same."""
    model = torch.nn.Sequential(*(Block(8) for _ in range(2)))
    plan = planned(ul.Workload(model, torch.randn(2, 3, 8), loss=squares), policy="offload")
    assert plan.host is not None and plan.host.capacity_bytes == 4096 and plan.predicted.traffic is None


def test_a_window_of_another_limit_is_forgotten() -> None:
    work = large(3)
    tier = choose_tier(TierRequest(host_budget="1GiB"), work, "h200")
    s = prepare(work, "h200", tier=tier)
    wide = decide(s, None, "offload")
    assert wide.host is not None and wide.host.window_bytes > 0
    least = wide.predicted.peak_bytes - wide.host.reserved_bytes
    narrow = decide(s, Budget(least), "offload")
    assert narrow.host is not None and (narrow.host.window_bytes, narrow.predicted.peak_bytes) == (0, least)
