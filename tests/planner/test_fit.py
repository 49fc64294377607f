"""The largest value that fits and the fastest: the answer fits, the next value does not, and few values are tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

import ullage as ul
from tests.small import Blocks, blocks, tiny
from ullage.measure._measure import record_peak
from ullage.planner.answers import _fit

FAST = {"costs": "roofline"}


def check(found: ul.Fit, make: Callable[[int], ul.Workload]) -> None:
    """What holds of every fit that the budget bounds."""
    assert found.bound_by == "the budget"
    plan = ul.plan(make(found.value), found.budget_bytes, **FAST)
    assert (
        msgspec.structs.replace(plan, bounds=None) == found.plan
    )  # what bounds it is said of plans that are asked for alone
    with pytest.raises(ul.BudgetInfeasible) as caught:
        ul.plan(make(found.value + found.step), found.budget_bytes, **FAST)
    tried = {t.value: t for t in found.tried}
    assert list(tried) == sorted(tried) and all(v % found.step == 0 for v in tried)
    over = tried[found.value + found.step]
    assert (over.fits, over.peak_bytes) == (False, caught.value.smallest_bytes)
    assert [t.value for t in found.tried if t.fits] == [v for v in tried if v <= found.value]
    rates = {t.value: t.throughput for t in found.tried if t.throughput is not None}
    assert list(rates) == [v for v in tried if v <= found.value]
    assert found.fastest_throughput == rates[found.fastest] == max(rates.values())
    assert found.throughput == rates[found.value]
    assert found.fastest_plan.predicted.step_seconds == tried[found.fastest].step_seconds


def test_a_batch() -> None:
    calls = []

    def make(batch: int) -> ul.Workload:
        calls.append(batch)
        return tiny(batch)

    found = ul.fit(make, "2MiB", at_least=8, **FAST)
    assert calls[:2] == [8, 16] and {found.value, found.value + 1} <= set(calls) and len(calls) <= 8
    check(found, tiny)
    assert found.unit == "samples/s" and found.throughput == found.value / found.plan.predicted.step_seconds
    assert set(found.plan.counts()) != {"keep"}
    assert record_peak(tiny(found.value), found.plan) == found.plan.predicted.peak_bytes <= 2 * 2**20


def test_the_fastest_is_often_not_the_largest() -> None:
    found = ul.fit(blocks, "400KiB", at_least=64, **FAST)
    check(found, blocks)
    assert found.fastest == 256 < found.value
    lines = str(found).splitlines()
    assert lines[0] == "fit of batch (multiples of 1) within 400.00 KiB on cpu (costs: roofline)"
    assert lines[1:5] == str(found.plan.setup).splitlines()
    assert lines[5].startswith(f"  largest  batch={found.value}: ") and lines[6].startswith("  fastest  batch=256: ")
    assert lines[7] == "  bound by the budget" and len(lines) == 9 + len(found.tried)
    assert lines[-1].endswith("over the budget")


class Positions(Blocks):
    """Has 48 positions."""

    def __init__(self) -> None:
        super().__init__(2, 32)
        self.positions = nn.Parameter(torch.zeros(48, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.positions[: x.shape[1]])


def test_a_sequence_is_bound_by_what_can_be_run() -> None:
    def make(seq: int) -> ul.Workload:
        return ul.Workload(Positions(), torch.ones(4, seq, 32))

    found = ul.fit(make, "100MiB", "seq", step=16, **FAST)
    assert found.value == 48 and found.unit == "tokens/s"
    assert found.throughput == 4 * 48 / found.plan.predicted.step_seconds
    assert "test_fit.py" in found.bound_by and "the step itself raises RuntimeError" in found.bound_by
    assert [(t.value, t.fits) for t in found.tried] == [(16, True), (32, True), (48, True), (64, False)]
    assert found.tried[-1].peak_bytes is None and found.bound_by in str(found)


@pytest.mark.slow
def test_any_keyword_that_takes_a_whole_number() -> None:
    """Alone shows a fit along a keyword of any name."""
    found = ul.fit(lambda *, layers: blocks(layers=layers), "300KiB", "layers", **FAST)
    check(found, lambda layers: blocks(layers=layers))
    assert found.axis == "layers" and found.unit == "samples/s"
    assert found.throughput == 128 / found.plan.predicted.step_seconds


def test_a_peak_that_grows_faster_than_the_value() -> None:
    def square(side: int) -> ul.Workload:
        return ul.Workload(Blocks(2, side), torch.ones(side, side), optimizer=None)

    calls = []

    def make(side: int) -> ul.Workload:
        calls.append(side)
        return square(side)

    found = ul.fit(make, "1MiB", "side", step=2, at_least=8, **FAST)
    check(found, square)
    assert len(calls) == len(set(calls)) <= 13


def test_bounds() -> None:
    found = ul.fit(blocks, "1GiB", step=3, at_least=7, at_most=20, **FAST)
    assert [t.value for t in found.tried] == [9, 18] and found.value == 18 and found.bound_by == "at_most=18"
    found = ul.fit(blocks, "1GiB", at_least=5, at_most=5, **FAST)
    assert [t.value for t in found.tried] == [5]


def test_defaults_are_said() -> None:
    assert _fit.STEPS == {"batch": 1, "seq": 128} and _fit.MOST == {"batch": 65_536, "seq": 1_048_576}
    said = str(ul.fit.__doc__)
    assert all(text in said for text in ("1, along seq 128", "65,536 for batch, 1,048,576 for seq, else 1,024 steps"))


def test_nothing_fits() -> None:
    with pytest.raises(
        ul.BudgetInfeasible, match="batch=8, the smallest value tried, does not fit: budget 1.00 KiB"
    ) as e:
        ul.fit(blocks, 1024, at_least=8, **FAST)
    assert e.value.budget_bytes == 1024 and e.value.bound_by[0] in ("forward", "backward")
    found = ul.fit(blocks, e.value.smallest_bytes, at_least=8, at_most=8, **FAST)
    assert found.value == 8 and found.plan.predicted.peak_bytes == e.value.smallest_bytes


def _boom(batch: int) -> ul.Workload:
    raise KeyError("mine")


@pytest.mark.parametrize(
    ("call", "kind", "match"),
    [
        (
            lambda: ul.fit(blocks, "1MiB", "colour"),
            ul.ArgumentError,
            "axis='colour': no keyword of blocks; it takes batch, la",
        ),
        (lambda: ul.fit(lambda: blocks(), "1MiB"), ul.ArgumentError, "axis='batch': .*it takes no keywords"),
        (
            lambda: ul.fit(lambda batch="much": blocks(), "1MiB"),
            ul.ArgumentError,
            "default is 'much', not a whole number",
        ),
        (lambda: ul.fit(lambda batch=True: blocks(), "1MiB"), ul.ArgumentError, "default is True"),
        (lambda: ul.fit(blocks, "1MiB", 3), ul.ArgumentError, "axis=3"),  # type: ignore[arg-type]
        (lambda: ul.fit(blocks(), "1MiB"), ul.ArgumentError, "make_work: .*batch=, got Workload"),  # type: ignore[arg-type]
        (lambda: ul.fit(lambda batch: 7, "1MiB"), ul.ArgumentError, "make_work: .*Workload, got int"),
        (lambda: ul.fit(_boom, "1MiB"), ul.WorkloadError, r"make_work\(batch=1\) raised KeyError: 'mine'"),
        (lambda: ul.fit(blocks, "1MiB", step=0), ul.ArgumentError, "step=0: .*1 or more"),
        (lambda: ul.fit(blocks, "1MiB", at_least=2.5), ul.ArgumentError, "at_least=2.5"),  # type: ignore[arg-type]
        (lambda: ul.fit(blocks, "1MiB", at_most=True), ul.ArgumentError, "at_most=True"),
        (
            lambda: ul.fit(blocks, "1MiB", step=8, at_least=9, at_most=15),
            ul.ArgumentError,
            "no multiple of step=8 .* 9 to 15",
        ),
        (lambda: ul.fit(blocks, "50% of plain"), ul.BudgetError, "the plain step is another one at each batch"),
        (lambda: ul.fit(blocks, "6 potatoes"), ul.BudgetError, "potatoes"),
        (lambda: ul.fit(blocks, "1MiB", device="h20"), ul.DeviceError, "did you mean"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        call()
    assert isinstance(caught.value, ul.UllageError)
