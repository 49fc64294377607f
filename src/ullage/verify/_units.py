"""Unit by unit: where the plain step does not fit, each unit is compared alone, from the same inputs and gradients.

One planned step is run to see the inputs of every unit, which are copied to host memory. Each unit is then run forward
and backward from them: plain twice, and once as the plan has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ullage._torch import tree_flatten, tree_map
from ullage.apply import apply_plan
from ullage.measure._state import preserved
from ullage.mechanisms import Sites, UnitSettings
from ullage.planner import Plan
from ullage.verify._compare import compare
from ullage.workload import Instance, run_step


@dataclass
class UnitResults:
    """(name, largest difference) of tensors the plan changes and of those that differ without it, and counts."""

    differences: list[tuple[str, float]] = field(default_factory=list)
    unstable: list[tuple[str, float]] = field(default_factory=list)
    compared: int = 0
    replays: int = 0


@dataclass(frozen=True)
class _Entry:
    """A unit's first call: its inputs in host memory (and where they were), generators, autocast."""

    args: Any
    kwargs: Any
    devices: list[torch.device]
    cpu_rng: Tensor
    cuda_rng: Tensor | None
    device: torch.device
    autocast: tuple[bool, torch.dtype]


def verify_units(inst: Instance, plan: Plan, say: Callable[[str], None] = lambda _: None) -> UnitResults:
    """Compare each planned unit with its plain forward and backward."""
    results = UnitResults()
    planned = {d.unit: d.settings() for d in plan.decisions if not d.settings().option.is_plain}
    say("running a planned step for the inputs of its units")
    with apply_plan(plan, inst.model), preserved(inst), _entries(inst, list(planned)) as entries:
        run_step(inst)
    for fqn, settings in planned.items():
        say(f"comparing {fqn}")
        entry = entries.pop(fqn, None)
        if entry is None:
            results.differences.append((f"{fqn}: its forward was not called", float("nan")))
            continue
        module = inst.model.get_submodule(fqn)
        runs = []
        for option in (None, None, settings):
            with preserved(inst):
                tensors, replays = _alone(module, option, entry)
            runs.append({f"{fqn}: {n}": t for n, t in tensors.items()})
            results.replays += replays
        results.compared += len(runs[0])
        results.unstable += compare(runs[0], runs[1])
        results.differences += compare(runs[0], runs[2])
    return results


@contextlib.contextmanager
def _entries(inst: Instance, fqns: list[str]) -> Iterator[dict[str, _Entry]]:
    """Note the first call of each of these modules."""
    seen: dict[str, _Entry] = {}
    device = inst.device

    def host(t: Any) -> Any:
        return t.detach().to("cpu", copy=True).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t

    def watch(fqn: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            if fqn in seen or not torch.is_grad_enabled():
                return
            kind = device.type
            seen[fqn] = _Entry(
                tree_map(host, args),
                tree_map(host, kwargs),
                [t.device for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)],
                torch.get_rng_state(),
                torch.cuda.get_rng_state(device) if kind == "cuda" else None,
                device,
                (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
            )

        return inst.model.get_submodule(fqn).register_forward_pre_hook(note, with_kwargs=True)

    handles = [watch(f) for f in fqns]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _alone(module: nn.Module, settings: UnitSettings | None, entry: _Entry) -> tuple[dict[str, Tensor], int]:
    """One forward and backward of a unit from given inputs: outputs, gradients of inputs and parameters, buffers after."""
    leaves: list[Tensor] = []
    count = 0

    def replayed() -> None:
        nonlocal count
        count += 1

    def fresh(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        leaf = t.detach().to(entry.devices[len(leaves)], copy=True).requires_grad_(t.requires_grad)
        leaves.append(leaf)
        return leaf.clone()  # a unit may write to its input, which a leaf would refuse

    args, kwargs = tree_map(fresh, (entry.args, entry.kwargs))
    torch.set_rng_state(entry.cpu_rng)
    if entry.cuda_rng is not None:
        torch.cuda.set_rng_state(entry.cuda_rng, entry.device)
    enabled, dtype = entry.autocast
    with torch.autocast(entry.device.type, dtype, enabled=enabled):
        call = module.forward
        if settings is None:
            out = call(*args, **kwargs)
        else:
            out = settings.run(Sites().site("", module, settings), call, args, kwargs, replayed)
    outs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
    result = {f"output {i}": t.detach().to("cpu", copy=True) for i, t in enumerate(outs)}
    outs = [t for t in outs if t.requires_grad]
    generator = torch.Generator().manual_seed(0)
    torch.autograd.backward(outs, [torch.randn(t.shape, generator=generator).to(t) for t in outs])
    result |= {f"gradient of input {i}": t.grad for i, t in enumerate(leaves) if t.grad is not None}
    result |= {f"gradient of {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    result |= {f"buffer {n}": b for n, b in module.named_buffers()}
    return {n: t.detach().to("cpu", copy=True) for n, t in result.items()}, count
