"""Objects that a step reaches from its model, optimizer, batch, loss and step, as the runtime's walker finds them.

There are two sets: the objects that are copied with a workload, whose tensors exist before a step begins; and all objects that a step
can change, which are more: globals that methods load, attributes of classes, plain objects among globals.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ullage.runtime.state._classes import classes_in
from ullage.runtime.state._traverse import hooks_of, traverse, with_classes
from ullage.workload import Instance, Workload, copied_parts

MOST_NODES = 2_000_000  # a walk goes through data in memory, too; a bound against one that never ends


def _roots(inst: Instance | Workload) -> list[Any]:
    return [inst.model, inst.optimizer, inst.batch, inst.loss, inst.step, inst.inputs]


def _with_attributes(obj: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield the children of an object with its class, the hooks that backward runs, and attributes that the user set on a tensor."""
    yield from with_classes(obj)
    yield from hooks_of(obj)
    if isinstance(obj, Tensor):
        for name, value in vars(obj).items():
            yield ("a", name), name, value


def all_a_step_reaches(inst: Instance) -> Iterator[Any]:
    """Everything that a step of this instance can change, classes included."""
    return (obj for obj, _ in traverse(_roots(inst), {}, _with_attributes, classes=True, most=MOST_NODES))


def copied_with(inst: Instance | Workload) -> list[Any]:
    """Parts of a workload: they are copied where it is captured, and counted where it is measured."""
    return [obj for obj, _ in traverse(_roots(inst), {}, copied_parts, most=MOST_NODES)]


def copied_tensors(inst: Instance | Workload) -> list[Tensor]:
    """Its tensors: a teacher in the loss's closure, class weights."""
    return [obj for obj in copied_with(inst) if isinstance(obj, Tensor)]


def shared_tensors(inst: Instance) -> list[Tensor]:
    """Return tensors that are class attributes of the objects copied with a workload: constants of a trainer's class."""
    classes = {cls for obj in copied_with(inst) if not isinstance(obj, Tensor) for cls in classes_in(obj)}
    found = [v for cls in classes for part in cls.__mro__ for v in vars(part).values() if isinstance(v, Tensor)]
    return list({id(t): t for t in found}.values())


def optimizers_of(inst: Instance | Workload) -> list[torch.optim.Optimizer]:
    """The optimizer, or those that a step reaches its own way."""
    return [obj for obj in copied_with(inst) if isinstance(obj, torch.optim.Optimizer)]
