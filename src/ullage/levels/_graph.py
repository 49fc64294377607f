"""The graph of one unit for the choice inside it: ops, values, saved tensors, and groups that could be kept. No torch, no tensors.

A replay makes the saved tensors that are not kept. The kept ones decide which ops it runs, by the rules of
`ullage.runtime.ops._select`:

- a dropped saved value is needed; all makers of a needed value run; an op that runs needs its inputs;
- a kept storage is handed out by the op that allocated it, which then need not run; the replay must save (pack) it again;
- an op that draws runs if the replay gets past it; the replay ends at the last tensor that it must save.

Each rule has the form "if this holds, that holds", so the ops that run are the least set in which all rules hold: `Rules`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class OpNode:
    """One op, at its place in the unit.

    Attributes:
        seconds: the time of one run.
        reads: the values of its arguments.
        forced: it runs whenever a replay gets past it, because it draws, or writes to a storage from outside.
    """

    seconds: float
    reads: tuple[int, ...] = ()
    forced: bool = False


@dataclass(frozen=True)
class ValueNode:
    """One value: a tensor's place, shape and strides in a storage.

    Attributes:
        makers: ops that all run if it is needed: those that make it; if its storage is written in place, all that make any of that.
        born: one more op, which allocated its storage and need not run if that is handed out; -1 if there is none.
        storage: index in `Graph.storages` of the storage that could be handed out; -1 if none could.
    """

    makers: tuple[int, ...] = ()
    born: int = -1
    storage: int = -1


@dataclass(frozen=True)
class StorageNode:
    """A storage that can be kept.

    Attributes:
        group: the group that it is kept with; -1 if it is always kept.
        packed: the value that the replay must pack again if it hands the storage out.
        at: number of ops that have run when that value is packed.
    """

    group: int
    packed: int
    at: int


@dataclass(frozen=True)
class SavedNode:
    """A saved tensor: its value, how many ops have run when it is packed, and the storage that could be kept (or -1)."""

    value: int
    at: int
    storage: int = -1


@dataclass(frozen=True)
class Group:
    """Storages that are kept or dropped together: the saved ones that one op allocates.

    Attributes:
        nbytes: bytes that keeping it holds.
        call: the op's name and the number of the call, as in `ullage.runtime.ops._keep.OpsRule`.
    """

    nbytes: int
    call: tuple[str, int] = ("", 0)


@dataclass(frozen=True)
class Graph:
    """The graph of one unit, see above. Nodes refer to each other by their indices in these tuples."""

    ops: tuple[OpNode, ...]
    values: tuple[ValueNode, ...]
    storages: tuple[StorageNode, ...]
    saved: tuple[SavedNode, ...]
    groups: tuple[Group, ...]

    @cached_property
    def rules(self) -> Rules:
        """The rules that decide what a replay runs."""
        return rules_of(self)

    def nbytes(self, kept: Iterable[int]) -> int:
        """Return the bytes that keeping these groups holds."""
        return sum(self.groups[g].nbytes for g in kept)

    def seconds(self, kept: Collection[int]) -> float:
        """Return the time of a replay if these groups are kept. Only ops that it gets to cost time."""
        holds = self.rules.holds(kept)
        return sum(seconds for node, seconds in self.rules.cost.items() if holds[node])

    def runs(self, kept: Collection[int]) -> frozenset[int]:
        """Return the ops that such a replay would run if it did not end early."""
        holds = self.rules.holds(kept)
        return frozenset(k for k in range(len(self.ops)) if holds[self.rules.op(k)])


Implies = tuple[int, int]  # node, node
IfGroup = tuple[int, int, int]  # node, node, group


@dataclass(frozen=True)
class Rules:
    """Rules between nodes, each a statement that may hold. Node 0 always holds; node k + 1 says that op k runs; later ones help.

    Attributes:
        size: number of nodes.
        always: if the first holds, so does the second.
        dropped: the same, if the group is dropped.
        kept: the same, if the group is kept.
        both: if the first and the second hold, so does the third.
        cost: seconds by node.
        antitone: nodes that can only stop holding as more groups are kept; the others say that a storage is handed out.
    """

    size: int
    always: tuple[Implies, ...]
    dropped: tuple[IfGroup, ...]
    kept: tuple[IfGroup, ...]
    both: tuple[tuple[int, int, int], ...]
    cost: dict[int, float]
    antitone: frozenset[int]

    @staticmethod
    def op(k: int) -> int:
        """Return the node that says "op k runs"."""
        return k + 1

    @cached_property
    def _next(self) -> tuple[list[list[tuple[int, int, bool]]], dict[int, list[tuple[int, int]]]]:
        following: list[list[tuple[int, int, bool]]] = [[] for _ in range(self.size)]
        for a, b in self.always:
            following[a].append((b, -1, False))
        for a, b, g in self.dropped:
            following[a].append((b, g, False))
        for a, b, g in self.kept:
            following[a].append((b, g, True))
        joint: dict[int, list[tuple[int, int]]] = {}
        for a, b, c in self.both:
            joint.setdefault(a, []).append((b, c))
            joint.setdefault(b, []).append((a, c))
        return following, joint

    def holds(self, kept: Collection[int]) -> list[bool]:
        """Return the least set of nodes in which all rules hold."""
        following, joint = self._next
        holds = [False] * self.size
        holds[0], todo = True, [0]
        while todo:
            a = todo.pop()
            reached = [b for b, g, if_kept in following[a] if g < 0 or (g in kept) == if_kept]
            reached += [c for b, c in joint.get(a, ()) if holds[b]]
            for b in reached:
                if not holds[b]:
                    holds[b] = True
                    todo.append(b)
        return holds


def rules_of(graph: Graph) -> Rules:
    """Write a graph's rules."""
    return _Writer(graph).rules()


