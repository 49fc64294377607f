"""The runtime's sites of a model's units, which share what is learnt among units of one structure."""

from __future__ import annotations

import types
from collections.abc import Hashable
from dataclasses import replace
from typing import Any
from weakref import ref

from torch import nn

from ullage.mechanisms._settings import UnitSettings
from ullage.runtime import Learnt, Shared, Site, Tier, Trail, selection_of


class Sites:
    """The sites of one model's units: units of one structure under one setting share their op logs.

    Args:
        explores: many settings will run on the same units; what one call has taught serves all of them without a proof.
        tier: where tensors are offloaded to.
    """

    def __init__(self, explores: bool = False, tier: Tier | None = None) -> None:
        self._explores, self.tier = explores, tier
        self._shared: dict[Hashable, Shared] = {}
        self._logs: dict[Hashable, dict[Hashable, Learnt]] = {}
        self._twins: dict[str, Site] = {}
        self._trail = Trail()

    def site(self, name: str, module: nn.Module, settings: UnitSettings) -> Site:
        """Make a new site."""
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
                rule = settings.runtime_options.rule
                if rule is not None:
                    for signature, learnt in shared.logs.items():
                        shared.know(signature, selection_of(learnt.log, rule), learnt.notes)
        return shared

    def logs_of(self, module: nn.Module) -> dict[Hashable, Learnt]:
        """Return the op logs of calls of modules of this structure, by input signature."""
        return self._logs.get(structure_of(module), {})


def structure_of(module: nn.Module) -> Hashable:
    """Return a key that is equal for modules of the same classes, shapes, dtypes, flags and functions.

    Other attributes (a block's number or name) don't count.
    """
    classes = tuple((n, type(m), _flags_and_functions(m)) for n, m in module.named_modules())
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return classes, tuple((n, type(t), t.shape, t.dtype, t.device, t.requires_grad) for n, t in tensors)


def _flags_and_functions(module: nn.Module) -> Hashable:
    told: list[tuple[str, Any]] = []
    for name, value in vars(module).items():
        if isinstance(value, bool | types.BuiltinFunctionType):
            told.append((name, value))
        elif isinstance(value, types.FunctionType):  # each block may make its own function object of the same code
            told.append((name, value.__code__))
    return tuple(told)
