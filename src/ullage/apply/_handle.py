"""Apply a plan to a model; the handle undoes it and reports what happened."""

from __future__ import annotations

import difflib
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ullage._bytes import format_bytes, format_seconds
from ullage._errors import ApplyError, PlanMismatch, UllageWarning
from ullage._torch import tell, tree_flatten
from ullage.apply._existing import refuse_existing
from ullage.apply._modes import Modes
from ullage.apply._open import open_store
from ullage.apply._protocols import PlanToApply
from ullage.apply._wrap import Unit, disabled, install, installed, uninstall
from ullage.mechanisms import Sites, UnitSettings
from ullage.offload import DiskStore, HostStore, Stats
from ullage.runtime import Tier


@dataclass(frozen=True)
class UnitReport:
    """One unit: its action, how often its planned forward ran and was replayed, bytes the plan frees there.

    `skipped_ops`: ops that its selective replays did not run; `stale_logs`: how often one had to be rebuilt in full
    because the op log was of another call. `sent_bytes` were offloaded, in all; for `late_prefetches` of the tensors brought back,
    backward had to wait although it was asked for ahead. `note` says what else happened, e.g. why nothing is skipped.
    """

    fqn: str
    action: str
    fired: int
    recomputed: int
    planned_bytes_freed: int
    skipped_ops: int = 0
    stale_logs: int = 0
    note: str = ""
    sent_bytes: int = 0
    late_prefetches: int = 0


@dataclass(frozen=True)
class HandleReport:
    """Observed numbers of an applied plan, beside the predicted ones.

    Attributes:
        units: a `UnitReport` per unit: its action, how often its forward ran and was replayed, and bytes freed.
        planned_peak_bytes: bytes of the plan's predicted peak.
        observed_peak_bytes: most bytes that torch has allocated on the model's CUDA device since its statistics were last reset; None
            on a CPU, which keeps no such record (`ullage.measure` makes one).
        budget_bytes: bytes of the plan's budget, or None.
        larger_batches: batches with more elements than planned, as the unit that met most of them counts.
        store: counts of the store of offloaded tensors; None if the plan offloads nothing.
        tier: "host", "disk" or "".
        endurance: bytes that the plan writes to a disk per step and per day, in a sentence; "" without one.
        transfers_slower: how many times as long as simulated transfers took, by the seconds that steps have waited for them; at
            least 1. `plan(feedback=)` takes it into account.
        checksums: whether each read was compared with what was written; one that differs raises `OffloadError`.
    """

    units: tuple[UnitReport, ...]
    planned_peak_bytes: int
    observed_peak_bytes: int | None
    budget_bytes: int | None
    larger_batches: int
    store: Stats | None = None
    tier: str = ""
    endurance: str = ""
    transfers_slower: float = 1.0
    checksums: bool = False

    def __str__(self) -> str:
        seen = self.observed_peak_bytes
        observed = f", observed {format_bytes(seen)}" if seen is not None else ""
        lines = [
            f"planned peak {format_bytes(self.planned_peak_bytes)}{observed}; batches larger than planned: {self.larger_batches}"
        ]
        if self.store is not None:
            slower = f"transfers {self.transfers_slower:.2f} times as long as simulated" if self.store.writes else ""
            compared = f"checksums of all {self.store.reads} reads agree" if self.checksums else ""
            parts = [f"{self.tier}: {_said(self.store)}", compared, slower, self.endurance]
            lines.append("; ".join(filter(None, parts)))
        width = max((len(u.fqn) for u in self.units), default=4)
        lines += [
            f"{u.fqn:<{width}}  {u.action:<28} fired {u.fired:>6}  recomputed {u.recomputed:>6}  skipped ops {u.skipped_ops:>7}  frees {format_bytes(u.planned_bytes_freed)}  {u.note}"
            for u in self.units
        ]
        return "\n".join(lines)


def _said(s: Stats) -> str:
    moved = f"{format_bytes(s.bytes_written)} written, {format_bytes(s.bytes_read)} read back, {format_bytes(s.forwarded_bytes)} taken on its way out"
    waits = f"{format_seconds(s.stalled_write_seconds)} waited for writes, {format_seconds(s.stalled_read_seconds)} for reads"
    return f"{moved}; {waits}; late {s.late_prefetches} of {s.reads} reads"


