"""Optimizers that a config.json target may name; those that torch lacks are written here in torch's own ops.

A stand-in has the state of the library that it stands for, to the byte; its temporaries are stated in docs/choose.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Params = Iterable[Any]

BLOCK = 256  # elements that share a scale, as in bitsandbytes
SMALL = 4096  # tensors with fewer elements keep their state in float32, as in bitsandbytes
CHUNK = 1 << 22  # elements that are updated at once: 16 MiB in float32


class _Optimizer(torch.optim.Optimizer, ABC):
    """The part of `step` that optimizers share: the closure."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._updates()
        return loss

    @abstractmethod
    def _updates(self) -> None: ...


class _OneByOne(_Optimizer):
    """Updates one parameter after the other; subclasses make a parameter's state and update it."""

    def _updates(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        self._start(p, state)
                    self._update(p, p.grad, state, group)

    @abstractmethod
    def _start(self, p: Tensor, state: dict[str, Any]) -> None: ...

    @abstractmethod
    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None: ...


class _Adam(_OneByOne):
    """AdamW's update in float32, whatever the parameters' dtype; subclasses say where the state lies."""

    def __init__(self, params: Params, lr: float = 1e-4, weight_decay: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay})


def _adamw_(p: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: int, group: dict[str, Any]) -> None:
    """AdamW's update, in place; all four tensors are float32."""
    first, second = group["betas"]
    p.mul_(1 - group["lr"] * group["weight_decay"])
    mean.lerp_(grad, 1 - first)
    square.mul_(second).addcmul_(grad, grad, value=1 - second)
    divisor = square.sqrt().div_(math.sqrt(1 - second**step)).add_(group["eps"])
    p.addcdiv_(mean, divisor, value=-group["lr"] / (1 - first**step))


class MasterAdamW(_Adam):
    """AdamW on float32 copies of parameters of lower precision: copy, mean and square are 12 bytes per parameter."""

    def _start(self, p: Tensor, state: dict[str, Any]) -> None:
        state.update(step=0, exp_avg=torch.zeros_like(p, dtype=torch.float32))
        state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        if p.dtype != torch.float32:
            state["master"] = p.detach().to(torch.float32)

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] += 1
        master = state.get("master", p)
        _adamw_(master, grad.float(), state["exp_avg"], state["exp_avg_sq"], state["step"], group)
        if master is not p:
            p.copy_(master)


