"""Forwards that give parameters other memory, which no version and no dispatch mode shows: kept, and no tensor loses its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ullage as ul
from ullage.runtime._memory import make_good

aten = torch.ops.aten
KEEPS = [None, "matmul_attention", {aten.mul.Tensor}, lambda op: True]


class _Clamped(nn.Module):
    """Clamps its parameter, from batches of `rows` on."""

    def __init__(self, how: str, rows: int = 0) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.full((8,), 2.0))
        self.how, self.rows = how, rows

    def forward(self, x: Tensor) -> Tensor:
        if len(x) >= self.rows and self.how == "data":
            self.scale.data = self.scale.data.clamp(0.5, 0.9) * 0.99
        elif len(x) >= self.rows:
            with torch.no_grad():
                self.scale.set_((self.scale.detach().clamp(0.5, 0.9) * 0.99).detach())
        return x + (self.linear(x) * self.scale).tanh()


def _steps(how: str, rows: int, sizes: list[int], keep: Any, checkpointed: bool) -> list[Tensor]:
    torch.manual_seed(0)
    block, found = _Clamped(how, rows), []
    for size in sizes:
        x = torch.randn(size, 8)
        out = ul.checkpoint(block, x, keep=keep) if checkpointed else block(x)
        out.square().mean().backward()
        found += [p.grad.clone() for p in block.parameters() if p.grad is not None] + [block.scale.detach().clone()]
        block.zero_grad()
    return found


@pytest.mark.parametrize("keep", KEEPS, ids=lambda k: getattr(k, "__name__", str(k)))
@pytest.mark.parametrize("how", ["data", "set_"])
def test_a_parameter_that_is_given_other_memory_is_that_of_the_plain_step(how: str, keep: Any) -> None:
    plain = _steps(how, 0, [4, 4, 4], keep, False)
    with pytest.warns(ul.UllageWarning, match=r"scale.*; its activations are kept"):
        found = _steps(how, 0, [4, 4, 4], keep, True)
    assert len(found) == len(plain) and all(map(torch.equal, found, plain))


@pytest.mark.parametrize("keep", KEEPS[1:], ids=lambda k: getattr(k, "__name__", str(k)))
def test_also_where_only_a_later_signature_does_it(keep: Any) -> None:
    plain = _steps("data", 5, [4, 4, 6, 6], keep, False)
    with pytest.warns(ul.UllageWarning, match=r"gives scale other memory.*; its activations are kept"):
        found = _steps("data", 5, [4, 4, 6, 6], keep, True)
    assert len(found) == len(plain) and all(map(torch.equal, found, plain))


def test_a_tensor_without_memory_gets_some() -> None:
    from ullage.runtime._skip import Placeholder

    p, whole = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    p.data = Placeholder(((3,), (1,), torch.float32, torch.device("cpu")), 0)
    assert make_good([whole, p]) is p and make_good([whole, p]) is None
    assert p.isnan().all() and torch.equal(whole, torch.ones(3))
