"""A profile, plan, verification or measurement, whether it fails or not, leaves everything as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul
from tests.small import tiny
from ullage.measure._state import preserved
from ullage.workload import run_step


class Odd(nn.Module):
    """Everything a forward may change: buffers in place and by assignment, attributes, containers, modes, tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4), persistent=False)
        self.calls, self.log, self.table = 0, [], {"deep": [0]}
        self.memory = torch.zeros(4)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.inner(x))
        self.count = self.count + 1
        self.last.copy_(y.detach().mean(0))
        self.calls += 1
        self.log.append(self.calls)
        self.table["deep"].append(self.calls)
        self.memory.add_(1)
        self.fresh = y.detach()
        self.norm.training = False
        return y * torch.rand((), generator=self.generator)


def everything(*things: Any) -> Any:
    """The values of all a step can reach, in a form that can be compared."""
    if len(things) != 1:
        return [everything(t) for t in things]
    value = things[0]
    if isinstance(value, Tensor):
        grad = value.grad if value.is_leaf else None
        return value.tolist(), value.requires_grad, None if grad is None else (id(grad), grad.tolist())
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, dict):
        return [(k if isinstance(k, str | int) else id(k), everything(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return (
            [id(value), *(everything(v) for v in value)] if isinstance(value, list) else [everything(v) for v in value]
        )
    if isinstance(value, nn.Module | torch.amp.GradScaler | torch.optim.lr_scheduler.LRScheduler):
        return [(k, everything(v)) for k, v in vars(value).items() if k != "optimizer" and "lr_lambdas" not in k]
    if isinstance(value, torch.optim.Optimizer):
        return everything(dict(value.state)), [everything(g) for g in value.param_groups]
    return repr(value)


def generators() -> Any:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def test_a_snapshot_restores_all_of_it() -> None:
    model = Odd()
    shadow = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu")
    losses: list[float] = []

    def step(m: nn.Module, x: Tensor) -> None:
        loss = m(x).square().mean() + random.random() + float(np.random.rand())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        x.mul_(2)
        for s, p in zip(shadow, m.parameters(), strict=True):
            s.lerp_(p.detach(), 0.5)
        next(m.parameters()).requires_grad_(False)
        m.inner.bias.data = torch.ones(4)

    work = ul.Workload(model, torch.randn(3, 4), step=step)
    inst = work.instance()
    things = model, optimizer, schedule, scaler, losses, shadow, work.batch
    for _ in range(2):  # nothing yet; then with state of its own
        before, rng = everything(*things), generators()
        with preserved(inst):
            run_step(inst)
            run_step(inst)
            assert everything(*things) != before
        assert everything(*things) == before and generators() == rng
        step(model, work.batch)
        model.inner.weight.requires_grad_(True)
        model.inner.weight.grad = torch.ones(4, 4)
    assert model.inner.bias.data_ptr() == model.inner.bias.data.data_ptr()


def test_optimizer_state_keeps_its_dtype() -> None:
    model = nn.Linear(4, 4).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[model.weight]["momentum_buffer"] = torch.full((4, 4), 1.0001)  # fp32, as master weights are kept
    with preserved(ul.Workload(model, torch.ones(2, 4).bfloat16(), optimizer=optimizer).instance()):
        pass
    assert optimizer.state[model.weight]["momentum_buffer"].dtype is torch.float32


class Failing(torch.autograd.Function):
    """Fails in backward, but only for real: the capture must go through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if "backward" in _fail:
            raise ArithmeticError("in backward")
        return g


_fail: set[str] = set()


class Fragile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for b in self.blocks:
            x = b(x)
        random.random()
        if "forward" in _fail:
            raise ArithmeticError("in forward")
        return Failing.apply(x).sum()


def _fragile() -> tuple[ul.Workload, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Fragile()
    optimizer = torch.optim.AdamW(model.parameters())

    def step(m: nn.Module, x: Tensor) -> None:
        m(x).backward()
        optimizer.step()
        if "step" in _fail:
            raise ArithmeticError("in step")
        optimizer.zero_grad()

    step(model, torch.ones(3, 4))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.blocks[1].eval()
    return ul.Workload(model, torch.randn(3, 4), step=step), optimizer


VERBS: dict[str, Callable[[ul.Workload, ul.Plan], Any]] = {
    "profile": lambda w, p: ul.profile(w, costs="roofline"),
    "plan": lambda w, p: ul.plan(w, policy="every_block", costs="roofline"),
    "verify": lambda w, p: ul.verify(w, p, steps=1),
    "verify units": lambda w, p: ul.verify(w, p, scope="units"),
    "measure": lambda w, p: ul.measure(w, steps=1),
    "measure planned": lambda w, p: ul.measure(w, p, steps=1),
}


@pytest.mark.parametrize("verb", VERBS)
def test_success_and_failure_leave_all_as_found(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    work, optimizer = _fragile()
    plan = ul.plan(work, policy="every_block", costs="roofline")
    for where in ("forward", "backward", "step", ""):
        _fail.clear()
        _fail.update({where} - {""})
        before, rng = everything(work.model, optimizer, work.batch), generators()
        try:
            if where:
                with pytest.raises(ul.UllageError, match=f"in {where}"):
                    VERBS[verb](work, plan)
            else:
                VERBS[verb](work, plan)
        finally:
            _fail.clear()
        assert everything(work.model, optimizer, work.batch) == before, where
        assert generators() == rng, where
        assert not list(tmp_path.iterdir())
        assert all("forward" not in vars(m) for m in work.model.modules())


def test_a_factory_leaves_the_generators_too() -> None:
    state = generators()
    work = ul.Workload.from_factory(tiny)
    plan = ul.plan(work, policy="every_block", costs="roofline")
    ul.verify(work, plan, steps=1).raise_if_failed()
    ul.measure(work, steps=1)
    assert generators() == state


def test_gradients_that_were_there_are_counted() -> None:
    work = tiny()
    loss = F.mse_loss(work.model(work.batch), torch.zeros(()).expand(4, 32, 256))
    loss.backward()
    del loss
    with_grads = ul.measure(work, steps=1).peak_bytes
    predicted = ul.profile(work).peak_bytes
    assert abs(with_grads / predicted - 1) < 0.01
