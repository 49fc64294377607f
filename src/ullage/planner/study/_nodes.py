"""Measure autograd nodes whose formula runs other ops on real tensors than in a capture, and book their bytes in the trace.

One node of each kind is run alone on real tensors. If it allocates what the captured ops allocate, the trace stays as it is.
Otherwise every distinct node of the kind is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence

from ullage.capture import Session
from ullage.capture._timeline import OpCost, effective_bytes
from ullage.capture._trace import NodeRun, Signature, Storage
from ullage.cost import is_free, measure_node

TRIED = 3  # nodes of a kind that are tried until one can be run alone (some need inputs that can't be made up)
# Nodes with larger outputs are tried last, because they take memory and time. Not tuned.
TRIED_BYTES = 16 * 2**20
_SAME, _OTHER = OpCost(0.0, 0), OpCost(0.0, 1)


def book_nodes(
    session: Session,
    runs: Sequence[NodeRun],
    costs: Sequence[OpCost],
    known: MutableMapping[str, OpCost],
    key_of: Callable[[Signature], str],
) -> None:
    """Put the measured bytes of these runs into the session's trace.

    Args:
        session: the session whose trace has these runs.
        runs: runs of nodes.
        costs: costs of the session's op signatures.
        known: costs by name; those of nodes are looked up and added here.
        key_of: returns the name of an op signature.
    """
    book = _Book(session, runs, costs, known, key_of)
    kinds: dict[str, list[NodeRun]] = {}
    for run in runs:
        if book.may_differ(run):
            kinds.setdefault(book.kind(run), []).append(run)
    for kind, alike in kinds.items():
        if kind not in known:
            known[kind] = _OTHER if book.differs(alike) else _SAME
        if known[kind] != _SAME:
            for run in alike:
                book.book(run)


def upper_bound(where: str) -> str:
    """Return the note about bytes that are not known exactly."""
    return f"bytes inside {where} depend on values: the most of several that were tried is counted, as an upper bound"


class _Book:
    def __init__(
        self,
        session: Session,
        runs: Sequence[NodeRun],
        costs: Sequence[OpCost],
        known: MutableMapping[str, OpCost],
        key_of: Callable[[Signature], str],
    ) -> None:
        self.session, self.trace, self.costs, self.known, self.key_of = session, session.trace, costs, known, key_of
        first = min((run.ops[0] for run in runs), default=0)
        self.born: dict[int, list[Storage]] = {}
        for storage in self.trace.storages:
            if storage.birth >= first:
                self.born.setdefault(storage.birth, []).append(storage)
        self.names = [str(s.func) for s in session.signatures]
        self.free = [is_free(s) for s in session.signatures]

    def may_differ(self, run: NodeRun) -> bool:
        """Does the run have several ops that allocate or compute, without other ops between them?"""
        whole = run.ops[-1] - run.ops[0] + 1 == len(run.ops)
        return whole and sum(not self.free[self.trace.signature[i]] for i in run.ops) > 1

    def kind(self, run: NodeRun) -> str:
        """Return the name of its formula, with the ops that it ran in the capture."""
        return f"node {run.name}: {' '.join(self.names[self.trace.signature[i]] for i in run.ops)}"

    def differs(self, alike: Sequence[NodeRun]) -> bool:
        """Do nodes of a kind allocate other bytes on real tensors? Tries the nodes nearest to `TRIED_BYTES`, smaller ones first."""
        size = {id(r): self.session.signatures[r.made_by].output_bytes for r in alike}
        order = sorted(alike, key=lambda r: (size[id(r)] > TRIED_BYTES, abs(TRIED_BYTES - size[id(r)])))
        distinct = {self._key(r): r for r in reversed(order)}
        for run in list(reversed(distinct.values()))[:TRIED]:
            real = self._measured(run)
            if real is not None:
                return (real.internal_bytes, sorted(real.output_bytes)) != self._captured(run)
        return False

    def book(self, run: NodeRun) -> None:
        """Book the run's measured peak at its first op, and the real sizes of the storages that outlive it."""
        real = self._measured(run)
        if real is None:
            return
        left = list(real.output_bytes)
        odd = []
        for storage in self._storages(run):
            if storage.death <= run.ops[-1]:
                storage.booked = 0
            elif (size := effective_bytes(storage, self.trace, self.costs)) in left:
                left.remove(size)
            else:
                odd.append(storage)
        for storage in odd:
            storage.booked = left.pop(0) if left else 0
        if real.bounds:
            self._note(run)
        self.trace.inside.update(dict.fromkeys(run.ops, 0))
        self.trace.inside[run.ops[0]] = real.internal_bytes

    def _note(self, run: NodeRun) -> None:
        func = self.session.signatures[run.made_by].func
        self.session.values.assumptions[upper_bound(f"the backward of {func}")] = None

    def _captured(self, run: NodeRun) -> tuple[int, list[int]]:
        """Return, by the trace: the most bytes its ops hold at a moment, and the sizes of the storages that outlive them."""
        live = peak = 0
        alive: list[tuple[Storage, int]] = []
        for i in run.ops:
            made = [(s, effective_bytes(s, self.trace, self.costs)) for s in self.born.get(i, ())]
            inside = self.costs[self.trace.signature[i]].internal_bytes + self.trace.numbers[i]
            peak = max(peak, live + max(sum(n for _, n in made), inside))
            alive = [(s, n) for s, n in (*alive, *made) if s.death > i]
            live = sum(n for _, n in alive)
        return peak, sorted(n for _, n in alive)

    def _storages(self, run: NodeRun) -> Iterable[Storage]:
        return (s for i in run.ops for s in self.born.get(i, ()))

    def _key(self, run: NodeRun) -> str:
        needs = "".join(str(int(n)) for n in run.needs)
        return f"{self.kind(run)}|{self.key_of(self.session.signatures[run.made_by])}|{needs}|{run.grads!r}"

    def _measured(self, run: NodeRun) -> OpCost | None:
        key = self._key(run)
        if key not in self.known:
            signatures = self.session.signatures
            ops = [signatures[self.trace.signature[i]].func for i in run.ops]
            found = measure_node(run, signatures[run.made_by], ops)
            self.known[key] = found if found is not None else _UNKNOWN
        return self.known[key] if self.known[key] != _UNKNOWN else None


_UNKNOWN = OpCost(0.0, -1)
