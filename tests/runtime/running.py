"""Runs a program plain, under torch's checkpoint and under ullage's, and says what differs."""

from __future__ import annotations

import contextlib
import gc
import random
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.runtime import programs
from tests.runtime.programs import Block, Op, Program, Unit, _tensors_of
from ullage._errors import UllageError
from ullage.runtime import _learn, _select
from ullage.runtime._frame import Frame
from ullage.runtime._site import Site
from ullage.runtime._skip import Stale

STEPS = 3


@dataclass
class Outcome:
    """What a run gave, step by step, or the error that ended it."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    error: BaseException | None = None
    warned: list[str] = field(default_factory=list)


@dataclass
class Verdict:
    """What became of a program.

    Attributes:
        kind: "equal", or "mismatch" (ullage's step is not the plain one), "raises" (ullage raises where plain and torch's
            checkpoint run), "silent" (ullage runs where plain and torch's checkpoint raise, and gives something else than
            plain does when `allow_mutation_on_saved_tensors` lets it), "leak"; or "lenient" (it gives the same as that), "unforeseen" (ullage says in a
            ReplayError that a call wrote what the first call did not, and is prepared from then on), "refused" (ullage raises
            its own error where plain runs, and torch's checkpoint raises or gives something else), "invalid" (plain raises, and so does ullage or it gives what torch's gives).
        what: details.
        torch: "equal", "mismatch" or "raises": torch's checkpoint.
        selective: selective sites that were replayed, where what can be kept lets a replay skip an op.
        skipped: of these, how many skipped ops.
        replays: units run again, all steps.
        idle: the sites that skipped nothing.
    """

    kind: str
    what: str = ""
    torch: str = "equal"
    selective: int = 0
    skipped: int = 0
    replays: int = 0
    warned: tuple[str, ...] = ()
    idle: list[Site] = field(default_factory=list)

    @property
    def defect(self) -> bool:
        return self.kind in ("mismatch", "raises", "silent", "leak") or (self.kind, self.torch) == (
            "unforeseen",
            "equal",
        )


def run(program: Program, mode: str, like: Unit | None = None) -> tuple[Outcome, Unit]:
    """Three steps from the program's own initial state."""
    outcome = Outcome()
    model = Unit(program.top, program.frozen, like=like)
    programs._mode[0] = mode
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            for step in range(STEPS):
                outcome.steps.append(_step(program, model, step))
        except (Exception, Stale) as error:
            outcome.error = error.with_traceback(None)
            error.__context__ = error.__cause__ = None
        finally:
            programs._mode[0] = "plain"
    outcome.warned = [str(w.message) for w in warned]
    return outcome, model


def _step(program: Program, model: Unit, step: int) -> dict[str, Any]:
    torch.manual_seed(100 + step)
    random.seed(step)
    np.random.seed(step)
    batch = program.batch + (1 if program.varies == 2 and step == 2 else 0)
    inputs = [
        torch.randn(batch, 4, 8).requires_grad_(bool(program.needs_grad & 1)),
        torch.randn(batch, 8).requires_grad_(bool(program.needs_grad & 2)),
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=program.autocast):
        out = _tensors_of(model(*inputs, flag=program.varies > 0 and step > 0))
    losses = [(1 + i) * o.float().mean() for i, o in enumerate(out) if o.requires_grad]
    seen: dict[str, Any] = {f"output {i}": o.detach().clone() for i, o in enumerate(out)}
    if losses:
        _backward(program, model, inputs, losses, seen)
    del losses, out
    leaves = {f"input {i}": t for i, t in enumerate(inputs)} | dict(model.named_parameters())
    seen |= {f"grad of {n}": None if t.grad is None else t.grad.clone() for n, t in leaves.items()}
    seen |= {n: b.detach().clone() for n, b in model.named_buffers()}
    for name, unit in model.named_modules():
        if isinstance(unit, Unit):
            seen[f"attributes of {name}"] = (
                unit.calls,
                list(unit.history),
                sorted(unit.cache),
                unit.table.tolist(),
                unit.flag,
            )
    seen["generator"] = torch.get_rng_state()
    seen["python's generator"] = random.getstate()
    seen["numpy's generator"] = np.random.get_state()[1].tobytes(), np.random.get_state()[2]  # type: ignore[index]
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.05 * p.grad.clamp(-1, 1)
                p.grad = None
    return seen


def _backward(program: Program, model: Unit, inputs: list[Tensor], losses: list[Tensor], seen: dict[str, Any]) -> None:
    loss = torch.stack(losses).sum()
    leaves = {f"input {i}": t for i, t in enumerate(inputs)} | dict(model.named_parameters())
    # by name: a later step may make more of them
    some = [(n, t) for n, t in leaves.items() if t.requires_grad and zlib.crc32(n.encode()) % 2]
    how = program.backward
    if how in (2, 3) and some:
        given = torch.autograd.grad(loss, [t for _, t in some], retain_graph=how == 2, allow_unused=True)
        seen |= {f"grad of {n} alone": g for (n, _), g in zip(some, given, strict=True)}
        if how == 3:
            return
    if how == 1:
        loss.backward(retain_graph=True)
    if how == 4:
        for one in losses[:-1]:
            one.backward(retain_graph=True)
        losses[-1].backward()
        return
    loss.backward()


