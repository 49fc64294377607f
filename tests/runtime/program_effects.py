"""Ops of random programs that write, draw, look at values, or keep state: (unit, number, x, y, n) -> what becomes live."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.runtime.program_arithmetic import Made, fresh, like

if TYPE_CHECKING:
    from tests.runtime.program_units import Unit


def in_place(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    """On a tensor of its own, or (from 8 on) on one that others may see."""
    if n % 12 < 8 or (x.is_leaf and x.requires_grad):
        x = fresh(x)
    n %= 12
    if n % 4 == 0:
        return x.add_(like(x, y)) if n != 4 else x.mul_(like(x, y.detach()))
    if n % 4 == 1:
        return x.relu_() if n != 5 else x.tanh_()
    if n % 4 == 2:
        x[..., 0] = 0.25 if n == 2 else x[..., -1] * 2
        return x
    part = x[..., :1] if n == 3 else x.flatten() if x.is_contiguous() else x
    part.mul_(0.5)
    return x


def draws(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    n %= 7
    if n == 0:
        return F.dropout(x, 0.3)
    if n == 1:
        return F.dropout(fresh(x), 0.3, inplace=True)
    if n == 2:
        return x + torch.randn_like(x) * 0.1
    if n == 3:
        return x * torch.bernoulli(torch.full_like(x, 0.5))
    if n == 4:
        return F.alpha_dropout(x, 0.2, training=True)
    if n == 5:
        return x * random.random()
    return x + float(np.random.rand())


def lookup(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    """Ops whose indices or shapes come from data."""
    n %= 6
    if n == 0:
        return F.embedding(x.argmax(-1) % 4, u.weight(k, 4, 8))
    if n == 1:
        return x[x > 0]
    if n == 2:
        return x.flatten()[(x.flatten() > 0.2).nonzero().flatten()] * 2
    if n == 3:
        return x.index_select(-1, torch.randperm(x.shape[-1]))
    if n == 4:
        where = x.detach().flatten().topk(min(3, x.numel())).indices
        return x.flatten().index_add(0, where, x.flatten()[where])
    return x.masked_fill(x > 1, 0.5)


def branch(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    n %= 7
    if n == 0:
        return torch.tanh(x) if u.flag else F.gelu(x)
    if n == 1:
        return torch.tanh(x) * 2 if x.shape[0] % 2 else x.sigmoid()
    if n == 2:
        return x.exp().tanh() if x.sum().item() > 0 else torch.relu(x)
    if n == 3:
        return x.sigmoid() if (x > 1).any() else x.tanh() + 1
    if n == 4:
        return x * x.detach().abs().max().item()
    if n == 5:
        return x @ u.weight(k, x.shape[-1], x.shape[-1]) if bool(x.flatten()[0] > 0) else x
    if u.flag:
        return F.dropout(x, 0.1)
    return x.tanh()


def apart(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    """Parts outside the graph, or in other modes."""
    n %= 8
    if n == 0:
        return x * x.detach().tanh()
    if n == 1:
        with torch.no_grad():
            z = torch.tanh(x @ u.weight(k, x.shape[-1], 8))
        return [z, x + z.mean()]
    if n == 2:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ u.weight(k, x.shape[-1], 8)
    if n == 3:
        with torch.autocast("cpu", enabled=False):
            return x.float() @ u.weight(k, x.shape[-1], 8)
    if n == 4:
        return x.to(torch.bfloat16).tanh().float()
    if n == 5:
        return torch.fft.rfft(x.float()).abs()
    if n == 6:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(torch.tanh(z).square().sum(), z)
        return x + g
    try:
        return x.tanh().view(-1, 7919) * 2
    except RuntimeError:
        return x.sigmoid()


class _Cube(torch.autograd.Function):
    """Saves its input and a tensor that nobody else sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x * x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        _x, square = ctx.saved_tensors
        return 3 * square * g


class _Exp(torch.autograd.Function):
    """Saves its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp(-3, 3).exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * y


def custom(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    return _Cube.apply(x) if n % 2 else _Exp.apply(x)  # type: ignore[no-untyped-call]


def state(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    """Buffers, counters, caches."""
    n %= 12
    if n == 0:
        rows = x.reshape(-1, x.shape[-1])
        return u.batch_norm(k, x.shape[-1])(rows).reshape(x.shape) if rows.shape[0] > 1 else x
    if n == 1:
        u.calls += 1
        return x * (1 + 0.1 * u.calls)
    if n == 2:
        u.count.add_(1)
        return x + u.count
    if n == 3:
        u.average.mul_(0.9).add_(x.detach().mean(), alpha=0.1)
        return x - u.average
    if n == 4:
        u.moved = u.moved * 0.5 + x.detach().float().mean()
        return x * u.moved
    if n == 5:
        u.history.append(len(u.history))
        return x * (1 + 0.01 * sum(u.history))
    if n == 6:  # a table that the first call makes
        key = x.shape[-1]
        if key not in u.cache:
            u.cache[key] = torch.cos(torch.arange(key) / key)
        return x * u.cache[key]
    if n == 7:
        u.table[u.calls % 4] = float(u.table.sum()) + 1
        return x * float(u.table[u.calls % 4])
    if n == 8:
        u.calls += 1
        return x.tanh() if u.calls % 2 else x.sigmoid()
    if n == 9:  # changed by some calls only
        if u.flag:
            u.count.add_(1)
        return x + u.count
    if n == 10:
        if u.flag:
            u.calls += 1
        return x * (1 + 0.1 * u.calls)
    if x.sum().item() > 0:
        u.average.copy_(x.detach().mean())
    return x - u.average