def _slower(plan: PlanToApply, seen: Stats | None) -> float:
    """How many times as long as simulated transfers took, from the seconds steps waited; a first step's waits are in it too."""
    t, tier = plan.predicted.traffic, plan.tier
    if seen is None or t is None or tier is None or not t.sent_bytes or not seen.bytes_written:
        return 1.0
    moving = t.hidden_seconds + t.stalled_seconds
    waited = (seen.stalled_write_seconds + seen.stalled_read_seconds) * t.sent_bytes / seen.bytes_written
    return max(1 + float(waited - t.stalled_seconds) / float(moving), 1.0)


class Handle:
    """A plan in force. `remove()` undoes it; also a context manager."""

    def __init__(
        self, plan: PlanToApply, units: list[Unit], modes: Modes, store: DiskStore | HostStore | None = None
    ) -> None:
        self.plan, self.modes = plan, modes
        self._units = units
        self._store = store
        self._left: weakref.ref[DiskStore | HostStore] | None = None  # once removed: it lives as long as its tensors
        self._stats = Stats() if store is not None else None
        self._planned = {d.unit: d.input_elements for d in plan.decisions}
        self._warned = False
        self.active = True

    def remove(self) -> None:
        """Put every forward back (no-op the second time)."""
        for unit in self._units:
            unit.active = False  # should another wrapper have been put over ours
            module = unit.owner()
            if module is not None:
                uninstall(module)
        self.active = False
        if self._store is not None:
            self._store.poll()
            if not self._store.tickets:
                self._store.close()  # else backward is still to come: it closes when the last tensor is gone
            self._stats, self._left = self._store.stats, weakref.ref(self._store)
            self._store = None
            for unit in self._units:
                unit.site.tier = None

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def report(self) -> HandleReport:
        """Return predicted and observed numbers so far."""
        by_fqn = {u.fqn: u for u in self._units}
        rows = []
        for d in self.plan.decisions:
            unit = by_fqn.get(d.unit)
            fired, again = (unit.fired, unit.recomputed) if unit else (0, 0)
            skipped, stale = (unit.site.skipped, unit.site.stale) if unit else (0, 0)
            note = "; ".join(unit.site.notes) if unit else ""
            note = "never ran under the plan" if unit and not fired else note
            sent, late = (unit.site.sent_bytes, unit.site.late) if unit else (0, 0)
            rows.append(UnitReport(d.unit, d.action, fired, again, d.bytes_freed, skipped, stale, note, sent, late))
        larger, stats = max((u.larger for u in self._units), default=0), self._store_stats()
        return HandleReport(
            tuple(rows),
            self.plan.predicted.peak_bytes,
            self._observed_peak(),
            self.plan.budget_bytes,
            larger,
            stats,
            self.plan.tier.name if self.plan.tier is not None else "",
            self.plan.endurance,
            _slower(self.plan, stats),
            self.plan.disk is not None and self.plan.disk.checksums is True,
        )

    def _store_stats(self) -> Stats | None:
        store = self._store if self._store is not None else self._left() if self._left is not None else None
        if store is not None:
            self._stats = store.stats
        return self._stats

    def _observed_peak(self) -> int | None:
        modules = [m for u in self._units if (m := u.owner()) is not None]
        device = _device_of(*modules)
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

    def observe(self, unit: Unit, args: Any, kwargs: Any) -> None:
        """Warn, once, of a batch or a module's mode that puts the budget at risk; called at each planned forward."""
        self.modes.look(unit.fqn)
        planned = self._planned[unit.fqn]
        elements = sum(t.numel() for t in tree_flatten(args)[0] if isinstance(t, Tensor))  # as the plan counts them
        if not 0 < planned < elements:
            return
        unit.larger += 1
        budget, growth = self.plan.budget_bytes, elements / planned
        if self._warned or budget is None or self.plan.predicted.peak_bytes * growth <= budget:
            return
        self._warned = True
        tier = self.plan.tier
        small = (
            f", and {format_bytes(tier.capacity_bytes)} on {tier.name} may be too little" if tier is not None else ""
        )
        warnings.warn(
            f"{unit.fqn}: its input is {growth:.2f} times the planned one; results stay exact, but the budget of "
            f"{format_bytes(budget)} is at risk{small}: plan again for this shape",
            UllageWarning,
            stacklevel=3,
        )


