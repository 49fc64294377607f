"""Run one unit's forward under an option, on ullage's runtime."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

from torch import nn

from ullage.mechanisms._options import Option
from ullage.runtime import Learnt, Options, Shared, Site, Tier, Trail, run, run_offloaded, select
from ullage.runtime._keep import named_rule


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

    def runtime_options(self) -> Options:
        """What the runtime is told."""
        level = self.option.level if self.option.action == "select" else ""
        rule = named_rule(level, self.keeps_routing) if level or self.keeps_routing else None
        return Options(rule=rule, place=self.option.place)


class Sites:
    """The sites of one model's units: units of one structure under one setting share their op logs.

    Args:
        explores: many settings are tried on the same units: what one call has taught serves all of them, unproven.
        tier: where tensors are offloaded to.
    """

    def __init__(self, explores: bool = False, tier: Tier | None = None) -> None:
        self._explores, self.tier = explores, tier
        self._shared: dict[Hashable, Shared] = {}
        self._logs: dict[Hashable, dict[Hashable, Learnt]] = {}
        self._twins: dict[str, Site] = {}
        self._trail = Trail()

    def site(self, name: str, module: nn.Module, settings: UnitSettings) -> Site:
        """A new site."""
        owner = ref(module)

        def changing() -> set[int]:
            module = owner()
            return {id(module.get_buffer(b)) for b in settings.buffers} if module is not None else set()

        shared = self._shared_by(structure_of(module), replace(settings, option=replace(settings.option, place=None)))
        site = Site(name, shared, changing if settings.buffers else None, self._trail, self.tier)
        if self._explores:
            twin = self._twins.setdefault(name, site)
            site.facts, site.noted = twin.facts, twin.noted
        return site

    def _shared_by(self, structure: Hashable, settings: UnitSettings) -> Shared:
        shared = self._shared.get((structure, settings))
        if shared is None:
            shared = self._shared[structure, settings] = Shared()
            if self._explores:
                shared.logs = self._logs.setdefault(structure, {})
                rule = settings.runtime_options().rule
                if rule is not None:
                    for signature, learnt in shared.logs.items():
                        shared.know(signature, select(learnt.log, rule), learnt.notes)
        return shared

    def logs_of(self, module: nn.Module) -> dict[Hashable, Learnt]:
        """What calls of modules of this structure have taught, by input signature."""
        return self._logs.get(structure_of(module), {})


def structure_of(module: nn.Module) -> Hashable:
    """Equal for modules of the same classes, shapes, dtypes, flags and functions. Numbers and names may differ from block to block."""
    classes = tuple((n, type(m), _flags_and_functions(m)) for n, m in module.named_modules())
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return classes, tuple((n, type(t), t.shape, t.dtype, t.device, t.requires_grad) for n, t in tensors)


def _flags_and_functions(module: nn.Module) -> Hashable:
    told: list[tuple[str, Any]] = []
    for name, value in vars(module).items():
        if isinstance(value, bool | types.BuiltinFunctionType):
            told.append((name, value))
        elif isinstance(value, types.FunctionType):  # made anew in each block, it is the same by its code
            told.append((name, value.__code__))
    return tuple(told)


def run_unit(
    call: Callable[..., Any],
    settings: UnitSettings,
    site: Site,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    on_recompute: Callable[[], None] | None = None,
) -> Any:
    """Call `call(*args, **kwargs)` so that its activations are treated as the option says.

    Args:
        call: the unit's plain forward.
        settings: what to do.
        site: what is known of the unit.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        on_recompute: called at the start of every replay.
    """
    if settings.option.action == "keep":
        return call(*args, **kwargs)
    if settings.option.action == "offload":
        return run_offloaded(site, call, args, kwargs)
    return run(site, settings.runtime_options(), call, args, kwargs, on_recompute)
