"""Put a unit's planned forward in the place of its own, below every hook and wrapper.

A callable object is stored in the instance's `__dict__`. It knows its module weakly: a model with a plan is freed as
soon as a plain one would be, without a garbage collection. Copies must be plain models with their own weights, so the
instance also gets a `__reduce_ex__` that leaves both entries out: `copy.deepcopy`, `pickle` and `torch.save` ask it.
"""

from __future__ import annotations

import copy
import functools
import os
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ullage._errors import ApplyError
from ullage.mechanisms import UnitSettings
from ullage.runtime import Apart, Site

_MISSING = object()
_FORWARD, _REDUCE = "forward", "__reduce_ex__"


def disabled() -> bool:
    """Is ULLAGE_DISABLE set? It turns every applied plan off."""
    return os.environ.get("ULLAGE_DISABLE", "") not in ("", "0")


class Unit(Apart):
    """One wrapped module and what happened to it: forwards run under the plan, and replays.

    Args:
        fqn: the module's name in its model.
        module: the module, held weakly.
        settings: what to do with its activations.
        site: what the runtime knows of it.
        observer: a method, held weakly: called with (unit, args, kwargs) at every planned forward.
    """

    def __init__(
        self,
        fqn: str,
        module: nn.Module,
        settings: UnitSettings,
        site: Site,
        observer: Callable[[Unit, Any, Any], None] | None = None,
    ) -> None:
        self.fqn, self.settings, self.site = fqn, settings, site
        # weakly: who observes has the units, and a file of a plan goes when its handle does
        self.observer = weakref.WeakMethod(observer) if observer is not None else None
        self.owner = weakref.ref(module)
        self.active = True
        self.fired = self.recomputed = self.larger = 0

    def count_replay(self) -> None:
        """One more replay."""
        self.recomputed += 1

    def run(self, plain: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The planned forward."""
        self.fired += 1
        observe = self.observer() if self.observer is not None else None
        if observe is not None:
            observe(self, args, kwargs)
        return self.settings.run(self.site, plain, args, kwargs, self.count_replay)


class PlannedForward(Apart):
    """Stands in for `module.forward` under a plan."""

    def __init__(self, unit: Unit, module: nn.Module) -> None:
        self.unit = unit
        self.previous = module.__dict__.get(_FORWARD, _MISSING)
        for name in ("__name__", "__qualname__", "__doc__"):
            setattr(self, name, getattr(self.plain(module), name, None))

    def plain(self, module: nn.Module) -> Callable[..., Any]:
        """The forward this one replaces."""
        if self.previous is _MISSING:
            return types.MethodType(type(module).forward, module)
        return self.previous  # type: ignore[no-any-return]

    def _module(self) -> nn.Module:
        module = self.unit.owner()
        if module is None:
            raise ApplyError(f"{self.unit.fqn}: this forward's model is gone; keep the model, not only its forward")
        return module

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The plain forward: `inspect.signature` shows that one's."""
        return self.plain(self._module())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._compiled(args, kwargs)
        module, unit = self._module(), self.unit
        plain = self.plain(module)
        if not torch.is_grad_enabled() or not unit.active or disabled():
            return plain(*args, **kwargs)
        return unit.run(plain, module, args, kwargs)

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the unit in a form that Dynamo traces as one graph; a plan's bytes are not promised there."""
        module, unit, plain = self._module(), self.unit, self.previous
        if plain is _MISSING:
            plain = functools.partial(type(module).forward, module)
        if not torch.is_grad_enabled() or not unit.active or disabled():
            return plain(*args, **kwargs)
        option = unit.settings.option
        return option.mechanism.traced(option, plain, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Only for a module that copies its `__dict__` by itself, past `__reduce_ex__`: the copy's own forward."""
        if self.previous is not _MISSING:
            return copy.deepcopy(self.previous, memo)
        twin = memo[id(self._module())]
        return types.MethodType(type(twin).forward, twin)


class _Reduce(Apart):
    """Stands in for `module.__reduce_ex__` under a plan: the module's own, without our entries."""

    def __init__(self, planned: PlannedForward) -> None:
        self.planned = planned

    def __call__(self, protocol: Any) -> Any:
        module = self.planned._module()
        reduced: Any = type(module).__reduce_ex__(module, protocol)
        function, arguments, *rest = reduced
        return (function, tuple(map(self._without, arguments)), *map(self._without, rest))

    def _without(self, value: Any) -> Any:
        if isinstance(value, tuple):  # (dict, slots)
            return tuple(map(self._without, value))
        if not isinstance(value, dict) or value.get(_FORWARD) is not self.planned:
            return value
        kept = {k: v for k, v in value.items() if k not in (_FORWARD, _REDUCE)}
        return kept if self.planned.previous is _MISSING else {**kept, _FORWARD: self.planned.previous}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self.planned._module())]
        return types.MethodType(type(twin).__reduce_ex__, twin)


def install(unit: Unit, module: nn.Module) -> None:
    """Make `module.forward` the unit's."""
    planned = PlannedForward(unit, module)
    module.__dict__[_FORWARD] = planned
    module.__dict__[_REDUCE] = _Reduce(planned)


def installed(module: nn.Module) -> Unit | None:
    """The unit that wraps this module, or None."""
    planned = module.__dict__.get(_FORWARD)
    if isinstance(planned, PlannedForward) and planned.unit.owner() is module:
        return planned.unit
    return None


def uninstall(module: nn.Module) -> None:
    """Put back the very forward that was there; one that was put over ours since then stays."""
    for name in (_FORWARD, _REDUCE):
        ours = module.__dict__.get(name)
        planned = ours.planned if isinstance(ours, _Reduce) else ours
        if not isinstance(planned, PlannedForward) or planned.unit.owner() is not module:
            continue
        planned.unit.active = False
        if name == _REDUCE or planned.previous is _MISSING:
            del module.__dict__[name]
        else:
            module.__dict__[name] = planned.previous
