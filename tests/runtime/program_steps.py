"""One training step of a random program, and all that can be seen of it."""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.runtime.program_calls import tensors_of
from tests.runtime.program_constructs import DEPTH
from tests.runtime.program_units import Unit
from tests.runtime.programs import Program


def step(program: Program, model: Unit, number: int) -> dict[str, Any]:
    torch.manual_seed(100 + number)
    random.seed(number)
    np.random.seed(number)
    batch = program.batch + (1 if program.varies == 2 and number == 2 else 0)
    inputs = [
        torch.randn(batch, 4, 8).requires_grad_(bool(program.needs_grad & 1)),
        torch.randn(batch, 8).requires_grad_(bool(program.needs_grad & 2)),
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=program.autocast):
        out = tensors_of(model(*inputs, flag=program.varies > 0 and number > 0))
    losses = [(1 + i) * o.float().mean() for i, o in enumerate(out) if o.requires_grad]
    seen: dict[str, Any] = {f"output {i}": o.detach().clone() for i, o in enumerate(out)}
    if losses:
        change(program.between, model, inputs)
        with hooked(program.hooks, model, out, seen):
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
                unit.training,
                (unit.depth, unit.flip, list(unit.stack), list(unit.sizes), hasattr(unit, "temporary")),
            )
    seen["flags"] = (
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(),
        DEPTH.get(),
    )
    if program.between or program.hooks:
        seen |= {f"values of {n}": p.detach().clone() for n, p in model.named_parameters()}
    seen["generator"] = torch.get_rng_state()
    seen["python's generator"] = random.getstate()
    seen["numpy's generator"] = np.random.get_state()[1].tobytes(), np.random.get_state()[2]  # type: ignore[index]
    _update(program.hooks, model)
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


def _update(hooks: int, model: Unit) -> None:
    if hooks == 4 and (parameters := list(model.parameters())):
        optimizer = torch.optim.SGD(parameters, 0.05)
        optimizer.register_step_post_hook(lambda *_: [p.data.clamp_(-1, 1) for p in parameters] and None)
        optimizer.step()
        optimizer.zero_grad()
        return
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.05 * p.grad.clamp(-1, 1)
                p.grad = None


def change(how: int, model: Unit, inputs: list[Tensor]) -> None:
    """What somebody changes between forward and backward, seen by autograd or not."""
    if how == 0:
        return
    units = [u for u in model.modules() if isinstance(u, Unit) and u.weights]
    if how == 4:
        with torch.no_grad():
            inputs[0].mul_(0.5)
        return
    if how == 7:
        for u in model.modules():
            if isinstance(u, Unit):
                u.average.set_((u.average + 1).detach())
        return
    if not units:
        return
    weights = units[-1].weights
    name = sorted(weights)[0]
    p = weights[name]
    if how == 1:
        with torch.no_grad():
            torch._foreach_mul_([p], 1.01)
    elif how == 2:
        p.data = p.data * 1.01
    elif how == 3:
        with torch.no_grad():
            units[-1].average.add_(1)
    elif how == 5:
        with torch.no_grad():
            p.mul_(1.01)
    else:
        weights[name] = nn.Parameter(p.detach() * 1.01, requires_grad=p.requires_grad)


@contextlib.contextmanager
def hooked(how: int, model: Unit, out: list[Tensor], seen: dict[str, Any]) -> Iterator[None]:
    """Hooks during backward: that step each parameter as its gradient is there, that scale gradients, that count."""
    handles: list[Any] = []
    if how == 1:
        stepped = [p for p in model.parameters() if p.requires_grad]
        handles = [p.register_post_accumulate_grad_hook(_step_now) for p in stepped]
    elif how == 2:
        handles = [o.register_hook(lambda g: g * 0.5) for o in out if o.requires_grad]
    elif how == 3:
        calls: list[int] = []
        handles = [p.register_hook(lambda g: calls.append(g.numel())) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if how == 3:
        seen["hooks"] = sorted(calls)


def _step_now(p: Tensor) -> None:
    with torch.no_grad():
        assert p.grad is not None
        p.sub_(0.05 * p.grad.clamp(-1, 1))
    p.grad = None


def reset() -> None:
    """Flags of the process as they are at the start of a program, if one has ended half-way."""
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    torch.set_grad_enabled(True)
    DEPTH.set(0)
