"""Take batches apart and call a model on them: loaders give tensors, lists, dicts, named tuples and objects."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ullage._errors import WorkloadError
from ullage.runtime.state._walk import CONTAINERS, slots_of

_TARGETS = ("labels", "label", "targets", "target", "y")
_ATOMS = (int, float, complex, str, bytes, type(None), type, nn.Module)


def tensors_of(batch: Any) -> list[Tensor]:
    """Every tensor in a batch, each once, in one order for a batch and its copy: in containers and in attributes of objects."""
    found: list[Tensor] = []
    seen: dict[int, Any] = {}  # holds them, so that an id stays one thing's
    todo = [batch]
    while todo:
        value = todo.pop()
        if isinstance(value, _ATOMS) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            found.append(value)
        else:
            todo += reversed(_parts(value))
    return found


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, CONTAINERS):
        return list(value)
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, n, None) for n in slots_of(type(value)))]


def check_batch(batch: Any, step: Any) -> None:
    """Raise WorkloadError unless this is one micro-batch. A step of one's own may take any object."""
    got = f"got {type(batch).__name__}"
    if isinstance(batch, DataLoader | Dataset) or hasattr(batch, "__next__"):
        raise WorkloadError(f"batch: expected one micro-batch, {got}; give next(iter(loader))")
    if step is None and not tensors_of(batch):
        raise WorkloadError(
            f"batch: expected a tensor, or a list, tuple, dict or object that holds some, {got} without any"
        )


def call_on(model: nn.Module, batch: Any, for_loss: bool) -> Any:
    """Call the model: items of a list or tuple are positional, those of a mapping keywords, anything else is the one argument.

    Args:
        model: what is called.
        batch: one micro-batch.
        for_loss: a loss gets the whole batch too, so what `forward` has no argument for is the loss's alone.

    Raises:
        WorkloadError: the items are not the arguments of `forward`.
    """
    is_mapping = isinstance(batch, Mapping)
    if not is_mapping and not isinstance(batch, list | tuple):
        return model(batch)
    args, kwargs = ((), dict(batch)) if is_mapping else (tuple(batch), {})
    if all(_is_ours(hook) for hook in model._forward_pre_hooks.values()):  # another may make other arguments of these
        args, kwargs = _taken(model, args, kwargs, for_loss)
    return model(*args, **kwargs)


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("ullage.")


def _taken(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], for_loss: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    signature = _signature(model.forward)
    if signature is None:
        return args, kwargs
    given = args, kwargs
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        if for_loss:
            args, kwargs = without_surplus(model, args, kwargs)[:2]
            if _binds(signature, args, kwargs):
                return args, kwargs
        form = "*batch" if given[0] else "**batch"
        raise WorkloadError(
            f"batch: the model is called as model({form}), which {type(model).__name__}.forward({', '.join(signature.parameters)}) does not take: {error}. "
            "With loss=callable(output, batch) what forward has no argument for goes to the loss alone; inputs=callable(batch) returns the arguments of the model; "
            "step=callable(model, batch) calls the model its own way"
        ) from error
    return args, kwargs


def without_surplus(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that `forward` has names for, and those that it has none for."""
    signature = _signature(model.forward)
    if signature is None:
        return args, kwargs, (), {}
    by = signature.parameters.values()
    positional = [p for p in by if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = {p.name for p in by if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    kinds = {p.kind for p in by}
    most = len(args) if inspect.Parameter.VAR_POSITIONAL in kinds else len(positional)
    takes = {k for k in kwargs if k in named or inspect.Parameter.VAR_KEYWORD in kinds}
    left = {k: v for k, v in kwargs.items() if k not in takes}
    return args[:most], {k: v for k, v in kwargs.items() if k in takes}, args[most:], left


def _binds(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _signature(forward: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(forward)
    except (TypeError, ValueError):  # a callable without a signature
        return None


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
        named = [tensors[n] for n in _TARGETS if n in tensors]
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
