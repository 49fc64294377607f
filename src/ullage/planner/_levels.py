"""The levels of a unit: from the op logs that its runs on fake tensors left to exact choices of what to keep inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ullage.capture import Session
from ullage.mechanisms import Option
from ullage.planner._study import Study
from ullage.planner._unit_graph import graph_of, rule_for
from ullage.planner._within import levels
from ullage.runtime import Learnt, level_rule

MOST_LEVELS = 8  # each is run on fake tensors


@dataclass(frozen=True)
class Levels:
    """The selective options of a unit.

    Attributes:
        options: from the fewest bytes kept to the most.
        call_bytes: what each call that they name holds.
    """

    options: tuple[Option, ...]
    call_bytes: Mapping[tuple[str, int], int]


def find_levels(s: Study, fqns: Sequence[str]) -> dict[str, Levels]:
    """Per unit its levels. Twins have the same.

    Args:
        s: a study whose session has run these units selectively.
        fqns: the units.
    """
    known: dict[int, Levels] = {}
    facts = {u.fqn: u for u in s.units}
    found: dict[str, Levels] = {}
    for fqn in fqns:
        logs = list(s.session.family.logs_of(s.session.inst.model.get_submodule(fqn)).values())
        if not logs:
            continue
        learnt = max(logs, key=lambda entry: len(entry.log.ops))  # of several input signatures; a rule holds for all
        if id(learnt) not in known:
            known[id(learnt)] = _levels_of(s, learnt, facts[fqn].routing)
        found[fqn] = known[id(learnt)]
    return found


def _levels_of(s: Study, learnt: Learnt, routing: bool) -> Levels:
    seconds = _seconds(s, s.session, learnt)
    base = level_rule("", True) if routing else None
    graph = graph_of(learnt.log, seconds, s.device.round_bytes, base)
    texts = [rule_for(graph, level.kept, routing).text for level in levels(graph, MOST_LEVELS)]
    return Levels(tuple(Option("select", text) for text in texts if text), {g.call: g.nbytes for g in graph.groups})


def _seconds(s: Study, session: Session, learnt: Learnt) -> list[float]:
    """Per op of the log, the time of the same op in the trace: of the last call of that unit in a forward.

    The trace also has what the runtime does on its own (`detach`), which the log leaves out.
    """
    seconds, trace = s.timeline(session).seconds, session.trace
    call = next(c for c in reversed(session.calls) if c.fqn == learnt.name)
    at, found = call.first_op, []
    for op in learnt.log.ops:
        k = at
        while k < call.last_op and session.signatures[trace.signature[k]].func is not op.func:
            k += 1
        if k < call.last_op:
            found.append(float(seconds[k]))
            at = k + 1
        else:  # what the tracker sees as another op
            found.append(0.0)
    return found
