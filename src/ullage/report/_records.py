"""Parts of a timeline: columns of events and storages, and single ones of them as a person reads them."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from ullage.report._columns import Column

PHASES = ("forward", "backward", "optimizer")
WORKSPACE, INSIDE = "library workspace", "inside the op"
# in the order in which they are stacked: categories that live all the time lie below
CATEGORIES = (
    "parameter", "buffer", WORKSPACE, "input", "other", "optimizer state", "gradient", "activation", "recomputed", "temporary",
    "optimizer temporary", INSIDE,
)  # fmt: skip

Array = npt.NDArray[np.int64]


class Events(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Ops in order, the first step's before the later one's. Names are indices into the timeline's lists.

    Attributes:
        phase: into `PHASES`.
        stack: into `stacks`: the modules that the op runs in; of an op of backward, those whose op made its node.
        op, source: into `ops` and `sources`.
        seconds: predicted, host time of replays included.
        recomputed: 1 in a replay.
        micro_batch: counted from 0 in each step.
        inside_bytes: bytes alive at the op's peak that belong to no storage: its kernel allocates them for itself.
    """

    phase: Column
    stack: Column
    op: Column
    source: Column
    seconds: Column
    recomputed: Column
    micro_batch: Column
    inside_bytes: Column


class Transfer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A tensor on its way out of memory or back, as simulated.

    Attributes:
        out: it leaves.
        step: "first" or "later".
        start_seconds: from the timeline's start.
        seconds: how long it takes.
        nbytes: its size.
    """

    out: bool
    step: str
    start_seconds: float
    seconds: float
    nbytes: int


class Allocations(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Storages in order of their birth.

    Attributes:
        birth: the event that makes it, -1: it was there before.
        death: the last event during which it is alive; the number of events: it stays.
        nbytes: its size.
        category, module, name: into `categories`, `modules` and `names`; the name is that of a parameter or buffer.
    """

    birth: Column
    death: Column
    nbytes: Column
    category: Column
    module: Column
    name: Column


class Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One op. `live_bytes` is its peak, and `by_category` adds up to it."""

    index: int
    step: str
    micro_batch: int
    phase: str
    module: str
    op: str
    source: str
    recomputed: bool
    start_seconds: float
    seconds: float
    live_bytes: int
    by_category: dict[str, int]


class Allocation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One storage: its size, category and owner, and the events between which it is alive (see `Allocations`)."""

    nbytes: int
    category: str
    module: str
    name: str
    op: str
    source: str
    birth: int
    death: int


class PhaseFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A phase of a step: its highest bytes, its time, and how many ops it has."""

    name: str
    nbytes: int
    seconds: float
    ops: int


def where(e: Event) -> str:
    """The moment, in words."""
    again = ", recomputed" if e.recomputed else ""
    return f"{e.phase}, {e.module or '(root)'}, {e.op}{again}"
