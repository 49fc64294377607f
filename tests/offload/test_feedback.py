"""What an applied plan's transfers took, and the next plan that knows of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest

import ullage as ul
from tests.offload.planned import CAPACITY, backward, offload, tower
from ullage.apply._handle import _slower
from ullage.offload import Bandwidth, Stats
from ullage.planner.study._tiers import Disk, Host, Traffic


def made(plan: ul.Plan, **of_traffic: Any) -> ul.Plan:
    """A plan that sends 1,000 bytes and brings 500 back, in 10 s and 10 s, of which it stalls 4 s."""
    traffic = {"sent_bytes": 1000, "fetched_bytes": 500, "hidden_seconds": 16.0, "stalled_seconds": 4.0}
    predicted = msgspec.structs.replace(plan.predicted, traffic=Traffic(**{**traffic, **of_traffic}, late_prefetches=0))
    disk = Disk(directory="/", capacity_bytes=2**20, write_bytes_per_second=100.0, read_bytes_per_second=50.0)
    return msgspec.structs.replace(plan, predicted=predicted, disk=disk)


def test_waits_beyond_those_simulated_are_slower_transfers() -> None:
    plan = made(ul.plan(tower(1), policy="none", costs="roofline"))
    three = Stats(bytes_written=3000, bytes_read=1500, stalled_write_seconds=20.0, stalled_read_seconds=22.0)
    assert _slower(plan, three) == 1 + (14 - 4) / 20
    assert _slower(plan, dataclasses.replace(three, stalled_read_seconds=0.0)) == 1 + (20 / 3 - 4) / 20
    assert _slower(plan, dataclasses.replace(three, stalled_write_seconds=0.0, stalled_read_seconds=1.0)) == 1.0
    assert _slower(plan, Stats()) == _slower(plan, None) == 1.0
    assert _slower(made(plan, sent_bytes=0), three) == 1.0


def test_the_next_plan_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ullage.planner.study._tiers.measure_bandwidth", lambda *_, **__: Bandwidth(4e8, 8e8, True))
    work = tower(2)
    with offload(work, tmp_path).apply(work.model) as handle:
        backward(work.model, work.batch)
        report = handle.report()
    assert report.tier == "disk" and report.transfers_slower >= 1
    assert f"transfers {report.transfers_slower:.2f} times as long as simulated" in str(report)
    again = offload(work, tmp_path, feedback=dataclasses.replace(report, transfers_slower=2.0))
    assert again.disk is not None
    assert (again.disk.write_bytes_per_second, again.disk.read_bytes_per_second) == (2e8, 4e8)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"disk_directory": "/tmp", "disk_budget": CAPACITY, "feedback": "fast"}, "feedback: expected .*got str"),
        ({"feedback": None}, ""),
        ({}, "feedback: is for plans with a tier"),
        (
            {"host_budget": "1MiB", "device": "h200"},
            "feedback: of a plan without offloading, but this one offloads to host; pass the report",
        ),
    ],
)
def test_feedback_that_means_nothing(options: dict[str, Any], match: str) -> None:
    work = tower(1)
    with ul.plan(work, policy="none", costs="roofline").apply(work.model) as handle:
        given = {"feedback": handle.report(), **options}
    if not match:
        assert ul.plan(work, policy="none", costs="roofline", **given).tier is None
        return
    with pytest.raises(ul.ArgumentError, match=match):
        ul.plan(work, "1GiB", costs="roofline", **given)


def test_speeds_are_those_of_the_device_table_without_feedback() -> None:
    plan = ul.plan(tower(1), policy="offload", device="h200", host_budget="16MiB")
    assert isinstance(plan.tier, Host) and plan.tier.write_bytes_per_second == 5.5e10


def test_what_was_not_measured_is_not_in_a_plan() -> None:
    """So that plans of before keep their digests."""
    disk = Disk(directory="/scratch", capacity_bytes=2**20, write_bytes_per_second=1e9, read_bytes_per_second=2e9)
    names = {"directory", "capacity_bytes", "write_bytes_per_second", "read_bytes_per_second", "window_bytes"}
    assert set(msgspec.to_builtins(disk)) == names | {"threads", "buffer_bytes"}
    assert (disk.channels.transfer_seconds, disk.channels.wait_seconds) == (0.0, 0.0)
