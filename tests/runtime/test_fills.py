"""Kernels that fill a tensor after autograd has saved it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ullage as ul
from tests.runtime.steps import Wrap, ours, plain, selective, steps
from ullage.runtime import Options, Site, Tier, level_rule, run, run_offloaded
from ullage.runtime.tensors._fills import late_kernels, late_nodes, mark

values = functools.partial(ul.checkpoint, determinism_check="values")
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
def test_noise_that_evaluation_leaves_unset(wrap: Wrap) -> None:
    """It is saved all the same, and no gradient depends on it: it may have other bits in the replay."""

    def loss(model: nn.Module, call: Wrap) -> Tensor:
        junk = torch.rand(2, 4, 8)
        del junk  # what the memory of the noise may hold
        return _loss(model.eval(), call)

    make = functools.partial(Last, "both")
    assert steps(make, loss, wrap, 4) == steps(make, loss, plain, 4)


@ways
@pytest.mark.parametrize("make", [Normed, Recurrent])
def test_statistics_and_workspaces(make: type[nn.Module], wrap: Wrap) -> None:
    assert steps(make, _loss, wrap, 4) == steps(make, _loss, plain, 4)


def _needs(x: Tensor, other: bool) -> Tensor:
    """Two kinds of call that save alike; the second fills what it saves."""
    h = x.exp()
    if other:
        return torch.rrelu(h - 1.5, 0.1, 0.9, True)
    noise = torch.rand_like(h)
    return (h - 1.5) * noise


@pytest.mark.filterwarnings("ignore:.*a stale op log")  # said, and replayed in full
@ways
@pytest.mark.parametrize("first", [False, True])
def test_a_call_that_fills_though_the_first_one_did_not(first: bool, wrap: Wrap) -> None:
    """Both draw, both save a fresh tensor and what is multiplied with it: no call is new to the unit."""
    branch = [False]

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return _needs(x * self.scale, branch[0])

    def run_all(call: Wrap) -> object:
        numbers = iter(range(5))

        def loss(model: nn.Module, call: Wrap) -> Tensor:
            branch[0] = (next(numbers) > 1) != first
            torch.empty(100, 8).fill_(7.0)  # what the memory of an unfilled tensor may hold
            return call(model, torch.randn(4, 8)).square().sum()  # type: ignore[no-any-return]

        return steps(Unit, loss, call, 5)

    assert run_all(wrap) == run_all(plain)


@pytest.mark.parametrize("inplace", [False, True])
def test_noise_leaves_memory_when_it_is_drawn(tmp_path: Path, inplace: bool) -> None:
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(64, 64), nn.Linear(64, 64), nn.RReLU(inplace=inplace)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.b(self.act(self.a(x))))  # type: ignore[no-any-return]

    def loss(model: nn.Module, call: Wrap) -> Tensor:
        return call(model, torch.randn(32, 64)).square().sum()  # type: ignore[no-any-return]

    with ul.DiskStore(tmp_path, "4MiB") as store:
        site = Site("unit", tier=Tier(store))
        found = steps(Unit, loss, lambda fn, *args: run_offloaded(site, fn, args, {}))
        assert found == steps(Unit, loss, plain)
        assert site.sent_bytes == 3 * (4 if inplace else 5) * 32 * 64 * 4  # all that is saved but parameters and inputs


def test_what_a_kept_and_sent_tensor_is_filled_with(tmp_path: Path) -> None:
    """The same in a selective replay, at a call that does not learn."""
    model = nn.Sequential(nn.Linear(64, 64), nn.RReLU(), nn.Linear(64, 64), nn.Tanh())
    with ul.DiskStore(tmp_path, "4MiB") as store:
        rule = level_rule("matmul_attention", routing=False)

        def loss(model: nn.Module, call: Wrap) -> Tensor:
            return call(model, torch.randn(32, 64)).square().sum()  # type: ignore[no-any-return]

        site = Site("unit", tier=Tier(store))
        found = steps(lambda: copy.deepcopy(model), loss, lambda fn, *a: run(site, Options(rule=rule), fn, a, {}), 4)
        assert found == steps(lambda: copy.deepcopy(model), loss, plain, 4)


# --- the list is complete ----------------------------------------------------------------------------------------------


def test_which_nodes_save_what_their_kernels_fill() -> None:
    """Of torch 2.11 to 2.13. `may_be_unfilled` knows the one that saves nothing afterwards: noise, then what it is like."""
    assert [n for n, at_the_end in late_nodes().items() if at_the_end] == ["RreluWithNoiseBackward0"]
    assert {
        "NativeBatchNormBackward0",
        "CudnnBatchNormBackward0",
        "NativeBatchNormLegitBackward0",
    } <= late_nodes().keys()
    saved = [n for n in dir(torch._C._functions.RreluWithNoiseBackward0) if n.startswith("_raw_saved")]
    assert saved == ["_raw_saved_noise", "_raw_saved_self"]


def _filled_late(call: Callable[[], Any]) -> tuple[Any, bool]:
    """What an op makes, and whether something it saved has other values when it has run."""
    saved: list[tuple[Tensor, Tensor, int]] = []

    def pack(x: Tensor) -> Tensor:
        if x.layout == torch.strided:
            saved.append((x, x.detach().clone(), x._version))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call()
    same = [
        torch.equal(x.detach().nan_to_num(), was.nan_to_num()) for x, was, version in saved if x._version == version
    ]
    return out, not all(same)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_other_op_of_torch_fills_what_it_has_saved() -> None:
    """Torch's own samples of every op with a derivative: what is saved, before the op's kernel and after it."""
    ops = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    ran, late = 0, {}
    for op in ops:
        if not op.supports_autograd or torch.float32 not in op.dtypes:
            continue
        sample = next(iter(op.sample_inputs_func(op, "cpu", torch.float32, True)))
        for variant in (op.op, op.inplace_variant):
            if variant is None or (variant is op.inplace_variant and op.name == "float_power"):  # of float64 only
                continue
            given = sample.input.clone() if variant is op.inplace_variant else sample.input
            since = mark()
            out, filled = _filled_late(lambda: variant(given, *sample.args, **sample.kwargs))  # noqa: B023
            ran += 1
            if filled:
                late[op.name] = late_kernels(out, since)
    assert ran > 500
    assert all(late.values()), late
    assert "nn.functional.rrelu" in late and "native_batch_norm" in late
