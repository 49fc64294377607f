"""Put a unit's planned forward in the place of its own, below every hook and wrapper.

A bound method is stored in the instance's `__dict__`: `copy.deepcopy` binds it to the copy, `pickle` reduces it to
"the attribute `forward`"; either way the copy finds that it is not the unit's owner and runs its class's forward.
"""

from __future__ import annotations

import functools
import os
import types
import weakref
from typing import Any

import torch
from torch import nn

from ullage.mechanisms import UnitSettings, run_unit

_MISSING = object()


def disabled() -> bool:
    """Is ULLAGE_DISABLE set? It turns every applied plan off."""
    return os.environ.get("ULLAGE_DISABLE", "") not in ("", "0")


class Unit:
    """One wrapped module and what happened to it: forwards run under the plan, and replays."""

    def __init__(self, fqn: str, module: nn.Module, settings: UnitSettings, observer: Any = None) -> None:
        self.fqn, self.settings, self.observer = fqn, settings, observer
        self.owner = weakref.ref(module)
        self.previous = module.__dict__.get("forward", _MISSING)
        self.fired = self.recomputed = 0

    def plain(self, module: nn.Module) -> Any:
        """The forward this unit replaces."""
        return functools.partial(type(module).forward, module) if self.previous is _MISSING else self.previous

    def count_replay(self) -> None:
        """One more replay."""
        self.recomputed += 1

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The planned forward."""
        self.fired += 1
        if self.observer is not None:
            self.observer(self, args, kwargs)
        return run_unit(self.plain(module), module, self.settings, args, kwargs, self.fqn, self.count_replay)


def install(unit: Unit, module: nn.Module) -> None:
    """Make `module.forward` the unit's."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if unit.owner() is not self:
            return type(self).forward(self, *args, **kwargs)
        if not torch.is_grad_enabled() or disabled():
            return unit.plain(self)(*args, **kwargs)
        return unit.run(self, args, kwargs)

    forward.__wrapped__ = type(module).forward  # type: ignore[attr-defined]  # the signature others inspect
    forward._ullage_unit = unit  # type: ignore[attr-defined]
    module.__dict__["forward"] = types.MethodType(forward, module)


def installed(module: nn.Module) -> Unit | None:
    """The unit that wraps this module, or None."""
    unit: Unit | None = getattr(module.__dict__.get("forward"), "_ullage_unit", None)
    return unit if unit is not None and unit.owner() is module else None


def uninstall(module: nn.Module) -> None:
    """Put back the very forward that was there."""
    unit = installed(module)
    if unit is None:
        return
    if unit.previous is _MISSING:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = unit.previous
