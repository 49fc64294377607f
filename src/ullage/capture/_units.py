"""Find the units of a model: the repeated blocks that its architecture shows, and large modules outside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from ullage._errors import WorkloadError
from ullage.capture._session import Call, Session

SMALL_SHARE = 0.01  # a module outside blocks that saves less than this share of all activations is no unit: it could free too little
_CACHE = (
    "{fqn} adds to the {kind} it is given, which keeps keys and values alive to the end of the step; set model.config.use_cache = False, "
    "unless the step reads them"
)


@dataclass(frozen=True)
class UnitFacts:
    """A unit: a module call that can be wrapped.

    Attributes:
        fqn: the module's fully qualified name.
        class_name: its class.
        calls: calls per micro-batch.
        block: one of the repeated blocks (as opposed to a large remainder).
        saved_bytes: activations one micro-batch's calls save for backward in the plain step.
        buffers: buffers its forward changes, named below the unit.
        keep_reason: why the unit can only be kept, or "".
        routing: it has routing or index outputs, which are always kept.
    """

    fqn: str
    class_name: str
    calls: int
    block: bool
    saved_bytes: int
    buffers: tuple[str, ...] = ()
    keep_reason: str = ""
    routing: bool = False


def find_blocks(model: nn.Module, calls: Sequence[Call], patterns: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return (blocks, remainders): FQNs of repeated blocks and of other called modules outside them."""
    called = {c.fqn: c for c in reversed(calls)}
    if patterns is not None:
        named = [n for n, _ in model.named_modules() if n in called and any(fnmatchcase(n, p) for p in patterns)]
        outer = [n for n in named if not any(n.startswith(o + ".") for o in named if o != n)]
        if not outer:
            raise WorkloadError(f"units={list(patterns)}: no module that the step calls matches")
        return outer, []
    blocks: list[str] = []
    rest: list[str] = []

    def repeated(prefix: str, module: nn.Module) -> list[str]:
        """Return the called children of a list-like module whose class repeats."""
        if not isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            return []
        children = [(f"{prefix}.{n}" if prefix else n, m) for n, m in module.named_children()]
        classes = Counter(type(m) for f, m in children if f in called)
        leaf = not any(True for _, m in children for _ in m.children())
        return [] if leaf else [f for f, m in children if f in called and classes[type(m)] > 1]

    def chained(fqns: Sequence[str]) -> bool:
        pairs = list(zip(fqns, fqns[1:], strict=False))
        return bool(pairs) and all(called[a].outputs & called[b].inputs for a, b in pairs)

    def has_chain(prefix: str, module: nn.Module) -> bool:
        return any(chained(repeated(f"{prefix}.{n}" if n else prefix, m)) for n, m in module.named_modules())

    def has_blocks(prefix: str, module: nn.Module) -> bool:
        return any(repeated((f"{prefix}.{n}" if n else prefix).strip("."), m) for n, m in module.named_modules())

    def descend(prefix: str, module: nn.Module) -> None:
        inner = set(repeated(prefix, module))
        if not has_blocks(prefix, module):
            if prefix in called and prefix:
                rest.append(prefix)
            elif prefix not in called or not prefix:
                for name, child in module.named_children():
                    descend(f"{prefix}.{name}" if prefix else name, child)
            return
        for name, child in module.named_children():
            fqn = f"{prefix}.{name}" if prefix else name
            if fqn in inner and not has_chain(fqn, child):
                blocks.append(fqn)
            else:
                descend(fqn, child)

    descend("", model)
    kinds = {k for f in blocks if not (k := type(model.get_submodule(f))).__module__.startswith("torch.")}
    single = [f for f in rest if type(model.get_submodule(f)) in kinds]  # the middle of a U-Net
    return blocks + single, [f for f in rest if f not in single]


def _interleaved(calls: Sequence[Call], units: Mapping[str, int]) -> set[str]:
    """Return units that are called again after another unit (a shared dropout): they have no one place in the order."""
    sequence = [c.fqn for c in sorted(calls, key=lambda c: c.first_op) if c.fqn in units]
    runs = Counter(f for f, before in zip(sequence, ["", *sequence], strict=False) if f != before)
    return {f for f, n in runs.items() if n > 1}


def _changes(session: Session, fqn: str, in_every_step: set[str]) -> tuple[tuple[str, ...], str]:
    """Return the buffers below a unit that its forward changes, and why the unit can only be kept, or ""."""
    tracker, below = session.tracker, fqn + "."
    written = sorted(n for n, modules in tracker.writes.items() if fqn in modules)
    own_buffers = {below + n for n, _ in session.inst.model.get_submodule(fqn).named_buffers()}
    other = [n for n in written if n not in own_buffers]
    if fqn not in in_every_step:
        reason = "not every step calls it"
    elif other:
        reason = f"its forward writes {other[0]}, which is not a buffer of its own"
    elif fqn in tracker.generators.lost:
        reason = (
            "it draws from a torch.Generator that nothing in it leads to (made in the call, or given as an argument), "
            "which a replay would advance again; make it an attribute of the module"
        )
    else:
        reason = ""
    return tuple(n.removeprefix(below) for n in written if n in own_buffers), reason


def unit_facts(session: Session, saved: dict[str, int], patterns: Sequence[str] | None) -> list[UnitFacts]:
    """Return units in order of first call. `saved`: bytes that each module's calls save for backward in one micro-batch."""
    calls = (
        [c for c in session.calls if c.first_op < session.trace.marks[1]]
        if len(session.trace.marks) > 1
        else session.calls
    )
    blocks, rest = find_blocks(session.inst.model, calls, patterns)
    total = max(saved.get("", 0), 1)
    wanted = set(blocks) | {f for f in rest if saved.get(f, 0) >= SMALL_SHARE * total}
    if not wanted:  # no repeated blocks and nothing large: the children of the root
        wanted = {f for f in rest if saved.get(f, 0) > 0}
    order: dict[str, int] = {}
    for c in calls:
        if c.fqn in wanted:
            order.setdefault(c.fqn, c.first_op)
    counts = Counter(c.fqn for c in calls if c.fqn in wanted)
    micro = max(session.inst.accumulate, 1)
    backward = next((i for i, p in enumerate(session.trace.phase) if p == "backward"), session.tracker.clock)
    for fqn in _interleaved([c for c in calls if c.first_op < backward], order) - set(blocks):
        del order[fqn]
    later = session.trace.marks[-1]
    in_every_step = [c for c in calls if any(k.fqn == c.fqn and k.first_op >= later for k in session.calls)]
    facts = []
    for fqn in sorted(order, key=order.__getitem__):
        module = session.inst.model.get_submodule(fqn)
        buffers, reason = _changes(session, fqn, {c.fqn for c in in_every_step})
        kind = session.changed_arguments.get(fqn, "")
        if "Cache" in kind:
            session.values.assumptions[_CACHE.format(fqn=fqn, kind=kind)] = None
        facts.append(
            UnitFacts(
                fqn,
                type(module).__name__,
                max(counts[fqn] // micro, 1),
                fqn in set(blocks),
                saved.get(fqn, 0),
                buffers,
                reason,
            )
        )
    return facts
