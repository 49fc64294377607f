"""The lifetimes of a trace's storages as arrays, their categories, and the tensors alive at its peak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from ullage.capture import Session
from ullage.capture._timeline import Array, OpCost, Timeline, effective_bytes
from ullage.capture._trace import Storage, Trace

Mask = npt.NDArray[np.bool_]


class LiveTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A storage alive at the peak."""

    nbytes: int
    category: str
    module: str
    op: str
    source: str


class Ledger:
    """A session's storages and ops as arrays.

    Attributes:
        nbytes, birth, death: per storage; it is alive during op i if `birth <= i <= death`.
        category: per storage, the category that the capture knows for certain; "" for one that lives within a step.
        phase: per op.
        unit: per op, the FQN of the unit it belongs to, or "".
    """

    def __init__(self, session: Session, timeline: Timeline, costs: Sequence[OpCost], units: Collection[str]) -> None:
        trace = session.trace
        self.session, self.trace = session, trace
        self.timeline = timeline
        self.size = len(trace.signature)
        self.nbytes = np.array([effective_bytes(t, trace, costs) for t in trace.storages], np.int64)
        self.birth = np.array([max(t.birth, -1) for t in trace.storages], np.int64)
        self.death = np.array([min(t.death, self.size) for t in trace.storages], np.int64)
        self.category = np.array([lasting_category(t, trace) for t in trace.storages])
        self.phase = np.array(trace.phase)
        of_stack = np.array([next((f for f in stack if f in units), "") for stack in session.tracker.stacks])
        self.unit = of_stack[np.array(trace.stack, np.int64)]
        self.recomputed = np.array(trace.recomputed, np.bool_)

    def alive_at(self, op: int) -> Mask:
        """Return per storage whether it is alive during this op."""
        return (self.birth <= op) & (op <= self.death)

    def alive_bytes(self, some: Mask) -> Array:
        """Return per op the bytes of these storages that are alive during it."""
        born, dead = np.zeros(self.size + 2, np.int64), np.zeros(self.size + 2, np.int64)
        np.add.at(born, self.birth[some] + 1, self.nbytes[some])
        np.add.at(dead, self.death[some] + 1, self.nbytes[some])
        return np.asarray(np.cumsum(born)[1 : self.size + 1] - np.cumsum(dead)[: self.size], np.int64)


def lasting_category(storage: Storage, trace: Trace) -> str:
    """Return parameter, gradient, optimizer state, ...; "" for activations and temporaries.

    In a step of the user's own the capture can't name all of them. There, a tensor made in backward that outlives it counts as a
    gradient, and one made in the optimizer's step that outlives it as optimizer state.
    """
    n = len(trace.phase)
    if storage.category or not 0 <= storage.birth < n or trace.recomputed[storage.birth]:
        return storage.category
    born, stays = (
        trace.phase[storage.birth],
        storage.death >= n or trace.phase[storage.death] != trace.phase[storage.birth],
    )
    left = {"backward": "gradient", "optimizer": "optimizer state"}
    return left.get(born, "") if stays else ""


def categories(trace: Trace) -> list[str]:
    """Return the category of each storage of a trace, which it has for all its life."""
    n = len(trace.phase)
    # number of backward's ops before each op
    backward = np.cumsum([0, *(phase == "backward" for phase in trace.phase)])

    def category(t: Storage) -> str:
        if lasting := lasting_category(t, trace):
            return lasting
        if not 0 <= t.birth < n:
            return "other"
        if trace.recomputed[t.birth]:
            return "recomputed"
        born = trace.phase[t.birth]
        if born == "forward" and backward[min(t.death, n - 1) + 1] > backward[t.birth]:
            return "activation"
        return "optimizer temporary" if born == "optimizer" else "temporary"

    return [category(t) for t in trace.storages]


def live_tensors(session: Session, costs: Sequence[OpCost], at: int) -> list[LiveTensor]:
    """Return the storages alive during op `at`, in order of their birth."""
    trace, found = session.trace, []
    for t, category in zip(trace.storages, categories(trace), strict=True):
        if not (t.birth <= at <= t.death):
            continue
        module, op, source = "", "", ""
        if 0 <= t.birth < len(trace.signature):
            module = innermost(session, t.birth)
            op, source = str(session.signatures[trace.signature[t.birth]].func), trace.source[t.birth]
        nbytes = effective_bytes(t, trace, costs)
        found.append(LiveTensor(nbytes=nbytes, category=category, module=module, op=op, source=source))
    return found


def innermost(session: Session, op: int) -> str:
    """Return the FQN of the innermost module that an op runs in."""
    return (session.tracker.stacks[session.trace.stack[op]] or ("",))[-1]


def totals(rows: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Sum bytes per name, the largest first."""
    found: Counter[str] = Counter()
    for name, nbytes in rows:
        found[name] += nbytes
    return dict(found.most_common())


def by_category(live: Sequence[LiveTensor], peak: int, workspace: int) -> dict[str, int]:
    """Return bytes per category at a peak, the largest first. Bytes of no tensor were allocated inside the op.

    Args:
        live: the tensors alive at the peak.
        peak: all bytes alive at the peak.
        workspace: bytes among these that a library holds all the time.
    """
    rows = [(t.category, t.nbytes) for t in live]
    rest = peak - workspace - sum(nbytes for _, nbytes in rows)
    return totals([r for r in (*rows, ("library workspace", workspace), ("inside the op", rest)) if r[1] > 0])


def peak_op(timeline: Timeline, ops: slice) -> int:
    """Return the index of the op at which a range of ops peaks."""
    return int(ops.start) + int(timeline.peak[ops].argmax())


def moment(session: Session, op: int) -> tuple[str, str, str]:
    """Return (phase, module FQN, name) of an op."""
    return session.trace.phase[op], innermost(session, op), str(session.signatures[session.trace.signature[op]].func)
