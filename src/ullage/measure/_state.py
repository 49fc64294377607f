"""Leave things as found: snapshot what a step changes, in host memory, and put it back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ullage.workload import Instance

_STATEFUL = (torch.optim.Optimizer, torch.amp.GradScaler, torch.optim.lr_scheduler.LRScheduler)


@dataclass
class Snapshot:
    """Parameters, buffers, gradients, plain attributes, optimizers and RNG of an instance."""

    tensors: list[tuple[Tensor, Tensor]]
    grads: list[tuple[nn.Parameter, Tensor | None]]
    attributes: list[tuple[nn.Module, dict[str, Any]]]
    hooks: list[tuple[dict[Any, Any], dict[Any, Any]]]
    helpers: list[tuple[Any, dict[str, Any], Any]]
    cpu_rng: Tensor
    cuda_rng: list[Tensor]

    def restore(self) -> None:
        """Put everything back; tensors in place, so that whoever holds them sees it."""
        with torch.no_grad():
            for live, saved in self.tensors:
                live.data.copy_(saved)
        for parameter, grad in self.grads:
            parameter.grad = grad
        for module, attributes in self.attributes:
            for name in set(module.__dict__) - set(attributes):
                del module.__dict__[name]
            module.__dict__.update(attributes)
        for hooks, found in self.hooks:
            hooks.clear()
            hooks.update(found)
        for helper, state, inner in self.helpers:
            if isinstance(helper, torch.optim.Optimizer) and not inner:
                helper.state.clear()
                for group, saved in zip(helper.param_groups, state["param_groups"], strict=True):
                    group.update({k: v for k, v in saved.items() if k != "params"})
            else:
                helper.load_state_dict(copy.deepcopy(state))
        torch.set_rng_state(self.cpu_rng)
        if self.cuda_rng:
            torch.cuda.set_rng_state_all(self.cuda_rng)


def _plain(value: Any) -> bool:
    return not isinstance(value, Tensor | nn.Module)


def helpers_of(inst: Instance) -> list[Any]:
    """The optimizer, and what a step's closure, defaults and globals hold of optimizers, scalers and schedulers."""
    found: list[Any] = [inst.optimizer] if inst.optimizer is not None else []
    fn: Any = inst.step
    fn = getattr(fn, "func", fn)
    values: list[Any] = [c.cell_contents for c in getattr(fn, "__closure__", None) or ()]
    code = getattr(fn, "__code__", None)
    if code is not None:
        values += [fn.__globals__[n] for n in code.co_names if n in fn.__globals__]
    values += list(vars(fn.__self__).values()) if hasattr(fn, "__self__") and hasattr(fn.__self__, "__dict__") else []
    for value in values:
        for v in value if isinstance(value, list | tuple) else [value]:
            if isinstance(v, _STATEFUL) and all(v is not f for f in found):
                found.append(v)
    return found


def snapshot(inst: Instance) -> Snapshot:
    """Take a snapshot; tensors are copied to host memory."""
    tensors = [*inst.model.parameters(), *inst.model.buffers()]
    attributes, hooks = [], []
    for m in inst.model.modules():
        # transformers hooks modules in the first forward and notes that in an attribute: both go, or neither
        tables = [v for k, v in m.__dict__.items() if k.endswith("_hooks") and isinstance(v, dict)]
        hooks += [(v, dict(v)) for v in tables]
        skip = ("_parameters", "_buffers", "_modules", "forward")
        kept = {k: copy.copy(v) if isinstance(v, list | dict | set) else v for k, v in m.__dict__.items()}
        attributes.append((m, {k: (m.__dict__[k] if k in skip or k.startswith("_") else v) for k, v in kept.items()}))
    return Snapshot(
        [(t, t.detach().to("cpu", copy=True)) for t in tensors],
        [(p, p.grad) for p in inst.model.parameters()],
        attributes,
        hooks,
        [(h, copy.deepcopy(h.state_dict()), bool(getattr(h, "state", None))) for h in helpers_of(inst)],
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else [],
    )


@contextlib.contextmanager
def preserved(inst: Instance) -> Iterator[Snapshot]:
    """Snapshot now, restore at the end whatever happens. Gradients are set aside meanwhile."""
    saved = snapshot(inst)
    try:
        for p in inst.model.parameters():
            p.grad = None
        yield saved
    finally:
        saved.restore()