class _Writer:
    """Numbers the nodes: root, ops (it runs), values (needed), storages (handed out), ends (the replay gets so far), ops that run in time."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.value = 1 + len(graph.ops)
        self.storage = self.value + len(graph.values)
        self.size = self.storage + len(graph.storages)
        optional = [s.storage >= 0 for s in graph.saved]
        # tensors that can't be kept are always packed, so the replay gets at least to the last of them
        self.least = max((s.at for s, o in zip(graph.saved, optional, strict=True) if not o), default=0)
        late = {s.at for s in graph.saved} | {s.at for s in graph.storages}
        self.ends = {at: self._new() for at in sorted(late) if at > self.least}
        self.always: list[Implies] = []
        self.dropped: list[IfGroup] = []
        self.kept: list[IfGroup] = []
        self.both: list[tuple[int, int, int]] = []
        self.cost: dict[int, float] = {}

    def _new(self) -> int:
        self.size += 1
        return self.size - 1

    def _end(self, at: int) -> int:
        return self.ends.get(at, 0)

    def rules(self) -> Rules:
        graph = self.graph
        for at, sooner in zip([*self.ends][1:], self.ends, strict=False):
            self.always.append((self.ends[at], self.ends[sooner]))
        for saved in graph.saved:
            self._saved(saved)
        for v, value in enumerate(graph.values):
            self._value(self.value + v, value)
        for s, storage in enumerate(graph.storages):
            self.always += [(self.storage + s, self.value + storage.packed), (self.storage + s, self._end(storage.at))]
        for k, op in enumerate(graph.ops):
            self._op(k, op)
        handed = range(self.storage, self.storage + len(graph.storages))
        antitone = frozenset(range(self.size)) - frozenset(handed)
        always = tuple(rule for rule in dict.fromkeys(self.always) if rule[1])
        dropped = tuple(rule for rule in dict.fromkeys(self.dropped) if rule[1])
        return Rules(self.size, always, dropped, tuple(self.kept), tuple(self.both), self.cost, antitone)

    def _saved(self, saved: SavedNode) -> None:
        if saved.storage < 0:
            self.always.append((0, self.value + saved.value))
        elif (g := self.graph.storages[saved.storage].group) >= 0:
            self.dropped += [(0, self.value + saved.value, g), (0, self._end(saved.at), g)]

    def _value(self, node: int, value: ValueNode) -> None:
        self.always += [(node, Rules.op(k)) for k in value.makers]
        if value.born < 0:
            return
        group = self.graph.storages[value.storage].group if value.storage >= 0 else None
        if group is None:
            self.always.append((node, Rules.op(value.born)))
        elif group < 0:
            self.always.append((node, self.storage + value.storage))
        else:
            self.dropped.append((node, Rules.op(value.born), group))
            self.kept.append((node, self.storage + value.storage, group))

    def _op(self, k: int, op: OpNode) -> None:
        node = Rules.op(k)
        self.always += [(node, self.value + v) for v in op.reads]
        past = 0 if k < self.least else next((end for at, end in self.ends.items() if at > k), -1)
        if op.forced and past >= 0:
            self.always.append((past, node))
        if past == 0:
            self.cost[node] = op.seconds
        elif past > 0:  # it may have to run by the rules, but lie beyond the replay's end
            self.cost[self._new()] = op.seconds
            self.both.append((node, past, self.size - 1))
