"""The modules of a random program: each runs a block."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint as torchs
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import ullage as ul
from tests.runtime.program_calls import PASSINGS, arguments, callable_of, result_of, tensors_of
from tests.runtime.program_constructs import size_of
from tests.runtime.program_ops import OPS
from tests.runtime.programs import HOW, Block

mode = ["plain"]  # "plain", "torch", "torch, flat" or "ullage": what runs checkpointed blocks
_given: list[Any] = []  # the first argument of each unit that runs, outermost first


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
        self.depth, self.flip = 0, False
        self.stack: list[int] = []
        self.sizes: list[int] = []  # of containers that it was given, when its caller had them back
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

    def given(self) -> Any:
        """The first argument of the call that runs."""
        return _given[-1]

    def forward(self, *args: Any, flag: bool = False, scale: float = 1.0, **named: Any) -> Any:
        _given.append(args[0] if args else None)
        try:
            return self._run([t for a in (*args, *named.values()) for t in tensors_of(a)], flag, scale)
        finally:
            _given.pop()

    def _run(self, live: list[Tensor], flag: bool, scale: float) -> Any:
        self.flag = flag
        entered = len(live)
        for k, op in enumerate(self.block.ops):
            if isinstance(op, Block):
                made = self._call(self.units[str(k)], op, live, flag, scale)  # type: ignore[arg-type]
            else:
                x, y = (live[-1 - i % len(live)] for i in (op.a, op.b))
                out = OPS.named[op.name](self, k, x if scale == 1.0 or k else x * scale, y, op.n)
                made = out if isinstance(out, list) else [out]
            live += [_small(t) for t in made]
        return result_of(live, entered, self.block.returns)

    @staticmethod
    def _call(unit: Unit, block: Block, live: list[Tensor], flag: bool, scale: float) -> list[Tensor]:
        made = [live[-1 - i % len(live)] for i in block.inputs]
        for _ in range(block.times):
            extra = live[0]
            args, kwargs = arguments(made, block.passing, flag)
            function, args = callable_of(unit, block.call, args, extra)
            given = made[0]
            made = tensors_of(_called(function, block.how, args, kwargs)) or made
            if block.passing >= PASSINGS:
                unit.sizes.append(size_of(args[0]) if args else 0)
            if block.after:
                made = [_written_after(given, made[0], block.after), *made[1:]]
        return made


def _small(t: Tensor) -> Tensor:
    return t.reshape(-1)[:128].reshape(2, 8, 8) if t.numel() > 512 else t.reshape(1) if t.dim() == 0 else t


def _written_after(x: Tensor, out: Tensor, how: int) -> Tensor:
    """What a caller writes in place once a unit has run: to its residual, or to what the unit gave back."""
    if (how in (1, 2, 4) and x.is_leaf and x.requires_grad) or (how == 6 and x.grad_fn is not None):
        return out
    if how == 1:
        return x.add_(out) if x.shape == out.shape and x.dtype == out.dtype else x.mul_(1.5)
    if how == 2:
        x.mul_(0.9)
        return x + out.mean()
    if how == 3:
        return out.add_(x) if x.shape == out.shape and x.dtype == out.dtype and not out.is_leaf else out
    if how == 4:
        x[..., 0] = 0.25
        return x * out.mean()
    if how == 5 and not out.is_leaf:
        return out.tanh_()
    if x.is_leaf and x.requires_grad:  # of what a step makes itself no replay is promised to have that
        x.data = x.data * 0.9
    return out


def _called(function: Callable[..., Any], how: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if how == "plain" or mode[0] == "plain":
        return function(*args, **kwargs)
    if mode[0] == "torch":
        return torchs.checkpoint(function, *args, use_reentrant=False, **kwargs)
    if mode[0] == "torch, flat":
        tensors, shape = tree_flatten((args, kwargs))

        def from_flat(*flat: Any) -> Any:
            args, kwargs = tree_unflatten(flat, shape)
            return function(*args, **kwargs)

        return torchs.checkpoint(from_flat, *tensors, use_reentrant=False)
    return ul.checkpoint(function, *args, keep=HOW[how], **kwargs)
