"""Find the levels of a unit: exact choices of the tensors to keep inside it, from the op logs of its runs on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ullage.levels import graph_of, levels, rule_for
from ullage.mechanisms._mechanism import Exploration, Option, TierView
from ullage.runtime import Learnt, level_rule
from ullage.runtime.ops._keep import OpsRule, named_rule
from ullage.runtime.unit._tier import LEAST_BYTES

# Levels per unit. Each costs a captured step, so a plan's time grows with it; the gaps between levels that remain are the smallest in
# bytes times seconds (`ullage.levels`). Not tuned.
MOST_LEVELS = 8

Calls = frozenset[tuple[str, int]]


@dataclass(frozen=True)
class Levels:
    """The selective options of one unit.

    Attributes:
        options: the options, from the fewest bytes kept to the most.
        call_bytes: bytes of the outputs of each call that they name.
    """

    options: tuple[Option, ...]
    call_bytes: dict[tuple[str, int], int]


def find_levels(exploration: Exploration, fqns: Sequence[str], action: str) -> dict[str, Levels]:
    """Return the levels of each unit. Units of one structure share theirs.

    Args:
        exploration: an exploration in which the units have run selectively.
        fqns: the units.
        action: the action of the options.
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
    """Return these levels with the outputs of the calls that `which` names offloaded; a level without such calls is left out."""
    rules = [named_rule(o.level, False) for o in levels.options]
    found = [r.sent(tier.name, leaving) for r in rules if isinstance(r, OpsRule) and (leaving := which(r.calls))]
    return [Option(action, r.text) for r in found]


def hidden(levels: Levels, room: float) -> Callable[[Calls], Calls]:
    """Return a function that chooses calls to offload: the largest ones that together have no more bytes than `room`.

    With `room` as the bytes that the tier takes while the unit's forward computes, no transfer is waited for.
    """

    def which(calls: Calls) -> Calls:
        sizes, leaving, left = levels.call_bytes, set(), room
        for call in sorted(calls, key=lambda c: (-sizes.get(c, 0), c)):
            if LEAST_BYTES <= sizes.get(call, 0) <= left:
                leaving.add(call)
                left -= sizes[call]
        return frozenset(leaving)

    return which
