"""`Timeline`: live bytes of a first and a later step, event by event, and what they are."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ullage._bytes import format_bytes, format_seconds
from ullage._errors import PlanError
from ullage._files import write_whole
from ullage._writers import write
from ullage.planner import Holding
from ullage.planner.explain._peak import holding_rows
from ullage.report._records import (
    CATEGORIES,
    INSIDE,
    PHASES,
    WORKSPACE,
    Allocation,
    Allocations,
    Array,
    Event,
    Events,
    PhaseFacts,
    Transfer,
    where,
)
from ullage.workload import Setup

VERSION = 1
_ROWS = 12


class Timeline(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """A first and a later step, plain or under a plan. `str(timeline)` is a table.

    During event i the storages with `birth <= i <= death` are alive, with the library's workspace and the event's
    `inside_bytes`. The maximum of `live_bytes` is `peak_bytes`, and it is at `peak_event`.

    Attributes:
        version: of the file's format.
        device: name of the device.
        estimate: whether that device is not here.
        costs: "measured" or "roofline", as a plan has it.
        plan_digest: of the plan; "" for the plain step.
        policy: of the plan; "" for the plain step.
        budget_bytes: of the plan; None for the plain step.
        actions: each unit's option, by its name.
        peak_bytes: bytes; the larger of the two below.
        first_step_peak_bytes: bytes of the first step's peak.
        later_step_peak_bytes: bytes of the later step's peak.
        peak_event: index of the event at the peak.
        step_seconds: of the later step; its events' seconds add up to it.
        first_events: how many events the first step has.
        workspace_bytes: bytes that a library holds all the time.
        modules: names that the columns index.
        stacks: lists of modules that the columns index, the outermost first.
        ops: names that the columns index.
        sources: lines of code that the columns index.
        categories: names that the columns index.
        names: names of tensors that the columns index.
        events: columns with an entry per op of both steps.
        allocations: columns with an entry per storage.
        notes: sentences for the reader of the timeline.
        transfers: of offloaded tensors, out and back, in order; empty without offloading.
        setup: the facts that these numbers depend on; None in a file of an older version.
    """

    version: int
    device: str
    estimate: bool
    costs: str
    plan_digest: str
    policy: str
    budget_bytes: int | None
    actions: dict[str, str]
    peak_bytes: int
    first_step_peak_bytes: int
    later_step_peak_bytes: int
    peak_event: int
    step_seconds: float
    first_events: int
    workspace_bytes: int
    modules: list[str]
    stacks: list[list[int]]
    ops: list[str]
    sources: list[str]
    categories: list[str]
    names: list[str]
    events: Events
    allocations: Allocations
    notes: list[str]
    transfers: list[Transfer] = []
    setup: Setup | None = None

    def __len__(self) -> int:
        return len(self.events.phase.values)

    @property
    def steps(self) -> dict[str, slice]:
        """The events of the first and of the later step."""
        return {"first": slice(0, self.first_events), "later": slice(self.first_events, len(self))}

    @cached_property
    def live_by_category(self) -> dict[str, Array]:
        """Bytes per event and category, in the order of `CATEGORIES`; categories that never occur are left out."""
        a, n = self.allocations, len(self)
        birth, death, size = np.maximum(a.birth.values, 0), a.death.values, a.nbytes.values
        found: dict[str, Array] = {}
        for k, name in enumerate(self.categories):
            some = a.category.values == k
            change = np.zeros(n + 1, np.int64)
            np.add.at(change, birth[some], size[some])
            np.subtract.at(change, np.minimum(death[some] + 1, n), size[some])
            found[name] = np.cumsum(change)[:n]
        found[WORKSPACE] = np.full(n, self.workspace_bytes, np.int64)
        found[INSIDE] = self.events.inside_bytes.values
        order = [*(c for c in CATEGORIES if c in found), *(c for c in found if c not in CATEGORIES)]
        return {c: found[c] for c in order if found[c].any()}

    @cached_property
    def live_bytes(self) -> Array:
        """Bytes per event at its peak."""
        return np.asarray(sum(self.live_by_category.values(), np.zeros(len(self), np.int64)))

    @cached_property
    def start_seconds(self) -> npt.NDArray[np.float64]:
        """When each event starts; the later step follows the first one."""
        return np.concatenate([[0.0], np.cumsum(self.events.seconds.values)[:-1]]) if len(self) else np.zeros(0)

    @cached_property
    def innermost(self) -> Array:
        """The module that each event runs in, into `modules`; -1 where there is none."""
        last = np.array([stack[-1] if stack else -1 for stack in self.stacks], np.int64)
        return np.asarray(last[self.events.stack.values])

    def event(self, index: int) -> Event:
        """One event; negative indices count from the end."""
        index = range(len(self))[index]
        e, module = self.events, int(self.innermost[index])
        return Event(
            index=index,
            step="first" if index < self.first_events else "later",
            micro_batch=int(e.micro_batch.values[index]),
            phase=PHASES[e.phase.values[index]],
            module=self.modules[module] if module >= 0 else "",
            op=self.ops[e.op.values[index]],
            source=self.sources[e.source.values[index]],
            recomputed=bool(e.recomputed.values[index]),
            start_seconds=float(self.start_seconds[index]),
            seconds=float(e.seconds.values[index]),
            live_bytes=int(self.live_bytes[index]),
            by_category={c: int(n[index]) for c, n in self.live_by_category.items() if n[index]},
        )

    @property
    def peak(self) -> Event:
        """The event of the peak."""
        return self.event(self.peak_event)

    def allocation(self, k: int) -> Allocation:
        """One storage."""
        a = self.allocations
        birth = int(a.birth.values[k])
        return Allocation(
            nbytes=int(a.nbytes.values[k]),
            category=self.categories[a.category.values[k]],
            module=self.modules[a.module.values[k]],
            name=self.names[a.name.values[k]],
            op=self.ops[self.events.op.values[birth]] if birth >= 0 else "",
            source=self.sources[self.events.source.values[birth]] if birth >= 0 else "",
            birth=birth,
            death=int(a.death.values[k]),
        )

    def alive(self, event: int | None = None) -> list[Allocation]:
        """The storages alive during an event (None: the peak), the largest first."""
        at, a = self.peak_event if event is None else range(len(self))[event], self.allocations
        some = np.flatnonzero((a.birth.values <= at) & (at <= a.death.values))
        return sorted((self.allocation(int(k)) for k in some), key=lambda x: -x.nbytes)

    def holdings(self, event: int | None = None, units: bool = False) -> list[Holding]:
        """Return the tensors alive during an event (None: the peak), the largest first; they add up to its live bytes.

        Args:
            event: index of the event.
            units: by category and unit (or module outside units), as `ullage.Bounds` has it, instead of innermost module.
        """
        at = self.peak_event if event is None else range(len(self))[event]
        found: dict[tuple[str, str], list[int]] = {}
        for x in self.alive(at):
            found.setdefault((x.category, unit_of(x.module, self.actions) if units else x.module), []).append(x.nbytes)
        rows = [Holding(category=c, module=m, nbytes=sum(n), tensors=len(n)) for (c, m), n in found.items()]
        inside, module = int(self.events.inside_bytes.values[at]), self.event(at).module
        more = (
            (WORKSPACE, "", self.workspace_bytes),
            (INSIDE, unit_of(module, self.actions) if units else module, inside),
        )
        rows += [Holding(category=c, module=m, nbytes=n, tensors=0) for c, m, n in more if n]
        return sorted(rows, key=lambda h: -h.nbytes)

    def export(self, path: str | Path) -> None:
        """Write the timeline for another tool; the file's ending says which: see `ENDINGS` of this package.

        Raises:
            ArgumentError: another ending, a folder that is not there, or a package that is not installed.
        """
        write(self, "export", path)

    def save(self, path: str | Path) -> None:
        """Write the timeline as JSON."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> Timeline:
        """Read a timeline; PlanError if it is not one, is damaged, or is newer than what this version reads."""
        try:
            raw = Path(path).read_bytes()
            version = msgspec.json.decode(raw, type=_Version).version
            if version == VERSION:
                found = msgspec.json.decode(raw, type=cls)
                _check(found)
                return found
        except (OSError, msgspec.DecodeError, ValueError) as error:
            raise PlanError(f"timeline {path}: {error}") from error
        raise PlanError(f"timeline {path}: version {version}, but this ullage reads {VERSION}")

    def __str__(self) -> str:
        label = ", an ESTIMATE: this device is not here" if self.estimate else ""
        what = f"plan ({self.policy})" if self.plan_digest else "plain step"
        at = self.peak
        lines = [
            f"timeline of the {what} on {self.device}{label}",
            *([str(self.setup)] if self.setup is not None else []),
            f"  peak {format_bytes(self.peak_bytes)} in the {at.step} step, event {at.index} of {len(self)}",
            f"    {where(at)}",
            *([f"    {at.source}"] if at.source else []),
            f"  first step {format_bytes(self.first_step_peak_bytes)}, later {format_bytes(self.later_step_peak_bytes)}; "
            f"step about {format_seconds(self.step_seconds)} (costs: {self.costs})",
            "  alive at the peak",
        ]
        by_size = sorted(at.by_category.items(), key=lambda row: -row[1])
        lines += [f"    {c:<22} {format_bytes(n):>12}  {n / max(self.peak_bytes, 1):6.1%}" for c, n in by_size]
        lines.append("  by unit")
        lines += [f"    {row}" for row in holding_rows(self.holdings(units=True))[:_ROWS]]
        lines.append("  of the later step")
        for phase in phases_of(self):
            time = format_seconds(phase.seconds)
            lines.append(f"    {phase.name:<22} {format_bytes(phase.nbytes):>12}  {time:>10}  {phase.ops} ops")
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])


