"""`Plan`: a decision as plain data. Versioned JSON, readable, hand-editable, with a digest."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import nn

from ullage._bytes import format_bytes, format_seconds
from ullage._errors import PlanError, PlanMismatch
from ullage._files import write_whole
from ullage._version import __version__
from ullage.mechanisms import UnitSettings, option_from_name
from ullage.offload import endurance_note
from ullage.planner.explain._peak import Bounds
from ullage.planner.plan._grouped import rows_of, wrapped
from ullage.planner.plan._overrides import PinCost, describe
from ullage.planner.study._tiers import Disk, Host, OffloadTier, Traffic
from ullage.runtime import Place
from ullage.workload import Setup

if TYPE_CHECKING:
    from ullage.apply import Handle

VERSION = 1


class Forecast(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A step's predicted peak and time.

    Attributes:
        peak_bytes: bytes; the larger of the two below.
        step_seconds: seconds of a later step.
        first_step_peak_bytes: bytes; in the first step optimizer state is still to be made.
        later_step_peak_bytes: bytes.
        phase: "forward", "backward" or "optimizer": where the peak is.
        module: fully qualified name of the innermost module there; "" for the root.
        op: the op that runs there.
        traffic: bytes offloaded and brought back, and the seconds waited for them; None without offloading.
        reserved_bytes: bytes that torch's CUDA caching allocator would hold after both steps, by a simulation of its rules; None on a
            CPU, and in the points of a frontier.
    """

    peak_bytes: int
    step_seconds: float
    first_step_peak_bytes: int
    later_step_peak_bytes: int
    phase: str
    module: str
    op: str
    traffic: Traffic | None = None
    reserved_bytes: int | None = None


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A unit's option, the bytes it frees, the seconds it costs per step, and the reason.

    Attributes:
        unit: fully qualified name of the module.
        action: the option: "keep", "recompute", "select:LEVEL" or "offload:TIER".
        bytes_freed: bytes between forward and backward of one micro-batch, less than with "keep".
        seconds_added: seconds per step.
        recomputed_ops: ops that one replay runs.
        reason: why this option, in words.
        buffers: buffers that the unit's forward changes; a replay puts them back.
        keeps_routing: whether the unit makes indices (topk, sort, ...); these are always kept, so that a replay routes the same way.
        input_elements: elements of the unit's input tensors, by which a larger batch is noticed.
        place: the unit's place among units that are recomputed together; None if it is alone.
        words: what the option does, by modules and meaning: "keeps q, k, v projections and attention; recomputes norms".
    """

    unit: str
    action: str
    bytes_freed: int
    seconds_added: float
    recomputed_ops: int
    reason: str
    buffers: list[str]
    keeps_routing: bool
    input_elements: int
    place: Place | None = None
    words: str = ""

    @property
    def label(self) -> str:
        """The unit's option in a word or two."""
        return replace(option_from_name(self.action), place=self.place).label

    def settings(self) -> UnitSettings:
        """Return the runtime's settings for the unit."""
        option = replace(option_from_name(self.action), place=self.place)
        return UnitSettings(option, tuple(self.buffers), self.keeps_routing)


