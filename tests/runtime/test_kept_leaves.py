"""Weights, buffers and arguments that are given other memory between forward and backward of a unit whose activations are kept.

Autograd saves a tensor without a graph as itself, so the plain step's backward sees its new memory, though not where a view was saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ullage as ul

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*its activations are kept", "ignore:grad and param do not obey", "ignore:.*a stale op log"
)


class Block(nn.Module):
    """Saves weights as themselves (`@`, `*`, conv), and views of them."""

    def __init__(self, kind: str, kept: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv, self.kept = nn.Linear(8, 8), nn.Conv1d(1, 1, 3, padding=1), kept
        for name, t in {"mix": torch.randn(8, 8), "scale": torch.rand(8) + 0.5, "table": torch.rand(1000, 8)}.items():
            if kind == "buffer":
                self.register_buffer(name, t)
            else:
                setattr(self, name, nn.Parameter(t, requires_grad=kind == "trained"))
        self.conv.requires_grad_(kind == "trained")

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        if self.kept:
            with torch.no_grad():
                self.linear.weight.mul_(1.0)  # a replay would write it again
        x = (self.linear(x).sin() @ self.mix).cos() * self.scale * factor
        return self.conv(x.unsqueeze(1)).squeeze(1) * self.table[:3] * self.table.sum(0)  # type: ignore[no-any-return]


def _doubled(tensors: list[Tensor]) -> None:
    for t in tensors:
        t.data = t.data * 2


def _transposed(tensors: list[Tensor]) -> None:
    for t in tensors:
        if t.shape == (8, 8):
            t.data = t.data.t()


def _steps(block: Block, call: Callable[..., Any], change: Callable[[list[Tensor]], None]) -> list[Tensor]:
    found: list[Tensor] = []
    for n in range(3):
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(n), requires_grad=True)
        factor = torch.rand(3, 8, generator=torch.Generator().manual_seed(n))
        out = call(block, x, factor)
        change([block.mix, block.scale, block.table, block.conv.weight, factor])
        out.sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    return found + [p.grad for p in block.parameters() if p.grad is not None]


@pytest.mark.parametrize("keep", [None, "matmul_attention", lambda op: True], ids=["full", "matmul", "all"])
@pytest.mark.parametrize("change", [_doubled, _transposed])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "replayed"])
@pytest.mark.parametrize("kind", ["frozen", "trained", "buffer"])
def test_as_the_plain_step(kind: str, kept: bool, change: Callable[[list[Tensor]], None], keep: Any) -> None:
    plain = _steps(Block(kind, kept), lambda f, *a: f(*a), change)
    ours = _steps(Block(kind, kept), lambda f, *a: ul.checkpoint(f, *a, keep=keep), change)
    assert [torch.equal(a, b) for a, b in zip(plain, ours, strict=True)] == [True] * len(plain)


def test_a_kept_call_holds_no_graph_through_what_is_written_to_later() -> None:
    block, factor = Block("frozen", True), torch.rand(3, 8)
    x = torch.randn(3, 8, requires_grad=True)
    out = ul.checkpoint(block, x, factor)
    factor += out  # has a graph now, in which that call is
    leaf = weakref.ref(x)
    del x, out, factor
    assert leaf() is None
