"""A unit's place among units that are rebuilt together, and what they know of each other's calls."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor

from ullage._torch import tree_flatten


@dataclass(frozen=True)
class Place:
    """A unit's place in the runs of a plan.

    Attributes:
        depth: how many runs it lies in without being the first of them; 0: it holds its input from forward on.
        item: the depth of what it is beside in the innermost run that it lies in (its own depth, unless it starts a run).
        records: a sweep that passes it on the level of its own run keeps all it saves, so it is not run again.
        feeds: the next unit does not hold its input.
    """

    depth: int = 0
    item: int = 0
    records: bool = False
    feeds: bool = False


NOWHERE = Place()


class Trail(threading.local):
    """The last call, in this thread, of a unit that the next one may rely on; one per model."""

    last: tuple[ReferenceType[Any], list[tuple[ReferenceType[Tensor], int] | None]] | None = None

    def note(self, frame: Any, out: Any) -> None:
        """A call is over."""
        self.last = None
        if frame.complete and frame.reads is not None:  # else it keeps everything, or nothing needs it
            leaves = tree_flatten(out)[0]
            self.last = ref(frame), [(ref(t), t._version) if isinstance(t, Tensor) else None for t in leaves]

    def take(self) -> tuple[Any, dict[int, int]] | None:
        """The call before, and which leaf of its output each living tensor is, by id."""
        last, self.last = self.last, None
        frame = last[0]() if last is not None else None
        if last is None or frame is None:
            return None
        found = {}
        for leaf, noted in enumerate(last[1]):
            t = noted[0]() if noted is not None else None
            if noted is not None and t is not None and t._version == noted[1]:
                found[id(t)] = leaf
        return frame, found
