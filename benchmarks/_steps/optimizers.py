"""Optimizers: several, wrapped, with state of their own, stepped in hooks; and schedules around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul
from _steps._idiom import Net, adamw, idiom, net, square, xs, ys


def _plain(make: Callable[[Any], torch.optim.Optimizer]) -> ul.Workload:
    model = net()
    return ul.Workload(model, xs(), loss=square, optimizer=make(model.parameters()))


for _name, _optimizer in {
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw of a for loop": lambda p: torch.optim.AdamW(p, foreach=False),
    "fused adamw": lambda p: torch.optim.AdamW(p, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "capturable adamw with a tensor as rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), foreach=False),
}.items():

    def _make(chosen: Any = _optimizer) -> ul.Workload:
        return _plain(chosen)

    _make.__name__ = _name
    idiom("optimizer")(_make)


@idiom("optimizer", reads=True)
def adafactor() -> ul.Workload:
    return _plain(lambda p: torch.optim.Adafactor(p))


@idiom("optimizer")
def groups_with_and_without_decay() -> ul.Workload:
    model = net()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return ul.Workload(model, xs(), loss=square, optimizer=torch.optim.AdamW(groups, lr=1e-3))


class Lion(torch.optim.Optimizer):
    """An optimizer of one's own, with state and a counter that `super().__init__` does not know."""

    def __init__(self, params: Any, lr: float = 1e-4, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p)
                p.add_(torch.sign(state["average"].lerp(p.grad, 1 - group["beta"])), alpha=-group["lr"])
                state["average"].lerp_(p.grad, 0.01)


@idiom("optimizer")
def an_optimizer_of_ones_own() -> ul.Workload:
    return _plain(Lion)


class Clipped(torch.optim.AdamW):
    """A subclass with an attribute."""

    def __init__(self, params: Any, clip: float) -> None:
        super().__init__(params)
        self.clip = clip

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], self.clip)
        return super().step(closure)


@idiom("optimizer")
def an_optimizer_subclass_that_clips() -> ul.Workload:
    return _plain(lambda p: Clipped(p, 1.0))


class Lookahead(torch.optim.Optimizer):
    """Wraps another without calling `super().__init__`; every second step it pulls weights back to slow ones."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.param_groups, self.defaults, self.state = base, base.param_groups, base.defaults, base.state
        self.slow = [[p.detach().clone() for p in g["params"]] for g in base.param_groups]
        self.count = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()
        self.count += 1
        if self.count % 2 == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for p, s in zip(group["params"], slow, strict=True):
                    s.lerp_(p, 0.5)
                    p.copy_(s)


@idiom("optimizer")
def lookahead() -> ul.Workload:
    model = net()
    return ul.Workload(model, xs(), loss=square, optimizer=Lookahead(adamw(model)))


class SAM(torch.optim.Optimizer):
    """Sharpness-aware: climbs along the gradient, and steps back with the next one."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, dict(rho=rho, **kwargs))
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.data.clone()
                p.add_(p.grad * (group["rho"] / (norm + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        self.zero_grad()


@idiom("optimizer")
def sharpness_aware() -> ul.Workload:
    model = net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)

    def train_step(model: nn.Module, x: Tensor) -> None:
        model(x).square().mean().backward()
        opt.first_step()
        model(x).square().mean().backward()
        opt.second_step()

    return ul.Workload(model, xs(), step=train_step)


@idiom("optimizer")
def stepped_in_backward() -> ul.Workload:
    model = net()
    opts = {p: torch.optim.Adam([p], foreach=False) for p in model.parameters()}

    def hook(p: Tensor) -> None:
        opts[p].step()  # type: ignore[index]
        opts[p].zero_grad()  # type: ignore[index]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)

    def train_step(model: nn.Module, x: Tensor) -> None:
        model(x).square().mean().backward()

    return ul.Workload(model, xs(), step=train_step)


@idiom("optimizer")
def gradient_hooks_that_scale() -> ul.Workload:
    model = net()
    for p in model.parameters():
        p.register_hook(lambda g: g * 0.5)
    return ul.Workload(model, xs(), loss=square, optimizer=adamw(model))


@idiom("optimizer")
def step_hooks_of_an_optimizer() -> ul.Workload:
    model = net()
    opt, count = adamw(model), [0]
    opt.register_step_post_hook(lambda o, a, k: count.__setitem__(0, count[0] + 1))
    return ul.Workload(model, xs(), loss=square, optimizer=opt)


@idiom("optimizer")
def two_optimizers() -> ul.Workload:
    model = net()
    body, head = torch.optim.AdamW(model.blocks.parameters()), torch.optim.SGD(model.head.parameters(), lr=0.1)

    def train_step(model: nn.Module, batch: Any) -> None:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        for opt in (body, head):
            opt.step()
            opt.zero_grad()

    return ul.Workload(model, (xs(), ys()), step=train_step)


@idiom("optimizer")
def warmup_then_cosine() -> ul.Workload:
    model = net()
    opt = adamw(model)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        opt,
        [
            torch.optim.lr_scheduler.LambdaLR(opt, lambda s: (s + 1) / 2),
            torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10),
        ],
        milestones=[2],
    )

    def train_step(model: Net, x: Tensor) -> None:
        model(x).square().mean().backward()
        opt.step()
        schedule.step()
        opt.zero_grad()

    return ul.Workload(model, xs(), step=train_step)  # type: ignore[arg-type]


@idiom("optimizer")
def master_weights_in_float() -> ul.Workload:
    model = net().bfloat16()
    master = [p.detach().clone().float().requires_grad_() for p in model.parameters()]
    opt = torch.optim.AdamW(master)

    def train_step(model: nn.Module, x: Tensor) -> None:
        model(x).float().square().mean().backward()
        for m, p in zip(master, model.parameters(), strict=True):
            m.grad = p.grad.float()  # type: ignore[union-attr]
            p.grad = None
        opt.step()
        opt.zero_grad()
        with torch.no_grad():
            for m, p in zip(master, model.parameters(), strict=True):
                p.copy_(m)

    return ul.Workload(model, xs().bfloat16(), step=train_step)
