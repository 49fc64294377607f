"""Copy a function together with the models, optimizers and scalers it closes over.

`copy.deepcopy` treats functions as atoms, so a step that reaches its optimizer through a closure or a global of its
module would train the original. What this can't reach is caught while capturing: an optimizer that steps real
parameters, or an op on a real parameter, is an error there.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import torch
from torch import nn

_STATEFUL = (nn.Module, torch.Tensor, torch.optim.Optimizer, torch.amp.GradScaler, torch.optim.lr_scheduler.LRScheduler)


def rebind(fn: Any, memo: dict[int, Any]) -> Any:
    """Return `fn` with everything stateful it refers to copied through `memo`."""
    if id(fn) in memo:
        return memo[id(fn)]
    if isinstance(fn, functools.partial):
        arguments = [rebind(a, memo) for a in fn.args]
        return functools.partial(
            rebind(fn.func, memo), *arguments, **{k: rebind(v, memo) for k, v in fn.keywords.items()}
        )
    if isinstance(fn, types.MethodType):
        return types.MethodType(fn.__func__, copy.deepcopy(fn.__self__, memo))
    if not isinstance(fn, types.FunctionType):
        holds = isinstance(fn, (*_STATEFUL, list, tuple, dict)) or (callable(fn) and hasattr(fn, "__dict__"))
        is_code = isinstance(fn, type | types.ModuleType | types.BuiltinFunctionType)
        return copy.deepcopy(fn, memo) if holds and not is_code else fn
    if not (fn.__closure__ or any(isinstance(fn.__globals__.get(n), _STATEFUL) for n in fn.__code__.co_names)):
        return fn
    names = {n: v for n, v in fn.__globals__.items() if isinstance(v, _STATEFUL)}
    scope = {**fn.__globals__, **{n: copy.deepcopy(v, memo) for n, v in names.items()}} if names else fn.__globals__
    cells = tuple(types.CellType() for _ in fn.__closure__ or ())
    new = types.FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, cells or None)
    new.__kwdefaults__ = fn.__kwdefaults__
    memo[id(fn)] = new
    for cell, old in zip(cells, fn.__closure__ or (), strict=True):
        with_value = True
        try:
            value = old.cell_contents
        except ValueError:
            with_value = False
        if with_value:
            cell.cell_contents = rebind(value, memo)
    return new
