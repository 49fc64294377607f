"""Decide from an op log and a rule which saved tensors a unit keeps, and what a selective replay does at each op.

Idea: the rule names ops that a replay must not run. For each of them the unit keeps its outputs, if autograd saves them, or else the
nearest saved tensors computed from them. Then the choice goes backward from the dropped saved tensors: an op runs if one of them
needs it, and every other op is skipped.

Invariant: no kept tensor is one that autograd does not save, so selection never takes memory that the plain step does not take.
Ops that draw, return values to Python, or write to storages from outside always run; a storage that some op writes to is never
handed out, because it holds other values later.

Known non-optimalities: values are followed per storage, so every op that writes to a storage runs again if one value in it is
needed. Reruns end at the last dropped saved tensor, but an op before it that always runs takes its inputs with it, even if nothing
reads its result. torch's own policies (`create_selective_checkpoint_contexts`) need no log; they keep op outputs, saved or not, and
run every op that they don't keep, needed or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ullage.runtime.ops._keep import Rule, kind_of
from ullage.runtime.ops._log import Log, Op, Value

RUN, SKIP = 0, 1


@dataclass(frozen=True)
class Step:
    """The action of a replay at one op.

    Attributes:
        func: the op that must come.
        action: RUN or SKIP.
        outputs: per leaf of the result, (meta, storage offset, `lazy_bits`) of a tensor, or (constant, 0, 0).
        handed: per leaf of the result, the index of the kept tensor that has its storage, or -1.
        returns: per leaf of the result, which tensor argument it is, or -1.
        spec: the result's structure.
        made: the only entry of `outputs`, if the result is one placeholder.
        source: the model's own line.
    """

    func: Any
    action: int
    outputs: tuple[tuple[Any, Any, int], ...] = ()
    handed: tuple[int, ...] = ()
    returns: tuple[int, ...] = ()
    spec: Any = None
    made: tuple[Any, Any, int] | None = None
    source: str = ""


@dataclass(frozen=True)
class Selection:
    """The saved tensors that a unit keeps, and the steps of its replay.

    Attributes:
        kept: indices of the saved tensors that forward keeps.
        checked: kept tensors that the replay hands out as op outputs, and so must save again.
        steps: one per op of the log.
        skipped: how many ops the replay does not run, up to the last one that it needs.
        refusal: why the replay skips nothing, or "".
        away: kept tensors that are offloaded until backward asks for them.
    """

    kept: frozenset[int]
    checked: frozenset[int]
    steps: tuple[Step, ...]
    skipped: int
    refusal: str = ""
    away: frozenset[int] = frozenset()


def selection_of(log: Log, rule: Rule) -> Selection:
    """Choose the tensors to keep and the ops to run. `rule(op, n)`: is the n-th call of this op one that a replay must not run?"""
    if log.refusal:
        return Selection(frozenset(), frozenset(), (), 0, log.refusal)
    return _Chooser(log, rule).selection()


class Flow:
    """The data flow of a log: which ops make and write each storage, and which saved tensors are in it.

    Attributes:
        dirty: storages that some op writes to.
        makers: per value the ops that make it: the same view may be made many times.
        born: per storage the op that allocated it; storages from outside have no entry.
        making: per storage the ops that write to it or return a view of it.
        saved_by: per storage the indices of the saved tensors in it.
    """

    def __init__(self, log: Log) -> None:
        self.dirty = {s for op in log.ops for s in op.writes}
        self.makers: dict[Value, list[int]] = {}
        self.born: dict[int, int] = {}
        self.making: dict[int, list[int]] = {}
        for k, op in enumerate(log.ops):
            given = {v[0] for v in op.inputs}
            for value, _ in op.outputs:
                if value is not None:
                    self.makers.setdefault(value, []).append(k)
                    if value[0] not in given and value[0] not in log.outside:
                        self.born.setdefault(value[0], k)
            for s in op.writes | {v[0] for v, _ in op.outputs if v is not None}:
                self.making.setdefault(s, []).append(k)
        self.saved_by: dict[int, list[int]] = {}
        for i, value in enumerate(log.saved):
            self.saved_by.setdefault(value[0], []).append(i)

    def can_hand(self, s: int) -> bool:
        """Can this storage be kept, and handed out by the op that allocated it?"""
        return s in self.saved_by and s in self.born and s not in self.dirty


class _Chooser:
    def __init__(self, log: Log, rule: Rule) -> None:
        self.log, self.flow = log, Flow(log)
        moves = getattr(rule, "moves", None)
        self.chosen, self.leaving = self._chosen(rule), self._chosen(moves) if moves is not None else set()
        self.kept = self._kept(self.chosen)
        # a tensor kept for two calls, one named with `@tier` and one without, stays in memory
        self.away = self.kept - self._kept(self.chosen - self.leaving) if self.leaving else frozenset[int]()

    def _chosen(self, rule: Rule) -> set[int]:
        seen: dict[Any, int] = {}
        chosen = set()
        for k, op in enumerate(self.log.ops):
            kind = kind_of(op.func, rule)
            n = seen[kind] = seen.get(kind, -1) + 1
            if not op.writes and rule(op.func, n):
                chosen.add(k)
        return chosen

    def _kept(self, chosen: set[int]) -> frozenset[int]:
        consumers: dict[int, list[int]] = {}
        for k, op in enumerate(self.log.ops):
            for value in op.inputs:
                consumers.setdefault(value[0], []).append(k)
        kept: set[int] = set()
        for k in chosen:
            fresh = {v[0] for v, _ in self.log.ops[k].outputs if v is not None}
            saved = {s for s in fresh if self.flow.can_hand(s)}
            todo = list(fresh) if not saved else []
            seen = set(todo)
            while todo:  # breadth first: the nearest saved tensors computed from its outputs
                for c in consumers.get(todo.pop(), ()):
                    made = [v for v, _ in self.log.ops[c].outputs if v is not None and c not in self.chosen]
                    for value in made:
                        if value[0] not in seen:
                            seen.add(value[0])
                            (saved.add if self.flow.can_hand(value[0]) else todo.append)(value[0])
            kept |= {i for s in saved for i in self.flow.saved_by[s]}
        return frozenset(kept)

    def selection(self) -> Selection:
        log = self.log
        self.handed = {log.saved[i][0]: i for i in sorted(self.kept, reverse=True)}  # storage -> the first index
        self.run: set[int] = set()
        self.used: set[int] = set()
        self.wanted: list[Value] = [v for i, v in enumerate(log.saved) if i not in self.kept]
        last, done = -1, set[Value]()
        # tensors that autograd saved before the op that fills them
        late = {i for i, at in enumerate(log.saved_at) if at < len(log.ops) and log.saved[i][0] in log.ops[at].writes}
        while True:
            ends = [
                log.saved_at[i] + (i in late) for i in range(len(log.saved)) if i not in self.kept or i in self.used
            ]
            if max(ends, default=0) <= last:
                break
            last = max(ends, default=0)
            for k, op in enumerate(log.ops[:last]):
                if self._always_runs(k, op):
                    self._need_op(k)
            while self.wanted:
                value = self.wanted.pop()
                if value not in done:
                    done.add(value)
                    self._need(value)
        # a kept tensor whose own op runs anyway is not handed out
        used = frozenset(i for i in self.used if self.flow.born[log.saved[i][0]] not in self.run)
        steps = tuple(self._step(k, used) for k in range(len(log.ops)))
        return Selection(self.kept, used, steps, sum(s.action == SKIP for s in steps[:last]), away=self.away)

    def _always_runs(self, k: int, op: Op) -> bool:
        if op.must_run or any(s in self.log.outside for s in op.writes):
            return True
        # If shapes depend on data, a placeholder's shape may be wrong: an op is skipped only if its outputs are kept as they were made
        return self.log.dynamic and not all(
            v is not None and v[0] in self.handed and self.log.saved[self.handed[v[0]]] == v for v, _ in op.outputs
        )

    def _need_op(self, k: int) -> None:
        if k not in self.run:
            self.run.add(k)
            self.wanted.extend(self.log.ops[k].inputs)

    def _need(self, value: Value) -> None:
        s = value[0]
        if s in self.flow.dirty:
            for k in self.flow.making.get(s, ()):
                self._need_op(k)
            return
        for k in self.flow.makers.get(value, ()):  # a value from outside has no makers
            if self.flow.born.get(s) != k or s not in self.handed:
                self._need_op(k)
            elif self.handed[s] not in self.used:
                self.used.add(self.handed[s])
                # the replay must save it once more, so the views between its op and that save are needed, too
                self.wanted.append(self.log.saved[self.handed[s]])

    def _step(self, k: int, used: frozenset[int]) -> Step:
        op = self.log.ops[k]
        if k in self.run:
            return Step(op.func, RUN, source=op.source)
        handed = []
        for value, _ in op.outputs:
            index = self.handed.get(value[0], -1) if value is not None and self.flow.born.get(value[0]) == k else -1
            handed.append(index if index in used else -1)
        outputs = tuple((meta, *((0, 0) if value is None else (value[1], value[5]))) for value, meta in op.outputs)
        alone = op.spec.is_leaf() and op.outputs[0][0] is not None and handed[0] < 0 and op.returns[0] < 0
        made = outputs[0] if alone else None
        return Step(op.func, SKIP, outputs, tuple(handed), tuple(op.returns), op.spec, made, op.source)
