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
import torch.utils.checkpoint as torchs
from torch import Tensor, nn

import ullage as ul
from tests.runtime.program_ops import NAMES, OPS

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
            ops.append(Op(NAMES[choose(len(NAMES))], choose(4), choose(4), choose(60)))
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
