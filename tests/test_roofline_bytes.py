"""Bytes are those of the kernels that run here, wherever times come from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul
from ullage.cost import _measure


class Unit(nn.Module):
    def __init__(self, inside: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.inside = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), inside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(self.norm(self.conv(x)))


INSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded gradient": lambda h: F.gelu(h).sum((2, 3), keepdim=True),  # the backward of gelu makes a copy of it
    "formula": lambda h: h.sigmoid().cumprod(2),  # goes another way on real tensors
    "sorted": lambda h: h.sort(1).values.median(2, keepdim=True).values,
    "pooled": lambda h: F.interpolate(F.max_pool2d(h, 2), scale_factor=2.0, mode="bilinear"),
    "attention": lambda h: F.scaled_dot_product_attention(h, h, h),
}


def _work(inside: Callable[[Tensor], Tensor]) -> ul.Workload:
    torch.manual_seed(0)
    model = nn.Sequential(*(Unit(inside) for _ in range(3)))
    return ul.Workload(model, torch.randn(4, 8, 16, 16), loss=lambda out, _: out.square().mean())


@pytest.mark.parametrize("name", INSIDE)
def test_bytes_with_times_of_a_table_are_exact(name: str) -> None:
    work = _work(INSIDE[name])
    plain = ul.profile(work, costs="roofline")
    assert plain.peak_bytes == ul.measure(work, steps=1).peak_bytes
    plan = ul.plan(work, policy="every_block", costs="roofline")
    assert plan.predicted.peak_bytes == ul.measure(work, plan, steps=1).peak_bytes
    assert plan.predicted.peak_bytes == ul.plan(work, policy="every_block").predicted.peak_bytes


def test_bytes_of_kernels_are_measured_once_for_each_way_that_torch_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    work, ran = _work(torch.tanh), list[str]()
    one = _measure._one
    monkeypatch.setattr(_measure, "_MEASURED", {})
    monkeypatch.setattr(_measure, "_one", lambda s, *given: ran.append(str(s.func)) or one(s, *given))
    first = ul.profile(work, costs="roofline")
    assert ran.count("aten.convolution.default") == 1
    count = len(ran)
    again = ul.profile(work, costs="roofline")
    assert len(ran) == count and again.op_cost_table == first.op_cost_table
    torch._C._set_mkldnn_enabled(False)
    try:
        other = ul.profile(work, costs="roofline")
        assert other.peak_bytes == ul.measure(work, steps=1).peak_bytes
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert len(ran) == 2 * count and other.op_cost_table != first.op_cost_table
    seconds = {name: row[0] for name, row in first.op_cost_table.items()}
    assert seconds == {name: row[0] for name, row in other.op_cost_table.items()}
