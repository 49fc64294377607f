"""Small random training programs as plain data, and how to run them.

A `Program` is a tree of `Block`s of `Op`s. An op picks its operands from the list of live tensors by numbers that are valid
whatever the list holds, so every tree is a program, and so is every part of one. `random_program(seed)` draws one;
`program_from(choose)` draws one from any source of numbers, such as hypothesis.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as torchs
from torch import Tensor, nn

import ullage as ul

aten = torch.ops.aten
Choose = Callable[[int], int]  # a number from 0 to n - 1; 0 is the simplest


@dataclass(frozen=True, slots=True)
class Op:
    """An op on live tensors `a` and `b` (0 is the newest), in variant `n`."""

    name: str
    a: int = 0
    b: int = 0
    n: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """Ops and blocks, run as one module.

    Attributes:
        ops: what it does, in order.
        how: a key of `HOW`: "plain", or how it is checkpointed.
        inputs: which live tensors of its parent it is given.
        call: how it is called, see `_callable`.
        passing: how its arguments are passed, see `_arguments`.
        returns: what it returns, see `_result`.
        times: how often it is called, on what its last call made.
    """

    ops: tuple[Op | Block, ...]
    how: str = "plain"
    inputs: tuple[int, ...] = (0,)
    call: int = 0
    passing: int = 0
    returns: int = 0
    times: int = 1


@dataclass(frozen=True, slots=True)
class Program:
    """A model and how it is trained.

    Attributes:
        top: the model.
        autocast: run forward in bfloat16.
        backward: 0 once, 1 twice with retain_graph, 2 `autograd.grad` on a part first, 3 `autograd.grad` alone,
            4 two losses, one backward each.
        varies: what differs between steps: 0 values, 1 also a flag, 2 also the batch size.
        frozen: every how many-th parameter is frozen (0: none).
        needs_grad: bit per input: does it need a gradient?
        batch: rows.
    """

    top: Block
    autocast: bool = False
    backward: int = 0
    varies: int = 0
    frozen: int = 0
    needs_grad: int = 1
    batch: int = 2


HOW: dict[str, Any] = {
    "plain": None,
    "full": None,
    "matmul_attention": "matmul_attention",
    "half_matmul_attention": "half_matmul_attention",
    "attention": "attention",
    "matmuls": {aten.mm.default, aten.addmm.default, aten.bmm.default},
    "pointwise": {aten.tanh.default, aten.exp.default, aten.sigmoid.default, aten.relu.default, aten._softmax.default},
    "all": lambda op: True,
    "not_matmul": lambda op: op not in (aten.mm.default, aten.addmm.default, aten.bmm.default),
}
SELECTIVE = [h for h in HOW if h not in ("plain", "full")]


# --- ops: (unit, number, x, y, n) -> what becomes live ------------------------------------------------------------------

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
_NAMES = [*_OFTEN, *(n for n in OPS if n not in _OFTEN)]


# --- running a program --------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """A result of no container that torch knows."""

    value: Tensor
    other: Any = None
    name: str = "result"


_mode = ["plain"]  # "plain", "torch" or "ullage": what runs checkpointed blocks


class Unit(nn.Module):
    """A block as a module; its weights are made when they are first asked for, or are those of `like`."""

    def __init__(self, block: Block, frozen: int, path: str = "top", like: Unit | None = None) -> None:
        super().__init__()
        self.block, self.frozen, self.path = block, frozen, path
        self.flag = False
        self.calls = 0
        self.history: list[int] = []
        self.cache: dict[int, Tensor] = {}
        self.table = np.zeros(4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("moved", torch.ones(()))
        self.weights = nn.ParameterDict()
        self.norms = nn.ModuleDict()
        inner = [(k, o) for k, o in enumerate(block.ops) if isinstance(o, Block)]
        self.units = nn.ModuleDict(
            {str(k): Unit(o, frozen, f"{path}.{k}", like and like.units[str(k)]) for k, o in inner}  # type: ignore[arg-type]
        )
        if like is not None:
            for key, w in like.weights.items():
                self._make(key, tuple(w.shape))
            for key, norm in like.norms.items():
                self.norms[key] = nn.BatchNorm1d(norm.num_features)  # type: ignore[arg-type]

    def _make(self, key: str, shape: tuple[int, ...]) -> None:
        number = zlib.crc32(f"{self.path}.{key}".encode())
        values = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        self.weights[key] = nn.Parameter(
            values * (shape[-1] ** -0.5), requires_grad=not self.frozen or number % self.frozen > 0
        )

    def weight(self, k: int, *shape: int, bias: bool = False) -> Tensor:
        key = f"{k}_{'b' if bias else 'w'}_{'_'.join(map(str, shape))}"
        if key not in self.weights:
            self._make(key, shape)
        return self.weights[key]

    def batch_norm(self, k: int, width: int) -> nn.Module:
        key = f"{k}_{width}"
        if key not in self.norms:
            self.norms[key] = nn.BatchNorm1d(width)
        return self.norms[key]

    def forward(self, *args: Any, flag: bool = False, scale: float = 1.0, **named: Any) -> Any:
        self.flag = flag
        live = [t for a in (*args, *named.values()) for t in _tensors_of(a)]
        entered = len(live)
        for k, op in enumerate(self.block.ops):
            if isinstance(op, Block):
                made = self._call(self.units[str(k)], op, live, flag, scale)  # type: ignore[arg-type]
            else:
                x, y = (live[-1 - i % len(live)] for i in (op.a, op.b))
                out = OPS[op.name](self, k, x if scale == 1.0 or k else x * scale, y, op.n)
                made = out if isinstance(out, list) else [out]
            live += [_small(t) for t in made]
        return _result(live, entered, self.block.returns)

    @staticmethod
    def _call(unit: Unit, block: Block, live: list[Tensor], flag: bool, scale: float) -> list[Tensor]:
        made = [live[-1 - i % len(live)] for i in block.inputs]
        for _ in range(block.times):
            extra = live[0]
            args, kwargs = _arguments(made, block.passing, flag)
            function, args = _callable(unit, block.call, args, extra)
            made = _tensors_of(_run(function, block.how, args, kwargs)) or made
        return made


def _small(t: Tensor) -> Tensor:
    return t.reshape(-1)[:128].reshape(2, 8, 8) if t.numel() > 512 else t.reshape(1) if t.dim() == 0 else t


def _tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Result):
        return _tensors_of([value.value, value.other])
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors_of(v)] if isinstance(value, list | tuple) else []


def _arguments(tensors: list[Tensor], passing: int, flag: bool) -> tuple[list[Any], dict[str, Any]]:
    if passing == 1:
        return [tensors[0]], {f"t{i}": t for i, t in enumerate(tensors[1:])} | {"flag": flag}
    if passing == 2:
        return [tensors], {"flag": flag, "scale": 0.5}
    if passing == 3:
        return [{f"t{i}": t for i, t in enumerate(tensors)}, None], {"flag": flag}
    if passing == 4:
        return [tuple(tensors), "name", 3], {}
    if passing == 5:
        return [Result(tensors[0], tensors[1:])], {"flag": flag}
    return list(tensors), {"flag": flag}


def _apply(unit: Unit, *args: Any, **kwargs: Any) -> Any:
    return unit(*args, **kwargs)


def _callable(unit: Unit, call: int, args: list[Any], extra: Tensor) -> tuple[Callable[..., Any], list[Any]]:
    if call == 1:
        return unit.forward, args
    if call == 2:
        return (lambda *a, **k: unit(*a, **k)), args
    if call == 3:
        return functools.partial(unit, args[0]), args[1:]
    if call == 4:  # a tensor that it closes over
        return (lambda *a, **k: unit(extra, *a, **k)), args
    if call == 5:
        return _apply, [unit, *args]
    return unit, args


def _result(live: list[Tensor], entered: int, returns: int) -> Any:
    last, before = live[-1], live[-2] if len(live) > entered + 1 else live[0]
    if returns == 1:
        return last, None, before
    if returns == 2:
        return {"last": last, "none": None, "list": [before]}
    if returns == 3:
        return Result(last, before)
    if returns == 4:
        return [last, live[0]]  # its own input
    if returns == 5:
        return last, before.detach(), 3
    return last


def _run(function: Callable[..., Any], how: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if how == "plain" or _mode[0] == "plain":
        return function(*args, **kwargs)
    if _mode[0] == "torch":
        return torchs.checkpoint(function, *args, use_reentrant=False, **kwargs)
    return ul.checkpoint(function, *args, keep=HOW[how], **kwargs)


# --- drawing programs ---------------------------------------------------------------------------------------------------


def _block(choose: Choose, depth: int) -> Block:
    ops: list[Op | Block] = []
    for _ in range(1 + choose(8 if depth else 6)):
        if depth < 3 and choose(6 if depth else 2) == 1:
            ops.append(_block(choose, depth + 1))
        else:
            ops.append(Op(_NAMES[choose(len(_NAMES))], choose(4), choose(4), choose(60)))
    how = list(HOW)[choose(len(HOW))] if depth else "plain"
    inputs = tuple(choose(4) for _ in range(1 + choose(3)))
    rarely = choose(4)
    times = 2 if rarely == 3 and depth else 1
    return Block(tuple(ops), how, inputs, choose(6), choose(6), choose(6), times)


def program_from(choose: Choose) -> Program:
    """A program of numbers that `choose` gives."""
    top = _block(choose, 0)
    if not any(isinstance(o, Block) for o in top.ops):
        top = replace(top, ops=(*top.ops, _block(choose, 1)))
    backward = max(choose(8) - 3, 0)
    return Program(
        top, choose(4) == 3, backward, max(choose(6) - 3, 0), max(choose(6) - 3, 0), choose(4), 1 + choose(3)
    )


def random_program(seed: int) -> Program:
    """The program of a seed."""
    return program_from(random.Random(seed).randrange)
