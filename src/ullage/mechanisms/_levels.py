"""The levels of a unit: from the op logs that its runs on fake tensors left to exact choices of what to keep inside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ullage.levels import graph_of, levels, rule_for
from ullage.mechanisms._mechanism import Exploration, Option, TierView
from ullage.runtime import Learnt, level_rule
from ullage.runtime.ops._keep import OpsRule, named_rule
from ullage.runtime.unit._tier import LEAST_BYTES

MOST_LEVELS = 8  # each is run on fake tensors

Calls = frozenset[tuple[str, int]]


@dataclass(frozen=True)
class Levels:
    """The selective options of one unit.

    Attributes:
        options: from the fewest bytes kept to the most.
        call_bytes: what each call that they name holds.
    """

    options: tuple[Option, ...]
    call_bytes: dict[tuple[str, int], int]


def find_levels(exploration: Exploration, fqns: Sequence[str], action: str) -> dict[str, Levels]:
    """Per unit its levels. Twins have the same.

    Args:
        exploration: one whose units have been run selectively.
        fqns: the units.
        action: of the options.
    """
    routing = {u.fqn: u.routing for u in exploration.units}
    known: dict[int, Levels] = {}
    found: dict[str, Levels] = {}
    for fqn in fqns:
        seen = exploration.learnt(fqn)
        if seen is None:
            continue
        if id(seen[0]) not in known:
            known[id(seen[0])] = _levels_of(*seen, exploration.round_bytes, routing[fqn], action)
        found[fqn] = known[id(seen[0])]
    return found


def _levels_of(learnt: Learnt, seconds: Sequence[float], round_bytes: int, routing: bool, action: str) -> Levels:
    base = level_rule("", True) if routing else None
    graph = graph_of(learnt.log, seconds, round_bytes, base)
    texts = [rule_for(graph, level.kept, routing).text for level in levels(graph, MOST_LEVELS)]
    options = tuple(Option(action, text) for text in texts if text)
    return Levels(options, {g.call: g.nbytes for g in graph.groups})


def sent(levels: Levels, tier: TierView, which: Callable[[Calls], Calls], action: str) -> list[Option]:
    """These levels with the calls that `which` names offloaded; a level of which it names none is left out."""
    rules = [named_rule(o.level, False) for o in levels.options]
    found = [r.sent(tier.name, leaving) for r in rules if isinstance(r, OpsRule) and (leaving := which(r.calls))]
    return [Option(action, r.text) for r in found]


def hidden(levels: Levels, room: float) -> Callable[[Calls], Calls]:
    """Of some calls the largest that, together, have no more bytes than `room`: as many as leave while the unit's forward computes."""

    def which(calls: Calls) -> Calls:
        sizes, leaving, left = levels.call_bytes, set(), room
        for call in sorted(calls, key=lambda c: (-sizes.get(c, 0), c)):
            if LEAST_BYTES <= sizes.get(call, 0) <= left:
                leaving.add(call)
                left -= sizes[call]
        return frozenset(leaving)

    return which