class _Version(msgspec.Struct):
    version: int


def unit_of(module: str, units: Collection[str]) -> str:
    """The unit that a module is or lies in; the module itself outside units."""
    name = module
    while name and name not in units:
        name = name.rpartition(".")[0]
    return name or module


def phases_of(t: Timeline) -> list[PhaseFacts]:
    """Return forward, backward, optimizer, and recomputed ops (which count in no other phase), of the later step."""
    rows, some = [], t.steps["later"]
    phase, again = t.events.phase.values[some], t.events.recomputed.values[some] == 1
    seconds, live = t.events.seconds.values[some], t.live_bytes[some]
    for name, chosen in [(p, (phase == k) & ~again) for k, p in enumerate(PHASES)] + [("recomputed", again)]:
        if chosen.any():
            rows.append(PhaseFacts(name, int(live[chosen].max()), float(seconds[chosen].sum()), int(chosen.sum())))
    return rows


def _check(t: Timeline) -> None:
    """Raise ValueError unless the columns fit each other, the lists, and the peak."""
    events: dict[str, Any] = {f: getattr(t.events, f).values for f in t.events.__struct_fields__}
    storages: dict[str, Any] = {f: getattr(t.allocations, f).values for f in t.allocations.__struct_fields__}
    for table in (events, storages):
        if len({len(v) for v in table.values()}) != 1:
            raise ValueError("its columns differ in length; was it cut off or edited?")
    indexed = [
        (events["phase"], len(PHASES)), (events["stack"], len(t.stacks)), (events["op"], len(t.ops)),
        (events["source"], len(t.sources)), (storages["category"], len(t.categories)), (storages["module"], len(t.modules)),
        (storages["name"], len(t.names)), (np.array([m for s in t.stacks for m in s], np.int64), len(t.modules)),
    ]  # fmt: skip
    if any(len(v) and not (v.min() >= 0 and v.max() < n) for v, n in indexed):
        raise ValueError("a column names what is not in its list")
    if not 0 <= t.peak_event < len(t) or not t.live_bytes[t.peak_event] == t.live_bytes.max() == t.peak_bytes:
        raise ValueError("its peak is not that of its events")
