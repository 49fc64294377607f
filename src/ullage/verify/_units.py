"""Unit by unit: where the plain step does not fit, each unit is compared alone, from the same inputs and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ullage.measure._state import preserved
from ullage.mechanisms import UnitSettings, run_unit
from ullage.planner import Plan
from ullage.workload import Instance, run_step


def verify_units(inst: Instance, plan: Plan) -> tuple[list[tuple[str, float]], int, int]:
    """Compare each planned unit with its plain forward and backward. Returns (differences, tensors compared, replays)."""
    differences: list[tuple[str, float]] = []
    compared = replays = 0
    for decision in plan.decisions:
        settings = decision.settings()
        if settings.option.action == "keep":
            continue
        with plan.apply(inst.model), preserved(inst), _first_inputs(inst.model, decision.unit) as seen:
            run_step(inst)
        if not seen:
            differences.append((f"{decision.unit}: its forward was not called", float("nan")))
            continue
        module = inst.model.get_submodule(decision.unit)
        with preserved(inst):
            plain, _ = _alone(module, None, *seen[0])
        with preserved(inst):
            planned, count = _alone(module, settings, *seen[0])
        replays += count
        compared += len(plain)
        for name in plain.keys() | planned.keys():
            a, b = plain.get(name), planned.get(name)
            if a is None or b is None or not _same(a, b):
                gap = (a.double() - b.double()).abs().max().item() if a is not None and b is not None else float("nan")
                differences.append((f"{decision.unit}: {name}", gap))
    return differences, compared, replays


def _same(a: Tensor, b: Tensor) -> bool:
    from ullage.verify._verify import same_bits

    return same_bits(a, b)


@contextlib.contextmanager
def _first_inputs(model: nn.Module, fqn: str) -> Iterator[list[Any]]:
    seen: list[Any] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not seen and torch.is_grad_enabled():

            def copy(t: Any) -> Any:
                return t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t

            device = next((t.device.type for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)), "cpu")
            amp = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            seen.append((tree_map(copy, args), tree_map(copy, kwargs), torch.get_rng_state(), amp))

    handle = model.get_submodule(fqn).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _alone(
    module: nn.Module, settings: UnitSettings | None, args: Any, kwargs: Any, rng: Tensor, amp: Any
) -> tuple[dict[str, Tensor], int]:
    """One forward and backward of a unit from given inputs; gradients of inputs and parameters, buffers after."""
    leaves = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    for t in leaves:
        t.grad = None
    count = 0

    def replayed() -> None:
        nonlocal count
        count += 1

    torch.set_rng_state(rng)
    with torch.autocast(amp[0], amp[1], enabled=amp[2]):
        call = type(module).forward.__get__(module)
        out = (
            call(*args, **kwargs)
            if settings is None
            else run_unit(call, module, settings, args, kwargs, on_recompute=replayed)
        )
    outs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor) and t.requires_grad]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(t.shape, generator=generator).to(t) for t in outs]
    torch.autograd.backward(outs, grads)
    result = {f"gradient of input {i}": t.grad for i, t in enumerate(leaves) if t.grad is not None}
    result |= {f"gradient of {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    result |= {f"buffer {n}": b for n, b in module.named_buffers()}
    return {n: t.detach().to("cpu", copy=True) for n, t in result.items()}, count
