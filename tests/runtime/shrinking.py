"""Smaller programs that show the same: for the smallest form of a defect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.runtime.programs import Block, Op, Program


def smaller(program: Program) -> Iterator[Program]:
    """Programs that are one step simpler."""
    yield from (replace(program, top=t) for t in _smaller_blocks(program.top, True))
    for name, value in (
        ("autocast", False),
        ("backward", 0),
        ("varies", 0),
        ("varies", 1),
        ("frozen", 0),
        ("needs_grad", 1),
        ("batch", 2),
        ("between", 0),
        ("hooks", 0),
    ):
        if getattr(program, name) != value and (name != "varies" or program.varies > value):
            yield replace(program, **{name: value})


def _smaller_blocks(block: Block, top: bool = False) -> Iterator[Block]:
    ops = block.ops
    for k in range(len(ops)):
        if len(ops) > 1:
            yield replace(block, ops=ops[:k] + ops[k + 1 :])
    for k, op in enumerate(ops):
        if isinstance(op, Block):
            yield replace(block, ops=ops[:k] + op.ops + ops[k + 1 :])
            yield from (replace(block, ops=(*ops[:k], b, *ops[k + 1 :])) for b in _smaller_blocks(op))
        else:
            for less in (replace(op, a=0), replace(op, b=0), replace(op, n=0), Op("unary"), Op("linear")):
                if less != op and not (op.name in ("unary", "linear") and less.name != op.name):
                    yield replace(block, ops=(*ops[:k], less, *ops[k + 1 :]))
    if not top and block.how not in ("plain", "full"):
        yield replace(block, how="full")
        if block.how != "all":
            yield replace(block, how="all")
    if not top and block.how != "plain":
        yield replace(block, how="plain")
    for name, value in (
        ("inputs", block.inputs[:1]),
        ("inputs", (0,)),
        ("call", 0),
        ("passing", 0),
        ("returns", 0),
        ("times", 1),
        ("after", 0),
    ):
        if getattr(block, name) != value:
            yield replace(block, **{name: value})


def minimal(program: Program, bad: Callable[[Program], bool], tries: int = 400) -> Program:
    """A small program that is bad as well."""
    seen = {program}
    again = True
    while again:
        again = False
        for less in smaller(program):
            if less in seen:
                continue
            seen.add(less)
            tries -= 1
            if tries < 0:
                return program
            if bad(less):
                program, again = less, True
                break
    return program
