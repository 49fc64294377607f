"""Targets for losses that take `(output, target)`, as torch's do: the items of a batch that do not go to the model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ullage._errors import WorkloadError
from ullage.workload._batch import without_surplus

_NAMES = ("labels", "label", "targets", "target", "y")


def takes_targets(loss: Callable[..., Any]) -> bool:
    """Is it a loss module, or a function of `torch.nn.functional`? One whose second argument is called `batch` gets the batch."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    if not isinstance(loss, nn.Module):
        return getattr(loss, "__module__", None) == "torch.nn.functional"
    return "batch" not in list(inspect.signature(loss.forward).parameters)[1:2]


def targets_of(model: nn.Module, batch: Any, inputs: Any, loss: Callable[..., Any]) -> list[Any]:
    """The arguments after the output: what `forward` has no argument for; of a dict, its tensors, or the one that is called labels.

    Raises:
        WorkloadError: which item is the target can't be known.
    """
    if isinstance(batch, Tensor):  # an autoencoder's
        return [batch]
    if isinstance(batch, Mapping):
        left = dict(batch) if inputs is not None else without_surplus(model, (), dict(batch))[3]
        tensors = {k: v for k, v in left.items() if isinstance(v, Tensor)}
        named = [tensors[n] for n in _NAMES if n in tensors]
        if len(tensors) == 1 or named:
            return named[:1] or list(tensors.values())
    elif isinstance(batch, list | tuple):
        rest = list(batch[1:]) if inputs is not None else list(without_surplus(model, tuple(batch), {})[2])
        if rest:
            return rest
    name = type(loss).__name__ if isinstance(loss, nn.Module) else getattr(loss, "__name__", repr(loss))
    raise WorkloadError(
        f"loss: {name} takes an output and its target, and no item of the batch is left for it: "
        f"{type(model).__name__}.forward({', '.join(inspect.signature(model.forward).parameters)}) is called on the batch. "
        "inputs=callable(batch) returns the arguments of the model (inputs=lambda batch: batch[0]), or give loss=lambda output, batch: ..."
    )
