"""Kernels that fill a tensor after autograd has saved it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import ullage
from tests.runtime.steps import Wrap, ours, plain, selective, steps

values = functools.partial(ullage.checkpoint, determinism_check="values")
ways = pytest.mark.parametrize("wrap", [ours, selective, values], ids=["full", "selective", "values"])


class Last(nn.Module):
    """The op is the last that saves something, in the middle, or both."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.a, self.b, self.act = where, nn.Linear(8, 8), nn.Linear(8, 8), nn.RReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        if self.where != "last":
            h = self.b(h).sin()
        return self.act(h) + x if self.where == "both" else h + x  # type: ignore[no-any-return]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).sin()  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]  # type: ignore[no-any-return]


def _loss(model: nn.Module, call: Wrap) -> Tensor:
    return call(model, torch.randn(2, 4, 8)).square().sum()  # type: ignore[no-any-return]


@ways
@pytest.mark.parametrize("where", ["last", "middle", "both"])
def test_noise_that_is_saved_before_it_is_drawn(where: str, wrap: Wrap) -> None:
    make = functools.partial(Last, where)
    assert steps(make, _loss, wrap, 4) == steps(make, _loss, plain, 4)


@ways
@pytest.mark.parametrize("make", [Normed, Recurrent])
def test_statistics_and_workspaces(make: type[nn.Module], wrap: Wrap) -> None:
    assert steps(make, _loss, wrap, 4) == steps(make, _loss, plain, 4)
