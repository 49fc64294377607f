"""Are a planned model's modules in the modes that they were planned in when it runs? Dropout and statistics take memory."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection

from torch import nn

from ullage._errors import PlanMismatch, UllageWarning
from ullage.workload import named, reads_mode


class Modes:
    """Compares, when a plan is applied and at each planned forward, the modes of a unit's modules with the planned ones.

    Modules outside all units are looked at with the first unit. They are known weakly, like a unit's own module.

    Args:
        model: the model.
        units: names of the wrapped units.
        evaluation: the plan's modules in evaluation mode.
        promised: the promise that a different mode puts at risk, for the warning.
    """

    def __init__(self, model: nn.Module, units: list[str], evaluation: Collection[str], promised: str) -> None:
        self.refuses = False  # raise instead of warning, if the caller measures the bytes of the planned step
        self._promised = promised
        self._said: set[str] = set()
        self._names: dict[str, list[str]] = {u: [] for u in units}
        self._modules: dict[str, list[weakref.ref[nn.Module]]] = {u: [] for u in units}
        planned = set(evaluation)
        for name, module in model.named_modules() if units else ():
            if reads_mode(type(module)):
                unit = next((u for u in units if not u or name == u or name.startswith(f"{u}.")), units[0])
                self._names[unit].append(name)
                self._modules[unit].append(weakref.ref(module))
        self._planned = {u: [n not in planned for n in names] for u, names in self._names.items()}

    def look(self, unit: str) -> None:
        """Called at each forward of a unit: each module that trains, and was planned in evaluation mode, is named once.

        The other way round is no risk: in evaluation mode layers save the same or less. Only who asks for the planned step's bytes is refused.
        """
        try:
            now = [r().training for r in self._modules[unit]]  # type: ignore[union-attr]
        except AttributeError:  # a module was replaced
            return
        planned = self._planned[unit]
        if now == planned:
            return
        differ = [(n, a) for n, a, b in zip(self._names[unit], now, planned, strict=True) if a != b]
        if self.refuses:
            text, remedy = _told([n for n, a in differ if a == differ[0][1]], training=differ[0][1])
            raise PlanMismatch(f"{text}, so the bytes are not those of the plan; {remedy}")
        self._warn([n for n, a in differ if a], stacklevel=5)

    def look_at_all(self, model: nn.Module) -> None:
        """Called when a plan is applied to train: warn of modules that train already, or of a model that is still in evaluation mode."""
        modes = [
            (n, module.training, planned)
            for unit, names in self._names.items()
            for n, r, planned in zip(names, self._modules[unit], self._planned[unit], strict=True)
            if (module := r()) is not None
        ]
        self._warn([n for n, now, planned in modes if now and not planned], stacklevel=4)
        still = [n for n, now, planned in modes if not now and not planned]
        if still and not model.training:
            warnings.warn(
                f"{named(still)}: in evaluation mode, as planned; if they train in training mode, {self._promised} is at risk: "
                "call model.train() before planning",
                UllageWarning,
                stacklevel=3,
            )

    def _warn(self, training: list[str], stacklevel: int) -> None:
        new = [n for n in training if n not in self._said]
        if new:
            self._said.update(new)
            text, remedy = _told(new, training=True)
            warnings.warn(
                f"{text}; results stay exact, but {self._promised} is at risk: {remedy}",
                UllageWarning,
                stacklevel=stacklevel,
            )


def _told(names: list[str], training: bool) -> tuple[str, str]:
    mode, before = ("training", "evaluation") if training else ("evaluation", "training")
    now, planned = ("eval", "train") if training else ("train", "eval")
    return (
        f"{named(names)}: in {mode} mode, but planned in {before} mode",
        f"call model.{planned}() before planning, or model.{now}() before this step",
    )
