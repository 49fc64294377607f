"""The arithmetic of random programs: (unit, number, x, y, n) -> what becomes live."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tests.runtime.program_units import Unit

Made = Tensor | list[Tensor]


def _three(x: Tensor) -> Tensor:
    while x.dim() < 3:
        x = x.unsqueeze(0)
    return x.flatten(0, x.dim() - 3) if x.dim() > 3 else x


def like(x: Tensor, y: Tensor) -> Tensor:
    """Something of y that goes with x."""
    return y if y.shape == x.shape else y.mean()


def fresh(x: Tensor) -> Tensor:
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
    return _BINARY[n % len(_BINARY)](x, like(x, y))


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
    return x + torch.tanh(x @ u.weight(k, x.shape[-1], x.shape[-1])) if n % 2 else x + like(x, y)


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
