"""Run one unit's forward under an option, on `torch.utils.checkpoint` (non-reentrant).

torch restores RNG, autocast and grad mode for the replay; buffers the forward changes (BatchNorm statistics, counters)
are put back here: the replay sees the values its forward saw on entry, and the values just before the replay return
afterwards, without version bumps (BatchNorm's backward has saved those buffers).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ullage.mechanisms._options import Option, SavePolicy

_local = threading.local()


def is_recomputing() -> bool:
    """True while ullage re-runs a unit's forward during backward."""
    return getattr(_local, "depth", 0) > 0


@dataclass(frozen=True)
class UnitSettings:
    """What running a unit needs beside its option.

    Attributes:
        option: what to do.
        buffers: names, below the unit, of the buffers its forward changes.
        keeps_routing: the unit has routing or index outputs (topk, sort, ...), which are always kept.
    """

    option: Option
    buffers: tuple[str, ...] = ()
    keeps_routing: bool = False


def run_unit(
    call: Callable[..., Any],
    module: nn.Module,
    settings: UnitSettings,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    on_recompute: Callable[[], None] | None = None,
) -> Any:
    """Call `call(*args, **kwargs)` so that its activations are treated as the option says."""
    if settings.option.action == "keep":
        return call(*args, **kwargs)
    buffers = [module.get_buffer(name) for name in settings.buffers]
    entry = [b.detach().clone() for b in buffers]
    forward_done = False

    def body(*a: Any, **k: Any) -> Any:
        nonlocal forward_done
        if not forward_done:
            forward_done = True
            return call(*a, **k)
        if on_recompute is not None:
            on_recompute()
        return _replay(functools.partial(call, *a, **k), buffers, entry)

    extra: dict[str, Any] = {}
    if settings.option.action == "select" or settings.keeps_routing:
        extra["context_fn"] = functools.partial(_contexts, settings.option)
    return checkpoint(body, *args, use_reentrant=False, preserve_rng_state=True, **extra, **kwargs)


def _contexts(option: Option) -> Any:
    return create_selective_checkpoint_contexts(SavePolicy(option))


def _replay(call: Callable[[], Any], buffers: list[Tensor], entry: list[Tensor]) -> Any:
    now = [b.detach().clone() for b in buffers]
    _set(buffers, entry)
    _local.depth = getattr(_local, "depth", 0) + 1
    try:
        return call()
    finally:  # early stop leaves by an exception
        _local.depth -= 1
        _set(buffers, now)


def _set(buffers: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(buffers, values, strict=True):
            buffer.data.copy_(value)  # .data: a version counter of its own, so backward's saved buffers stay valid
