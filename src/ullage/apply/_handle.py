"""Apply a plan to a model; the handle undoes it and reports what happened."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ullage._bytes import format_bytes
from ullage._errors import ApplyError, UllageWarning
from ullage.apply._existing import refuse_existing
from ullage.apply._wrap import Unit, disabled, install, installed, uninstall

if TYPE_CHECKING:
    from ullage.planner._plan import Plan


@dataclass(frozen=True)
class UnitReport:
    """One unit: its action, how often its planned forward ran and was replayed, bytes the plan frees there."""

    fqn: str
    action: str
    fired: int
    recomputed: int
    planned_bytes_freed: int
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Planned beside observed."""

    units: tuple[UnitReport, ...]
    planned_peak_bytes: int
    budget_bytes: int | None
    larger_batches: int

    def __str__(self) -> str:
        lines = [
            f"planned peak {format_bytes(self.planned_peak_bytes)}; forwards beyond the planned shape: {self.larger_batches}"
        ]
        width = max((len(u.fqn) for u in self.units), default=4)
        lines += [
            f"{u.fqn:<{width}}  {u.action:<28} fired {u.fired:>6}  recomputed {u.recomputed:>6}  frees {format_bytes(u.planned_bytes_freed)}  {u.note}"
            for u in self.units
        ]
        return "\n".join(lines)


class Handle:
    """A plan in force. `remove()` undoes it; also a context manager."""

    def __init__(self, plan: Plan, model: nn.Module, units: list[Unit]) -> None:
        self.plan = plan
        self._model = weakref.ref(model)
        self._units = units
        self._larger = 0
        self.active = True

    def remove(self) -> None:
        """Put every forward back (no-op the second time)."""
        for unit in self._units:
            module = unit.owner()
            if module is not None and installed(module) is unit:
                uninstall(module)
        self.active = False

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def report(self) -> Report:
        """What the plan said and what was seen so far."""
        by_fqn = {u.fqn: u for u in self._units}
        rows = []
        for d in self.plan.decisions:
            unit = by_fqn.get(d.unit)
            fired, again = (unit.fired, unit.recomputed) if unit else (0, 0)
            note = "never ran under the plan" if unit and not fired else ""
            rows.append(UnitReport(d.unit, d.action, fired, again, d.bytes_freed, note))
        return Report(tuple(rows), self.plan.predicted.peak_bytes, self.plan.budget_bytes, self._larger)

    def observe(self, unit: Unit, args: Any, kwargs: Any) -> None:
        """Called at each planned forward: a larger input than planned is said once."""
        planned = next(d.input_elements for d in self.plan.decisions if d.unit == unit.fqn)
        # positional ones, as in the capture, whose hook does not see keywords
        elements = sum(t.numel() for t in tree_flatten(args)[0] if isinstance(t, Tensor))
        if elements <= planned:
            return
        self._larger += 1
        if self._larger == 1 and self.plan.budget_bytes is not None:
            growth = elements / max(planned, 1)
            if self.plan.predicted.peak_bytes * growth > self.plan.budget_bytes:
                warnings.warn(
                    f"{unit.fqn}: its input is {growth:.2f} times the planned one; results stay exact, but the budget of "
                    f"{format_bytes(self.plan.budget_bytes)} is at risk: plan again for this shape",
                    UllageWarning,
                    stacklevel=3,
                )


def apply_plan(plan: Plan, model: nn.Module) -> Handle:
    """Wrap the plan's units in place.

    Raises:
        PlanMismatch: the model is not the one that was planned.
        ApplyError: a plan is applied already.
        AlreadyCheckpointed: the model recomputes by itself.
    """
    taken = next((n for n, m in model.named_modules() if installed(m) is not None), None)
    if taken is not None:
        raise ApplyError(f"a plan is applied to this model already (module {taken!r}); call handle.remove() first")
    refuse_existing(model)
    plan.check_model(model)
    units: list[Unit] = []
    handle = Handle(plan, model, units)
    if disabled():
        return handle
    for decision in plan.decisions:
        settings = decision.settings()
        if settings.option.action == "keep":
            continue
        module = model.get_submodule(decision.unit)
        unit = Unit(decision.unit, module, settings, handle.observe)
        install(unit, module)
        units.append(unit)
    return handle
