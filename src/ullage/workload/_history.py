"""The history of `torch.optim.LBFGS`: it grows for many steps, until it is full."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# of each iteration it holds two differences as large as all parameters, and two numbers
_LARGE, _NUMBERS = ("old_dirs", "old_stps"), ("ro", "al")


def history(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of the optimizer's history so far; none of another kind of optimizer."""
    return [t for name in (*_LARGE, *_NUMBERS) for t in _held(optimizer, name)]


def _held(optimizer: torch.optim.Optimizer, name: str) -> list[Tensor]:
    states: list[dict[str, Any]] = list(optimizer.state.values()) if isinstance(optimizer, torch.optim.LBFGS) else []
    return [t for s in states for t in s.get(name) or () if isinstance(t, Tensor)]


def missing_history(optimizer: torch.optim.Optimizer, round_bytes: int = 1) -> int:
    """Return the bytes by which the history grows until it is full, each tensor rounded up to a multiple of `round_bytes`.

    Two more differences are counted: the newest, which are made while the history still holds the oldest.
    """
    if not isinstance(optimizer, torch.optim.LBFGS):
        return 0
    group = optimizer.param_groups[0]
    numel = sum(p.numel() * (2 if p.is_complex() else 1) for p in group["params"])
    element = max((p.element_size() for p in group["params"]), default=0)
    sizes = {**dict.fromkeys(_LARGE, numel * element), **dict.fromkeys(_NUMBERS, element)}
    missing = {name: int(group["history_size"]) - len(_held(optimizer, name)) for name in sizes}
    if missing[_LARGE[0]] > 0:
        missing |= {name: missing[name] + 1 for name in _LARGE}
    return sum(missing[name] * -(-size // round_bytes) * round_bytes for name, size in sizes.items())
