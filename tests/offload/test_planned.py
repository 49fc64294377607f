"""Plans that have saved tensors on disk: what is promised is what happens, bit for bit, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

import ullage as ul
from tests import zoo
from ullage.mechanisms import OFFLOAD

CAPACITY = "32MiB"
BLOCKED = "gpt", "resnet", "moe", "shared", "unet", "lstm"


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULLAGE_POISON", "1")


def mixed(work: ul.Workload, at: Path) -> ul.Plan:
    """Blocks on disk, recomputed, and partly on disk, in turn, where they can be."""
    plain = ul.plan(work, policy="offload", disk_directory=at, disk_budget=CAPACITY)
    units = [d.unit for d in plain.decisions if d.action == OFFLOAD.name]
    whole = ul.plan(work, policy="every_block")
    able = {d.unit for d in whole.decisions if d.action == "recompute"}
    pins = {u: "recompute" for u in units[1::3] if u in able}
    return ul.plan(work, policy="offload", pin=pins, disk_directory=at, disk_budget=CAPACITY)


@pytest.mark.parametrize("family", BLOCKED)
def test_families_are_bitwise(family: str, tmp_path: Path) -> None:
    work = zoo.workload(family)
    plan = mixed(work, tmp_path)
    assert plan.predicted.traffic is not None and plan.predicted.traffic.sent_bytes > 0
    found = ul.verify(work, plan, steps=3)
    assert found.ok, str(found)
    assert not list(tmp_path.iterdir())