def same(a: Any, b: Any) -> bool:
    """The same bits?"""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and _bytes(a) == _bytes(b)
    return type(a) is type(b) and bool(a == b)


def _bytes(t: Tensor) -> bytes:
    t = t.detach().contiguous()
    return (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy().tobytes()


def difference(plain: Outcome, other: Outcome) -> str:
    """The first thing in which a run is not the plain one, or ""."""
    for n, (a, b) in enumerate(zip(plain.steps, other.steps, strict=False)):
        for name in (*a, *(k for k in b if k not in a)):
            # what plain has not made yet may be there already, untouched
            if name in a and (name not in b or not same(a[name], b[name])):
                return f"step {n}: {name}"
            if name not in a and name.startswith("grad of") and b[name] is not None:
                return f"step {n}: {name} is not None"
    return ""


@contextlib.contextmanager
def watching(found: dict[int, tuple[Site, bool]]) -> Iterator[None]:
    """Notes every site that learns, and whether its rule named something that can be kept."""
    original = _learn._selection

    def selection(frame: Frame, recorder: Any) -> Any:
        refusal, recorder.log.refusal = recorder.log.refusal, ""
        can = _select.select(recorder.log, frame.options.rule).skipped > 0  # type: ignore[arg-type]
        recorder.log.refusal = refusal
        known = found.get(id(frame.site), (frame.site, False))[1]
        found[id(frame.site)] = (frame.site, known or can)
        return original(frame, recorder)

    _learn._selection = selection
    try:
        yield
    finally:
        _learn._selection = original


def judge(program: Program) -> Verdict:
    """Run a program three ways."""
    found: dict[int, tuple[Site, bool]] = {}
    _, model = run(program, "plain")  # makes the weights
    plain, _ = run(program, "plain", model)
    by_torch, _ = run(program, "torch", model)
    with watching(found):
        by_ullage, _ = run(program, "ullage", model)
    verdict = _verdict(plain, by_torch, by_ullage)
    if verdict.kind == "silent":
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            meant, _ = run(program, "plain", model)
        if meant.error is None and not difference(meant, by_ullage):
            verdict.kind = "lenient"
    could = [s for s, can in found.values() if can and (s.replays or s.skipped)]
    verdict.selective, verdict.skipped = len(could), sum(s.skipped > 0 for s in could)
    verdict.idle = [s for s in could if not s.skipped]
    verdict.replays = sum(s.replays for s, _ in found.values())
    verdict.warned = tuple(w for w in by_ullage.warned if w not in plain.warned)
    return verdict


def _verdict(plain: Outcome, by_torch: Outcome, by_ullage: Outcome) -> Verdict:
    theirs = "raises" if by_torch.error else "mismatch" if difference(plain, by_torch) else "equal"
    error = by_ullage.error
    if plain.error is not None:
        if error is not None or not by_torch.error:
            return Verdict("invalid", f"{type(plain.error).__name__}: {plain.error}"[:200], theirs)
        return Verdict("silent", f"plain: {plain.error}; ullage runs"[:300], theirs)
    if error is not None:
        if isinstance(error, UllageError) and "which its first call had left alone" in str(error):
            return Verdict("unforeseen", str(error), theirs)
        kind = "refused" if theirs != "equal" and isinstance(error, UllageError) else "raises"
        return Verdict(kind, f"{type(error).__name__}: {error}", theirs)
    what = difference(plain, by_ullage)
    return Verdict("mismatch" if what else "equal", what, theirs)


class Leaks:
    """Counts frames and tensors that outlive a program. `gc.freeze` keeps what was there before out of it."""

    def __enter__(self) -> Leaks:
        gc.collect()
        gc.freeze()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()

    def left(self) -> str:
        """What is alive that should not be, or ""."""
        gc.collect()
        gc.collect()  # what the first one's finalizers let go of
        objects = gc.get_objects()
        frames = sum(type(o) is Frame for o in objects)
        tensors = [o for o in objects if isinstance(o, Tensor)]
        sites = sum(type(o) is Site for o in objects)
        if not frames and not tensors:
            return f"{sites} sites" if sites > 200 else ""
        del objects
        gc.freeze()  # once told
        return f"{frames} frames, {[tuple(t.shape) for t in tensors[:5]]} ({len(tensors)} tensors), {sites} sites"


def _leaks(program: Program, mode: str, leaks: Leaks) -> bool:
    run(program, mode)
    return bool(leaks.left())


def checked(program: Program, leaks: Leaks) -> Verdict:
    """`judge`, and what it leaves behind; a leak does not hide another defect."""
    verdict = judge(program)
    left = leaks.left()
    # after a failed backward the graph still holds what closures hold of it, and no collector sees such a cycle
    if left and verdict.kind == "equal" and not any(_leaks(program, mode, leaks) for mode in ("plain", "torch")):
        verdict.kind, verdict.what = "leak", left
    return verdict


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
