"""Tensors without a graph that get other memory (`.data =`) after autograd has saved them or a view of them, by the unit or its caller.

They are held until backward: what a step makes itself, changes so and lets go of is outside the guarantee.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ullage as ul
from tests.runtime.steps import bits

W = torch.linspace(-1, 1, 16).view(4, 4)
Call = Callable[..., Any]
HELD: list[Tensor] = []


def _closed_over(call: Call, x: Tensor, w: Tensor, writes: bool) -> Tensor:
    def unit(x: Tensor) -> Tensor:
        return F.linear(x.add_(x) if writes else x, w)

    y = call(functools.partial(unit, x))
    x.data = x.data * 0.9
    return y  # type: ignore[no-any-return]


def _given(call: Call, x: Tensor, w: Tensor, writes: bool) -> Tensor:
    def unit(x: Tensor) -> Tensor:
        return F.linear(x.add_(x) if writes else x, w)

    y = call(unit, x)
    x.data = x.data * 0.9
    return y  # type: ignore[no-any-return]


def _own(call: Call, x: Tensor, w: Tensor, stays: bool) -> Tensor:
    def unit(x: Tensor) -> tuple[Tensor, Tensor | None]:
        h = x.sin()
        y = F.linear(h, w)
        h.data = h.data * 0.9
        return y, h if stays else None

    y, h = call(unit, x)
    if h is not None:
        h.data = h.data * 0.5
        HELD.append(h)
    return y  # type: ignore[no-any-return]


KINDS: dict[str, Callable[[Call, Tensor, Tensor], Tensor]] = {
    "closed over": functools.partial(_closed_over, writes=False),
    "closed over and written": functools.partial(_closed_over, writes=True),
    "given": functools.partial(_given, writes=False),
    "given and written": functools.partial(_given, writes=True),
    "its own": functools.partial(_own, stays=False),
    "its own, given back": functools.partial(_own, stays=True),
}


@pytest.mark.parametrize("shape", [(4, 4), (2, 2, 4)], ids=["itself saved", "a view saved"])
@pytest.mark.parametrize("keep", [None, "matmul_attention", lambda op: True], ids=["full", "selective", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*its activations are kept:ullage.UllageWarning")
def test_it_is_as_in_the_plain_step(kind: str, keep: Any, shape: tuple[int, ...]) -> None:
    def step(call: Call) -> Any:
        w = W.clone().requires_grad_()
        x = torch.linspace(0, 1, 16).view(shape)
        KINDS[kind](call, x, w).sum().backward()
        HELD.clear()
        return bits(w.grad)

    plain = step(lambda f, *a: f(*a))
    for _ in range(2):
        assert step(lambda f, *a: ul.checkpoint(f, *a, keep=keep)) == plain