class TensorFact(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A parameter or buffer in a fingerprint."""

    name: str
    shape: list[int]
    dtype: str
    requires_grad: bool


class Fingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model a plan was made for: class, parameters and buffers."""

    model_class: str
    tensors: list[TensorFact]


def fingerprint(model: nn.Module) -> Fingerprint:
    """Return the fingerprint of a model, which does not depend on values."""
    named = [*model.named_parameters(), *model.named_buffers()]
    facts = [TensorFact(n, list(t.shape), str(t.dtype).removeprefix("torch."), t.requires_grad) for n, t in named]
    return Fingerprint(f"{type(model).__module__}.{type(model).__qualname__}", facts)


def environment() -> dict[str, str]:
    """Return versions that help to explain a plan; they are not part of its digest."""
    return {"ullage": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A plan: an option per unit, predictions, and the model they are for. `str(plan)` is a table.

    A field that has its default is left out of the file, so files of older versions are read as they were written.

    Attributes:
        version: of the file's format.
        budget_bytes: bytes; None for a named policy without a budget.
        policy: "optimal" or a named policy.
        device: name of the device that was planned for.
        costs: "measured" or "roofline".
        estimate: whether that device is not here.
        predicted: the step under this plan.
        baseline: the plain step.
        lower_bound_seconds: no plan within the budget is predicted to take less; 0 for a named policy.
        gap: how much this plan is above that, as a share of the bound.
        decisions: one per unit, in the order of the forward.
        shapes: shape of each unit's first input, by the unit's name.
        model: the model's class, and name, shape, dtype and requires_grad of its parameters and buffers.
        notes: sentences for the reader of the plan.
        environment: versions of ullage, torch and Python; not part of the digest.
        headroom_bytes: bytes of the budget that the plan leaves free.
        forbidden: actions that no unit may have, except by a pin.
        pins: the cost of each pin.
        bounds: the tensors that hold the predicted peak, and levers that would lower it.
        disk: the file for offloaded tensors; None if the plan uses none.
        host: the pinned memory for offloaded tensors; None if the plan uses none.
        setup: the facts that these numbers depend on; None in a file of an older version.
        evaluation: modules in evaluation mode in the planned step, of those whose code reads the mode.
        values: "auto", "assumed" or "run", as in `ullage.plan`; the notes name what the step reads.
        assume: what was assumed for values that depend on activations.
    """

    version: int
    budget_bytes: int | None
    policy: str
    device: str
    costs: str
    estimate: bool
    predicted: Forecast
    baseline: Forecast
    lower_bound_seconds: float
    gap: float
    decisions: list[Decision]
    shapes: dict[str, list[int]]
    model: Fingerprint
    notes: list[str]
    environment: dict[str, str]
    headroom_bytes: int = 0
    forbidden: list[str] = []
    pins: list[PinCost] = []
    bounds: Bounds | None = None
    disk: Disk | None = None
    host: Host | None = None
    evaluation: list[str] = []
    setup: Setup | None = None
    values: str = "auto"
    assume: dict[str, float] = {}

    @property
    def tier(self) -> OffloadTier | None:
        """The tier that saved tensors are offloaded to, if any are."""
        return self.host if self.host is not None else self.disk

    @property
    def endurance(self) -> str:
        """The bytes that the plan writes to its disk, and how long the disk lasts, in a sentence; "" without a disk."""
        t, seconds = self.predicted.traffic, self.predicted.step_seconds
        if self.disk is None or t is None or not seconds:
            return ""
        return endurance_note(t.sent_bytes, 1 / seconds)

    @property
    def digest(self) -> str:
        """SHA-256 over everything but the environment."""
        data = msgspec.to_builtins(self)
        data.pop("environment")
        return hashlib.sha256(msgspec.json.encode(data, order="sorted")).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_whole(path, self.text())

    def text(self) -> bytes:
        """The JSON that `save` writes."""
        data = msgspec.to_builtins(self) | {"digest": self.digest}
        return msgspec.json.format(msgspec.json.encode(data), indent=1) + b"\n"

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan. The digest is not checked: plans may be edited by hand.

        Raises:
            PlanError: not readable, cut off, of a newer version, or with keys or actions this version does not know.
        """
        try:
            raw = msgspec.json.decode(Path(path).read_bytes())
        except OSError as error:
            raise PlanError(f"plan {path}: can't be read: {error}") from error
        except msgspec.DecodeError as error:
            raise PlanError(f"plan {path}: not whole JSON ({error}); was it cut off? save it again") from error
        if not isinstance(raw, dict) or type(raw.get("version")) is not int or raw["version"] < 1:
            raise PlanError(f"plan {path}: not a plan of ullage: it has no version; write one with `ullage plan -o`")
        if raw["version"] > VERSION:
            raise PlanError(
                f"plan {path}: version {raw['version']} is newer than this ullage reads ({VERSION}); upgrade ullage"
            )
        raw.pop("digest", None)
        try:
            plan = msgspec.convert(raw, cls)
        except msgspec.ValidationError as error:
            raise PlanError(f"plan {path}: {error}; put that right, or plan again") from error
        check_actions(plan, f"plan {path}")
        return plan

    def counts(self) -> dict[str, int]:
        """Return the number of units per action."""
        return dict(Counter(d.action for d in self.decisions).most_common())

    @property
    def kinds(self) -> str:
        """How many units have which kind of action: "11 x select, 1 x keep"."""
        found = Counter(d.action.partition(":")[0] for d in self.decisions)
        return ", ".join(f"{n} x {kind}" for kind, n in found.most_common())

    def check_model(self, model: nn.Module) -> None:
        """Raise PlanMismatch, naming what differs, unless the model is the one that was planned."""
        now = fingerprint(model)
        if now == self.model:
            return
        where = "the plan is for another model, or the model changed since planning: "
        if now.model_class != self.model.model_class:
            raise PlanMismatch(f"{where}class {now.model_class}, planned {self.model.model_class}")
        old, new = ({t.name: t for t in f.tensors} for f in (self.model, now))
        differences = [f"{n} is missing" for n in old if n not in new] + [f"{n} is new" for n in new if n not in old]
        for n in old.keys() & new.keys():
            a, b = old[n], new[n]
            for field in ("shape", "dtype", "requires_grad"):
                if getattr(a, field) != getattr(b, field):
                    differences.append(f"{n}: {field} {getattr(b, field)}, planned {getattr(a, field)}")
        shown = "; ".join(sorted(differences)[:5]) or "the order of parameters"
        raise PlanMismatch(f"{where}{shown}{' ...' if len(differences) > 5 else ''}. Plan again")

    def check_modes(self, evaluation: Sequence[str]) -> None:
        """Raise PlanMismatch unless these modules, as captured, are the ones that were in evaluation mode."""
        other = sorted(set(evaluation) ^ set(self.evaluation))
        if other:
            now, then = ("evaluation", "training") if other[0] in evaluation else ("training", "evaluation")
            raise PlanMismatch(
                f"{other[0] or 'the root'}: in {now} mode, but planned in {then} mode ({len(other)} modules differ); plan again, or put the "
                "model into the mode it was planned in"
            )

    def apply(self, model: nn.Module) -> Handle:
        """Apply in place; see `ullage.apply.apply_plan`. Warns if the plan, or the model now, is in evaluation mode."""
        from ullage.apply import apply_plan

        handle = apply_plan(self, model)
        handle.modes.look_at_all(model)
        return handle

    def describe(self, verbose: bool = False) -> str:
        """The plan in words, at most 80 columns wide where names allow it; `verbose` adds the ops of each action."""
        p, b, by, bound = self.predicted, self.baseline, self.setup, self.lower_bound_seconds
        title = f"plan ({self.policy}) for {self.device}{', an ESTIMATE: it is not here' if self.estimate else ''}"
        budget = "none" if self.budget_bytes is None else format_bytes(self.budget_bytes)
        budget += f", of which {format_bytes(self.headroom_bytes)} are headroom" if self.headroom_bytes else ""
        slower = p.step_seconds / b.step_seconds - 1 if b.step_seconds else 0.0
        lines = [
            title,
            *([str(by)] if by is not None else []),
            f"  budget     {budget}",
            f"  peak       {format_bytes(p.peak_bytes)}   plain {format_bytes(b.peak_bytes)}",
            f"             in {p.phase}, {p.module or '(root)'}, {p.op}",
            *_reserved(p.reserved_bytes, b.reserved_bytes),
            *([f"  fits       {by.fits(p.peak_bytes)}"] if by is not None else []),
            f"  step time  {format_seconds(p.step_seconds)}   plain {format_seconds(b.step_seconds)} ({slower:+.1%}, costs: {self.costs})",
            *([f"  bound      at least {format_seconds(bound)}, gap {self.gap:.2%}"] if bound else []),
            *([_moves(p.traffic, self.tier)] if p.traffic is not None and self.tier is not None else []),
            *([f"  endurance  {self.endurance}"] if self.endurance else []),
            "  decisions",
        ]
        lines += [f"    {row}" for row in rows_of(self.decisions, verbose)]
        lines += [f"  pin {describe(cost)}" for cost in self.pins]
        lines += [f"  forbidden: {', '.join(self.forbidden)}"] if self.forbidden else []
        for line in self.bounds.summary() if self.bounds is not None else []:
            lines += wrapped(line)
        for note in [*(by.defaults if by is not None else []), *self.notes]:
            lines += wrapped(f"  note: {note}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()


def _reserved(planned: int | None, plain: int | None) -> list[str]:
    """Return the row about reserved bytes, if they were simulated."""
    if planned is None or plain is None:
        return []
    return [f"  reserved   {format_bytes(planned)}   plain {format_bytes(plain)}   (torch's allocator, simulated)"]


def _moves(t: Traffic, tier: OffloadTier) -> str:
    """Return the row about bytes offloaded and brought back in a step, and the seconds waited for them."""
    times = f"{format_seconds(t.hidden_seconds)} hidden, {format_seconds(t.stalled_seconds)} stalled"
    sizes = f"{format_bytes(t.sent_bytes)} out, {format_bytes(t.fetched_bytes)} in"
    return f"  {tier.name:<10} {sizes}: {times}; {tier}"


def check_actions(plan: Plan, where: str) -> None:
    """Raise PlanError for an action that this version does not know."""
    try:
        for d in plan.decisions:
            d.settings()
    except ValueError as error:
        raise PlanError(
            f"{where}: unknown action {error}; known: keep, recompute, offload:host, offload:disk, select:LEVEL or calls of ops such as select:mm[0,2]@host"
        ) from error
