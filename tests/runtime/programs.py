"""Small random training programs as plain data, drawn from numbers.

A `Program` is a tree of `Block`s of `Op`s. An op picks its operands from the list of live tensors by numbers that are valid
whatever the list holds, so every tree is a program, and so is every part of one. `random_program(seed)` draws one;
`program_from(choose)` draws one from any source of numbers, such as hypothesis. `with_constructs` puts more into one, so that what a
seed drew before there were these constructs is drawn still. `program_units` runs them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.runtime.program_calls import CALLS, MORE_CALLS, MORE_PASSINGS, PASSINGS
from tests.runtime.program_ops import MORE_NAMES, NAMES

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
        call: how it is called, see `callable_of`.
        passing: how its arguments are passed, see `arguments`.
        returns: what it returns, see `result_of`.
        times: how often it is called, on what its last call made.
        after: what its caller then writes in place: 0 nothing, else see `_written_after`.
    """

    ops: tuple[Op | Block, ...]
    how: str = "plain"
    inputs: tuple[int, ...] = (0,)
    call: int = 0
    passing: int = 0
    returns: int = 0
    times: int = 1
    after: int = 0


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
        between: what changes between forward and backward: 0 nothing, else see `program_steps.change`.
        hooks: hooks around backward and the update: 0 none, else see `program_steps.hooked`.
    """

    top: Block
    autocast: bool = False
    backward: int = 0
    varies: int = 0
    frozen: int = 0
    needs_grad: int = 1
    batch: int = 2
    between: int = 0
    hooks: int = 0


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


@dataclass(frozen=True, slots=True)
class Size:
    """How large programs are: at most so many ops in the model, in a unit, and units in units."""

    top: int
    ops: int
    depth: int


SIZES = {"large": Size(6, 8, 3), "small": Size(3, 3, 2)}
LARGE = SIZES["large"]


def _block(choose: Choose, depth: int, size: Size) -> Block:
    ops: list[Op | Block] = []
    for _ in range(1 + choose(size.ops if depth else size.top)):
        if depth < size.depth and choose(6 if depth else 2) == 1:
            ops.append(_block(choose, depth + 1, size))
        else:
            ops.append(Op(NAMES[choose(len(NAMES))], choose(4), choose(4), choose(60)))
    how = list(HOW)[choose(len(HOW))] if depth else "plain"
    inputs = tuple(choose(4) for _ in range(1 + choose(3)))
    rarely = choose(4)
    times = 2 if rarely == 3 and depth else 1
    return Block(tuple(ops), how, inputs, choose(6), choose(6), choose(6), times)


def program_from(choose: Choose, size: Size = LARGE) -> Program:
    """A program of numbers that `choose` gives."""
    top = _block(choose, 0, size)
    if not any(isinstance(o, Block) for o in top.ops):
        top = replace(top, ops=(*top.ops, _block(choose, 1, size)))
    backward = max(choose(8) - 3, 0)
    return Program(
        top, choose(4) == 3, backward, max(choose(6) - 3, 0), max(choose(6) - 3, 0), choose(4), 1 + choose(3)
    )


AFTER, BETWEEN, HOOKS = 6, 7, 4


def with_constructs(program: Program, choose: Choose) -> Program:
    """A program with constructs of `MORE_NAMES` in it, other containers and callables, in-place writes and hooks around its units."""
    top = _more(program.top, choose, top=True)
    between = 1 + choose(BETWEEN) if choose(12) == 11 else 0
    hooks = 1 + choose(HOOKS) if choose(4) == 3 else 0
    return replace(program, top=top, between=between, hooks=hooks)


def _more(block: Block, choose: Choose, top: bool = False) -> Block:
    ops = [_more(o, choose) if isinstance(o, Block) else o for o in block.ops]
    for _ in range(choose(3)):
        op = Op(MORE_NAMES[choose(len(MORE_NAMES))], choose(4), choose(4), choose(60))
        ops.insert(choose(len(ops) + 1), op)
    if top:
        return replace(block, ops=tuple(ops))
    passing = PASSINGS + choose(MORE_PASSINGS) if choose(3) == 2 else block.passing
    call = CALLS + choose(MORE_CALLS) if choose(3) == 2 else block.call
    after = 1 + choose(AFTER) if choose(5) == 4 else 0
    return replace(block, ops=tuple(ops), passing=passing, call=call, after=after)


def random_program(seed: int, constructs: int = 1, size: Size = LARGE) -> Program:
    """The program of a seed; with `constructs=2` more is put into the same one."""
    program = program_from(random.Random(seed).randrange, size)
    return program if constructs == 1 else with_constructs(program, random.Random(f"{constructs}/{seed}").randrange)