# Which plan is applied to which model: a plan may wrap nothing, and then no module shows it.
_in_force: weakref.WeakKeyDictionary[nn.Module, Handle] = weakref.WeakKeyDictionary()


def handle_on(model: nn.Module) -> Handle | None:
    """The handle of the plan that is in force on this model or on a module in it (DDP wraps one), or None."""
    found = (_in_force.get(module) for module in model.modules())
    return next((h for h in found if h is not None and h.active), None)


def model_of(handle: Handle) -> nn.Module | None:
    """The model that this handle's plan was applied to; None if it is gone."""
    return next((model for model, h in _in_force.items() if h is handle), None)


def apply_plan(plan: PlanToApply, model: nn.Module) -> Handle:
    """Wrap the plan's units in place.

    Raises:
        PlanMismatch: the model is not the one that was planned.
        ApplyError: a plan is applied already.
        AlreadyCheckpointed: the model recomputes by itself.
        OffloadError: the plan offloads to a directory in which its file can't be made, or to memory that can't be
            pinned.
        DeviceError: the plan offloads to host memory, and the model is on a CPU; or to disk from another device.
    """
    if not isinstance(model, nn.Module):
        raise ApplyError(f"model: expected the torch.nn.Module that was planned, got {type(model).__name__}")
    before = _in_force.get(model)
    taken = next((n or "the root" for n, m in model.named_modules() if installed(m) is not None), None)
    if taken is not None or (before is not None and before.active):
        where = f" (module {taken})" if taken else ""
        raise ApplyError(f"a plan is applied to this model already{where}; call remove() of its handle first")
    refuse_existing(model)
    plan.check_model(model)
    tell()
    modules = _modules(plan, model)
    units: list[Unit] = []
    tiers = {settings.option.tier for _, settings, _ in modules} - {""}
    store = open_store(plan, tiers, _device_of(model)) if tiers and not disabled() else None
    budget = f"the budget of {format_bytes(plan.budget_bytes)}" if plan.budget_bytes is not None else "the planned peak"
    modes = Modes(model, [fqn for fqn, _, _ in modules], plan.evaluation, budget)
    handle = _in_force[model] = Handle(plan, units, modes, store)
    if disabled():
        return handle
    sites = Sites(tier=Tier(store) if store is not None else None)
    for fqn, settings, module in modules:
        unit = Unit(fqn, module, settings, sites.site(fqn, module, settings), handle.observe)
        install(unit, module)
        units.append(unit)
    return handle


def _device_of(*modules: nn.Module) -> torch.device:
    return next((p.device for m in modules for p in m.parameters()), torch.device("cpu"))


def _modules(plan: PlanToApply, model: nn.Module) -> list[tuple[str, UnitSettings, nn.Module]]:
    """The modules to wrap. Everything is looked up before anything is touched; plans may be edited by hand."""
    found: list[tuple[str, UnitSettings, nn.Module]] = []
    names: dict[int, str] = {}
    for decision in plan.decisions:
        try:
            module = model.get_submodule(decision.unit)
        except AttributeError:
            near = difflib.get_close_matches(decision.unit, [n for n, _ in model.named_modules()], 3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise PlanMismatch(f"decision for {decision.unit!r}: the model has no such module{hint}") from None
        if id(module) in names:
            raise PlanMismatch(
                f"decision for {decision.unit!r}: that module is decided on already, as {names[id(module)]!r}; keep one"
            )
        names[id(module)] = decision.unit
        missing = [b for b in decision.buffers if b not in dict(module.named_buffers())]
        if missing:
            raise PlanMismatch(f"decision for {decision.unit!r}: the module has no buffer {missing[0]!r}")
        settings = decision.settings()
        if not settings.option.is_plain:
            found.append((decision.unit, settings, module))
    return found
