"""A module put in the place of another: between two calls it is known as new, and between forward and backward the replay runs the old one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ullage as ul

pytestmark = pytest.mark.filterwarnings("ignore:.*a stale op log")
hold: list[nn.Module] = []  # without it the old module is gone, and seen so


class Counting(nn.Module):
    """Changes a buffer that is too large to be copied unless it is known to change, and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(9000))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.table.add_(1)
        self.calls += 1
        return x * (1 + self.table[:8] * 0.1) * self.calls


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.last = nn.Linear(8, 8), nn.Identity(), nn.Identity()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.body(self.a(x).sin())))  # type: ignore[no-any-return]


def _put(name: str, make: Callable[[], nn.Module]) -> Callable[[Block], None]:
    def put(block: Block) -> None:
        hold.append(block.get_submodule(name))
        torch.manual_seed(1)
        block.set_submodule(name, make())

    return put


def _nobody_holds_the_old(block: Block) -> None:
    torch.manual_seed(1)
    block.a = nn.Linear(8, 8)


def _wrapped(block: Block) -> None:
    block.a = nn.Sequential(block.a, nn.ReLU())  # type: ignore[assignment]


def _removed(block: Block) -> None:
    hold.append(block.body[1])
    del block.body[1]


CHANGES: dict[str, Callable[[Block], None]] = {
    "weights": _put("a", lambda: nn.Linear(8, 8)),
    "nobody holds the old": _nobody_holds_the_old,
    "further down": _put("body.0", lambda: nn.Linear(8, 8)),
    "no weights": _put("body.1", nn.ReLU),
    "statistics": _put("norm", lambda: nn.BatchNorm1d(8)),
    "large state": _put("last", Counting),
    "wrapped": _wrapped,
    "removed": _removed,
}


def _steps(call: Callable[..., Any], change: Callable[[Block], None], when: str) -> list[Any]:
    block, found = Block(), list[Any]()
    for n in range(4):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(n), requires_grad=True)
        if (n, when) == (2, "between calls"):
            change(block)
        y = call(block, x)
        if (n, when) == (2, "before backward"):
            change(block)
            now = list(block.modules())
        y.square().sum().backward()
        if (n, when) == (2, "before backward"):
            assert list(block.modules()) == now  # the replay leaves the new one there
        found.append(x.grad)
    return [*found, *[p.grad for p in block.parameters()], *block.buffers(), getattr(block.last, "calls", 0)]


@pytest.mark.parametrize("keep", [None, "matmul_attention"], ids=["full", "matmul"])
@pytest.mark.parametrize("when", ["between calls", "before backward"])
@pytest.mark.parametrize("change", CHANGES)
def test_as_the_plain_step(change: str, when: str, keep: Any) -> None:
    plain = _steps(lambda f, x: f(x), CHANGES[change], when)
    ours = _steps(lambda f, x: ul.checkpoint(f, x, keep=keep), CHANGES[change], when)
    hold.clear()
    equal = [
        a is b or (torch.equal(a, b) if isinstance(a, Tensor) else a == b) for a, b in zip(plain, ours, strict=True)
    ]
    assert equal == [True] * len(plain)