class AdamW8bit(_Adam):
    """AdamW whose mean and square are 8-bit codes with a float32 scale per 256 elements, as in bitsandbytes: 2.03 bytes per parameter."""

    def _start(self, p: Tensor, state: dict[str, Any]) -> None:
        state["step"] = 0
        if p.numel() < SMALL:
            state.update(exp_avg=torch.zeros_like(p, dtype=torch.float32))
            state.update(exp_avg_sq=torch.zeros_like(p, dtype=torch.float32))
            return
        scales = -(-p.numel() // BLOCK)
        for name, kind in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
            state[name] = torch.zeros(p.numel(), dtype=kind, device=p.device)
            state[f"{name}_scale"] = torch.zeros(scales, dtype=torch.float32, device=p.device)

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] += 1
        if p.numel() < SMALL:
            new = p.float() if p.dtype != torch.float32 else p
            _adamw_(new, grad.float(), state["exp_avg"], state["exp_avg_sq"], state["step"], group)
            if new is not p:
                p.copy_(new)
            return
        flat = p.view(-1) if p.is_contiguous() else None
        values, grads = p.reshape(-1) if flat is None else flat, grad.reshape(-1)
        for start in range(0, p.numel(), CHUNK):
            part = slice(start, min(start + CHUNK, p.numel()))
            scales = slice(start // BLOCK, -(-part.stop // BLOCK))
            mean = _read(state["exp_avg"][part], state["exp_avg_scale"][scales], 127)
            square = _read(state["exp_avg_sq"][part], state["exp_avg_sq_scale"][scales], 255)
            new = values[part].float() if p.dtype != torch.float32 else values[part]
            _adamw_(new, grads[part].float(), mean, square, state["step"], group)
            if p.dtype != torch.float32:
                values[part].copy_(new)
            _write(mean, state["exp_avg"][part], state["exp_avg_scale"][scales], 127)
            _write(square, state["exp_avg_sq"][part], state["exp_avg_sq_scale"][scales], 255)
        if flat is None:
            p.copy_(values.view(p.shape))


def _blocks(values: Tensor) -> list[tuple[slice, slice]]:
    """Whole blocks, and the part of one at the end: (elements, scales)."""
    whole = values.numel() // BLOCK
    found = [(slice(0, whole * BLOCK), slice(0, whole))] if whole else []
    return found + ([(slice(whole * BLOCK, None), slice(whole, None))] if values.numel() % BLOCK else [])


def _read(codes: Tensor, scales: Tensor, most: int) -> Tensor:
    """Codes as float32. A code is the fourth root of a value's share of its block's largest, so that small ones survive."""
    values = codes.float().div_(most)
    for _ in range(2):
        values.mul_(values.abs())
    for part, of in _blocks(values):
        values[part].view(scales[of].numel(), -1).mul_(scales[of].unsqueeze(1))
    return values


def _write(values: Tensor, codes: Tensor, scales: Tensor, most: int) -> None:
    """The inverse of `_read`; `values` is used up."""
    for part, of in _blocks(values):
        rows = values[part].view(scales[of].numel(), -1)
        scales[of].copy_(rows.abs().amax(1))
        rows.div_(scales[of].clamp(min=1e-38).unsqueeze(1))
    # away from zero: a square that became none would divide by nothing
    signs = values.sign()
    codes.copy_(values.abs_().sqrt_().sqrt_().mul_(most).ceil_().clamp_(max=most).mul_(signs))


class Lion(_OneByOne):
    """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of a momentum, which is its only state."""

    def __init__(self, params: Params, lr: float = 1e-5, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay})

    def _start(self, p: Tensor, state: dict[str, Any]) -> None:
        state["exp_avg"] = torch.zeros_like(p)

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        p.mul_(1 - group["lr"] * group["weight_decay"])
        update = state["exp_avg"].lerp(grad, 1 - first).sign_()
        p.add_(update, alpha=-group["lr"])
        state["exp_avg"].lerp_(grad, 1 - second)


class MuonWithAdamW(_Optimizer):
    """Muon for the matrices inside a model, AdamW for the rest: embeddings, head, norms and biases, as its author has it."""

    def __init__(self, matrices: list[Any], others: list[Any], lr: float = 2e-3) -> None:
        parts = [torch.optim.Muon(matrices, lr=lr)] if matrices else []
        self.parts = [*parts, *([torch.optim.AdamW(others, lr=1e-4)] if others else [])]
        super().__init__([*matrices, *others], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state

    def _updates(self) -> None:
        for part in self.parts:
            part.step()


def _muon(model: nn.Module) -> torch.optim.Optimizer:
    ends = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    ends |= {id(p) for p in head.parameters()} if head is not None else set()
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() == 2 and id(p) not in ends]
    inside = {id(p) for p in matrices}
    return MuonWithAdamW(matrices, [p for p in trained if id(p) not in inside])


def _of(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: kind([p for p in model.parameters() if p.requires_grad], **options)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer] | None] = {
    "adamw": _of(torch.optim.AdamW, lr=1e-4),
    "adamw-fused": _of(torch.optim.AdamW, lr=1e-4, fused=True),
    "adamw-foreach": _of(torch.optim.AdamW, lr=1e-4, foreach=True),
    "adamw-forloop": _of(torch.optim.AdamW, lr=1e-4, foreach=False),
    "adamw-8bit": _of(AdamW8bit),
    "adamw-master": _of(MasterAdamW),
    "adafactor": _of(torch.optim.Adafactor),
    "muon": _muon,
    "lion": _of(Lion),
    "sgd": _of(torch.optim.SGD, lr=1e-2),
    "sgd-momentum": _of(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "none": None,
}
