"""What a step can change: everything stateful that is reachable from its model, optimizer, batch, loss and step.

Followed: modules, optimizers, schedulers, scalers and the object a bound step belongs to, through all their attributes;
built-in containers; closures, defaults and globals of functions. Not followed: attributes of any other object.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ullage.workload import Instance, Workload, tensors_of

STATEFUL = (nn.Module, torch.optim.Optimizer, torch.amp.GradScaler, torch.optim.lr_scheduler.LRScheduler)
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
_ATOMS = (int, float, complex, str, bytes, bool, type(None), type, types.ModuleType, torch.dtype, torch.device)


@dataclass
class Reach:
    """Distinct things found, in order."""

    objects: list[Any] = field(default_factory=list)
    containers: list[Any] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    generators: list[torch.Generator] = field(default_factory=list)
    _seen: dict[int, Any] = field(default_factory=dict)  # holds them, so that an id stays one thing's

    def follow(self, root: Any, owned: bool = False) -> None:
        """Add everything reachable from `root`; `owned`: look into it whatever its class."""
        todo = [(root, owned)]
        while todo:
            value, owned = todo.pop()
            if isinstance(value, _ATOMS) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            todo += [(v, o) for v, o in reversed(self._parts(value, owned))]

    def _parts(self, value: Any, owned: bool) -> list[tuple[Any, bool]]:
        if isinstance(value, Tensor):
            self.tensors.append(value)
            hooks = (value._backward_hooks, getattr(value, "_post_accumulate_grad_hooks", None))
            return [(h, False) for group in hooks if group for h in group.values()]
        if isinstance(value, torch.Generator):
            self.generators.append(value)
            return []
        if type(value) in _CONTAINERS:
            self.containers.append(value)
            return [(v, False) for v in (value.values() if isinstance(value, dict) else value)]
        if isinstance(value, tuple | dict):  # cannot be restored in place, or is not safe to
            return [(v, False) for v in (value.values() if isinstance(value, dict) else value)]
        if isinstance(value, functools.partial):
            return [(value.func, False), (value.args, False), (value.keywords, False)]
        if isinstance(value, types.MethodType):
            return [(value.__self__, True), (value.__func__, False)]
        if isinstance(value, types.FunctionType):
            return [(v, False) for v in _of_function(value)]
        if isinstance(value, STATEFUL) or (owned and hasattr(value, "__dict__")):
            self.objects.append(value)
            return [(v, False) for v in list(vars(value).values())]
        return []


def _of_function(fn: types.FunctionType) -> list[Any]:
    found: list[Any] = []
    for cell in fn.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    found += [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
    for name in _names(fn.__code__):
        value = fn.__globals__.get(name)
        is_foreign = isinstance(value, types.FunctionType) and value.__module__ != fn.__module__
        if not is_foreign:
            found.append(value)
    return found


def _names(code: types.CodeType) -> list[str]:
    inner = [n for c in code.co_consts if isinstance(c, types.CodeType) for n in _names(c)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def reach(inst: Instance | Workload) -> Reach:
    """Everything a step of this instance can change."""
    found = Reach()
    found.follow(inst.model)
    found.follow(inst.optimizer)
    found.follow(inst.batch, owned=True)
    for tensor in tensors_of(inst.batch):  # also those in attributes of objects in it
        found.follow(tensor)
    for fn in (inst.loss, inst.step):
        found.follow(fn, owned=True)
    return found


def optimizers_of(inst: Instance | Workload) -> list[torch.optim.Optimizer]:
    """The optimizer, or those that a step reaches its own way."""
    return [o for o in reach(inst).objects if isinstance(o, torch.optim.Optimizer)]
