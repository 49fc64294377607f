"""Selective replays of units with conjugated and negated views: they share memory, shape and strides with what they are taken of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ullage as ul
from tests.runtime.steps import bits
from ullage.runtime.ambient._totals import totals

aten = torch.ops.aten
W = torch.linspace(-1, 1, 64).reshape(8, 8)


def _complex(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    return torch.complex(h, h.sigmoid())


UNITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "negated": lambda x, w: _complex(x, w).conj().imag.tanh() * x,
    "conjugated": lambda x, w: (_complex(x, w).conj() * _complex(x, w)).real.tanh(),
    "both saved": lambda x, w: ((z := _complex(x, w).exp()) * z.conj() * z).imag.tanh(),
    "conjugated saved first": lambda x, w: ((z := _complex(x, w).exp()).conj() * z.sin() * z).real,
    "transposed": lambda x, w: ((z := _complex(x, w)) @ z.mH).abs().tanh(),
    "negated product": lambda x, w: (_complex(x, w).conj().imag @ w).tanh(),
    "physical": lambda x, w: _complex(x, w).conj().resolve_conj().sin().real,
}
KEEP: dict[str, Any] = {
    "matmuls": {aten.mm.default, aten.bmm.default},
    "tanh": {aten.tanh.default, aten.exp.default},
    "complex": {aten.complex.default},
    "all": lambda op: True,
}

# ops that each replay does not run, in the order of `KEEP`
SKIPPED = {
    "negated": (1, 8, 8, 10),
    "conjugated": (2, 0, 2, 4),
    "both saved": (1, 2, 2, 0),  # where all is kept the replay ends before the first op that it could skip
    "conjugated saved first": (1, 2, 2, 0),
    "transposed": (2, 0, 1, 0),
    "negated product": (1, 0, 1, 8),
    "physical": (1, 0, 0, 0),
}


@pytest.mark.parametrize("keep", KEEP.values(), ids=KEEP)
@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.filterwarnings("ignore:.*which it was told to keep:ullage.UllageWarning")
def test_gradients_are_those_of_the_plain_step(
    unit: Callable[[Tensor, Tensor], Tensor], keep: Any, request: Any
) -> None:
    def step(call: Callable[..., Tensor], k: int) -> tuple[Any, Any]:
        x = torch.linspace(-1, 1 + k, 32).reshape(4, 8).requires_grad_()
        w = W.clone().requires_grad_()
        call(unit, x, w).sum().backward()
        return bits(x.grad), bits(w.grad)

    before = totals.now()
    for k in range(3):
        assert step(lambda f, *a: ul.checkpoint(f, *a, keep=keep), k) == step(lambda f, *a: f(*a), k)
    replays, skipped, stale, mismatches, *_ = (a - b for a, b in zip(totals.now(), before, strict=True))
    assert (replays, stale, mismatches) == (3, 0, 0)
    assert skipped == 3 * SKIPPED[request.node.callspec.id.split("-")[0]][list(KEEP.values()).index(keep)]
