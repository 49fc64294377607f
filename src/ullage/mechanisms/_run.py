"""Run one unit's forward under an option, on `torch.utils.checkpoint` (non-reentrant).

torch restores its RNG, autocast and grad mode for the replay; Python's and numpy's generators and the buffers that the
forward changes (BatchNorm statistics, counters) are put back here: the replay sees what its forward saw on entry, and
what was there just before the replay returns afterwards, without version bumps (BatchNorm's backward has saved those
buffers). A buffer that is replaced (`self.count = self.count + 1`) is put back as an object.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import (
    _CachedTorchDispatchMode,
    _CachingTorchDispatchMode,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ullage.mechanisms._options import ROUTING, Option, SavePolicy

aten = torch.ops.aten
_local = threading.local()


def is_recomputing() -> bool:
    """True while ullage re-runs a unit's forward during backward."""
    return bool(recomputing_units())


def recomputing_units() -> list[str]:
    """Names of the units this thread is re-running, outermost first."""
    names: list[str] | None = getattr(_local, "units", None)
    if names is None:
        names = _local.units = []
    return names


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
    name: str = "",
    on_recompute: Callable[[], None] | None = None,
) -> Any:
    """Call `call(*args, **kwargs)` so that its activations are treated as the option says.

    Args:
        call: the unit's plain forward.
        module: the unit, whose buffers are put back for a replay.
        settings: what to do.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        name: what `recomputing_units` calls the unit.
        on_recompute: called at the start of every replay.
    """
    if settings.option.action == "keep":
        return call(*args, **kwargs)
    buffers = [module.get_buffer(name) for name in settings.buffers]
    registered = [(m._buffers, dict(m._buffers)) for m in module.modules() if m._buffers]
    replay = _Replay(name, buffers, [b.detach().clone() for b in buffers], registered, on_recompute)
    selective = settings.option.action == "select" or settings.keeps_routing

    def contexts() -> tuple[Any, Any]:
        if not selective:
            return contextlib.nullcontext(), replay
        forward, replay.inner = create_selective_checkpoint_contexts(SavePolicy(settings.option))
        # not made directly: what the two share, and how they are constructed, differs between versions of torch
        forward.__class__, replay.inner.__class__ = _ForwardMode, _ReplayMode
        return forward, replay

    before = host_rng()
    out = checkpoint(call, *args, use_reentrant=False, preserve_rng_state=True, context_fn=contexts, **kwargs)
    if host_rng_moved(before, host_rng()):
        replay.host_rng = before
    return out


def host_rng() -> tuple[Any, Any]:
    """The state of Python's and numpy's generator."""
    return random.getstate(), np.random.get_state()


def host_rng_moved(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    """Did Python's or numpy's generator move?"""
    return a[0] != b[0] or a[1][2:] != b[1][2:] or not np.array_equal(a[1][1], b[1][1])


def _set_host_rng(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])


class _ForwardMode(_CachingTorchDispatchMode):
    """torch's, except that the model gets copies of routing outputs, which it may change (Mixtral normalises topk's)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        return tree_map_only(Tensor, torch.clone, out) if func in ROUTING else out


class _ReplayMode(_CachedTorchDispatchMode):
    """torch's, except that a cast needs no counterpart in the forward.

    Autocast had the weight's cast in its cache there, from an earlier call; a replay starts with an empty cache.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._to_copy.default:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Replay:
    """Around a replay: buffers as they were on entry of the forward; around that, as they are now.

    Outside the selective context, whose dispatch mode would take the copies for ops of the unit.
    """

    def __init__(
        self,
        name: str,
        buffers: list[Tensor],
        entry: list[Tensor],
        registered: list[tuple[dict[str, Any], dict[str, Any]]],
        on_recompute: Callable[[], None] | None,
    ) -> None:
        self.name, self.buffers, self.entry, self.on_recompute = name, buffers, entry, on_recompute
        self.registered = registered  # each module's buffers: the dict, and what was in it on entry
        self.host_rng: tuple[Any, Any] | None = None  # on entry, if the forward drew from it
        self.now: list[Tensor] = []
        self.registered_now: list[dict[str, Any]] = []
        self.host_rng_now: tuple[Any, Any] | None = None
        self.inner: Any = contextlib.nullcontext()

    def __enter__(self) -> None:
        if self.on_recompute is not None:
            self.on_recompute()
        self.now = [b.detach().clone() for b in self.buffers]
        _set(self.buffers, self.entry)
        self.registered_now = [dict(live) for live, _ in self.registered]
        for live, entry in self.registered:
            live.update(entry)
        if self.host_rng is not None:
            self.host_rng_now = host_rng()
            _set_host_rng(self.host_rng)
        recomputing_units().append(self.name)
        self.inner.__enter__()

    def __exit__(self, *exc: Any) -> None:  # early stop leaves by an exception
        self.inner.__exit__(*exc)
        recomputing_units().pop()
        if self.host_rng_now is not None:
            _set_host_rng(self.host_rng_now)
        for (live, _), now in zip(self.registered, self.registered_now, strict=True):
            live.update(now)
        _set(self.buffers, self.now)
        self.now, self.registered_now, self.host_rng_now = [], [], None


def _set(buffers: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(buffers, values, strict=True):
            buffer.data.copy_(value)  # .data: a version counter of its own, so backward's saved buffers stay valid
