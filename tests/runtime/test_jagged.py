"""Units with jagged nested tensors: a replay that makes its own offsets gives back tensors of the forward's ragged size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ullage
from tests.runtime.steps import bits, torchs

pytestmark = pytest.mark.filterwarnings("ignore")  # Dynamo's own, of what it imports

WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "keep": {"keep": "matmul_attention"},
    "values": {"determinism_check": "values"},
    "whole": {"early_stop": False},
}
every_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
ROWS = [0, 3, 7, 10]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).sin()
        return h * h.exp()


def _jagged(values: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, torch.tensor(ROWS))


def _made_inside(block: Block, values: Tensor) -> Tensor:
    return block(_jagged(values)).values()


def _with_gaps(block: Block, values: Tensor) -> Tensor:
    rows = torch.nested.nested_tensor_from_jagged(values, torch.tensor(ROWS), lengths=torch.tensor([2, 4, 1]))
    return (rows * rows.cos()).values() + block(values)


def _turned(block: Block, values: Tensor) -> Tensor:
    rows = torch.nested.nested_tensor_from_jagged(values.t(), torch.tensor(ROWS), jagged_dim=2)
    return (rows.sin() * rows.exp()).values().t() + block(values)


CASES: dict[str, Callable[[Callable[..., Any], Block, Tensor], Tensor]] = {
    "leaf": lambda call, block, v: call(block, _jagged(v.detach()).requires_grad_()).values(),
    "no gradient": lambda call, block, v: call(block, _jagged(v.detach())).values(),
    "part of a graph": lambda call, block, v: call(block, _jagged(v * 2)).values(),
    "made inside": lambda call, block, v: call(_made_inside, block, v),
    "with gaps": lambda call, block, v: call(_with_gaps, block, v),
    "turned": lambda call, block, v: call(_turned, block, v),
    "in a list": lambda call, block, v: call(lambda rows: block(rows[0] + rows[0]), [_jagged(v * 2)]).values(),
    "nested units": lambda call, block, v: call(lambda x: call(_made_inside, block, call(_made_inside, block, x)), v),
}


@every_way
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_the_plain_step(case: Any, options: dict[str, Any]) -> None:
    def run(call: Callable[..., Any]) -> Any:
        torch.manual_seed(0)
        block, seen = Block(), []
        for _ in range(3):
            values = torch.linspace(-1, 1, 80).view(10, 8).requires_grad_()
            out = case(call, block, values)
            out.square().sum().backward()
            grads = [None if p.grad is None else bits(p.grad) for p in (values, *block.parameters())]
            seen.append((bits(out), grads))
            block.zero_grad()
        return seen

    assert run(lambda f, *a: ullage.checkpoint(f, *a, **options)) == run(lambda f, *a: f(*a))


def test_torch_refuses_offsets_made_inside() -> None:
    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different metadata"):
        torchs(_made_inside, Block(), torch.ones(10, 8, requires_grad=True)).sum().backward()


_rows = list(ROWS)  # a global that no unit writes: a replay sees what it is now


def test_other_rows_in_the_replay_are_told() -> None:
    def unit(values: Tensor) -> Tensor:
        rows = torch.nested.nested_tensor_from_jagged(values, torch.tensor(_rows))
        return (rows.sin() * rows.exp()).values()

    out = ullage.checkpoint(unit, torch.ones(10, 8, requires_grad=True))
    _rows[1] = 4
    try:
        with pytest.raises(ullage.ReplayError, match="saved tensor 0 is jagged, with other rows in the replay"):
            out.sum().backward()
    finally:
        _rows[1] = 3
