"""select: keep some saved tensors of a unit, and run again the ops that make the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ullage.mechanisms._mechanism import (
    Exploration,
    HostTimes,
    Mechanism,
    Offer,
    Option,
    Replays,
    TierView,
    UnitView,
    register,
)
from ullage.mechanisms.recompute import RECOMPUTE
from ullage.runtime import ATTENTION, MATMUL, Rule
from ullage.runtime.ops._keep import kind_of, named_rule

if TYPE_CHECKING:
    from ullage.mechanisms._levels import Levels


# Equal units that a level needs, if all levels are to run in one step: one in the middle, whose neighbours have the same level, and
# one on either side. A model with fewer has each level run in a step of its own.
EQUAL_PER_LEVEL = 3


class Select(Mechanism):
    """Keep the outputs of selected ops, on the device or in a tier; in backward run again only the ops that make the other ones.

    Use it if recomputing a unit takes too long: cheap ops that save large outputs (activations, norms, masks) run again,
    dear ones (matmuls, attention) don't. It needs more memory than `recompute`, and host time for replays that skip ops.

    Sources: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022 (arXiv:2205.05198), for
    selecting by kind of op; its levels are exact choices inside a unit: `ullage.levels`.
    """

    action = "select"
    forms = ("select (any level)", "select:LEVEL")
    policy = "selective"
    replays = Replays.PART

    def parse(self, level: str) -> Option:
        """Read a level's name, or single calls of ops."""
        if not level:
            raise ValueError
        named_rule(level)
        return Option(self.action, level)

    def offers(self, unit: UnitView, tier: TierView | None) -> Offer:
        """Offer to keep matmuls, convolutions and attention, if the unit has matmuls; `explore` finds the exact levels."""
        draws = any(isinstance(a, float) and a > 0 for o in unit.ops if o.func in ATTENTION for a in o.args[3:5])
        reasons = (
            {f"{self.action}:attention": "attention with dropout draws, so it is always run again"} if draws else {}
        )
        matmuls = any(o.func in MATMUL for o in unit.ops)
        return Offer((SELECTIVE,) if matmuls else (), reasons)

    def admits(self, unit: UnitView, option: Option) -> bool:
        """Admit any level that would keep something."""
        rule, counts = named_rule(option.level, False), Counter[Any]()
        for op in unit.ops:
            kind = kind_of(op.func, rule)
            if rule(op.func, counts[kind]):
                return True
            counts[kind] += 1
        return False

    def typical(self, options: Sequence[Option]) -> Option | None:
        """Return the level that other tools select: matmuls, convolutions and attention."""
        return SELECTIVE if SELECTIVE in options else None

    def explore(self, exploration: Exploration, offered: Sequence[Option]) -> None:
        """Run every unit selectively once; find levels in the op logs of these runs; run the levels, in memory and offloaded."""
        # here, because an import of ullage does not need the solvers of the choice inside a unit
        from ullage.mechanisms._levels import find_levels, hidden, sent

        x, action = exploration, self.action
        x.capture(SELECTIVE.name, lambda fqn: SELECTIVE if x.may(fqn, SELECTIVE) else None)
        able = [u.fqn for u in x.units if x.has(u.fqn, RECOMPUTE)]
        found = find_levels(x, able, action)
        for fqn, levels in found.items():
            x.add(fqn, levels.options)
        classes = _classes(found)
        if all(len(fqns) >= EQUAL_PER_LEVEL * len(levels.options) for levels, fqns in classes):
            _capture_shared(x, classes)
            ladders = []
        else:
            ladders = [("", {fqn: list(levels.options) for fqn, levels in found.items()})]
        if (tier := x.tier) is not None:
            whole = {f: sent(levels, tier, lambda calls: calls, action) for f, levels in found.items()}
            speed = tier.write_bytes_per_second
            part = {f: sent(v, tier, hidden(v, x.forward_seconds(f) * speed), action) for f, v in found.items()}
            ladders += [(" offloaded", whole), (" offloaded in part", part)]
        for label, options in ladders:
            for fqn, rungs in options.items():
                x.add(fqn, rungs)
            for k in range(max(map(len, options.values()), default=0)):
                x.capture(f"level {k}{label}", lambda fqn, k=k, of=options: _rung(x, of.get(fqn, ()), k, fqn))  # type: ignore[misc]

    def seconds(self, option: Option, host: HostTimes, calls: int, ops: int, again: int | None) -> float:
        """Count a replay per call, whose ops are skipped or run one by one in Python."""
        return host.replays(True, calls, ops)

    def tier_of(self, level: str) -> str:
        """Return the tier behind the last `@`: all offloaded calls of a level go to one tier."""
        return level.rpartition("@")[2].partition("+")[0] if "@" in level else ""

    def rule(self, option: Option, keeps_routing: bool) -> Rule | None:
        """Return the level's rule."""
        return named_rule(option.level, keeps_routing)


def _classes(found: Mapping[str, Levels]) -> list[tuple[Levels, list[str]]]:
    """Return the units that have the same levels because their op logs are the same, in forward order."""
    classes: dict[int, tuple[Levels, list[str]]] = {}
    for fqn, levels in found.items():
        if levels.options:  # none, if keeping some tensors of a unit is never better
            classes.setdefault(id(levels), (levels, []))[1].append(fqn)
    return list(classes.values())


def _capture_shared(x: Exploration, classes: Sequence[tuple[Levels, list[str]]]) -> None:
    """Run all levels in one step, each on a stretch of equal units; the middle one of a stretch shows the level for all of them."""
    mine: dict[str, Option] = {}
    for levels, fqns in classes:
        mine |= {f: levels.options[k * len(levels.options) // len(fqns)] for k, f in enumerate(fqns)}
    x.capture("levels", lambda fqn: mine[fqn] if fqn in mine and x.has(fqn, mine[fqn]) else None)
    for levels, fqns in classes:
        for option in levels.options:
            ran = [f for f in fqns if mine[f] == option and x.has(f, option)]
            if ran:
                x.show([f for f in fqns if f not in ran], option, ran[len(ran) // 2])


def _rung(x: Exploration, options: Sequence[Option], k: int, fqn: str) -> Option | None:
    """Return the k-th of the options that the unit still has, or the last one."""
    left = [o for o in options if x.has(fqn, o)]
    return left[min(k, len(left) - 1)] if left else None


register(Select())
SELECTIVE = Option(Select.action, "matmul_attention")
