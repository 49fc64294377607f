"""Ops of random programs that stand for constructs of real models: (unit, number, x, y, n) -> what becomes live.

Containers that a unit changes, state that it sets and puts back, parameters and buffers given other memory, bits and kinds of tensors.
"""

from __future__ import annotations

import contextvars
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.runtime.program_arithmetic import Made, fresh

if TYPE_CHECKING:
    from tests.runtime.program_units import Unit

DEPTH: contextvars.ContextVar[int] = contextvars.ContextVar("depth", default=0)


def size_of(container: Any) -> int:
    """How much is in a container, or how often it was counted up."""
    return len(container) if hasattr(container, "__len__") else int(getattr(container, "count", 0))


def _grow(container: Any) -> None:
    if isinstance(container, list | deque):
        container.append(len(container))
    elif isinstance(container, dict):
        container[f"more{len(container)}"] = 1
    elif isinstance(container, set):
        container.add(len(container))
    elif hasattr(container, "count"):
        container.count += 1


def grows(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    """The container that the unit was given is one larger, and the values hang on it."""
    container = u.given()
    if container is None or isinstance(container, Tensor | tuple):
        return x * 1.5
    if n % 3:
        _grow(container)
    out = x * (1 + 0.05 * size_of(container))
    if n % 3 == 2:
        _grow(container)
    return out


def toggled(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    """State that the forward sets, uses and puts back."""
    n %= 8
    if n == 0:
        u.temporary = x.detach().mean()
        out = x.tanh() * u.temporary
        del u.temporary
        return out
    if n == 1:
        was = u.training
        u.eval()
        out = F.dropout(x, 0.5, u.training) + x.sigmoid()
        u.train(was)
        return out
    if n == 2:
        u.depth += 1
        out = torch.sin(x) * (1 + 0.1 * u.depth)
        u.depth -= 1
        return out
    if n == 3:
        torch.set_default_dtype(torch.float64)
        try:
            return x.exp().tanh() * torch.ones(()).float()
        finally:
            torch.set_default_dtype(torch.float32)
    if n == 4:
        token = DEPTH.set(DEPTH.get() + 1)
        out = x.sigmoid() * (1 + 0.1 * DEPTH.get())
        DEPTH.reset(token)
        return out
    if n == 5:
        u.stack.append(1)
        out = x.tanh() * (1 + 0.1 * len(u.stack))
        u.stack.pop()
        return out
    if n == 6:
        grad = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        z = x.tanh()
        torch.set_grad_enabled(grad)
        return x * z
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    out = x @ u.weight(k, x.shape[-1], x.shape[-1])
    torch.set_float32_matmul_precision(before)
    return out


def restored(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    """State that a later op of the same forward puts back, or that only the next call does."""
    n %= 4
    if n == 0:
        u.flip = not u.flip
        return x.tanh() if u.flip else x.sigmoid()
    if n == 1:
        u.train(not u.training)
        return x * (2.0 if u.training else 0.5)
    if n == 2:
        u.cache[-1] = u.cache[-1] * 0.5 + 1 if -1 in u.cache else torch.ones(())
        return x * u.cache[-1]
    u.depth = (u.depth + 1) % 3
    return x.square() * (1 + u.depth)


def swapped(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    """Parameters and buffers that get other values or other memory behind autograd's back."""
    n %= 8
    d = x.shape[-1]
    if n == 0:
        w = u.weight(k, d)
        w.data.clamp_(
            -0.02, 0.02
        )  # so low that a first call changes it: what only a later one does is outside the guarantee
        return x * w
    if n == 1:
        w = u.weight(k, d)
        w.data = w.data.clamp(-0.2, 0.2)
        return x * w
    if n == 2:
        u.average.data = u.average.data * 0.5 + 1
        return x - u.average
    if n == 3:
        u.average.set_((u.average * 0.5 + 1).detach())
        return x * u.average
    if n == 4:
        z = torch.empty(0)
        z.resize_(x.shape).copy_(x.detach())
        return x * z
    if n == 5:
        z = fresh(x)
        z.data = z.data * 0.5
        return z * x
    if n == 6:
        z = x.detach().clone()
        out = x * z
        z.data.mul_(0.5)  # saved, and then written to where autograd does not see it
        return out
    w = u.weight(k, d, d)
    return torch.func.functional_call(_Times(w), {"weight": w * 0.5}, (x,))  # type: ignore[no-any-return]


class _Times(torch.nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def bits(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    """Complex tensors, and views with a conjugate or a negative bit."""
    n %= 7
    z = torch.complex(x.float(), x.float().sigmoid())
    if n == 0:
        return (z.conj() * z).real
    if n == 1:
        return z.conj().imag  # its negative bit is set
    if n == 2:
        return torch.view_as_real(z.exp().resolve_conj()).flatten(-2)
    if n == 3:
        z = z if z.dim() > 1 else z.unsqueeze(0)
        return (z @ z.mH).abs()
    if n == 4:
        return z.conj().imag.tanh() * x
    if n == 5:
        return (z.conj() @ torch.complex(w := u.weight(k, x.shape[-1], 4), w)).real
    return torch.view_as_complex(torch.view_as_real(z).contiguous()).angle()


def kinds(u: Unit, k: int, x: Tensor, y: Tensor, n: int) -> Made:
    """Sparse and jagged tensors."""
    n %= 7
    rows = x.float().reshape(-1, x.shape[-1])
    w = u.weight(k, rows.shape[-1], 4)
    if n == 0:
        return rows.to_sparse().to_dense() * 2
    if n == 1:
        return torch.sparse.mm(rows.relu().to_sparse(), w)
    if n == 2:
        return torch.sparse.mm(rows.detach().relu().to_sparse_csr(), w)
    if n == 3:
        return (rows.to_sparse() * 0.5).coalesce().values().tanh()
    first = max(rows.shape[0] // 2, 1)
    nested = torch.nested.as_nested_tensor([t for t in (rows[:first], rows[first:]) if len(t)], layout=torch.jagged)
    if n == 4:
        return nested.sin().values()  # type: ignore[no-any-return]
    if n == 5:
        return (nested @ w).values()  # type: ignore[no-any-return]
    return (nested * 2).to_padded_tensor(0.0)  # type: ignore[no-any-return]
