"""What a workload reaches is copied with it: hooks and steps act on the copy, and nothing of it stays in the original."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import ullage as ul

torch.manual_seed(0)
net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
opt = torch.optim.AdamW(net.parameters(), lr=1e-3)


def step(model: nn.Module, batch: Tensor) -> None:
    """Uses a global of its module, and a global has its own name: the function itself."""
    opt.zero_grad()
    model(batch).square().mean().backward()
    opt.step()


class Halting(nn.Module):
    """Fails under capture only, if `fails`: what sparse tensors take is not predicted."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        return x.to_sparse().to_dense().tanh() if self.fails else x.relu()


def _features(fails: bool) -> tuple[ul.Workload, dict[int, Tensor]]:
    """A dict that only the hooks' closures reach keeps each layer's output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), Halting(fails), nn.Linear(32, 16))
    kept: dict[int, Tensor] = {}

    def hook(i: int) -> Any:
        return lambda module, args, out: kept.__setitem__(i, out)

    for i, layer in enumerate(model):
        layer.register_forward_hook(hook(i))

    def loss(out: Any, batch: Any) -> Tensor:
        return out.square().mean()

    return ul.Workload(model, torch.randn(64, 16), loss=loss), kept


def test_a_hooks_closure_keeps_the_copys_outputs() -> None:
    work, kept = _features(fails=False)
    predicted = ul.profile(work, costs="roofline").peak_bytes
    assert kept == {}
    assert predicted == ul.measure(work, steps=1).peak_bytes


def test_a_failed_profile_leaves_nothing_fake_in_a_hooks_dict() -> None:
    work, kept = _features(fails=True)
    with pytest.raises(ul.UllageError):
        ul.profile(work, costs="roofline")
    assert not any(isinstance(t, FakeTensor) for t in kept.values())
    assert kept == {}


def test_optimizers_that_are_stepped_in_backward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3)])
    optimizers = {p: torch.optim.Adam([p], lr=1e-3, foreach=False) for p in model.parameters()}

    def update(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)

    def fused(m: nn.Module, batch: Tensor) -> None:
        m(batch).square().mean().backward()

    work = ul.Workload(model, torch.randn(64, 16), step=fused)
    predicted = ul.profile(work, costs="roofline").peak_bytes
    assert not any(o.state for o in optimizers.values())
    assert predicted == ul.measure(work, steps=1).peak_bytes
    assert ul.verify(work, ul.plan(work, policy="every_block", costs="roofline"), steps=1).ok


def test_a_step_of_a_module_that_is_called_step() -> None:
    work = ul.Workload(net, torch.randn(8, 8), step=step)
    ul.verify(work, ul.plan(work, policy="every_block", costs="roofline"), steps=1).raise_if_failed()
    assert not opt.state


class Clipped(torch.optim.SGD):
    """An attribute of its own, which `Optimizer.__getstate__` does not name."""

    def __init__(self, params: Any, clip: float) -> None:
        super().__init__(params, lr=0.1)
        self.clip = clip

    def step(self, closure: Any = None) -> Any:
        """Clip, then step."""
        nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], self.clip)
        return super().step(closure)


@pytest.mark.parametrize("fails", [False, True])
def test_an_optimizer_with_attributes(fails: bool) -> None:
    work, _ = _features(fails)
    mine = Clipped(work.model.parameters(), 1.0)
    work = ul.Workload(work.model, work.batch, loss=work.loss, optimizer=mine)
    if fails:
        with pytest.raises(ul.UllageError):
            ul.profile(work, costs="roofline")
    else:
        assert ul.profile(work, costs="roofline").peak_bytes == ul.measure(work, steps=1).peak_bytes
    work.model(work.batch).square().mean().backward()
    mine.step()  # its class still works


def test_lbfgs_is_planned_by_the_values_of_real_steps() -> None:
    model = nn.Linear(8, 8)
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=2, history_size=1)

    def closed(m: nn.Module, batch: Tensor) -> None:
        def closure() -> Tensor:
            lbfgs.zero_grad()
            loss = m(batch).square().mean()
            loss.backward()
            return loss

        lbfgs.step(closure)

    work = ul.Workload(model, torch.randn(8, 8), step=closed)
    profile, before = ul.profile(work, costs="roofline"), [p.detach().clone() for p in model.parameters()]
    assert [profile.first_step_peak_bytes, profile.later_step_peak_bytes] == ul.measure(work, steps=1).step_peaks[:2]
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)) and not lbfgs.state


def test_the_plain_step_is_not_measured_under_a_plan() -> None:
    work = ul.Workload(net, torch.randn(8, 8), step=step)
    plan = ul.plan(work, policy="every_block", costs="roofline")
    with plan.apply(net), pytest.raises(ul.ApplyError, match=r"is in force on the model; call remove\(\)"):
        ul.measure(work, steps=1)
    assert ul.measure(work, steps=1).plan_digest == ""


def test_a_function_that_reaches_an_optimizer_by_a_weak_reference_alone() -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    held = weakref.ref(optimizer)

    def step(m: nn.Module, x: Tensor) -> None:
        m(x).sum().backward()
        held().step()  # type: ignore[union-attr]
        held().zero_grad()  # type: ignore[union-attr]

    before = model.weight.tolist()
    assert ul.profile(ul.Workload(model, torch.ones(2, 4), step=step), costs="roofline").peak_bytes > 0
    assert model.weight.tolist() == before and not optimizer.state
