"""`verify` itself: what it blames, what it does not, unit by unit; and what it leaves behind."""

from __future__ import annotations

import itertools
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ullage as ul
from tests.broken import without_autocast, without_rng, without_state
from tests.small import tiny
from tests.zoo import workload

_calls = itertools.count()
_free = torch.Generator()  # no snapshot reaches it: a module-level name that only a submodule's forward knows


class Unsteady(nn.Module):
    """Adds noise that differs from run to run."""

    def __init__(self) -> None:
        super().__init__()
        self.steady, self.noisy = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = float(next(_calls)) if not isinstance(x, torch._subclasses.FakeTensor) else 0.5
        return self.steady(x) + self.noisy(x * noise).tanh()


class Blocks(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for b in self.blocks:
            x = b(x)
        return x.square().mean()


def _plan(work: ul.Workload, *units: str) -> ul.Plan:
    return ul.plan(work, policy="every_block", units=units or None, costs="roofline")


def test_what_differs_without_a_plan_is_named_and_not_blamed() -> None:
    work = ul.Workload(Blocks(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), Unsteady()), torch.ones(2, 4))
    check = ul.verify(work, _plan(work, "blocks.0"), steps=1)
    assert not check.differences and check.replays == 1
    assert any("noisy" in d.name for d in check.unstable) and "unstable without any plan" in str(check)
    assert not check.ok  # noise reaches every gradient, so nothing was compared
    with pytest.raises(ul.VerifyError, match="nothing is proven"):
        check.raise_if_failed()


def test_what_is_steady_beside_it_is_proven() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.other = Blocks(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), Blocks(Unsteady())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x) + self.other(x)

    work = ul.Workload(Beside(), torch.ones(2, 4))
    check = ul.verify(work, _plan(work, "blocks.blocks.0"), steps=1)
    assert check.ok and check.replays == 1 and any("noisy" in d.name for d in check.unstable)
    assert f"{check.compared - len(check.unstable)} of {check.compared} tensors" in str(check)
    check.raise_if_failed()


def test_python_and_numpy_generators_belong_to_the_step() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * random.random() * float(np.random.rand())

    work = ul.Workload(Blocks(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), Drops()), torch.ones(2, 4))
    plan = _plan(work, "blocks.0")
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    check = ul.verify(work, plan)
    assert check.ok and not check.unstable
    ul.measure(work, plan, steps=1)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.b(self.a(x)))


def _norms() -> ul.Workload:
    torch.manual_seed(0)
    return ul.Workload(Blocks(*(Norms() for _ in range(3))), torch.randn(4, 8))


WORKS: dict[str, Any] = {
    "gpt": tiny,
    "norms": _norms,
    "bf16 autocast": lambda: tiny(autocast=torch.bfloat16),
}
SLOW = {
    name: lambda name=name: workload(name, None if name == "moe" else torch.bfloat16)
    for name in ("llama", "shared", "moe", "resnet")
}


@pytest.mark.parametrize("name", [*WORKS, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_unit_by_unit(name: str) -> None:
    work = (WORKS | SLOW)[name]()
    check = ul.verify(work, _plan(work), scope="units")
    assert check.ok and check.scope == "units" and not check.unstable
    assert check.replays >= 1 and check.compared > 10


class Assigned(nn.Module):
    """Replaces its buffer, and draws from generators that torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count = self.count + 1
        return (self.inner(x) * self.count * (1 + random.random()) * float(np.random.rand())).tanh()


@pytest.mark.parametrize("scope", ["step", "units"])
def test_replaced_buffers_and_foreign_generators_are_put_back_for_a_replay(scope: str) -> None:
    work = ul.Workload(Blocks(Assigned(), Assigned()), torch.ones(2, 4))
    check = ul.verify(work, _plan(work), scope=scope)
    assert check.ok and check.replays and not check.unstable


BROKEN = {"gpt": without_rng, "norms": without_state, "bf16 autocast": without_autocast}


@pytest.mark.parametrize("scope", ["step", "units"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_replay_is_found(name: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = WORKS[name]()
    plan = _plan(work)
    with BROKEN[name](monkeypatch):
        try:
            check = ul.verify(work, plan, steps=2, scope=scope)
        except ul.VerifyError as error:
            assert isinstance(error.__cause__, ul.ReplayError)
            return  # the runtime noticed first: the replay saved other dtypes
    assert not check.ok and check.differences
    with pytest.raises(ul.VerifyError, match="differs from the plain one"):
        check.raise_if_failed()
    assert ul.verify(work, plan, steps=2, scope=scope).ok


def test_out_of_memory_falls_back_to_units(monkeypatch: pytest.MonkeyPatch) -> None:
    work = tiny()
    plan = _plan(work)
    module = sys.modules["ullage.verify._verify"]
    real = module.run_step

    def plain_does_not_fit(inst: Any) -> Any:
        if "forward" not in vars(inst.model.blocks[0]):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return real(inst)

    monkeypatch.setattr(module, "run_step", plain_does_not_fit)
    assert ul.verify(work, plan).scope == "units"
    with pytest.raises(ul.VerifyError, match="allocate.*scope='units'"):
        ul.verify(work, plan, scope="step")
    monkeypatch.undo()
    monkeypatch.setattr(module, "_plain_fits", lambda *a: False)
    assert ul.verify(work, plan).scope == "units"
