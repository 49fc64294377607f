"""Turn a unit's op log into the graph for the choice inside it, and a choice into a rule for the runtime."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ullage.levels._graph import Graph, Group, OpNode, SavedNode, StorageNode, ValueNode
from ullage.runtime.ops._keep import OpsRule, Rule, portable_name
from ullage.runtime.ops._log import Log, Op, Value
from ullage.runtime.ops._select import Flow, selection_of


def graph_of(log: Log, seconds: Sequence[float], round_bytes: int = 1, base: Rule | None = None) -> Graph:
    """Return the graph of a unit.

    Args:
        log: the op log of one call.
        seconds: per op of the log, the time of one run.
        round_bytes: granularity of the allocator: 512 on CUDA, 1 on a CPU.
        base: a rule that applies to any choice (routing outputs): the tensors it keeps are no choice, and their bytes don't count.

    Returns:
        A graph with a group per op that allocated saved storages which could be kept, unless naming the op would keep other tensors, too.
        A log in which nothing may be skipped has no groups, and all its ops run.
    """
    if log.refusal:
        ends = (SavedNode(0, max(log.saved_at)),) if log.saved else ()
        return Graph(tuple(OpNode(s, forced=True) for s in seconds), (ValueNode(),), (), ends, ())
    return _Maker(log, seconds, round_bytes, base).graph()


def rule_for(graph: Graph, kept: Collection[int], routing: bool = False) -> OpsRule:
    """Return the rule by which the runtime keeps exactly these groups, and routing outputs if asked to."""
    return OpsRule(frozenset(graph.groups[g].call for g in kept), routing)


class _Maker:
    def __init__(self, log: Log, seconds: Sequence[float], round_bytes: int, base: Rule | None) -> None:
        self.log, self.seconds, self.round_bytes = log, seconds, round_bytes
        self.flow = Flow(log)
        kept = selection_of(log, base).kept if base is not None else frozenset()
        self.base = {log.saved[i][0] for i in kept}
        self.numbers: dict[Value, int] = {}
        for op in log.ops:
            for value in (*op.inputs, *(v for v, _ in op.outputs if v is not None)):
                self.numbers.setdefault(value, len(self.numbers))
        for value in log.saved:
            self.numbers.setdefault(value, len(self.numbers))
        self.nbytes = self._sizes()
        self.groups: list[Group] = []
        self.storages: dict[int, StorageNode] = {}  # by the log's number
        self._group()

    def _sizes(self) -> dict[int, int]:
        """Return bytes per storage: up to the last element that any value in it reaches."""
        sizes: dict[int, int] = {}
        for storage, offset, shape, stride, dtype, _ in self.numbers:
            reach = offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else 0
            sizes[storage] = max(sizes.get(storage, 0), reach * dtype.itemsize)
        return sizes

    def _group(self) -> None:
        calls: dict[str, int] = {}
        for k, op in enumerate(self.log.ops):
            name = portable_name(op.func)
            calls[name] = calls.get(name, -1) + 1
            returned = {v[0] for v, _ in op.outputs if v is not None}
            able = sorted(s for s in returned if self.flow.can_hand(s))
            chosen = [s for s in able if s not in self.base]
            always = [s for s in able if s in self.base and self.flow.born[s] == k]
            for s in always:
                self._storage(s, -1)
            # a rule can't name an op that writes, and it keeps all outputs of an op that it names
            if chosen and not op.writes and all(self.flow.born[s] == k for s in chosen):
                rounded = [-(-self.nbytes[s] // self.round_bytes) * self.round_bytes for s in chosen]
                for s in chosen:
                    self._storage(s, len(self.groups))
                self.groups.append(Group(sum(rounded), (name, calls[name])))

    def _storage(self, s: int, group: int) -> None:
        first = self.flow.saved_by[s][0]
        self.storages[s] = StorageNode(group, self.numbers[self.log.saved[first]], self.log.saved_at[first])

    def graph(self) -> Graph:
        log = self.log
        place = {s: i for i, s in enumerate(self.storages)}
        saved = tuple(
            SavedNode(self.numbers[v], at, place.get(v[0], -1)) for v, at in zip(log.saved, log.saved_at, strict=True)
        )
        values = tuple(self._value(value, place) for value in self.numbers)
        ops = tuple(self._op(op, seconds) for op, seconds in zip(log.ops, self.seconds, strict=True))
        return Graph(ops, values, tuple(self.storages.values()), saved, tuple(self.groups))

    def _value(self, value: Value, place: dict[int, int]) -> ValueNode:
        s = value[0]
        if s in self.flow.dirty:
            return ValueNode(tuple(self.flow.making.get(s, ())))
        makers = self.flow.makers.get(value, [])
        born = self.flow.born.get(s, -1)
        if born not in makers or s not in place:
            return ValueNode(tuple(makers))
        return ValueNode(tuple(k for k in makers if k != born), born, place[s])

    def _op(self, op: Op, seconds: float) -> OpNode:
        reads = tuple(dict.fromkeys(self.numbers[v] for v in op.inputs))
        forced = op.must_run or any(s in self.log.outside for s in op.writes)
        if self.log.dynamic and not forced:
            # If shapes depend on data, an op is skipped only if its outputs are kept as they were made (see `_select`)
            forced = not all(value is not None and self._is_packed(value) for value, _ in op.outputs)
        return OpNode(seconds, reads, forced)

    def _is_packed(self, value: Value) -> bool:
        storage = self.storages.get(value[0])
        return storage is not None and storage.packed == self.numbers[value]
