"""The ops of random programs: (unit, number, x, y, n) -> what becomes live."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tests.runtime.programs import Unit

aten = torch.ops.aten
Made = Tensor | list[Tensor]


def _three(x: Tensor) -> Tensor:
    while x.dim() < 3:
        x = x.unsqueeze(0)
    return x.flatten(0, x.dim() - 3) if x.dim() > 3 else x


def _like(x: Tensor, y: Tensor) -> Tensor:
    """Something of y that goes with x."""
    return y if y.shape == x.shape else y.mean()


def _fresh(x: Tensor) -> Tensor:
    return x + 0.5


_UNARY: list[Callable[[Tensor], Tensor]] = [
    F.gelu, torch.tanh, torch.relu, torch.sigmoid, lambda x: x.clamp(-3, 3).exp(), F.silu, F.softplus, torch.sin,
    torch.abs, torch.square, lambda x: (x.abs() + 0.1).sqrt(), lambda x: x * 2, lambda x: -x, F.leaky_relu,
    lambda x: F.gelu(x, approximate="tanh"), lambda x: (x.abs() + 1).log(), lambda x: 1 / (x.square() + 1),
]  # fmt: skip
_BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.mul, torch.add, torch.sub, torch.maximum, lambda x, y: x / (y.square() + 1), lambda x, y: torch.where(x > 0, x, y),
    lambda x, y: torch.addcmul(x, x, y), lambda x, y: torch.lerp(x, y, 0.3), lambda x, y: x.atan2(y.abs() + 1),
]  # fmt: skip


def unary(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    return _UNARY[n % len(_UNARY)](x)


def binary(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    return _BINARY[n % len(_BINARY)](x, _like(x, y))


def linear(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    d, out = x.shape[-1], (x.shape[-1], 8, 4)[n % 3]
    w = u.weight(k, out, d)
    return F.linear(x, w, u.weight(k, out) if n % 2 else None)


def matmul(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    if n % 4 == 0:
        return x @ u.weight(k, x.shape[-1], x.shape[-1])
    x = _three(x)
    if n % 4 == 1:
        return torch.bmm(x, x.transpose(1, 2))
    if n % 4 == 2:
        return torch.einsum("bij,jk->bik", x, u.weight(k, x.shape[-1], 8))
    return torch.baddbmm(x, torch.bmm(x, x.transpose(1, 2)), x, alpha=0.1)


def residual(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    return x + torch.tanh(x @ u.weight(k, x.shape[-1], x.shape[-1])) if n % 2 else x + _like(x, y)


def norm(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    d = x.shape[-1]
    if n % 3 == 0:
        return F.layer_norm(x, (d,), u.weight(k, d), u.weight(k, d, bias=True))
    if n % 3 == 1:
        return F.rms_norm(x, (d,), u.weight(k, d))
    return F.normalize(x, dim=-1)


def view(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    d = x.shape[-1]
    n %= 12
    if n == 0:
        return x.transpose(0, -1)
    if n == 1:
        return x.reshape(-1, d)
    if n == 2:
        return x.unsqueeze(1).expand(x.shape[0], 2, *x.shape[1:])
    if n == 3:
        return x[1:] if x.shape[0] > 1 else x[:]
    if n == 4:
        return x[..., ::2]
    if n == 5:
        return x.view(x.shape) if d % 2 else x.reshape(*x.shape[:-1], 2, d // 2)
    if n == 6:
        return x.transpose(0, -1).contiguous()
    if n == 7:
        return x.flatten()
    if n == 8:
        return x.select(0, 0) if x.dim() > 1 else x
    if n == 9:
        return x.diagonal(0, 0, -1) if x.dim() > 1 else x
    if n == 10:
        return x.T if x.dim() == 2 else x.squeeze()
    return x.narrow(-1, 0, max(d // 2, 1))


def parts(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    n %= 8
    if n == 0:
        return list(x.chunk(2, dim=-1))
    if n == 1:
        return list(x.split(max(x.shape[0] // 2, 1)))
    if n == 2:
        return list(x.unbind(0))[:2]
    if n == 3:
        return list(torch.var_mean(x, dim=-1, keepdim=True))
    if n == 4:
        values, where = x.max(dim=-1, keepdim=True)
        return [values, x.gather(-1, where)]
    if n == 5:
        values, where = x.topk(min(2, x.shape[-1]), dim=-1)
        return [values, x.gather(-1, where) * 2]
    if n == 6:
        return x.sort(dim=-1).values
    return [x.amax(-1, keepdim=True), x.logsumexp(-1, keepdim=True)]


def cat(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    y = y if y.shape == x.shape else x
    return torch.cat([x, y], -1) if n % 3 == 0 else torch.stack([x, y]) if n % 3 == 1 else F.pad(x, (0, 1))


def in_place(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    """On a tensor of its own, or (from 8 on) on one that others may see."""
    if n % 12 < 8 or (x.is_leaf and x.requires_grad):
        x = _fresh(x)
    n %= 12
    if n % 4 == 0:
        return x.add_(_like(x, y)) if n != 4 else x.mul_(_like(x, y.detach()))
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
        return F.dropout(_fresh(x), 0.3, inplace=True)
    if n == 2:
        return x + torch.randn_like(x) * 0.1
    if n == 3:
        return x * torch.bernoulli(torch.full_like(x, 0.5))
    if n == 4:
        return F.alpha_dropout(x, 0.2, training=True)
    if n == 5:
        return x * random.random()
    return x + float(np.random.rand())


def attention(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    q = _three(x)
    b, s, d = q.shape
    heads = 2 if d % 2 == 0 else 1
    if n % 2:
        q, key, value = F.linear(q, u.weight(k, 3 * d, d)).chunk(3, -1)
    else:
        key = value = q
    q, key, value = (t.reshape(b, s, heads, d // heads).transpose(1, 2) for t in (q, key, value))
    p = 0.2 if n % 5 == 4 else 0.0
    return (
        F.scaled_dot_product_attention(q, key, value, dropout_p=p, is_causal=n % 3 == 1)
        .transpose(1, 2)
        .reshape(b, s, d)
    )


def softmax(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    return (x.softmax(-1), x.log_softmax(-1), x.cumsum(-1), x.softmax(0))[n % 4]


def reduce(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    if n % 4 == 0:
        return x.mean(-1, keepdim=True) + x
    if n % 4 == 1:
        return F.cross_entropy(
            x.reshape(-1, x.shape[-1]), x.detach().reshape(-1, x.shape[-1]).argmax(-1), reduction="none"
        )
    if n % 4 == 2:
        return x.norm(dim=-1)
    return x.sum(0)


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


OPS: dict[str, Callable[[Unit, int, Tensor, Tensor, int], Made]] = {
    f.__name__: f
    for f in (
        unary, binary, linear, matmul, residual, norm, view, parts, cat, in_place, draws, attention, softmax, reduce, lookup,
        branch, apart, custom, state,
    )
}  # fmt: skip
_OFTEN = (
    ["unary"] * 4
    + ["binary"] * 3
    + ["linear"] * 4
    + ["matmul"] * 2
    + ["residual"] * 2
    + ["norm"] * 2
    + ["view"] * 3
    + ["in_place"] * 2
)
NAMES = [*_OFTEN, *(n for n in OPS if n not in _OFTEN)]
